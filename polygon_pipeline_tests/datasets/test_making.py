"""Datasets of many days: each by itself, in one go, with the next days made and fetched beside."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polygon_pipeline.datasets import catalog, making
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.making import FailedDay, MadeDataset, WrongSchema, make_days
from polygon_pipeline.datasets.normalize import NoBars
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.dataset_files import fetch_dataset, put_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline_tests.support.bars import aggregate, at, later, line, reference_daily_row
from polygon_pipeline_tests.support.day_files import read, reference_daily_file

DAYS = trading_days(date(2026, 1, 26), date(2026, 1, 30))
# What can be made without the vendor's day.
MINUTE = [dataset for dataset in catalog.FOLLOWING if dataset.channel is Channel.MINUTE and not dataset.required]
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def collect(lake: Lake, days: Sequence[date]) -> None:
    for day in days:
        frames = [line(later(0), [aggregate("SPY", at(12, 0, day), c=float(day.day))])]
        lake.put(layout.frames_key(day, "run", 1), archive.compress(frames))


def make(
    lake: Lake, folder: Path, days: Sequence[date] = DAYS, wanted: Sequence[Dataset] = MINUTE
) -> list[tuple[date, str]]:
    """What was made, by day; every made dataset is stored, as the asset does it."""
    folder.mkdir(exist_ok=True)
    found = []
    for made in make_days(lake, days, lambda _: wanted, folder, NOW):
        if isinstance(made, FailedDay):
            found.append((made.day, type(made.error).__name__))
        else:
            assert pq.read_table(made.file).num_rows
            put_dataset(lake, made.dataset.name, made.day.isoformat(), made.file)
            found.append((made.day, made.dataset.name))
    return found


def test_all_datasets_of_all_days_are_made_in_order(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS)
    assert make(file_lake, tmp_path / "scratch") == [(day, dataset.name) for day in DAYS for dataset in MINUTE]


def test_a_day_that_cannot_be_made_costs_only_itself(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, [day for day in DAYS if day != DAYS[2]])
    made = make(file_lake, tmp_path / "scratch")
    assert [found for found in made if found[0] == DAYS[2]] == [(DAYS[2], NoBars.__name__)]
    assert {day for day, name in made if name == catalog.BAR_COVERAGE.name} == {*DAYS} - {DAYS[2]}


def test_a_day_leaves_nothing_behind_and_the_next_two_are_all_that_is_there_beside_it(
    file_lake: Lake, tmp_path: Path
) -> None:
    collect(file_lake, DAYS)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    most = 0
    for _ in make_days(file_lake, DAYS, lambda _: MINUTE, scratch, NOW):
        most = max(most, len([*scratch.iterdir()]))
    assert most <= 3
    assert not [*scratch.iterdir()]


def test_what_is_to_be_made_is_asked_for_before_the_day_is_read(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked: list[date] = []

    def wanted_of(day: date) -> Sequence[Dataset]:
        asked.append(day)
        return MINUTE if day != DAYS[1] else []

    made = [found.day for found in make_days(file_lake, DAYS, wanted_of, scratch, NOW)]
    assert asked == DAYS
    assert DAYS[1] not in made


def test_datasets_alone_are_made_of_the_bars_on_the_lake(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS[:1])
    make(file_lake, tmp_path / "first", DAYS[:1])
    made = make(file_lake, tmp_path / "second", DAYS[:2], [catalog.DAILY_BARS])
    assert made == [(DAYS[0], catalog.DAILY_BARS.name), (DAYS[1], "MissingDataset")]


def test_differences_are_left_out_without_the_vendors_day_and_asked_for_alone_they_say_what_is_missing(
    file_lake: Lake, tmp_path: Path
) -> None:
    collect(file_lake, DAYS[:1])
    everything = [*MINUTE, catalog.DAILY_DIFFERENCES]
    assert make(file_lake, tmp_path / "first", DAYS[:1], everything) == [(DAYS[0], dataset.name) for dataset in MINUTE]
    made = make(file_lake, tmp_path / "second", DAYS[:1], [catalog.DAILY_DIFFERENCES])
    assert made == [(DAYS[0], "MissingDataset")]


def test_the_vendors_day_gives_the_official_close_beside_ours_and_the_differences(
    file_lake: Lake, tmp_path: Path
) -> None:
    collect(file_lake, DAYS[:1])
    make(file_lake, tmp_path / "first", DAYS[:1])
    vendors = reference_daily_file(tmp_path / "theirs.parquet", [reference_daily_row("SPY", close=7.5)])
    put_dataset(file_lake, catalog.REFERENCE_DAILY_BARS.name, DAYS[0].isoformat(), vendors)
    wanted = [catalog.DAILY_BARS, catalog.DAILY_DIFFERENCES]
    assert make(file_lake, tmp_path / "second", DAYS[:1], wanted) == [(DAYS[0], dataset.name) for dataset in wanted]
    [daily] = read(fetch_dataset(file_lake, catalog.DAILY_BARS.name, DAYS[0].isoformat(), tmp_path))
    assert (daily["close"], daily["official_close"], daily["official_close_source"]) == (26.0, 7.5, "vendor_daily")
    differences = read(fetch_dataset(file_lake, catalog.DAILY_DIFFERENCES.name, DAYS[0].isoformat(), tmp_path))
    assert (26.0, 7.5) in {(row["ours"], row["theirs"]) for row in differences if row["field"] == "close"}


def test_nothing_is_made_of_bars_with_a_wrong_schema(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS[:1])
    make(file_lake, tmp_path / "first", DAYS[:1])
    stored = file_lake.local_root / layout.dataset_key(catalog.NORMALIZED_BARS.name, DAYS[0].isoformat())
    pq.write_table(pq.read_table(stored, partitioning=None).drop_columns(["vwap"]), stored)
    (tmp_path / "second").mkdir()
    [failed] = make_days(file_lake, DAYS[:1], lambda _: [catalog.DAILY_BARS], tmp_path / "second", NOW)
    assert isinstance(failed, FailedDay)
    assert isinstance(failed.error, WrongSchema)
    assert "vwap" in str(failed.error)


def test_a_dataset_on_the_lake_that_is_no_parquet_file_costs_only_its_day(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS[:3])
    make(file_lake, tmp_path / "first", DAYS[:3])
    file_lake.put(layout.dataset_key(catalog.NORMALIZED_BARS.name, DAYS[1].isoformat()), b"")
    made = make(file_lake, tmp_path / "second", DAYS[:3], [catalog.DAILY_BARS])
    assert made == [(DAYS[0], "daily_bars"), (DAYS[1], "WrongSchema"), (DAYS[2], "daily_bars")]


def test_a_store_error_ends_the_run(file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(making, "fetch_raw", away)
    with pytest.raises(OSError, match="the store is away"):
        make(file_lake, tmp_path / "scratch")


def test_a_picture_is_drawn_where_it_is_asked_for_and_the_day_is_over(file_lake: Lake, tmp_path: Path) -> None:
    collect(file_lake, DAYS[:1])

    def pictures(now: datetime, draw: bool, name: str) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        return [
            made.dataset.name
            for made in make_days(file_lake, DAYS[:1], lambda _: MINUTE, folder, now, draw=draw)
            if isinstance(made, MadeDataset) and made.picture
        ]

    drawn = [catalog.NORMALIZED_BARS, catalog.DAILY_BARS, catalog.BAR_COVERAGE, catalog.SESSION_REPORT]
    assert pictures(NOW, True, "over") == [dataset.name for dataset in drawn]
    assert pictures(NOW, False, "not asked for") == []
    assert pictures(datetime(2026, 1, 26, 18, tzinfo=UTC), True, "not over") == []
