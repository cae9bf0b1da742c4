"""The command `polygon-pipeline`: asks the lake from a terminal.

Belongs here: its arguments and what it prints. Does not belong here: reading the lake (read).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, TextIO

import duckdb

from polygon_pipeline import read
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief
from polygon_pipeline.settings import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1, with one line on stderr, where the query or the lake cannot be read."""
    parser = argparse.ArgumentParser(prog="polygon-pipeline", description="Asks the lake of LAKE_URI.")
    commands = parser.add_subparsers(dest="command", required=True)
    query = commands.add_parser(
        "query",
        help="print what a SELECT gives; every dataset is a view",
        epilog="Example: polygon-pipeline query \"SELECT ticker, close FROM daily_bars WHERE date = '2026-01-26'\"",
    )
    query.add_argument("sql", metavar="SELECT", help="DuckDB's SQL; SHOW TABLES lists the datasets")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="all rows as CSV with a header")
    form.add_argument("--json", action="store_true", help="all rows as JSON, one object a line")
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            connection = read.connect()
        with connection:
            if options.csv or options.json:
                batches = connection.sql(options.sql).to_arrow_reader(100_000)
                (_write_csv if options.csv else _write_json)(batches, sys.stdout.buffer)
            else:
                sys.stdout.write(f"{connection.sql(options.sql)}\n")
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (read.ReadError, LakeError, ConfigurationError, duckdb.Error, *STORE_ERRORS) as error:
        sys.stderr.write(f"polygon-pipeline: {_line(error)}\n")
        return 1
    return 0


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(f"polygon-pipeline: {message}\n")


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    if lines and lines[0].startswith("Traceback"):  # DuckDB's, of what was raised while an object of S3 was read
        lines = [line for line in lines[1:] if not line.startswith(" ")]
    return " ".join(lines[:1]) if isinstance(error, duckdb.Error) else brief(error)


def _write_csv(batches: pa.RecordBatchReader, out: BinaryIO) -> None:
    from pyarrow import csv

    with csv.CSVWriter(out, batches.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_json(batches: pa.RecordBatchReader, out: BinaryIO) -> None:
    import msgspec

    for batch in batches:
        out.write(msgspec.json.Encoder().encode_lines(batch.to_pylist()))


if __name__ == "__main__":
    sys.exit(main())
