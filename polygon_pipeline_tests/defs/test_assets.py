"""The assets: their partitions, what runs they ask for, and what a day of them shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from polygon_pipeline.datasets.catalog import (
    BAR_COVERAGE,
    DAILY_BARS,
    DERIVED,
    LISTINGS,
    NORMALIZED_BARS,
    RESAMPLED,
    SESSION_REPORT,
)
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import assets
from polygon_pipeline.defs.assets import _difference_row, _not_made_before, _tries
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.defs.writer import write_day
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.dataset_files import fetch_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, at, line
from polygon_pipeline_tests.support.day_files import read
from polygon_pipeline_tests.support.materializing import latest_metadata, materialize

PROJECT = Project()
_DATASETS = [NORMALIZED_BARS.name, *(dataset.name for dataset in DERIVED), BAR_COVERAGE.name, SESSION_REPORT.name]


def test_every_asset_of_days_is_partitioned_by_trading_day_and_every_asset_described() -> None:
    graph = build_defs(PROJECT).get_repository_def().asset_graph
    listings = {listing.name for listing in LISTINGS}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.partitions_def == (None if key.to_user_string() in listings else PROJECT.trading_days)
        assert node.description
        assert node.kinds


# A day


@pytest.fixture
def lake(file_lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """The lake that the assets find in the environment."""
    monkeypatch.setenv("LAKE_URI", file_lake.uri)
    return file_lake


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def put_frame(lake: Lake, *events: dict[str, Any]) -> None:
    lake.put(layout.frames_key(DAY, "run", 1), archive.compress([line(ARRIVAL, list(events))]))


@pytest.mark.slow
def test_a_days_datasets_are_made_of_its_raw_bars_and_show_what_they_hold(
    lake: Lake, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    put_frame(lake, aggregate("SPY", NOON), aggregate("SPY", NOON + 60_000), aggregate("QQQ", NOON))
    unreadable = layout.raw_key(Channel.MINUTE, DAY, "IBM", NOON)
    lake.put(unreadable, b"not JSON")
    assert materialize(instance, _DATASETS, DAY.isoformat()).success
    shown = {name: latest_metadata(instance, name, DAY.isoformat()) for name in _DATASETS}
    assert {name: (found["dagster/row_count"], found["tickers"]) for name, found in shown.items()} == {
        NORMALIZED_BARS.name: (3, 2),
        **{dataset.name: (2, 2) for dataset in DERIVED},
        BAR_COVERAGE.name: (2, 2),
        SESSION_REPORT.name: (2, 2),
    }
    normalized = shown[NORMALIZED_BARS.name]
    assert (normalized["frame_files"], normalized["raw_objects_without_frames"]) == (1, 0)
    assert normalized["history"] == "none yet"
    assert list(normalized["unreadable_objects"]) == [unreadable]
    coverage = shown[BAR_COVERAGE.name]
    assert coverage["picture"].startswith("![bar_coverage of 2026-01-26](data:image/png;base64,")
    rows = read(fetch_dataset(lake, NORMALIZED_BARS.name, DAY.isoformat(), tmp_path))
    assert [row["ticker"] for row in rows] == ["QQQ", "SPY", "SPY"]


def test_one_derived_dataset_can_be_made_without_the_others(lake: Lake, instance: dg.DagsterInstance) -> None:
    put_frame(lake, aggregate())
    chosen = RESAMPLED[0].name
    assert materialize(instance, [NORMALIZED_BARS.name, chosen], DAY.isoformat()).success
    assert [dataset.name for dataset in DERIVED if lake.keys(f"datasets/{dataset.name}")] == [chosen]


def test_a_day_without_raw_bars_fails_with_the_reason_and_is_not_retried(
    lake: Lake, instance: dg.DagsterInstance
) -> None:
    with pytest.raises(dg.Failure, match="no raw bars of 2026-01-26") as failure:
        materialize(instance, [NORMALIZED_BARS.name], DAY.isoformat())
    assert failure.value.allow_retries is False


@pytest.mark.slow
def test_a_run_of_many_days_makes_those_it_can_and_names_the_others(lake: Lake, instance: dg.DagsterInstance) -> None:
    days = trading_days(DAY, DAY + timedelta(days=4))
    for day in (days[0], days[2]):
        frame = line(ARRIVAL, [aggregate("SPY", at(12, 0, day))])
        lake.put(layout.frames_key(day, "run", 1), archive.compress([frame]))
    result = materialize(instance, _DATASETS, days[0].isoformat(), days[2].isoformat(), fails=True)
    assert not result.success
    [failure] = result.get_step_failure_events()
    assert str(days[1]) in str(failure.event_specific_data)
    for name in _DATASETS:
        assert instance.get_materialized_partitions(dg.AssetKey(name)) == {str(days[0]), str(days[2])}
    checked = {check.check_name: check.metadata["days"].value for check in result.get_asset_check_evaluations()}
    assert checked["schema"] == "2 days, 2026-01-26 to 2026-01-28"


def test_a_run_that_was_cut_goes_on_where_it_was(lake: Lake, instance: dg.DagsterInstance) -> None:
    put_frame(lake, aggregate())
    made = materialize(instance, [NORMALIZED_BARS.name], DAY.isoformat())

    def left(root: str | None) -> list[str]:
        found = _not_made_before(instance, _tries(instance, root), DAY, [NORMALIZED_BARS, DAILY_BARS])
        return [dataset.name for dataset in found]

    assert left(None) == [NORMALIZED_BARS.name, DAILY_BARS.name]
    assert left("another run") == [NORMALIZED_BARS.name, DAILY_BARS.name]
    assert left(made.run_id) == [DAILY_BARS.name]


@pytest.mark.slow
def test_a_day_says_how_it_stands_and_how_its_checks_went(lake: Lake, instance: dg.DagsterInstance) -> None:
    put_frame(lake, aggregate())
    result = materialize(instance, _DATASETS, DAY.isoformat())
    shown = latest_metadata(instance, DAILY_BARS.name, DAY.isoformat())
    assert shown["day_state"] == "partial"
    assert shown["day_state_detail"].startswith("not known, New York: 04:00-19:59")
    assert shown["checks"] == "0 of 1 passed; failed: day_is_complete"
    assert latest_metadata(instance, NORMALIZED_BARS.name, DAY.isoformat())["checks"] == "7 of 7 passed"
    report = latest_metadata(instance, SESSION_REPORT.name, DAY.isoformat())
    assert report["checks"] == "8 of 9 passed; failed: day_is_complete"
    assert report["at_a_glance"].startswith("**Monday, 26 January 2026: partial**, not known, New York: 04:00-19:59")
    [complete] = [c for c in result.get_asset_check_evaluations() if c.check_name == "day_is_complete"]
    assert (complete.passed, complete.severity) == (False, dg.AssetCheckSeverity.ERROR)


def test_assets_of_seconds_exist_only_where_they_are_collected() -> None:
    def names(*channels: Channel) -> set[str]:
        graph = build_defs(Project(channels=channels)).get_repository_def().asset_graph
        return {key.to_user_string() for key in graph.get_all_asset_keys()}

    seconds = {"raw_second_bars", "normalized_second_bars"}
    assert not names(Channel.MINUTE) & seconds
    assert names(Channel.MINUTE, Channel.SECOND) == names(Channel.MINUTE) | seconds


def test_a_difference_from_the_history_is_shown_in_what_differs_and_in_new_yorks_time() -> None:
    values = {"open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5, "volume": 1000.0, "vwap": None}
    row = _difference_row(
        {
            "ticker": "SPY",
            "timestamp": "2026-01-26T19:42:00Z",
            "verdict": "corrected",
            "stream": values,
            "reference": values | {"close": 1.6, "volume": 12_345.5, "vwap": 1.55},
        }
    )
    assert row == {
        "ticker": "SPY",
        "time": "14:42 New York",
        "stream": "close 1.5, volume 1,000.0",
        "history": "close 1.6, volume 12,345.5",
        "kept": "history",
    }


def test_a_store_that_is_away_is_waited_for_and_what_was_made_before_is_kept(
    lake: Lake, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "_STORE_PAUSE_SECONDS", 0)
    put_frame(lake, aggregate())
    stored: list[str] = []

    def flaky(*arguments: Any, **options: Any) -> dict[str, Any]:
        stored.append(arguments[1])
        if len(stored) == 2:
            raise OSError("the store is away")
        return write_day(*arguments, **options)

    monkeypatch.setattr(assets, "write_day", flaky)
    assert materialize(instance, [NORMALIZED_BARS.name, DAILY_BARS.name], DAY.isoformat()).success
    assert stored == [NORMALIZED_BARS.name, DAILY_BARS.name, DAILY_BARS.name]
