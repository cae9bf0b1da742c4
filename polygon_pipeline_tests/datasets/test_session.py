"""A DuckDB session: sessions that share their space are apart otherwise."""

from __future__ import annotations

from pathlib import Path

from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline_tests.support.bars import ARRIVAL, aggregate, line
from polygon_pipeline_tests.support.day_files import normalized_file


def test_sessions_that_share_their_space_do_not_see_each_others_views(tmp_path: Path) -> None:
    file = normalized_file(tmp_path / "day", [[line(ARRIVAL, [aggregate()])]])
    with DuckSession(tmp_path) as base, DuckSession(base) as one, DuckSession(base) as other:
        one.view("bars", file)
        other.rows("CREATE TEMP TABLE bars AS SELECT 'mine' AS ticker")
        assert one.rows("SELECT ticker FROM bars") == [("SPY",)]
        assert other.rows("SELECT ticker FROM bars") == [("mine",)]
