"""What a day's file holds, in short, for a person who looks at it.

Belongs here: the counts and the sample, as one scan of the Parquet file. Does not belong here: how they show in the UI
(defs.writer), and what must hold of the rows (datasets.quality).
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from polygon_pipeline.datasets.session import DuckSession

_SAMPLE_TICKERS = 8


class Description(NamedTuple):
    """first, last: the starts of the first and the last bar; None for a file of dates. columns, sample: the last row of
    the most traded tickers, or of the first few by name where the file has no volume."""

    rows: int
    tickers: int
    first: datetime | None
    last: datetime | None
    columns: list[str]
    sample: list[list[Any]]


def describe(file: Path) -> Description:
    """Describes a Parquet file of a ticker and a time or date, its first two columns; the sample ends with the VWAP."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    names = schema.names
    columns = names[: names.index("vwap") + 1] if "vwap" in names else names
    shown = ", ".join(f'"{name}"' for name in columns)
    has_volume = "volume" in names and pa.types.is_floating(schema.field("volume").type)
    traded = "sum(volume)" if has_volume else "0"
    query = f"""
        SELECT sum(rows)::BIGINT, count(*), min(first), max(last),
            list(sample ORDER BY traded DESC NULLS LAST, ticker)[:{_SAMPLE_TICKERS}]
        FROM (
            SELECT ticker, count(*) AS rows, min("{names[1]}") AS first, max("{names[1]}") AS last,
                {traded} AS traded, arg_max(struct_pack({shown}), "{names[1]}") AS sample
            FROM read_parquet($file, hive_partitioning = false) GROUP BY ticker
        )
    """
    with DuckSession() as session:
        [(rows, tickers, first, last, sample)] = session.rows(query, {"file": str(file)})
    first, last = (_aware(moment) if isinstance(moment, datetime) else None for moment in (first, last))
    return Description(rows or 0, tickers, first, last, columns, [[*map(_aware, row.values())] for row in sample or []])


def _aware(value: Any) -> Any:
    """Files of other assets may have times without a zone, which are UTC as all are."""
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
