"""The schedules: what they ask for, and what they say when they ask for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

import dagster as dg
import pytest

from polygon_pipeline.datasets.catalog import FOLLOWING, RAW, REFERENCE_BARS
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import schedules
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.defs.reference import reference_job
from polygon_pipeline.defs.schedules import after_close_schedule, catch_up_schedule, reference_schedule
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline_tests.support.folders import folder_in_memory

_INPUTS = {dataset.name: [needed.name for needed in dataset.inputs] for dataset in FOLLOWING}
_MINUTE_DATASETS = [dataset.name for dataset in FOLLOWING if dataset.channel is Channel.MINUTE]
_RAW = [dataset.name for dataset in RAW.values()]
_REFERENCE = REFERENCE_BARS.name
_ALL = [*_RAW, _REFERENCE, *_INPUTS]

# The trading days that the night of _NIGHT looks at. The flat file of the last is not published then.
_NIGHT = "2020-11-24"
_DAYS = [f"2020-11-{day}" for day in (10, 11, 12, 13, 16, 17, 18, 19, 20, 23)]


@pytest.fixture(scope="module")
def stored_instance() -> Iterator[dg.DagsterInstance]:
    """Making one takes longer than a test; a schedule's context does not take an ephemeral one."""
    with folder_in_memory() as folder, dg.instance_for_test(temp_dir=str(folder)) as instance:
        yield instance


@pytest.fixture
def instance(stored_instance: dg.DagsterInstance) -> dg.DagsterInstance:
    stored_instance.wipe()
    return stored_instance


def _context(instance: dg.DagsterInstance, day: str, at: str) -> dg.ScheduleEvaluationContext:
    when = datetime.fromisoformat(f"{day}T{at}:00").replace(tzinfo=NEW_YORK)
    return dg.build_schedule_context(instance=instance, scheduled_execution_time=when)


def _after_close(instance: dg.DagsterInstance, day: str) -> dg.RunRequest | dg.SkipReason:
    result = after_close_schedule(_context(instance, day, "20:30"))
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def _reference(instance: dg.DagsterInstance, day: str) -> dg.RunRequest | dg.SkipReason:
    result = reference_schedule(_context(instance, day, "11:30"))
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def _catch_up(instance: dg.DagsterInstance, night: str = _NIGHT) -> list[dg.RunRequest]:
    result = catch_up_schedule(_context(instance, night, "02:00"))
    assert isinstance(result, list)
    return result


def _why_not(instance: dg.DagsterInstance, night: str = _NIGHT) -> str:
    result = catch_up_schedule(_context(instance, night, "02:00"))
    assert isinstance(result, dg.SkipReason)
    return result.skip_message or ""


def _asked(requests: Iterable[dg.RunRequest]) -> list[tuple[str | None, list[str]]]:
    return [(request.partition_key, _names(request)) for request in requests]


def _names(request: dg.RunRequest) -> list[str]:
    return [key.to_user_string() for key in request.asset_selection or []]


def _report(instance: dg.DagsterInstance, names: Iterable[str], days: Iterable[str]) -> None:
    for day in days:
        for name in names:
            instance.report_runless_asset_event(dg.AssetMaterialization(name, partition=day))


def test_a_closed_day_is_skipped_and_the_next_session_named(instance: dg.DagsterInstance) -> None:
    skip = _after_close(instance, "2026-11-26")
    assert isinstance(skip, dg.SkipReason)
    assert skip.skip_message == "2026-11-26 is not a trading day; the next is 2026-11-27"


def test_a_day_on_which_nothing_was_collected_is_skipped(instance: dg.DagsterInstance) -> None:
    skip = _after_close(instance, "2026-11-20")
    assert isinstance(skip, dg.SkipReason)
    assert "no raw bars of 2026-11-20" in (skip.skip_message or "")


def test_the_collected_channels_datasets_are_made(instance: dg.DagsterInstance) -> None:
    _report(instance, ["raw_bars"], ["2026-11-20"])
    request = _after_close(instance, "2026-11-20")
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "2026-11-20"
    assert _names(request) == _MINUTE_DATASETS


@pytest.mark.parametrize(
    ("today", "first", "last"),
    [
        ("2026-11-20", "2026-11-13", "2026-11-19"),
        ("2026-11-23", "2026-11-16", "2026-11-20"),
        ("2026-11-27", "2026-11-19", "2026-11-25"),
    ],
)
def test_on_a_trading_day_the_references_of_the_five_before_it_are_requested_in_one_run(
    instance: dg.DagsterInstance, today: str, first: str, last: str
) -> None:
    request = _reference(instance, today)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == last
    assert request.tags["dagster/asset_partition_range_start"] == first
    assert request.tags["dagster/asset_partition_range_end"] == last


def test_on_a_closed_day_no_reference_is_requested_and_the_reason_names_the_next_time(
    instance: dg.DagsterInstance,
) -> None:
    skip = _reference(instance, "2026-11-21")
    assert isinstance(skip, dg.SkipReason)
    assert skip.skip_message == "2026-11-21 is not a trading day; the next is 2026-11-23, 11:30 New York time"


def test_days_without_any_data_get_their_reference_once_it_is_published(
    instance: dg.DagsterInstance,
) -> None:
    assert _asked(_catch_up(instance)) == [(day, [_REFERENCE]) for day in _DAYS[:-1]]


