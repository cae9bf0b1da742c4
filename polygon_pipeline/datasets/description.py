"""What a day's file holds, in short, for a person who looks at it.

Belongs here: the counts and the sample, as one scan of the Parquet file. Does not belong here: how they show in the UI
(defs.writer), and what must hold of the rows (datasets.quality).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from polygon_pipeline.datasets.session import DuckSession

_SAMPLE_TICKERS = 8


class Description(NamedTuple):
    """first, last: the first and last bar or date, as text. columns, sample: the last row of the first few tickers."""

    rows: int
    tickers: int
    first: str | None
    last: str | None
    columns: list[str]
    sample: list[list[Any]]


def describe(file: Path) -> Description:
    """Describes a Parquet file of a ticker and a time or date, its first two columns; the sample ends with the VWAP."""
    import pyarrow.parquet as pq

    names = pq.read_schema(file).names
    columns = names[: names.index("vwap") + 1] if "vwap" in names else names
    shown = ", ".join(f'"{name}"' for name in columns)
    query = f"""
        SELECT sum(rows)::BIGINT, count(*), CAST(min(first) AS VARCHAR), CAST(max(last) AS VARCHAR),
            list(sample ORDER BY ticker)[:{_SAMPLE_TICKERS}]
        FROM (
            SELECT ticker, count(*) AS rows, min("{names[1]}") AS first, max("{names[1]}") AS last,
                arg_max(struct_pack({shown}), "{names[1]}") AS sample
            FROM read_parquet($file, hive_partitioning = false) GROUP BY ticker
        )
    """
    with DuckSession() as session:
        [(rows, tickers, first, last, sample)] = session.rows(query, {"file": str(file)})
    return Description(rows or 0, tickers, first, last, columns, [[*row.values()] for row in sample or []])
