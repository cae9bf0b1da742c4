"""What a day's file is described as."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.description import describe
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, at, line
from polygon_pipeline_tests.support.day_files import normalized_file


def test_a_description_counts_rows_and_tickers_and_names_the_ends(tmp_path: Path) -> None:
    bars = [aggregate("SPY", at(4, 0)), aggregate("SPY", NOON), aggregate("QQQ", at(19, 59))]
    file = normalized_file(tmp_path, [[line(ARRIVAL, bars)]])
    found = describe(file)
    assert (found.rows, found.tickers) == (3, 2)
    assert str(found.first).startswith("2026-01-26 09:00:00")
    assert str(found.last).startswith("2026-01-27 00:59:00")
    with Resampling(DAY, file, tmp_path) as resampling:
        resampling.write(catalog.DAILY_BARS, tmp_path / "daily.parquet")
    assert describe(tmp_path / "daily.parquet")[:4] == (2, 2, "2026-01-26", "2026-01-26")


def test_the_sample_is_the_last_row_of_the_first_tickers_up_to_its_vwap(tmp_path: Path) -> None:
    bars = [aggregate(f"T{number:02d}", NOON + number * 60_000) for number in range(20)]
    file = normalized_file(tmp_path, [[line(ARRIVAL, [*bars, aggregate("T00", at(12, 30), c=7.5)])]])
    found = describe(file)
    assert found.columns[-1] == "vwap"
    assert [row[0] for row in found.sample] == [f"T{number:02d}" for number in range(8)]
    assert found.sample[0][found.columns.index("close")] == 7.5


def test_an_empty_file_has_no_ends_and_no_sample(tmp_path: Path) -> None:
    pq.write_table(catalog.REFERENCE_BARS.schema().empty_table(), tmp_path / "day.parquet")
    found = describe(tmp_path / "day.parquet")
    assert (found.rows, found.tickers, found.first, found.last, found.sample) == (0, 0, None, None, [])
