"""What clearing old runs takes away, and what it leaves."""

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg
import pytest

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import housekeeping

DAY = "2026-01-26"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def made(instance: dg.DagsterInstance, asset: str, day: str | None = DAY) -> str:
    """A run that materialized a day, or an asset without days, and ended; its id."""

    @dg.op
    def make(context: dg.OpExecutionContext) -> None:
        context.log_event(dg.AssetMaterialization(asset, partition=day))

    @dg.job
    def job() -> None:
        make()

    return job.execute_in_process(instance=instance).run_id


def clear(instance: dg.DagsterInstance) -> None:
    assert build_defs().get_job_def("housekeeping").execute_in_process(instance=instance).success


def test_a_run_whose_days_were_made_again_is_deleted_and_the_days_stay_made(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "KEPT_DAYS", 0)
    old, new = made(instance, "bars"), made(instance, "bars")
    clear(instance)
    assert instance.get_run_by_id(old) is None
    assert instance.get_run_by_id(new) is not None
    assert instance.get_materialized_partitions(dg.AssetKey("bars")) == {DAY}


def test_a_run_that_made_one_day_last_keeps_all_its_events(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "KEPT_DAYS", 0)
    kept = [made(instance, "bars"), made(instance, "bars", "2026-01-27")]
    for _ in range(2):
        clear(instance)
    assert all(instance.get_run_by_id(run) for run in kept)


def test_the_run_that_made_an_asset_without_days_last_is_kept(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "KEPT_DAYS", 0)
    old, new = made(instance, "splits", None), made(instance, "splits", None)
    clear(instance)
    assert instance.get_run_by_id(old) is None
    assert instance.get_run_by_id(new) is not None


def test_runs_of_the_last_two_weeks_are_left_alone(instance: dg.DagsterInstance) -> None:
    runs = [made(instance, "bars"), made(instance, "bars")]
    clear(instance)
    assert all(instance.get_run_by_id(run) for run in runs)
    assert timedelta(days=housekeeping.KEPT_DAYS) == timedelta(days=14)


def test_a_run_under_way_is_left_alone(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "KEPT_DAYS", 0)
    run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"))
    clear(instance)
    assert instance.get_run_by_id(run.run_id) is not None
