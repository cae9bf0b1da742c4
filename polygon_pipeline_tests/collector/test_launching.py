"""Which runs count as lost, and when a collector is started."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.collector.launching import (
    Outcome,
    PastRun,
    Start,
    Wait,
    decide_live,
    quiet_limit,
    session_end,
    why_lost,
)
from polygon_pipeline.collector.lease import TOLERANCE, TTL
from polygon_pipeline.market.calendar import completed_sessions, session
from polygon_pipeline.market.revisions import collected_after
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.past_runs import past_runs

_SECOND = timedelta(seconds=1)

# Which runs are lost


@given(seconds=st.integers(0, 600), released=st.booleans(), has_lease=st.booleans())
def test_a_run_is_lost_when_its_lease_is_not_renewed_or_when_it_has_been_without_one_for_minutes(
    seconds: int, released: bool, has_lease: bool
) -> None:
    own = holding("run", released=released, expires_in=timedelta(days=-1)) if has_lease else None  # by another clock
    cause = why_lost(own, timedelta(seconds=seconds))
    limit = TTL + TOLERANCE if own and not released else timedelta(minutes=3)
    assert (cause is not None) == (timedelta(seconds=seconds) > limit)


# When a collector is started

_SESSION = session(DAY)
assert _SESSION
_OPEN = _SESSION.pre_open
_moments = st.integers(0, 11 * 86_400).map(
    lambda seconds: datetime(2026, 1, 23, tzinfo=UTC) + timedelta(seconds=seconds)
)
_during = st.integers(0, 16 * 3600 + 1199).map(lambda seconds: _OPEN + timedelta(seconds=seconds))
_DAYS = [DAY, DAY - timedelta(days=3), DAY + timedelta(days=1)]


@given(data=st.data(), now=_moments, loaded_at=_moments)
def test_nothing_is_ever_started_beside_an_active_run(data: st.DataObject, now: datetime, loaded_at: datetime) -> None:
    runs = data.draw(past_runs(now, [*_DAYS, *completed_sessions(now, 2)], active=True))
    assert isinstance(decide_live(now, loaded_at, runs), Wait)


@given(data=st.data(), now=_moments, loaded_at=_moments)
def test_while_the_market_is_closed_nothing_starts_and_the_reason_names_the_next_start(
    data: st.DataObject, now: datetime, loaded_at: datetime
) -> None:
    runs = data.draw(past_runs(now, _DAYS, active=False))
    decision = decide_live(now, loaded_at, runs)
    today = session((now - collected_after() - timedelta(hours=5)).date())
    is_open = today is not None and today.pre_open <= now < today.post_close + collected_after()
    assert isinstance(decision, Start) <= is_open
    assert (isinstance(decision, Wait) and "the market is closed; collecting starts" in decision.reason) != is_open


@given(data=st.data(), now=_during, age=st.integers(-3600, 3600))
def test_the_sessions_last_run_decides_and_every_attempt_has_its_own_number(
    data: st.DataObject, now: datetime, age: int
) -> None:
    loaded_at = now - timedelta(seconds=age)
    runs = data.draw(past_runs(now, _DAYS, active=False))
    decision = decide_live(now, loaded_at, runs)
    mine = [run for run in runs if run.session_date == DAY]
    if isinstance(decision, Start):
        assert decision == Start(DAY, len(mine) + 1)
    if not mine:
        assert isinstance(decision, Start)
        return
    last = mine[0]
    assert last.ended_at
    match last.outcome:
        case Outcome.SUCCEEDED | Outcome.STOPPED:
            assert isinstance(decision, Wait)
        case Outcome.INTERRUPTED:
            assert isinstance(decision, Start)
        case Outcome.FAILED_FOR_GOOD:
            since = [run.outcome for run in runs if run.ended_at and run.ended_at > loaded_at]
            worked = {Outcome.SUCCEEDED, Outcome.STOPPED, Outcome.INTERRUPTED}.intersection(since)
            if since.count(Outcome.FAILED_FOR_GOOD) > 1 and not worked:
                assert isinstance(decision, Wait)
            elif now >= last.ended_at + timedelta(minutes=10):
                assert isinstance(decision, Start)
        case _:
            before = {run.outcome for run in mine[1:2]}
            again = before <= {Outcome.FAILED, Outcome.FAILED_FOR_GOOD} and before
            if now >= last.ended_at + timedelta(minutes=10) or not again:
                assert isinstance(decision, Start)


@given(outcomes=st.lists(st.sampled_from([Outcome.FAILED, Outcome.INTERRUPTED]), min_size=1, max_size=25))
def test_a_run_that_keeps_failing_is_started_again_with_increasing_numbers_and_pauses(outcomes: list[Outcome]) -> None:
    now, runs, pauses = _OPEN, list[PastRun](), []
    for attempt, outcome in enumerate(outcomes, start=1):
        asked = now
        while isinstance(decision := decide_live(now, _OPEN, runs), Wait):
            assert re.search(r"the next is due at \d\d:\d\d:\d\d New York$", decision.reason)
            now += _SECOND * 5
        pauses.append(now - asked)
        assert decision == Start(DAY, attempt)
        now += _SECOND
        runs.insert(0, PastRun(DAY, outcome, now))
    assert all(pause <= timedelta(minutes=10, seconds=5) for pause in pauses)
    failures = 0
    for outcome, pause in zip(outcomes, pauses[1:], strict=False):
        failures = failures + 1 if outcome is Outcome.FAILED else 0
        expected = min(30 * 2 ** (failures - 2), 600) if failures > 1 else 0
        assert expected <= pause.total_seconds() <= expected + 5


_REFUSED, _MINUTE = Outcome.FAILED_FOR_GOOD, timedelta(minutes=1)


def _after(*outcomes: Outcome, waited: timedelta) -> Start | Wait:
    """The decision about a session after these runs, a minute apart; Dagster was started with the first one."""
    runs = [PastRun(DAY, outcome, _OPEN + _MINUTE * number) for number, outcome in enumerate(outcomes, start=1)]
    return decide_live(_OPEN + _MINUTE * len(runs) + waited, _OPEN, runs[::-1])


@pytest.mark.parametrize("before", [(), (Outcome.INTERRUPTED,), (Outcome.INTERRUPTED, _REFUSED, _REFUSED, _REFUSED)])
def test_a_refusal_that_is_the_first_or_of_what_worked_before_is_tried_again_after_minutes(
    before: tuple[Outcome, ...],
) -> None:
    assert isinstance(_after(*before, _REFUSED, waited=_MINUTE), Wait)
    assert isinstance(_after(*before, _REFUSED, waited=10 * _MINUTE), Start)


def test_what_was_refused_from_the_start_and_again_is_not_tried_any_more() -> None:
    decision = _after(_REFUSED, _REFUSED, waited=timedelta(hours=5))
    assert isinstance(decision, Wait)
    assert "cannot correct" in decision.reason


# How long a run lasts


def test_a_session_ends_with_its_last_revisions() -> None:
    assert session_end(DAY) == datetime(2026, 1, 27, 1, 20, tzinfo=UTC)
    assert session_end(HALF_DAY) == datetime(2026, 11, 27, 22, 20, tzinfo=UTC)
    with pytest.raises(ValueError, match="2026-01-25 is not a trading day"):
        session_end(date(2026, 1, 25))


@pytest.mark.parametrize(
    ("utc", "seconds"), [("14:29", None), ("14:32", None), ("14:33", 180.0), ("20:59", 180.0), ("21:00", None)]
)
def test_minutes_without_a_bar_are_suspicious_in_regular_hours_only(utc: str, seconds: float | None) -> None:
    assert quiet_limit(datetime.fromisoformat(f"{DAY}T{utc}:00+00:00")) == seconds
