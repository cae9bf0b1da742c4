"""Datasets follow their inputs: evaluated as the automation sensor does, tick after tick."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from polygon_pipeline.definitions import build_defs

_DAY = "2026-11-16"
_DATASETS = {"normalized_bars", "bars_5m", "bars_15m", "bars_1h", "daily_bars", "bar_coverage"}


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
        return {key.to_user_string() for key in keys if result.get_requested_partitions(key) == {_DAY}}

    def report(self, *names: str) -> None:
        for name in names:
            self._instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=_DAY))


@pytest.fixture
def ticks() -> Iterator[_Ticks]:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = _Ticks(instance)
        ticks.next()
        yield ticks


def test_raw_bars_of_any_day_ask_for_the_days_datasets_once(ticks: _Ticks) -> None:
    ticks.report("raw_bars")
    assert ticks.next() == _DATASETS
    ticks.report(*_DATASETS)
    assert ticks.next() == set()
    assert ticks.next() == set()


def test_raw_bars_that_come_while_the_day_is_being_made_ask_for_it_again(ticks: _Ticks) -> None:
    ticks.report("raw_bars")
    assert ticks.next() == _DATASETS
    ticks.report("raw_bars", *sorted(_DATASETS))
    assert "normalized_bars" in ticks.next()


def test_the_history_of_a_day_asks_for_its_datasets_once_whoever_collected_it(ticks: _Ticks) -> None:
    ticks.report("reference_bars")
    assert ticks.next() == _DATASETS
    ticks.report(*sorted(_DATASETS))
    assert ticks.next() == set()
    ticks.report("reference_bars")  # a replaced file
    assert ticks.next() == _DATASETS


def test_what_a_backfill_made_of_the_history_is_not_made_again(ticks: _Ticks) -> None:
    ticks.report("reference_bars", "normalized_bars", *sorted(_DATASETS - {"normalized_bars"}))
    assert ticks.next() == set()
