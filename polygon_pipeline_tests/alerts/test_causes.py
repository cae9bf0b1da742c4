"""What counts as wrong: failed runs, the collector's lease, days, disks."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import msgspec
import pytest

from polygon_pipeline.alerts import causes
from polygon_pipeline.alerts.causes import DEAD_AFTER, DISK_LIMIT_BYTES, EndedRun, Failure
from polygon_pipeline.collector.lease import CollectorStatus, Holding
from polygon_pipeline.datasets.day_state import DayState, DayStatus
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.nights import first_night

NOW = datetime(2026, 1, 26, 18, tzinfo=UTC)  # 13:00 New York, a Monday
NIGHT = datetime(2026, 1, 26, 4, tzinfo=UTC)
FRESH = timedelta(seconds=20)
DAYS = [date(2026, 1, 20), date(2026, 1, 21), date(2026, 1, 22)]


def _run(number: int, succeeded: bool, job: str = "datasets", assets: str = "", days: list[date] = DAYS) -> EndedRun:
    return EndedRun(f"{number:08d}-run", job, frozenset(assets.split()), frozenset(days), succeeded)


def _texts(*ended: EndedRun) -> list[str]:
    return [cause.text for cause in causes.of_failures(causes.failures_after({}, ended, NOW))]


# Runs


def test_a_run_that_failed_is_named_with_its_days() -> None:
    assert _texts(_run(1, False, assets="daily_bars")) == [
        "Run 00000001 of daily_bars failed (2026-01-20 to 2026-01-22). Dagster has its error."
    ]
    assert _texts(_run(1, False, "housekeeping", days=[])) == [
        "Run 00000001 of housekeeping failed. Dagster has its error."
    ]


def test_a_run_that_fails_again_is_the_same_cause() -> None:
    failures = causes.failures_after({}, [_run(1, False), _run(2, False)], NOW)
    assert [failure.run_id for failure in failures.values()] == ["00000002-run"]


@pytest.mark.parametrize(
    ("then", "left"),
    [
        ([_run(2, True)], 0),
        ([_run(2, True, days=DAYS[:1]), _run(3, True, days=DAYS[1:])], 0),
        ([_run(2, True, days=DAYS[:1])], 1),
        ([_run(2, True, "reference")], 1),
        ([_run(2, True, days=[date(2026, 1, 23)])], 1),
        ([_run(2, True), _run(3, False)], 1),
    ],
)
def test_a_failure_is_over_when_all_its_days_are_made(then: list[EndedRun], left: int) -> None:
    assert len(_texts(_run(1, False), *then)) == left


@pytest.mark.parametrize(("made", "left"), [("a", 1), ("a b", 0), ("a b c", 0), ("", 1)])
def test_assets_that_failed_are_made_by_any_run_that_makes_them_all(made: str, left: int) -> None:
    assert len(_texts(_run(1, False, assets="a b"), _run(2, True, "assets", made))) == left


def test_a_storm_of_failures_is_remembered_in_bounded_memory() -> None:
    runs = [_run(number, False, f"job-{number}") for number in range(1000)]
    assert len(causes.failures_after({}, runs, NOW)) == 20


def test_a_failed_run_of_many_days_is_remembered_by_its_newest_and_told_with_all() -> None:
    days = trading_days(date(2026, 1, 5), date(2026, 5, 29))
    failed, newest = _run(1, False, days=days), _run(2, True, days=days[-20:])
    assert "(2026-01-05 to 2026-05-29)" in _texts(failed)[0]
    assert len(msgspec.json.encode(causes.failures_after({}, [failed], NOW))) < 600
    assert _texts(failed, newest) == []


def test_a_collector_that_failed_is_forgiven_once_another_collects() -> None:
    failures = {"run:c": Failure("first", "collect_aggregates", set(), {DAY}, NOW)}

    def left(lease: Holding | None) -> bool:
        return bool(causes.without_replaced(failures, "collect_aggregates", lease))

    later = NOW + timedelta(minutes=1)
    assert not left(holding(owner="second", now=later))
    assert left(None)
    assert left(holding(owner="first", now=later))
    assert left(holding(owner="second", released=True, now=later))
    assert left(holding(owner="second", now=NOW - timedelta(minutes=1))), "it was renewed before"


# The collector


def _lease(released: bool = False, **status: object) -> Holding:
    return msgspec.structs.replace(holding(released=released, now=NOW), status=CollectorStatus(**status))  # type: ignore[arg-type]


def _keys(lease: Holding | None, unchanged: timedelta = FRESH, is_live: bool = True, now: datetime = NOW) -> list[str]:
    return [cause.key for cause in causes.of_collector(lease, unchanged, is_live, now)]


def test_a_collector_that_renews_its_lease_and_publishes_is_well() -> None:
    assert _keys(_lease(connected=True, unpublished_seconds=60)) == []


def test_nobody_at_work_is_a_cause_at_night_where_the_market_trades_then(monkeypatch: pytest.MonkeyPatch) -> None:
    evening = datetime(2026, 12, 7, 3, tzinfo=UTC)  # Sunday, 22:00
    assert _keys(_lease(released=True), now=evening) == []
    first_night(monkeypatch, "2026-12-07")
    assert _keys(_lease(released=True), now=evening) == ["collector:none"]


def test_a_lease_that_is_not_renewed_and_not_given_up_is_a_dead_collectors_at_any_time() -> None:
    for now in (NOW, NIGHT):
        assert _keys(_lease(), DEAD_AFTER + FRESH, now=now) == ["collector:dead"]
    assert _keys(_lease(), DEAD_AFTER) == []


def test_nobody_at_work_is_a_cause_while_a_live_session_runs() -> None:
    assert _keys(_lease(released=True)) == ["collector:none"]
    assert _keys(_lease(released=True), now=NIGHT) == []
    assert _keys(_lease(released=True), is_live=False) == []
    assert _keys(None) == [], "nobody ever collected into this lake"


def test_an_eviction_and_a_backlog_are_told_by_the_collector_itself() -> None:
    assert _keys(_lease(evicted=True)) == ["collector:evicted"]
    assert _keys(_lease(unpublished_seconds=301, backlog_bytes=5)) == ["collector:backlog"]


# Days


def test_a_day_is_due_at_noon_of_the_next_and_not_where_it_ended_before_anybody_looked() -> None:
    noon = datetime(2026, 1, 27, 17, tzinfo=UTC)
    before = datetime(2026, 1, 26, 20, tzinfo=UTC)
    assert causes.days_due(before, noon - timedelta(seconds=1)) == []
    assert causes.days_due(before, noon) == [DAY]
    assert causes.days_due(noon - timedelta(hours=1), noon) == []
    friday, monday = date(2026, 1, 23), datetime(2026, 1, 26, 17, tzinfo=UTC)
    assert causes.days_due(monday - timedelta(days=4), monday) == [date(2026, 1, 22), friday]


@pytest.mark.parametrize("state", DayState)
def test_a_day_is_well_that_is_complete_or_final(state: DayState) -> None:
    cause = causes.of_day(DAY, DayStatus(state, "not known, New York: 10:00-10:05", True))
    assert (cause is None) == (state in (DayState.COMPLETE, DayState.FINAL))
    if cause:
        assert cause.key == "day:2026-01-26"
        assert "10:00-10:05" in cause.text


# Disks


def test_a_disk_that_is_nearly_full_is_well_again_only_with_some_room() -> None:
    def keys(left: float, *told: str) -> list[str]:
        return [cause.key for cause in causes.of_disks({"journal": int(left * DISK_LIMIT_BYTES)}, told)]

    assert keys(1.1) == []
    assert keys(0.9) == ["disk:journal"]
    assert keys(1.1, "disk:journal") == ["disk:journal"]
    assert keys(1.3, "disk:journal") == []
