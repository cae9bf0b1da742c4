"""A day's files as the datasets' modules take and give them, made of single bars.

Belongs here: local files, and reading them. Does not belong here: the bars in them (bars), and the lake (lakes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.inputs import arrival
from polygon_pipeline.datasets.normalize import Normalization
from polygon_pipeline.lake import archive
from polygon_pipeline.lake.records import decode_record
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, Row, at


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


def reference_daily_file(file: Path, rows: Iterable[Row]) -> Path:
    """A reference_daily_bars file as the lake has it."""
    info = {"source": "rest", "tickers": None, "until_ms": at(23, 59), "etag": None}
    table = pa.Table.from_pylist(list(rows), schema=catalog.REFERENCE_DAILY_BARS.schema())
    pq.write_table(table.replace_schema_metadata({"reference": json.dumps(info)}), file)
    return file


def dataset_file(file: Path, rows: Iterable[Row], dataset: Dataset = catalog.NORMALIZED_BARS) -> Path:
    """A file with these rows and the dataset's columns. Columns that a row does not have are null."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=dataset.schema()), file)
    return file


def read(file: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(file).to_pylist()
    return rows


def columns(file: Path) -> list[tuple[str, pa.DataType]]:
    """The names and types of a file's columns."""
    return [(field.name, field.type) for field in pq.read_schema(file)]


def schema(dataset: Dataset) -> list[tuple[str, pa.DataType]]:
    """The names and types that the catalog says."""
    return [(field.name, field.type) for field in dataset.schema()]