def test_when_nothing_is_stale_the_reason_names_the_days_that_were_checked(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "CATCH_UP_DAYS", 2)
    _report(instance, _ALL, _DAYS[-2:])
    assert _why_not(instance).startswith("looked at 2 trading days, 2020-11-20 to 2020-11-23: nothing")


def test_only_missing_or_older_datasets_and_those_made_from_them_are_requested(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "CATCH_UP_DAYS", 3)
    _report(instance, [name for name in _ALL if name != "bars_1h"], ["2020-11-19"])
    _report(instance, ["raw_second_bars"], ["2020-11-19"])
    _report(instance, [*_ALL, "raw_bars"], ["2020-11-20"])
    _report(instance, [*_ALL, "normalized_bars"], ["2020-11-23"])
    assert _asked(_catch_up(instance)) == [
        ("2020-11-19", ["normalized_second_bars", "bars_1h"]),
        ("2020-11-20", _MINUTE_DATASETS),
        ("2020-11-23", _MINUTE_DATASETS[1:]),
    ]


def test_datasets_are_requested_without_waiting_for_their_reference(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "CATCH_UP_DAYS", 2)
    _report(instance, ["raw_bars"], ["2020-11-20"])
    assert _asked(_catch_up(instance)) == [("2020-11-20", [_REFERENCE]), ("2020-11-20", _MINUTE_DATASETS)]


@pytest.mark.slow
def test_a_reference_older_than_the_days_publication_is_requested_again(instance: dg.DagsterInstance) -> None:
    later = datetime.now(NEW_YORK) + timedelta(days=60)
    day = calendar.completed_sessions(later, 5)[0].isoformat()
    _report(instance, [_REFERENCE], [day])  # today, long before that day
    assert (day, [_REFERENCE]) in _asked(_catch_up(instance, later.date().isoformat()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tags", "busy"),
    [
        ({"dagster/partition": "2020-11-19"}, {"2020-11-19"}),
        (
            {"dagster/asset_partition_range_start": "2020-11-14", "dagster/asset_partition_range_end": "2020-11-19"},
            {"2020-11-16", "2020-11-17", "2020-11-18", "2020-11-19"},
        ),
        ({}, set()),
    ],
)
def test_a_day_that_a_run_is_making_is_not_requested_until_the_run_has_ended(
    instance: dg.DagsterInstance, tags: dict[str, str], busy: set[str]
) -> None:
    run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"), tags=tags)
    assert {request.partition_key for request in _catch_up(instance)} == set(_DAYS[:-1]) - busy
    instance.report_run_failed(run)
    assert {request.partition_key for request in _catch_up(instance)} == set(_DAYS[:-1])


def test_when_nothing_is_requested_the_reason_names_the_days_that_runs_are_making(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "CATCH_UP_DAYS", 2)
    job = build_defs().get_job_def("collect_aggregates")
    instance.create_run_for_job(job, tags={"dagster/partition": "2020-11-20"})
    assert _why_not(instance).endswith("left alone, as runs of them are not finished: 2020-11-20")


@pytest.mark.slow
def test_the_next_night_may_request_the_same_day_again(instance: dg.DagsterInstance) -> None:
    tonight, again, tomorrow = (
        {request.run_key for request in _catch_up(instance, night)} for night in (_NIGHT, _NIGHT, "2020-11-25")
    )
    assert len(tonight) == 9
    assert tonight == again
    assert not tonight & tomorrow


@pytest.mark.slow
def test_after_some_nights_all_datasets_are_made_and_nothing_is_requested(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are carried out by assets that do nothing; no sensor helps."""
    monkeypatch.setattr(schedules, "CATCH_UP_DAYS", 2)
    _report(instance, ["raw_bars"], ["2020-11-23"])
    repository = _stub_repository()
    nights = []
    for _ in range(3):
        with dg.build_schedule_context(
            instance=instance,
            scheduled_execution_time=datetime(2020, 11, 24, 2, tzinfo=NEW_YORK),
            repository_def=repository,
        ) as context:
            requests = catch_up_schedule.evaluate_tick(context).run_requests or []
        for request in requests:
            selected = [dg.AssetKey(name) for name in _names(request)]
            repository.get_job("catch_up").execute_in_process(
                instance=instance, partition_key=request.partition_key, asset_selection=selected
            )
        nights.append(_asked(requests))
    assert nights == [
        [("2020-11-20", [_REFERENCE]), ("2020-11-23", _MINUTE_DATASETS)],
        [("2020-11-20", _MINUTE_DATASETS)],
        [],
    ]


def _stub_repository() -> dg.RepositoryDefinition:
    """The schedules' jobs over assets that do nothing."""

    def nothing() -> None: ...

    assets: list[dg.AssetSpec | dg.AssetsDefinition] = [
        dg.AssetSpec(name, partitions_def=trading_days) for name in _RAW
    ]
    for name, inputs in {_REFERENCE: (), **_INPUTS}.items():
        assets.append(dg.asset(name=name, deps=list(inputs), partitions_def=trading_days)(nothing))
    jobs = [schedules.daily_datasets_job, reference_job, schedules.catch_up_job]
    every = [after_close_schedule, reference_schedule, catch_up_schedule]
    defs = dg.Definitions(assets=assets, jobs=jobs, schedules=every, executor=dg.in_process_executor)
    return defs.get_repository_def()
