"""The sensor that lets datasets follow their inputs, and the nightly look, against a real instance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from types import SimpleNamespace

import dagster as dg
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import (
    DAILY_BARS,
    DAILY_DIFFERENCES,
    FOLLOWING,
    NORMALIZED_BARS,
    RAW_BARS,
    REFERENCE_BARS,
    REFERENCE_DAILY_BARS,
)
from polygon_pipeline.datasets.staleness import AS_OF
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import following
from polygon_pipeline.defs.following import datasets_follow_sensor
from polygon_pipeline.defs.partitions import Project, day_tags, days_of
from polygon_pipeline.defs.schedules import catch_up_schedule
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK, trading_days

DAYS = trading_days(date(2025, 1, 2), date(2025, 6, 30))
# What follows without the vendor's day.
MINUTE = [dataset.name for dataset in FOLLOWING if dataset.channel is Channel.MINUTE and not dataset.required]
PROJECT = Project(date(2025, 1, 1))


@pytest.fixture(autouse=True)
def history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_HISTORY_START", "2025-01-01")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


class Ticks:
    """The sensor's ticks against one instance."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None
        self.said = ""

    def next(self) -> list[tuple[date, date, int]]:
        """What this tick asks for: first and last day of each run, and how many datasets."""
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            result = datasets_follow_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        self.said = (result.skip_reason and result.skip_reason.skip_message) or ""
        return [shown(request) for request in result.run_requests or ()]


@pytest.fixture
def ticks(instance: dg.DagsterInstance) -> Ticks:
    return Ticks(instance)


def shown(request: dg.RunRequest) -> tuple[date, date, int]:
    days = days_of(request.tags)
    return days[0], days[-1], len(request.asset_selection or ())


def report(instance: dg.DagsterInstance, names: Sequence[str], days: Sequence[date], as_of: int | None = None) -> None:
    for day in days:
        for name in names:
            metadata = {} if as_of is None else {AS_OF: as_of}
            event = dg.AssetMaterialization(name, partition=day.isoformat(), metadata=metadata)
            instance.report_runless_asset_event(event)


def under_way(instance: dg.DagsterInstance, days: Sequence[date]) -> dg.DagsterRun:
    job = build_defs(PROJECT).get_job_def("collect_aggregates")
    return instance.create_run_for_job(job, tags=day_tags(days))


def test_a_day_whose_raw_bars_changed_is_made_once(instance: dg.DagsterInstance, ticks: Ticks) -> None:
    report(instance, [RAW_BARS.name], DAYS[:1])
    assert ticks.next() == [(DAYS[0], DAYS[0], len(MINUTE))]
    assert ticks.next() == []
    report(instance, MINUTE, DAYS[:1])
    report(instance, [REFERENCE_BARS.name], DAYS[:1])
    assert ticks.next() == [(DAYS[0], DAYS[0], len(MINUTE))]


