"""A DuckDB session: how every dataset is computed and written. In memory, on disk beyond that.

Belongs here: the connection's settings, writing Parquet, and what DuckDB says of a damaged file. Does not belong here:
what the statements say (each dataset's own module).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import duckdb

# Leaves room for Python and Arrow below 2 GB; beyond it DuckDB uses the disk.
_MEMORY_LIMIT = "1GB"
THREADS = 2

_PARQUET = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE 122880"

# What DuckDB says of content that is not what it should be, and of a file that is damaged.
INVALID = (duckdb.InvalidInputException, duckdb.ConversionException)
UNREADABLE = (*INVALID, duckdb.IOException)


class DuckSession:
    """A DuckDB connection of its own, which ends with the `with` block. Its time zone is UTC.

    folder: an empty local folder for what does not fit into memory; without one, DuckDB stays in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        spill = {"temp_directory": str(folder / "spill")} if folder else {}
        self.connection = duckdb.connect(config={"memory_limit": _MEMORY_LIMIT, "threads": THREADS, **spill})
        self.connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.connection.close()

    def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[Any]:
        """A query's rows, as tuples."""
        return self.connection.execute(query, parameters or {}).fetchall()

    def view(self, name: str, file: Path) -> None:
        """Makes a Parquet file readable under a name."""
        self.connection.read_parquet(str(file)).create_view(name)

    def copy(
        self,
        query: str,
        target: Path,
        parameters: Mapping[str, object] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Writes a query's rows to a local Parquet file; returns how many. metadata: the file's key-value metadata."""
        options = _PARQUET
        if metadata:
            options += f", KV_METADATA {{{', '.join(f'{key}: {_quoted(value)}' for key, value in metadata.items())}}}"
        [(rows,)] = self.rows(f"COPY ({query}) TO {_quoted(str(target))} ({options})", parameters)
        return int(rows)


class Description(NamedTuple):
    """What a Parquet file of bars holds. first, last: its first and last bar or date, as text."""

    rows: int
    tickers: int
    first: str
    last: str


def describe(file: Path) -> Description:
    """Raises duckdb.Error if the file is no Parquet file of bars."""
    with DuckSession() as session:
        session.view("bars", file)
        when = "timestamp" if "timestamp" in session.connection.view("bars").columns else "date"
        [row] = session.rows(
            f"SELECT count(*), count(DISTINCT ticker), CAST(min({when}) AS VARCHAR), CAST(max({when}) AS VARCHAR) "
            "FROM bars"
        )
    return Description(*row)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
