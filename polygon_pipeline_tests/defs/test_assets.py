"""The assets: their partitions, what runs they ask for, and what a day of them shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from polygon_pipeline.datasets.catalog import BAR_COVERAGE, DERIVED, NORMALIZED_BARS, RESAMPLED
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.dataset_files import fetch_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, line
from polygon_pipeline_tests.support.day_files import read
from polygon_pipeline_tests.support.materializing import latest_metadata, materialize

_FOLLOWED_DAY = "2026-11-16"
_DATASETS = [NORMALIZED_BARS.name, *(dataset.name for dataset in DERIVED), BAR_COVERAGE.name]


def test_every_asset_is_partitioned_by_trading_day_and_described() -> None:
    graph = build_defs().get_repository_def().asset_graph
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.partitions_def == trading_days
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
    }
    normalized = shown[NORMALIZED_BARS.name]
    assert (normalized["frame_files"], normalized["raw_objects_without_frames"]) == (1, 0)
    assert normalized["history"] == "none yet"
    assert list(normalized["unreadable_objects"]) == [unreadable]
    coverage = shown[BAR_COVERAGE.name]
    assert coverage["history"].startswith("not there yet")
    assert coverage["picture"].startswith("![coverage of 2026-01-26](data:image/png;base64,")
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


# Datasets follow their inputs: evaluated as the automation sensor does, tick after tick.


class _Ticks:
    """The automation sensor's evaluations, one after another, against one instance."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance
        self._cursor: Any = None

    def next(self) -> set[str]:
        """The assets that this tick asks for, of the one day."""
        result = dg.evaluate_automation_conditions(
            defs=build_defs(),
            instance=self._instance,
            asset_selection=dg.AssetSelection.all(),
            cursor=self._cursor,
        )
        self._cursor = result.cursor
        keys = {dg.AssetKey(name) for name in _DATASETS}
        return {key.to_user_string() for key in keys if result.get_requested_partitions(key) == {_FOLLOWED_DAY}}

    def report(self, *names: str) -> None:
        for name in names:
            self._instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=_FOLLOWED_DAY))


@pytest.fixture
def ticks(instance: dg.DagsterInstance) -> _Ticks:
    ticks = _Ticks(instance)
    ticks.next()
    return ticks


@pytest.mark.slow
def test_raw_bars_of_any_day_request_the_days_datasets_once(ticks: _Ticks) -> None:
    ticks.report("raw_bars")
    assert ticks.next() == {*_DATASETS}
    ticks.report(*_DATASETS)
    assert ticks.next() == set()
    assert ticks.next() == set()


@pytest.mark.slow
def test_raw_bars_that_arrive_while_the_day_is_being_made_request_it_again(ticks: _Ticks) -> None:
    ticks.report("raw_bars")
    assert ticks.next() == {*_DATASETS}
    ticks.report("raw_bars", *sorted(_DATASETS))
    assert "normalized_bars" in ticks.next()


@pytest.mark.slow
def test_the_history_of_a_day_requests_its_datasets_once_also_if_it_was_not_collected(ticks: _Ticks) -> None:
    ticks.report("reference_bars")
    assert ticks.next() == {*_DATASETS}
    ticks.report(*sorted(_DATASETS))
    assert ticks.next() == set()
    ticks.report("reference_bars")  # a replaced file
    assert ticks.next() == {*_DATASETS}


@pytest.mark.slow
def test_what_a_backfill_made_of_the_history_is_not_made_again(ticks: _Ticks) -> None:
    ticks.report("reference_bars", "normalized_bars", *sorted({*_DATASETS} - {"normalized_bars"}))
    assert ticks.next() == set()
