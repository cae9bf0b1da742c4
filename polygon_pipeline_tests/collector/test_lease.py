"""One collector per lake: acquiring, renewing, losing and releasing the lease."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import msgspec
import obstore
import pytest

from polygon_pipeline.collector.lease import (
    TOLERANCE,
    TTL,
    CollectorStatus,
    Holding,
    Lease,
    LeaseHeld,
    LeaseLost,
    Watch,
    read_lease,
    this_machine,
)
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import NOT_FOUND, STORE_ERRORS
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.documented_s3 import documented_s3
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3, lake_behind
from polygon_pipeline_tests.support.leases import Clock, holding
from polygon_pipeline_tests.support.s3_server import SeaweedFS


class _WouldWait(Exception):
    """The lease is not free."""


def _refuse_to_wait(_seconds: float) -> None:
    raise _WouldWait


def _put(lake: Lake, holding: Holding) -> None:
    lake.put(layout.LEASE_KEY, msgspec.json.encode(holding))


def _lease(lake: Lake, run: str, clock: Callable[[], float] = time.monotonic) -> Lease:
    return Lease(lake, run, f"owner of {run}", clock)


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


def test_a_free_lease_is_acquired_at_once_and_shows_its_holder(lake: Lake) -> None:
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


def test_a_lease_that_is_renewed_excludes_other_runs_and_the_error_names_the_holder(lake: Lake) -> None:
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


def test_a_lease_that_is_seen_not_to_be_renewed_is_taken_over_and_its_holder_finds_out(s3_lake: Lake) -> None:
    clock = Clock()
    with _acquired(s3_lake, "run-1") as first:
        second = _lease(s3_lake, "run-2", clock)
        second.acquire(clock.wait)
        assert _holder(s3_lake) == "run-2"
        assert timedelta(seconds=clock.now - 1000) > TTL + TOLERANCE
        with pytest.raises(LeaseLost, match="run run-2"):
            first.renew(CollectorStatus())
        first.release()  # gives up nothing that is another's
        assert _holder(s3_lake) == "run-2"
        second.renew(CollectorStatus())
        second.release()


def test_the_lease_of_a_run_that_was_ended_for_its_silence_is_taken_over_as_soon_as_the_run_can_know_it(
    s3_lake: Lake,
) -> None:
    clock, held = Clock(), holding("run-1")
    _put(s3_lake, held)
    _lease(s3_lake, "run-2", clock).acquire(clock.wait, was_lost=lambda found: found == held)
    assert _holder(s3_lake) == "run-2"
    assert 10 < clock.now - 1000 < 15


def test_a_run_that_was_ended_for_its_silence_and_renews_again_is_alive(s3_lake: Lake) -> None:
    clock, held = Clock(), holding("run-1")
    _put(s3_lake, held)

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        _put(s3_lake, msgspec.structs.replace(held, renewed_at=held.renewed_at + timedelta(seconds=15)))

    with pytest.raises(LeaseHeld, match="run run-1"):
        _lease(s3_lake, "run-2", clock).acquire(wait, was_lost=lambda found: found == held)


def test_a_standby_waits_for_as_long_as_the_holder_renews_and_takes_over_80_s_after_it_stopped(s3_lake: Lake) -> None:
    clock, held, stops = Clock(), holding("run-1"), 1000 + 3600

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        if clock.now <= stops and clock.now % 15 < seconds:
            _put(s3_lake, msgspec.structs.replace(held, renewed_at=held.renewed_at + timedelta(seconds=clock.now)))

    _put(s3_lake, held)
    _lease(s3_lake, "run-2", clock).acquire(wait, standby=True)
    assert _holder(s3_lake) == "run-2"
    assert timedelta(seconds=clock.now - stops + 15) > TTL + TOLERANCE, "not before it was seen to be silent"
    assert clock.now - stops < 80


def test_who_only_waited_for_a_lease_releases_nothing(lake: Lake) -> None:
    with _acquired(lake, "run-1"):
        waiting = _lease(lake, "run-2")
        with pytest.raises(_WouldWait):
            waiting.acquire(_refuse_to_wait, standby=True)
        waiting.release()
        assert _holder(lake) == "run-1"


def test_the_standby_of_a_local_lake_takes_over_when_the_lock_is_free(file_lake: Lake) -> None:
    first = _lease(file_lake, "run-1")
    first.acquire(_refuse_to_wait)
    second = _lease(file_lake, "run-2")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            first.release()

    second.acquire(wait, standby=True)
    assert (_holder(file_lake), len(waited)) == ("run-2", 3)
    second.release()


@pytest.mark.parametrize("ahead", [timedelta(days=-1), -TTL, TTL, timedelta(days=1)])
@pytest.mark.fault("clock steps")
def test_a_lease_that_is_renewed_is_nobody_elses_whatever_the_clock_of_its_holder_says(
    ahead: timedelta, s3_lake: Lake
) -> None:
    clock, held = Clock(), holding("run-1", expires_in=ahead)
    _put(s3_lake, held)
    with pytest.raises(_WouldWait):
        _lease(s3_lake, "run-2").acquire(_refuse_to_wait)

    def wait(seconds: float) -> None:
        clock.wait(seconds)
        if clock.now > 1030:
            _put(s3_lake, msgspec.structs.replace(held, renewed_at=held.renewed_at + timedelta(seconds=15)))

    with pytest.raises(LeaseHeld, match="run run-1"):
        _lease(s3_lake, "run-2", clock).acquire(wait)


def test_a_process_that_is_not_seen_says_nothing_of_a_lease_and_a_run_that_is_over_all(s3_lake: Lake) -> None:
    """Another container of this host has processes of its own."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _put(s3_lake, holding("run-1", machine=this_machine(), pid=gone.pid))
    lease = _lease(s3_lake, "run-2")
    with pytest.raises(_WouldWait):
        lease.acquire(_refuse_to_wait)
    lease.acquire(_refuse_to_wait, ended={"run-1"})
    assert _holder(s3_lake) == "run-2"
    lease.release()


