"""Feeds from recordings: bars from a CSV file, or frames from the lake's raw-frames archives.

Belongs here: turning recordings into events. Does not belong here: writing recordings (lake) and the timing of sending
(exchange).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
from msgspec import UNSET
from pyarrow import csv

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel, shares
from polygon_pipeline.simulator.feed import Aggregate, Event, encode, window_ms

_COLUMNS = {
    "ticker": pa.string(),
    "start_ms": pa.int64(),
    **dict.fromkeys(("open", "high", "low", "close", "volume"), pa.float64()),
}


def replay(paths: Iterable[Path]) -> Iterator[Event]:
    """The events of all files, one file after the other: `.csv` files hold bars, all others raw frames."""
    for path in paths:
        yield from CsvFeed(path) if path.suffix == ".csv" else FramesFeed([path])


class CsvFeed:
    """Bars from a CSV file with the columns ticker, start_ms (Unix ms), open, high, low, close and volume.

    Other columns are ignored; the rows may be in any order. A bar is sent when its window ends. The day's volume is
    computed from the file, and fields that the file does not have are left out. ValueError if a column or a value is
    missing, or a value is not a number.
    """

    def __init__(self, path: Path, channel: Channel = Channel.MINUTE) -> None:
        self.path, self.channel = path, channel

    def __iter__(self) -> Iterator[Event]:
        try:
            options = csv.ConvertOptions(column_types=_COLUMNS, include_columns=list(_COLUMNS))
            table = csv.read_csv(self.path, convert_options=options)
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise ValueError(f"{self.path} is not a CSV file of bars ({', '.join(_COLUMNS)}): {error}") from error
        if any(column.null_count for column in table.columns):
            raise ValueError(f"{self.path} has bars with empty fields")
        day_volumes: dict[tuple[str, date], float] = {}
        for batch in table.sort_by("start_ms").to_batches(max_chunksize=10_000):
            rows = batch.to_pylist()
            aggregates = [self._aggregate(row, day_volumes) for row in rows]
            for aggregate, payload in zip(aggregates, encode(aggregates), strict=True):
                yield Event(aggregate.end_ms, self.channel, aggregate.sym, payload)

    def _aggregate(self, row: dict[str, Any], day_volumes: dict[tuple[str, date], float]) -> Aggregate:
        start_ms = row["start_ms"]
        key = row["ticker"], calendar.trade_date(start_ms)
        day_volumes[key] = day_volumes.get(key, 0.0) + row["volume"]
        return Aggregate(
            ev=self.channel.value,
            sym=row["ticker"],
            volume=shares(row["volume"]),
            day_volume=shares(day_volumes[key]),
            day_open=UNSET,
            vwap=UNSET,
            open=row["open"],
            close=row["close"],
            high=row["high"],
            low=row["low"],
            day_vwap=UNSET,
            average_trade_size=UNSET,
            start_ms=start_ms,
            end_ms=start_ms + window_ms(self.channel),
        )


class _Line(msgspec.Struct):
    received_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    frame: msgspec.Raw = msgspec.Raw()


class _EventHeader(msgspec.Struct):
    ev: Channel
    sym: str


class FramesFeed:
    """The aggregates of raw-frames archives (`.jsonl` or `.jsonl.zst`), verbatim, at the times they were received.

    Each line is `{"received_at": "…Z", "frame": <JSON array or object>}`. Lines without a frame and events that
    are not aggregates are skipped. ValueError names the file and line that cannot be read.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)

    def __iter__(self) -> Iterator[Event]:
        emit_ms = 0
        for path in self.paths:
            for number, line in _lines(path):
                try:
                    received, events = _read_line(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                # The order stays the same even if the clock was set back while recording.
                emit_ms = max(emit_ms, received)
                for header, payload in events:
                    yield Event(emit_ms, header.ev, header.sym, payload)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with pa.input_stream(path, compression="detect") as stream:
            yield from enumerate(io.BufferedReader(stream), start=1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_line(line: bytes) -> tuple[int, list[tuple[_EventHeader, bytes]]]:
    """The time the line's frame was received (Unix ms), and its aggregates. msgspec's errors are ValueErrors."""
    recorded = msgspec.json.decode(line, type=_Line)
    frame = bytes(recorded.frame)
    if not frame:
        return 0, []
    if recorded.received_at is None:
        raise ValueError("there is a frame but no received_at")
    elements = msgspec.json.decode(frame, type=list[msgspec.Raw]) if frame.startswith(b"[") else [frame]
    events = []
    for element in map(bytes, elements):
        try:
            events.append((msgspec.json.decode(element, type=_EventHeader), element))
        except msgspec.ValidationError:
            continue  # a status, or something else that is not an aggregate
    return int(recorded.received_at.timestamp() * 1000), events
