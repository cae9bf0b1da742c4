"""What a day's file is described as."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.description import describe
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, at, line, moment
from polygon_pipeline_tests.support.day_files import normalized_file
from polygon_pipeline_tests.support.planned_day import PlannedDay


def test_a_description_counts_rows_and_tickers_and_names_the_ends(tmp_path: Path) -> None:
    bars = [aggregate("SPY", at(4, 0)), aggregate("SPY", NOON), aggregate("QQQ", at(19, 59))]
    file = normalized_file(tmp_path, [[line(ARRIVAL, bars)]])
    found = describe(file)
    assert (found.rows, found.tickers) == (3, 2)
    assert (found.first, found.last) == (moment(at(4, 0)), moment(at(19, 59)))
    with Resampling(DAY, file, tmp_path) as resampling:
        resampling.write(catalog.DAILY_BARS, tmp_path / "daily.parquet")
    assert describe(tmp_path / "daily.parquet")[:4] == (2, 2, None, None), "a date is no bar's start"


def test_the_sample_is_the_last_row_of_the_most_traded_tickers_up_to_its_vwap(tmp_path: Path) -> None:
    bars = [aggregate(f"T{number:02d}", NOON, v=1000 + number) for number in range(20)]
    file = normalized_file(tmp_path, [[line(ARRIVAL, [*bars, aggregate("T03", at(12, 30), c=7.5, v=500)])]])
    found = describe(file)
    assert found.columns[-1] == "vwap"
    assert [row[0] for row in found.sample] == ["T03", *(f"T{number:02d}" for number in range(19, 12, -1))]
    assert found.sample[0][found.columns.index("close")] == 7.5


def test_where_there_is_no_volume_the_first_tickers_by_name_are_shown(tmp_path: Path) -> None:
    minutes = {(f"T{number:02d}", number): "collected" for number in range(20)}
    found = describe(PlannedDay(tmp_path, minutes).file())
    assert [row[0] for row in found.sample] == [f"T{number:02d}" for number in range(8)]


def test_an_empty_file_has_no_ends_and_no_sample(tmp_path: Path) -> None:
    pq.write_table(catalog.REFERENCE_BARS.schema().empty_table(), tmp_path / "day.parquet")
    found = describe(tmp_path / "day.parquet")
    assert (found.rows, found.tickers, found.first, found.last, found.sample) == (0, 0, None, None, [])
