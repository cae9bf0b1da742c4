"""The vendor's flat file of a full-market day to reference_bars: ours beside bare DuckDB on the same file.

The rival reads the compressed CSV and writes sorted zstd Parquet in one statement; ours also verifies the archive's
checksum and the columns, and takes only the day's bars.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import data
from benchmarks.equality import same_rows
from benchmarks.harness import Run, Table, at_most, contest, measure

_BARE = """
    COPY (
        SELECT ticker, to_timestamp(window_start // 1000000000) AS timestamp, open, high, low, close, volume,
            transactions
        FROM read_csv('{file}', header = true, nullstr = '\\N', columns = {{ticker: 'VARCHAR', volume: 'DOUBLE',
            open: 'DOUBLE', close: 'DOUBLE', high: 'DOUBLE', low: 'DOUBLE', window_start: 'BIGINT',
            transactions: 'BIGINT'}})
        ORDER BY ticker, window_start
    ) TO '{target}' (FORMAT parquet, COMPRESSION zstd)
"""


def ours(run: Run, file: Path) -> Callable[[], Path]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.datasets.reference import from_flat_file

    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    target = folder / "ours.parquet"

    def work() -> Path:
        from_flat_file(data.DAY, file, datetime(2026, 1, 27, 16, tzinfo=UTC), "an-etag", target, folder)
        return target

    return work


def bare_duckdb(run: Run, file: Path) -> Callable[[], Path]:
    import duckdb

    target = Path(tempfile.mkdtemp(dir=run.scratch)) / "theirs.parquet"

    def work() -> Path:
        with duckdb.connect(config={"memory_limit": "1GB", "threads": 2}) as connection:
            connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
            connection.execute(_BARE.format(file=file, target=target))
        return target

    return work


def benchmark(run: Run) -> Iterator[Table]:
    from polygon_pipeline.market.bars import Channel
    from polygon_pipeline.simulator.flat_files import flat_file

    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    table = data.market(tickers, run.seed).day_bars(data.DAY, Channel.MINUTE)
    file = run.scratch / "flat-file.csv.gz"
    file.write_bytes(flat_file(table))
    rows = contest(
        [("ours", lambda: measure(ours, run, file)), ("bare DuckDB", lambda: measure(bare_duckdb, run, file))],
        table.num_rows,
        3,
        lambda one, other: same_rows(one, other, ("ticker", "timestamp", "open", "high", "low", "close", "volume")),
    )
    times = {name: measured.seconds for name, _, measured in rows}
    yield Table(
        f"a flat file of {tickers:,} tickers to reference_bars",
        "bars",
        rows,
        [
            at_most(1.3, times["ours"] / times["bare DuckDB"], "times bare DuckDB"),
            at_most(1000, rows[0][2].peak_mb, "MB"),
        ],
        "unpacking, which is one thread's work; the plain text is then read by both, where DuckDB alone reads a "
        "compressed file with one.",
    )
