"""One collector a lake: who gets the lease, who loses it, and who is started instead."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta

import msgspec
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline import demo
from polygon_pipeline.collector import launching
from polygon_pipeline.collector.launching import (
    Outcome,
    PastRun,
    Start,
    Wait,
    decide_live,
    why_lost,
)
from polygon_pipeline.collector.lease import (
    CLOCK_TOLERANCE,
    TTL,
    CollectorStatus,
    Holding,
    Lease,
    LeaseHeld,
    LeaseLost,
    read_lease,
    this_machine,
)
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import NOT_FOUND, STORE_ERRORS, Lake, S3Access, open_lake
from polygon_pipeline.market.calendar import completed_sessions, session
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_SECOND = timedelta(seconds=1)


class _WouldWait(Exception):
    """The lease is not free."""


def _refuse_to_wait(_seconds: float) -> None:
    raise _WouldWait


def _holding(
    run: str = "run-old",
    machine: str = "elsewhere/boot",
    pid: int = 1,
    expires_in: timedelta = TTL,
    released: bool = False,
) -> Holding:
    expires_at = datetime.now(UTC) + expires_in
    return Holding(run, f"owner of {run}", machine, pid, expires_at - TTL, expires_at, released=released)


def _put(lake: Lake, holding: Holding) -> None:
    lake.put(layout.LEASE_KEY, msgspec.json.encode(holding))


def _lease(lake: Lake, run: str) -> Lease:
    return Lease(lake, run, f"owner of {run}")


def _holder(lake: Lake) -> str | None:
    holding = read_lease(lake)
    return holding.run if holding and not holding.released else None


@contextlib.contextmanager
def _acquired(lake: Lake, run: str) -> Iterator[Lease]:
    lease = _lease(lake, run)
    lease.acquire(_refuse_to_wait)
    try:
        yield lease
    finally:
        lease.release()


def test_a_lake_without_a_lease_is_taken_at_once_and_shows_its_holder(lake: Lake) -> None:
    assert read_lease(lake) is None
    with _acquired(lake, "run-1") as lease:
        last_bar = datetime(2026, 1, 26, 15, tzinfo=UTC)
        status = CollectorStatus(True, 12, 3.5, last_bar, 4096, 1.5, 2, "the lake is slow")
        lease.renew(status)
        shown = read_lease(lake)
        assert shown
        assert (shown.run, shown.owner, shown.pid) == ("run-1", "owner of run-1", os.getpid())
        assert shown.machine == this_machine()
        assert shown.status == status
        assert shown.expires_at - shown.renewed_at == TTL
        assert not shown.is_free(datetime.now(UTC))
    after = read_lease(lake)
    assert after
    assert after.released
    assert after.status == status


def test_a_holder_that_renews_excludes_the_next_which_is_told_who_it_is(lake: Lake) -> None:
    with _acquired(lake, "run-1") as first:
        second = _lease(lake, "run-2")
        with pytest.raises(LeaseHeld, match=rf"run run-1 on .*\(process {os.getpid()}\)"):
            second.acquire(lambda _: first.renew(CollectorStatus()))
        assert _holder(lake) == "run-1"
        first.renew(CollectorStatus(bars=1))
    assert _holder(lake) is None


def test_a_released_lease_is_free_at_once(lake: Lake) -> None:
    with _acquired(lake, "run-1"):
        pass
    with _acquired(lake, "run-2"):
        assert _holder(lake) == "run-2"


def test_a_lease_that_ran_out_is_taken_over_and_its_holder_told(s3_lake: Lake) -> None:
    with _acquired(s3_lake, "run-1") as first:
        _put(s3_lake, _holding("run-1", expires_in=-CLOCK_TOLERANCE - _SECOND))
        with _acquired(s3_lake, "run-2") as second:
            assert _holder(s3_lake) == "run-2"
            with pytest.raises(LeaseLost, match="run run-2"):
                first.renew(CollectorStatus())
            first.release()  # gives up nothing that is another's
            assert _holder(s3_lake) == "run-2"
            second.renew(CollectorStatus())


def test_a_lease_is_waited_for_until_every_clock_agrees_that_it_ran_out(s3_lake: Lake) -> None:
    dead = _holding(expires_in=-CLOCK_TOLERANCE / 2)
    _put(s3_lake, dead)
    waited = []

    def wait(seconds: float) -> None:
        """Stands for the time that passes: it makes the lease as old as it would be then."""
        waited.append(seconds)
        expired = dead.expires_at - CLOCK_TOLERANCE if len(waited) == 3 else dead.expires_at
        _put(s3_lake, msgspec.structs.replace(dead, expires_at=expired))

    _lease(s3_lake, "run-2").acquire(wait)
    assert len(waited) == 3
    assert _holder(s3_lake) == "run-2"


def test_a_lease_whose_process_died_on_this_machine_is_taken_over_at_once(s3_lake: Lake) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout
    zombie.stdout.read()  # its end; nobody has asked for its exit code yet
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    for number, pid in enumerate((gone.pid, zombie.pid)):
        _put(s3_lake, _holding(machine=this_machine(), pid=pid))
        with _acquired(s3_lake, f"run-{number}"):
            assert _holder(s3_lake) == f"run-{number}"
    zombie.wait()
    # The same number on another machine, or before a reboot, says nothing.
    _put(s3_lake, _holding(pid=gone.pid))
    with pytest.raises(_WouldWait):
        _lease(s3_lake, "run-9").acquire(_refuse_to_wait)


_HOLD = """
import sys
from polygon_pipeline.collector.lease import Lease
from polygon_pipeline.lake.store import open_lake
lease = Lease(open_lake(sys.argv[1], None), "run-1", "owner")
lease.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_local_lake_ends_with_its_process_and_not_before(file_lake: Lake) -> None:
    command = [sys.executable, "-c", _HOLD, file_lake.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LeaseHeld, match=rf"process {holder.pid}"):
            _lease(file_lake, "run-2").acquire(_refuse_to_wait)
        holder.kill()
        holder.wait()
        with _acquired(file_lake, "run-2"):
            assert _holder(file_lake) == "run-2"


