"""A day of per-second bars to normalized_second_bars, beside bare DuckDB: sizes far above the memory it may use.

The rows are the simulator's, a share of them revised; its tickers trade the less the later they come.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import data, normalizing
from benchmarks.equality import same_rows
from benchmarks.harness import Run, Table, at_most, contest, measure
from polygon_pipeline.market.bars import Channel


def benchmark(run: Run) -> Iterator[Table]:
    rates: list[float] = []
    for tickers in (data.WHOLE_MARKET // 5, data.WHOLE_MARKET) if run.full else (150,):
        _, bars = data.frames_lake(run, tickers, Channel.SECOND)
        contenders = [
            ("ours", lambda tickers=tickers: measure(normalizing.ours, run, tickers, Channel.SECOND)),
            ("bare DuckDB", lambda tickers=tickers: measure(normalizing.bare_duckdb, run, tickers, Channel.SECOND)),
        ]
        rows = contest(contenders, bars, 1, same_rows)
        rates.append(rows[0][2].rate(bars))
        goals = [at_most(2000, rows[0][2].peak_mb, "MB")]
        if len(rates) == 2:
            goals.append(at_most(1.3, rates[0] / rates[1], "times the time a row that the smaller day took"))
        yield Table(
            f"a day of second bars of {tickers:,} tickers, {bars:,} rows, to normalized_second_bars",
            "bars",
            rows,
            goals,
            "parsing JSON, and for the larger one what DuckDB writes to disk and reads again: its memory is limited to "
            "1 GB.",
        )