def test_a_lease_that_the_store_did_not_take_again_in_time_is_not_confirmed(lake: Lake) -> None:
    clock = Clock()
    lease = _lease(lake, "run-1", clock)
    confirmed = [lease.is_confirmed]
    lease.acquire(_refuse_to_wait)
    confirmed.append(lease.is_confirmed)
    clock.wait(TTL.total_seconds())
    confirmed.append(lease.is_confirmed)
    lease.renew(CollectorStatus())
    confirmed.append(lease.is_confirmed)
    # The lock of a local lake lasts as long as the process.
    assert confirmed == [False, True, not lake.is_s3, True]
    lease.release()


def test_a_watch_counts_only_what_it_saw_and_begins_anew_after_a_change_or_when_it_could_not_look() -> None:
    clock = Clock()
    watch = Watch(clock)

    def after(seconds: float, what: object) -> float:
        clock.wait(seconds)
        return watch.unchanged("name", what).total_seconds()

    assert [after(20, "a"), after(20, "a"), after(60, "a")] == [0, 20, 80]
    assert [after(20, "b"), after(20, "b"), after(61, "b"), after(20, "b")] == [0, 20, 0, 20]
    assert watch.unchanged("another name", "b") == timedelta(0)


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


@pytest.mark.parametrize("before", ["none", "released", "ended", "unreadable"])
def test_exactly_one_of_many_concurrent_runs_acquires_the_lease(lake: Lake, before: str) -> None:
    rounds = 4
    for _ in range(rounds):
        match before:
            case "none":
                with contextlib.suppress(*NOT_FOUND):
                    obstore.delete(lake.store, layout.LEASE_KEY)
            case "released":
                _put(lake, holding(released=True))
            case "ended":
                _put(lake, holding())
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
                leases[run].acquire(_refuse_to_wait, ended={"run-old"})
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


