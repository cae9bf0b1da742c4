"""A DuckDB session: what a file of bars is described as."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.datasets.session import Description, DuckSession, describe
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, at, line
from polygon_pipeline_tests.support.day_files import normalized_file


def described(file: Path) -> Description:
    with DuckSession() as session:
        session.view("bars", file)
        return describe(session, pq.read_schema(file).names)


def test_a_description_counts_rows_and_tickers_and_names_the_ends(tmp_path: Path) -> None:
    bars = [aggregate("SPY", at(4, 0)), aggregate("SPY", NOON), aggregate("QQQ", at(19, 59))]
    file = normalized_file(tmp_path, [[line(ARRIVAL, bars)]])
    described_file = described(file)
    assert (described_file.rows, described_file.tickers) == (3, 2)
    assert described_file.first.startswith("2026-01-26 09:00:00")
    assert described_file.last.startswith("2026-01-27 00:59:00")
    with Resampling(DAY, file, tmp_path) as resampling:
        resampling.write(catalog.DAILY_BARS, tmp_path / "daily.parquet")
    assert described(tmp_path / "daily.parquet") == (2, 2, "2026-01-26", "2026-01-26")


def test_sessions_that_share_their_space_do_not_see_each_others_views(tmp_path: Path) -> None:
    file = normalized_file(tmp_path / "day", [[line(ARRIVAL, [aggregate()])]])
    with DuckSession(tmp_path) as base, DuckSession(base) as one, DuckSession(base) as other:
        one.view("bars", file)
        other.rows("CREATE TEMP TABLE bars AS SELECT 'mine' AS ticker")
        assert one.rows("SELECT ticker FROM bars") == [("SPY",)]
        assert other.rows("SELECT ticker FROM bars") == [("mine",)]
