"""The raw-data record: one bar as one JSON object, exactly as the project's specification has it.

Belongs here: writing and reading that format. Does not belong here: where records are kept (lake.layout).
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from polygon_pipeline.market.bars import Bar, Price, Shares, arrival_error, iso_seconds


class _BarData(msgspec.Struct):
    open: Price
    high: Price
    low: Price
    close: Price
    volume: Shares
    vwap: Price | None = None


class BarRecord(msgspec.Struct):
    """The specification's record; the order of the fields is the order of the keys.

    timestamp: the bar's start, UTC, to the second. collected_at: when its frame arrived, UTC, to the millisecond.
    """

    source: str
    ticker: str
    timestamp: str
    bar_data: _BarData
    collected_at: str

    def start_ms(self) -> int:
        """The bar's start in Unix ms."""
        return int(datetime.fromisoformat(self.timestamp).timestamp()) * 1000


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(BarRecord).decode


def encode_record(bar: Bar, received_at: datetime) -> bytes:
    """The record of a bar whose frame arrived at received_at (aware, UTC)."""
    data = _BarData(bar.open, bar.high, bar.low, bar.close, bar.volume, bar.vwap)
    return _encode(
        BarRecord("polygon_websocket", bar.ticker, iso_seconds(bar.start_ms), data, _iso_milliseconds(received_at))
    )


def decode_record(content: bytes) -> BarRecord:
    """Reads a record, by whomever it was written; its times are given back in this project's spelling.

    Raises ValueError (msgspec's errors are) with what is wrong.
    """
    try:
        record = _decode(content)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from error
    start, collected = (_utc(stamp) for stamp in (record.timestamp, record.collected_at))
    if start.microsecond:
        raise ValueError(f"the timestamp {record.timestamp!r} is not on a whole second")
    record.timestamp = iso_seconds(int(start.timestamp()) * 1000)
    record.collected_at = _iso_milliseconds(collected)
    return record


def _utc(stamp: str) -> datetime:
    moment = datetime.fromisoformat(stamp)
    if error := arrival_error(moment):
        raise ValueError(error)
    return moment.astimezone(UTC)


def _iso_milliseconds(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")[:23] + "Z"