@pytest.mark.parametrize("fault", [Fault.LOST_RESPONSE, Fault.RESET, Fault.SLOW_DOWN, Fault.INTERNAL_ERROR])
def test_a_renewal_that_fails_or_whose_response_is_lost_does_not_lose_the_lease(
    seaweedfs: SeaweedFS, fault: Fault
) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        lease.acquire(_refuse_to_wait)
        for bars in range(1, 4):
            proxy.order(fault, 1, "PUT", layout.LEASE_KEY)
            with contextlib.suppress(*STORE_ERRORS):
                lease.renew(CollectorStatus(bars=bars))
        assert proxy.counts[fault] == 3
        lease.renew(CollectorStatus())  # it may only find out that it still holds it
        lease.renew(CollectorStatus(bars=99))
        shown = read_lease(lake)
        assert shown
        assert (shown.run, shown.status.bars) == ("run-1", 99)
        lease.release()
        assert _holder(lake) is None


def test_a_lease_that_was_taken_over_during_an_outage_is_lost_also_after_a_lost_response(
    seaweedfs: SeaweedFS,
) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        first = _lease(lake, "run-1")
        first.acquire(_refuse_to_wait)
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            first.renew(CollectorStatus())
        _put(lake, holding("run-2"))
        with pytest.raises(LeaseLost, match="run run-2"):
            first.renew(CollectorStatus())


def test_a_lease_is_released_though_the_response_to_its_last_renewal_was_lost(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        lease.acquire(_refuse_to_wait)
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            lease.renew(CollectorStatus())
        lease.release()
        assert _holder(lake) is None


def test_acquiring_is_retried_after_a_lost_response_without_waiting_for_its_own_lease(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        lease = _lease(lake, "run-1")
        proxy.order(Fault.LOST_RESPONSE, 1, "PUT", layout.LEASE_KEY)
        with contextlib.suppress(*STORE_ERRORS):
            lease.acquire(_refuse_to_wait)
        lease.acquire(_refuse_to_wait)
        assert _holder(lake) == "run-1"


@pytest.mark.fault("S3: racing writes (409)")
def test_a_write_that_met_another_is_tried_again_and_loses_no_lease() -> None:
    with documented_s3() as s3:
        lease = _lease(s3.lake(), "run-1")
        s3.conflicts = 1
        lease.acquire(_refuse_to_wait)
        s3.conflicts = 1
        lease.renew(CollectorStatus())
        s3.conflicts = 1
        lease.release()
        assert s3.conflicts == 0
        assert _holder(s3.lake()) is None


def test_acquiring_a_local_lake_is_retried_after_a_failed_write(file_lake: Lake) -> None:
    in_the_way = file_lake.local_root / layout.LEASE_KEY  # as a full disk would be: the lease cannot be written
    (in_the_way / "x").mkdir(parents=True)
    lease = _lease(file_lake, "run-1")
    with pytest.raises(STORE_ERRORS):  # which a collector tries again
        lease.acquire(_refuse_to_wait)
    (in_the_way / "x").rmdir()
    in_the_way.rmdir()
    lease.acquire(_refuse_to_wait)
    assert _holder(file_lake) == "run-1"


def test_of_twenty_holders_in_turn_none_has_a_second_holder_beside_it(say: Callable[[str], None], lake: Lake) -> None:
    holders = []
    for number in range(20):
        lease = _lease(lake, f"run-{number}")
        lease.acquire(_refuse_to_wait, ended={f"run-{number - 1}"})
        holders.append(_holder(lake))
        rival = _lease(lake, "rival")
        with pytest.raises((LeaseHeld, _WouldWait)):
            rival.acquire(_refuse_to_wait)
        if number % 2 or not lake.is_s3:
            lease.release()
    assert holders == [f"run-{number}" for number in range(20)]
    say(f"lease, {lake.uri.split(':')[0]} lake: 20 holders one after another, 20 rivals refused, 0 pairs")
