"""What a day's materialization shows of its file."""

from __future__ import annotations

from pathlib import Path

from polygon_pipeline.defs.writer import day_metadata
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.bars import DAY, at, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file
from polygon_pipeline_tests.support.planned_day import PlannedDay


def lines(lake: Lake, file: Path) -> list[str]:
    preview: str = day_metadata(lake, "a_dataset", DAY.isoformat(), file)["preview"].value
    return preview.splitlines()


def test_a_preview_is_in_new_yorks_time_and_rounded(file_lake: Lake, tmp_path: Path) -> None:
    row = normalized_row("BRK|B", at(19, 59), open=450.3012, volume=1_234_567.246)
    assert lines(file_lake, dataset_file(tmp_path / "bars.parquet", [row])) == [
        "| ticker | timestamp (New York) | open | high | low | close | volume | vwap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        r"| BRK\|B | 19:59 | 450.30 | 12.00 | 9.00 | 11.00 | 1,234,567 | 10.50 |",
    ]


def test_of_many_columns_those_are_shown_that_tell_tickers_apart(file_lake: Lake, tmp_path: Path) -> None:
    file = PlannedDay(tmp_path, {("QQQ", 0): "collected", ("SPY", 0): "repaired"}, [("QQQ", 0), ("SPY", 0)]).file()
    assert lines(file_lake, file)[0] == "| ticker | collected_minutes | lost_connected | repaired_minutes | " + (
        "longest_gap_minutes |"
    )


def test_a_file_of_dates_has_no_first_bar(file_lake: Lake, tmp_path: Path) -> None:
    file = PlannedDay(tmp_path, {("QQQ", 0): "collected"}).file()
    assert not {"first_bar", "last_bar"} & {*day_metadata(file_lake, "bar_coverage", DAY.isoformat(), file)}