@pytest.mark.parametrize("before", ["none", "released", "expired", "unreadable"])
def test_of_many_that_race_for_a_lease_exactly_one_wins(lake: Lake, before: str) -> None:
    rounds = 4
    for _ in range(rounds):
        match before:
            case "none":
                with contextlib.suppress(*NOT_FOUND):
                    obstore.delete(lake.store, layout.LEASE_KEY)
            case "released":
                _put(lake, _holding(released=True))
            case "expired":
                _put(lake, _holding(expires_in=-CLOCK_TOLERANCE - _SECOND))
            case "unreadable":
                lake.put(layout.LEASE_KEY, b"not a lease")
        leases = {f"run-{number}": _lease(lake, f"run-{number}") for number in range(6)}
        start = threading.Barrier(len(leases))
        won: list[str] = []
        lost: list[str] = []

        def race(
            run: str, leases: dict[str, Lease] = leases, start: threading.Barrier = start, won: list[str] = won
        ) -> None:
            start.wait()
            try:
                leases[run].acquire(_refuse_to_wait)
                won.append(run)
            except (_WouldWait, LeaseHeld):
                lost.append(run)  # noqa: B023 it is this round's: the threads are joined below

        threads = [threading.Thread(target=race, args=(run,)) for run in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert len(lost) == len(leases) - 1
        assert _holder(lake) == won[0]
        leases[won[0]].renew(CollectorStatus(bars=1))
        leases[won[0]].release()


# When the store fails


def _behind(proxy: FaultyS3, seaweedfs: SeaweedFS) -> Lake:
    access = seaweedfs.access()
    return open_lake(
        f"s3://{seaweedfs.new_bucket()}/lake", lambda: S3Access(access.session, endpoint_url=proxy.endpoint_url)
    )


@pytest.mark.parametrize("fault", [Fault.LOST_RESPONSE, Fault.RESET, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR])
def test_a_renewal_that_fails_or_whose_response_is_lost_is_no_loss(seaweedfs: SeaweedFS, fault: Fault) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = _behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        lease.acquire(_refuse_to_wait)
        for bars in range(1, 4):
            proxy.order(fault, 1, "PUT", layout.LEASE_KEY)
            with contextlib.suppress(*STORE_ERRORS):
                lease.renew(CollectorStatus(bars=bars))
        assert proxy.counts[fault] == 3
        lease.renew(CollectorStatus())  # perhaps only finds out that it still has it
        lease.renew(CollectorStatus(bars=99))
        shown = read_lease(lake)
        assert shown
        assert (shown.run, shown.status.bars) == ("run-1", 99)
        lease.release()
        assert _holder(lake) is None


def test_a_lease_that_was_taken_over_during_an_outage_is_lost_whatever_response_was_lost(
    seaweedfs: SeaweedFS,
) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = _behind(proxy, seaweedfs)
        first = _lease(lake, "run-1")
        first.acquire(_refuse_to_wait)
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            first.renew(CollectorStatus())
        _put(lake, _holding("run-2"))
        with pytest.raises(LeaseLost, match="run run-2"):
            first.renew(CollectorStatus())


def test_a_lease_is_released_though_the_response_to_its_last_renewal_was_lost(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = _behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        lease.acquire(_refuse_to_wait)
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            lease.renew(CollectorStatus())
        lease.release()
        assert _holder(lake) is None


def test_acquiring_is_tried_again_after_a_lost_response_without_waiting_for_oneself(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = _behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            lease.acquire(_refuse_to_wait)
        lease.acquire(_refuse_to_wait)
        assert _holder(lake) == "run-1"


def test_acquiring_a_local_lake_is_tried_again_after_a_failed_write(file_lake: Lake) -> None:
    in_the_way = file_lake.local_root / layout.LEASE_KEY  # as a full disk would be: the lease cannot be written
    (in_the_way / "x").mkdir(parents=True)
    lease = _lease(file_lake, "run-1")
    with pytest.raises(STORE_ERRORS):  # which a collector tries again
        lease.acquire(_refuse_to_wait)
    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    lease.acquire(_refuse_to_wait)
    assert _holder(file_lake) == "run-1"


# Who is dead

_NOW = datetime(2026, 1, 26, 15, tzinfo=UTC)
_seconds = st.integers(-600, 600).map(lambda seconds: timedelta(seconds=seconds))
_MINUTES = timedelta(minutes=3)


@given(started=_seconds, expires=_seconds, released=st.booleans(), mine=st.booleans())
def test_a_run_is_dead_when_its_lease_ran_out_or_it_has_been_without_one_for_minutes(
    started: timedelta, expires: timedelta, released: bool, mine: bool
) -> None:
    renewed_at, expires_at = _NOW + expires - TTL, _NOW + expires
    owner = "me" if mine else "another"
    holding = Holding("run", owner, "elsewhere/boot", 1, renewed_at, expires_at, released=released)
    cause = why_lost(_NOW, "me", _NOW + started, holding)
    if mine and not released:
        assert (cause is not None) == (expires_at + CLOCK_TOLERANCE < _NOW)
    elif mine:
        assert (cause is not None) == (renewed_at + _MINUTES < _NOW)
    else:
        assert (cause is not None) == (_NOW + started + _MINUTES < _NOW)
        assert cause == why_lost(_NOW, "me", _NOW + started, None)


def test_a_run_whose_process_is_gone_from_this_machine_is_dead_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    now = datetime.now(UTC)
    holding = _holding("run-1", this_machine(), gone.pid)
    assert "is free" in (why_lost(now, "owner of run-1", now, holding) or "")
    alive = _holding("run-1", this_machine(), os.getpid())
    assert why_lost(now, "owner of run-1", now - timedelta(days=1), alive) is None


def test_a_run_that_lives_on_this_machine_is_not_dead_because_the_lake_was_down_for_minutes() -> None:
    holding = _holding("run-1", this_machine(), os.getpid(), expires_in=-timedelta(minutes=5))
    now = datetime.now(UTC)
    assert why_lost(now, "owner of run-1", now - timedelta(hours=1), holding) is None


# Who is started

_DAY = date(2026, 1, 26)
_SESSION = session(_DAY)
assert _SESSION
_OPEN = _SESSION.pre_open
_moments = st.integers(0, 11 * 86_400).map(
    lambda seconds: datetime(2026, 1, 23, tzinfo=UTC) + timedelta(seconds=seconds)
)
_during = st.integers(0, 16 * 3600 + 1199).map(lambda seconds: _OPEN + timedelta(seconds=seconds))
_over = [outcome for outcome in Outcome if outcome is not Outcome.ACTIVE]


@st.composite
def _histories(draw: st.DrawFn, now: datetime, days: list[date], active: bool) -> list[PastRun]:
    """Runs up to now, newest first; at most the newest is active."""
    ages = sorted(draw(st.lists(st.integers(0, 40_000), max_size=6)))
    runs = [
        PastRun(draw(st.sampled_from(days)), draw(st.sampled_from(_over)), now - timedelta(seconds=age)) for age in ages
    ]
    return [PastRun(draw(st.sampled_from(days)), Outcome.ACTIVE, None), *runs] if active else runs


_DAYS = [_DAY, _DAY - timedelta(days=3), _DAY + timedelta(days=1)]


@given(data=st.data(), now=_moments, loaded_at=_moments, is_demo=st.booleans())
def test_nothing_is_ever_started_beside_an_active_run(
    data: st.DataObject, now: datetime, loaded_at: datetime, is_demo: bool
) -> None:
    runs = data.draw(_histories(now, [*_DAYS, *completed_sessions(now, 2)], active=True))
    decision = (demo.decide if is_demo else decide_live)(now, loaded_at, runs)
    assert isinstance(decision, Wait)


@given(data=st.data(), now=_moments, loaded_at=_moments)
def test_a_closed_market_waits_and_says_until_when(data: st.DataObject, now: datetime, loaded_at: datetime) -> None:
    runs = data.draw(_histories(now, _DAYS, active=False))
    decision = decide_live(now, loaded_at, runs)
    today = session((now - launching.REVISIONS - timedelta(hours=5)).date())
    is_open = today is not None and today.pre_open <= now < today.post_close + launching.REVISIONS
    assert isinstance(decision, Start) <= is_open
    assert (isinstance(decision, Wait) and "the market is closed; collecting starts" in decision.reason) != is_open


@given(data=st.data(), now=_during, age=st.integers(-3600, 3600))
def test_the_last_run_of_the_session_decides_and_an_attempt_has_a_number_of_its_own(
    data: st.DataObject, now: datetime, age: int
) -> None:
    loaded_at = now - timedelta(seconds=age)
    runs = data.draw(_histories(now, _DAYS, active=False))
    decision = decide_live(now, loaded_at, runs)
    mine = [run for run in runs if run.session_date == _DAY]
    if isinstance(decision, Start):
        assert decision == Start(_DAY, len(mine) + 1)
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
            assert isinstance(decision, Wait) == (last.ended_at > loaded_at)
        case _:
            if now >= last.ended_at + timedelta(minutes=10) or [run.outcome for run in mine[1:2]] != [Outcome.FAILED]:
                assert isinstance(decision, Start)


@given(outcomes=st.lists(st.sampled_from([Outcome.FAILED, Outcome.INTERRUPTED]), min_size=1, max_size=25))
def test_a_run_that_keeps_failing_is_started_again_with_rising_numbers_and_pauses(outcomes: list[Outcome]) -> None:
    now, runs, pauses = _OPEN, list[PastRun](), []
    for attempt, outcome in enumerate(outcomes, start=1):
        asked = now
        while isinstance(decision := decide_live(now, _OPEN, runs), Wait):
            assert "the next is due" in decision.reason
            now += _SECOND * 5
        pauses.append(now - asked)
        assert decision == Start(_DAY, attempt)
        now += _SECOND
        runs.insert(0, PastRun(_DAY, outcome, now))
    assert all(pause <= timedelta(minutes=10, seconds=5) for pause in pauses)
    failures = 0
    for outcome, pause in zip(outcomes, pauses[1:], strict=False):
        failures = failures + 1 if outcome is Outcome.FAILED else 0
        expected = min(30 * 2 ** (failures - 2), 600) if failures > 1 else 0
        assert expected <= pause.total_seconds() <= expected + 5


@given(data=st.data(), now=_moments)
def test_the_demo_plays_its_sessions_one_after_another_and_rests(data: st.DataObject, now: datetime) -> None:
    runs: list[PastRun] = []
    played = []
    for _ in range(4 * demo.SESSIONS):
        decision = demo.decide(now, now, runs)
        if isinstance(decision, Wait):
            break
        assert decision.attempt == 1 + sum(run.session_date == decision.session_date for run in runs)
        attempts = decision.attempt
        ends = [Outcome.SUCCEEDED, Outcome.STOPPED, *([Outcome.INTERRUPTED, Outcome.FAILED] if attempts == 1 else [])]
        outcome = data.draw(st.sampled_from(ends))
        runs.insert(0, PastRun(decision.session_date, outcome, now))
        if outcome in (Outcome.SUCCEEDED, Outcome.STOPPED):
            played.append(decision.session_date)
    assert played == completed_sessions(now, demo.SESSIONS)
    assert isinstance(decision, Wait)
    assert "are played" in decision.reason


def test_twenty_holders_follow_one_another_and_no_rival_gets_in_between(say: Callable[[str], None], lake: Lake) -> None:
    holders = []
    for number in range(20):
        lease = _lease(lake, f"run-{number}")
        lease.acquire(_refuse_to_wait)
        holders.append(_holder(lake))
        rival = _lease(lake, "rival")
        with pytest.raises((LeaseHeld, _WouldWait)):
            rival.acquire(_refuse_to_wait)
        if lake.is_s3 and number % 2:
            _put(lake, _holding(f"run-{number}", expires_in=-CLOCK_TOLERANCE - _SECOND))
        else:
            lease.release()
    assert holders == [f"run-{number}" for number in range(20)]
    say(f"lease, {lake.uri.split(':')[0]} lake: 20 holders one after another, 20 rivals refused, 0 pairs")
