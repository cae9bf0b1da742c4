"""A DuckDB session: how every dataset is computed and written. In memory, on disk beyond that.

Belongs here: the connection's settings, writing Parquet, and what DuckDB says of a damaged file. Does not belong here:
what the statements say (each dataset's own module).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb

# Leaves room for Python and Arrow below 2 GB; beyond it DuckDB uses the disk.
_MEMORY_LIMIT = "1GB"
THREADS = 2

_PARQUET = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE 122880"

# What DuckDB says of content that is not what it should be, and of a file that is damaged.
# Its messages quote the content, and may be cut within a character: then they cannot even be decoded.
INVALID = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.OutOfRangeException, UnicodeDecodeError)
UNREADABLE = (*INVALID, duckdb.IOException)


class DuckSession:
    """A DuckDB connection of its own, which ends with the `with` block. Its time zone is UTC.

    space: an empty local folder for what does not fit into memory, or a session to share that of. Without either it is
    for a look at a small file. A database of its own takes 20 ms, and a day has a dozen sessions.
    """

    def __init__(self, space: Path | DuckSession | None = None) -> None:
        match space:
            case None:
                self.connection = _in_memory().cursor()
            case DuckSession():
                self.connection = space.connection.cursor()
            case folder:
                self.connection = _open(temp_directory=str(folder / "spill"))
        self.connection.execute("SET TimeZone = 'UTC'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.connection.close()

    def rows(self, query: str, parameters: Mapping[str, object] | None = None) -> list[Any]:
        """A query's rows, as tuples."""
        return self.connection.execute(query, parameters or {}).fetchall()

    def view(self, name: str, file: Path) -> None:
        """Makes a Parquet file readable under a name."""
        self.rows(f"CREATE OR REPLACE TEMP VIEW {name} AS FROM read_parquet({quoted(str(file))})")

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
            options += f", KV_METADATA {{{', '.join(f'{key}: {quoted(value)}' for key, value in metadata.items())}}}"
        [(rows,)] = self.rows(f"COPY ({query}) TO {quoted(str(target))} ({options})", parameters)
        return int(rows)


def _open(**config: str) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"memory_limit": _MEMORY_LIMIT, "threads": THREADS, **config})
    connection.execute("SET enable_progress_bar = false")
    return connection


@functools.cache
def _in_memory() -> duckdb.DuckDBPyConnection:
    return _open()


def quoted(text: str) -> str:
    """Text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"
