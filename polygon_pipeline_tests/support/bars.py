"""What the tests say bars with: the vendor's events, the lake's lines, and a day from raw to normalized."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.inputs import arrival
from polygon_pipeline.datasets.normalize import Normalization
from polygon_pipeline.lake import archive
from polygon_pipeline.lake.records import decode_record
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK

DAY = date(2026, 1, 26)  # a Monday in winter: 18:30 UTC is 13:30 in New York
ARRIVAL = datetime(2026, 1, 26, 18, 31, 0, 123456, tzinfo=UTC)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Any microsecond from 2003 to 2099.
moments = st.integers(1_041_379_200_000_000, 4_102_444_799_999_999).map(
    lambda microseconds: EPOCH + timedelta(microseconds=microseconds)
)

JsonObject = dict[str, Any]
Row = dict[str, Any]


def at(hour: int, minute: int, day: date = DAY) -> int:
    """That time of the day in New York, in Unix ms."""
    return int(datetime(day.year, day.month, day.day, hour, minute, tzinfo=NEW_YORK).timestamp()) * 1000


NOON = at(12, 0)


def aggregate(ticker: str = "SPY", start_ms: int = NOON, **fields: object) -> JsonObject:
    """An acceptable `AM` event. fields: what differs; None takes a field away."""
    event = {
        "ev": "AM",
        "sym": ticker,
        "v": 1000,
        "av": 50_000,
        "op": 449.5,
        "vw": 450.3,
        "o": 450.25,
        "c": 450.5,
        "h": 450.75,
        "l": 450.2,
        "a": 450.1,
        "z": 62,
        "s": start_ms,
        "e": start_ms + 60_000,
        **fields,
    }
    return {name: value for name, value in event.items() if value is not None}


def later(seconds: float) -> datetime:
    return ARRIVAL + timedelta(seconds=seconds)


def line(received_at: datetime, events: object, refused: Sequence[int] = ()) -> bytes:
    """The archive's line of a frame."""
    return archive.frame_line(received_at, json.dumps(events).encode(), refused)


def record_line(
    ticker: str, start_ms: int, close: float, *, collected_at: datetime = ARRIVAL, bar_data: JsonObject | None = None
) -> bytes:
    """A raw-data record by another writer."""
    record = {
        "source": "polygon_websocket",
        "ticker": ticker,
        "timestamp": datetime.fromtimestamp(start_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "bar_data": {
            "open": 1.0,
            "high": 999.0,
            "low": 0.5,
            "close": close,
            "volume": 10,
            "vwap": 2.0,
            **(bar_data or {}),
        },
        "collected_at": collected_at.isoformat(),
    }
    return json.dumps(record).encode() + b"\n"


def normalize(
    folder: Path,
    files: Iterable[Iterable[bytes]],
    records: bytes = b"",
    day: date = DAY,
    channel: Channel = Channel.MINUTE,
) -> list[Row]:
    """The normalized rows of these archive files and records."""
    return read(normalized_file(folder, files, records, day, channel))


def normalized_file(
    folder: Path,
    files: Iterable[Iterable[bytes]],
    records: bytes = b"",
    day: date = DAY,
    channel: Channel = Channel.MINUTE,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, lines in enumerate(files):
        paths.append(folder / f"{number}.jsonl.zst")
        paths[-1].write_bytes(archive.compress(lines))
    target = folder / "normalized.parquet"
    with Normalization(day, channel, folder) as normalization:
        normalization.add_frames(paths)
        if records:
            decoded = [decode_record(record) for record in records.splitlines()]
            normalization.add_bars((arrival(r), datetime.fromisoformat(r.collected_at)) for r in decoded)
        normalization.write(target)
        assert normalization.unreadable == {}
    return target


def read(file: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(file).to_pylist()
    return rows


def history(ticker: str = "SPY", start_ms: int = NOON, **fields: object) -> Row:
    """A row of reference_bars that says of a bar what aggregate() does. fields: what differs."""
    return {
        "ticker": ticker,
        "timestamp": datetime.fromtimestamp(start_ms / 1000, UTC),
        "open": 450.25,
        "high": 450.75,
        "low": 450.2,
        "close": 450.5,
        "volume": 1000.0,
        "vwap": 450.3,
        "transactions": 7,
        "received_at": later(86_400),
        "source": "rest",
        **fields,
    }


def reference_file(
    file: Path,
    rows: Iterable[Row],
    tickers: Sequence[str] | None = None,
    until_ms: int = at(23, 59),
    etag: str | None = None,
) -> Path:
    """A reference_bars file as the lake has it."""
    ordered = sorted(rows, key=lambda row: (row["ticker"], row["timestamp"]))
    info = {
        "source": "flat_file" if tickers is None else "rest",
        "tickers": tickers and list(tickers),
        "until_ms": until_ms,
        "etag": etag,
    }
    table = pa.Table.from_pylist(ordered, schema=catalog.REFERENCE_BARS.schema())
    pq.write_table(table.replace_schema_metadata({"reference": json.dumps(info)}), file)
    return file


def moment(start_ms: int) -> datetime:
    return datetime.fromtimestamp(start_ms / 1000, UTC)


def columns(file: Path) -> list[tuple[str, pa.DataType]]:
    """The names and types of a file's columns."""
    return [(field.name, field.type) for field in pq.read_schema(file)]


def schema(dataset: Dataset) -> list[tuple[str, pa.DataType]]:
    """The names and types that the catalog says."""
    return [(field.name, field.type) for field in dataset.schema()]
