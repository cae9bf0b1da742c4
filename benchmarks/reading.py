"""One ticker's minute bars of a year (252 days) out of a whole market's lake: read.bars beside DuckDB and pandas.

The lake has the same day 252 times over, as links to one file: the disk is no part of the comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import data, normalizing
from benchmarks.harness import Measured, Run, Table, at_least, at_most, contest, measure
from polygon_pipeline.lake import layout
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline.simulator.tickers import first_tickers

_YEAR = 252
_DAYS = trading_days(date(2025, 1, 2), date(2026, 6, 30))[:_YEAR]
_DAYS_IN_FULL = 5  # of which a contender reads every ticker
_COLUMNS = ("ticker", "date", "timestamp", "open", "high", "low", "close", "volume", "vwap", "session")


def ours(root: Path, ticker: str, days: int) -> Callable[[], pa.Table]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline import read

    os.environ["LAKE_URI"] = root.as_uri()
    return lambda: read.bars(ticker, _DAYS[0], _DAYS[days - 1])


def bare_duckdb(root: Path, ticker: str) -> Callable[[], pa.Table]:
    import duckdb
    import pyarrow  # noqa: F401

    files = [str(_file(root, day)) for day in _DAYS]

    def work() -> pa.Table:
        with duckdb.connect() as connection:
            return connection.sql(
                f"SELECT {', '.join(_COLUMNS)} FROM read_parquet($files, hive_partitioning = true) "
                "WHERE ticker = $ticker ORDER BY ticker, date, timestamp",
                params={"files": files, "ticker": ticker},
            ).to_arrow_table()

    return work


def pandas(root: Path, ticker: str) -> Callable[[], pa.Table]:
    """Over the folder, told of the ticker: pyarrow leaves out the row groups without it."""
    import pandas as pd
    import pyarrow.dataset  # noqa: F401

    folder = _file(root, _DAYS[0]).parents[1]

    def work() -> pa.Table:
        frame = pd.read_parquet(folder, columns=list(_COLUMNS), filters=[("ticker", "=", ticker)])
        return pa.Table.from_pandas(frame.sort_values(["date", "timestamp"]), preserve_index=False)

    return work


def pandas_in_full(root: Path, ticker: str) -> Callable[[], int]:
    """Day by day, as a year does not fit into memory, and then the ticker."""
    import pandas as pd
    import pyarrow.dataset  # noqa: F401

    columns = [name for name in _COLUMNS if name != "date"]  # which is in the folder's name

    def work() -> int:
        days = [pd.read_parquet(_file(root, day), columns=columns) for day in _DAYS[:_DAYS_IN_FULL]]
        return len(pd.concat([day[day["ticker"] == ticker] for day in days]))

    return work


def _file(root: Path, day: date) -> Path:
    return root / layout.dataset_key("normalized_bars", day.isoformat())


def _lake(run: Run, tickers: int) -> Path:
    day = normalizing.ours(run, tickers, Channel.MINUTE)()
    root = run.scratch / f"reading-{tickers}"
    for trading_day in _DAYS:
        file = _file(root, trading_day)
        file.parent.mkdir(parents=True)
        file.hardlink_to(day)
    return root


def _same(ours: pa.Table, theirs: pa.Table) -> None:
    """Also where dates are text or a dictionary, and times have another precision."""
    assert ours.num_rows, "there are no rows"

    def plain(table: pa.Table) -> list[Any]:
        dates = [str(value) for value in table["date"].to_pylist()]
        times = [value.timestamp() for value in table["timestamp"].to_pylist()]
        return [dates, times, *(table[name].to_pylist() for name in _COLUMNS if name not in ("date", "timestamp"))]

    assert plain(ours) == plain(theirs)


def benchmark(run: Run) -> Iterator[Table]:
    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    ticker = sorted(first_tickers(tickers))[tickers // 2]
    root = _lake(run, tickers)
    rows = contest(
        [
            ("ours", lambda: measure(ours, root, ticker, _YEAR)),
            ("bare DuckDB over exactly the files", lambda: measure(bare_duckdb, root, ticker)),
            ("pandas over the folder, filtered as it reads", lambda: measure(pandas, root, ticker)),
        ],
        _YEAR,
        3,
        _same,
    )
    quarter: Measured = measure(ours, root, ticker, _YEAR // 4)
    in_full: Measured = measure(pandas_in_full, root, ticker)
    rows += [("ours, a quarter of the days", _YEAR // 4, quarter), ("pandas, all tickers", _DAYS_IN_FULL, in_full)]
    (_, _, found), (_, _, bare) = rows[:2]
    yield Table(
        f"One of {tickers:,} tickers over {_YEAR} days",
        "days",
        rows,
        [
            at_most(1.5, found.seconds / bare.seconds, "times bare DuckDB's time"),
            at_least(
                5, in_full.seconds / _DAYS_IN_FULL / (found.seconds / _YEAR), "times as fast as pandas with all tickers"
            ),
            at_most(1.25, found.peak_mb / quarter.peak_mb, "times the memory for four times the days"),
        ],
        "decompressing one row group of each day, 122,880 rows of which a ticker has some hundred.",
    )