def test_the_vendors_day_makes_the_daily_bars_again_and_the_differences_and_then_the_day_rests(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    report(instance, [RAW_BARS.name, REFERENCE_BARS.name, *MINUTE], DAYS[:1])
    assert ticks.next() == []
    report(instance, [REFERENCE_DAILY_BARS.name], DAYS[:1])
    assert ticks.next() == [(DAYS[0], DAYS[0], 2)]
    report(instance, [DAILY_BARS.name, DAILY_DIFFERENCES.name], DAYS[:1])
    assert ticks.next() == []
    assert night(instance) == []


def test_the_vendors_day_that_arrived_while_a_day_was_made_makes_its_daily_bars_again(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    report(instance, [RAW_BARS.name], DAYS[:1])
    report(instance, [REFERENCE_DAILY_BARS.name], DAYS[:1])  # after the run that makes the day has looked
    report(instance, [*MINUTE, DAILY_DIFFERENCES.name], DAYS[:1], as_of=1)
    assert ticks.next() == [(DAYS[0], DAYS[0], 2)]


def test_a_run_says_which_channel_it_makes() -> None:
    [request] = following.requests_for({DAYS[0]: [catalog.NORMALIZED_SECOND_BARS]}, "")
    assert request.tags["polygon_pipeline/channel"] == "A"


def test_days_that_follow_each_other_go_in_one_run_and_the_newest_come_first(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    report(instance, [REFERENCE_BARS.name], [*DAYS[:3], *DAYS[5:7]])
    assert ticks.next() == [(DAYS[5], DAYS[6], len(MINUTE)), (DAYS[0], DAYS[2], len(MINUTE))]


def test_a_tick_is_bounded_and_the_next_goes_on(
    instance: dg.DagsterInstance, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_DAYS_PER_TICK", 30)
    monkeypatch.setattr(following, "_RUNS_PER_TICK", 1)
    monkeypatch.setattr(following, "DAYS_PER_RUN", 20)
    report(instance, [REFERENCE_BARS.name], DAYS[:50])
    asked = [ticks.next() for _ in range(4)]
    assert all(len(runs) <= 1 for runs in asked)
    assert {day for runs in asked for first, last, _ in runs for day in trading_days(first, last)} == {*DAYS[:50]}
    assert ticks.next() == []


def test_more_events_than_a_tick_reads_are_read_by_the_next(
    instance: dg.DagsterInstance, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_EVENTS_PER_TICK", 2)
    report(instance, [RAW_BARS.name], DAYS[:3])
    report(instance, [REFERENCE_BARS.name], DAYS[:1])
    asked = [run for _ in range(3) for run in ticks.next()]
    assert {day for first, last, _ in asked for day in trading_days(first, last)} == {*DAYS[:3]}


def test_a_day_that_a_run_is_making_is_left_alone_and_looked_at_when_it_has_ended(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    run = under_way(instance, DAYS[:2])
    report(instance, [RAW_BARS.name], DAYS[:3])
    assert ticks.next() == [(DAYS[2], DAYS[2], len(MINUTE))]
    assert ticks.next() == []
    assert "2 days wait" in ticks.said
    instance.report_run_canceled(run)
    assert ticks.next() == [(DAYS[0], DAYS[1], len(MINUTE))]


def test_bars_that_arrived_while_a_day_was_made_make_it_again(instance: dg.DagsterInstance, ticks: Ticks) -> None:
    report(instance, [RAW_BARS.name], DAYS[:1])
    ticks.next()
    report(instance, [RAW_BARS.name], DAYS[:1])  # while the run is at work, which knew the first event only
    report(instance, MINUTE, DAYS[:1], as_of=1)
    assert ticks.next() == [(DAYS[0], DAYS[0], len(MINUTE))]


def test_a_run_that_made_history_and_datasets_is_not_followed_by_another(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    report(instance, [REFERENCE_BARS.name, *MINUTE], DAYS[:2])
    assert ticks.next() == []


def test_a_failed_day_is_asked_for_again_at_night_and_not_before(instance: dg.DagsterInstance, ticks: Ticks) -> None:
    report(instance, [RAW_BARS.name], DAYS[:1])
    assert ticks.next()  # whatever becomes of it, it leaves nothing made
    assert ticks.next() == []
    assert (DAYS[0], DAYS[0], len(MINUTE)) in night(instance)


def test_days_before_the_first_partition_and_closed_days_are_left_alone(
    instance: dg.DagsterInstance, ticks: Ticks
) -> None:
    report(instance, [RAW_BARS.name], [date(2024, 12, 31), date(2025, 1, 4)])
    assert ticks.next() == []
    assert not night(instance)


def test_datasets_of_seconds_follow_only_where_they_are_collected(
    instance: dg.DagsterInstance, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(instance, ["raw_second_bars"], DAYS[:1])
    assert ticks.next() == []
    monkeypatch.setenv("POLYGON_CHANNELS", "AM,A")
    assert Ticks(instance).next() == [(DAYS[0], DAYS[0], 1)]


def night(instance: dg.DagsterInstance) -> list[tuple[date, date, int]]:
    """What the nightly look asks for, on a night long after, when no history is asked for any more."""
    when = datetime(2025, 9, 9, 2, tzinfo=NEW_YORK)
    result = catch_up_schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=when))
    if isinstance(result, dg.SkipReason):
        return []
    assert isinstance(result, list)
    return [run for run in map(shown, result) if run[0] < date(2025, 8, 1)]


def test_the_nightly_look_is_over_all_days_and_asks_for_what_is_missing_or_older(
    instance: dg.DagsterInstance,
) -> None:
    report(instance, [RAW_BARS.name, *MINUTE], DAYS[:60])
    assert night(instance) == []
    report(instance, [REFERENCE_BARS.name], DAYS[10:70])
    assert night(instance) == [
        (DAYS[52], DAYS[69], len(MINUTE)),
        (DAYS[10], DAYS[51], len(MINUTE)),
    ]
    report(instance, [NORMALIZED_BARS.name], DAYS[:1])
    assert (DAYS[0], DAYS[0], len(MINUTE) - 1) in night(instance)


def test_the_nightly_look_leaves_days_alone_that_a_run_is_making(instance: dg.DagsterInstance) -> None:
    report(instance, [RAW_BARS.name], DAYS[:3])
    under_way(instance, DAYS[1:2])
    assert night(instance) == [(DAYS[2], DAYS[2], len(MINUTE)), (DAYS[0], DAYS[0], len(MINUTE))]


def test_the_nightly_look_asks_for_history_that_is_out_and_missing(instance: dg.DagsterInstance) -> None:
    when = datetime(2025, 9, 9, 2, tzinfo=NEW_YORK)  # the flat file of the 8th is not published then
    result = catch_up_schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=when))
    assert isinstance(result, list)
    [request] = result
    assert request.asset_selection == [dg.AssetKey(REFERENCE_BARS.name), dg.AssetKey(REFERENCE_DAILY_BARS.name)]
    assert shown(request)[:2] == (date(2025, 8, 25), date(2025, 9, 5))


def test_today_is_made_every_twenty_minutes_at_the_most_while_its_session_runs(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(NEW_YORK)
    soon = now + timedelta(minutes=19)  # perhaps after midnight
    under_way = SimpleNamespace(date=soon.date(), begin=now)
    monkeypatch.setattr(following, "current_or_next_session", lambda _: under_way)
    assert following._just_made(instance, soon) == set()
    report(instance, [NORMALIZED_BARS.name], [soon.date(), soon.date() - timedelta(days=1)])
    assert following._just_made(instance, soon) == {soon.date()}
    assert following._just_made(instance, now + timedelta(minutes=21)) == set()
    under_way.begin = soon + timedelta(hours=1)
    assert following._just_made(instance, soon) == set(), "what came last is not held back"
