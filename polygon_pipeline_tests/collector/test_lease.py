"""One collector per lake: acquiring, renewing, losing and releasing the lease."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import msgspec
import obstore
import pytest

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
from polygon_pipeline.lake.store import NOT_FOUND, STORE_ERRORS, Lake
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3, lake_behind
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_SECOND = timedelta(seconds=1)


class _WouldWait(Exception):
    """The lease is not free."""


def _refuse_to_wait(_seconds: float) -> None:
    raise _WouldWait


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


def test_an_expired_lease_is_taken_over_and_its_holder_finds_out(s3_lake: Lake) -> None:
    with _acquired(s3_lake, "run-1") as first:
        _put(s3_lake, holding("run-1", expires_in=-CLOCK_TOLERANCE - _SECOND))
        with _acquired(s3_lake, "run-2") as second:
            assert _holder(s3_lake) == "run-2"
            with pytest.raises(LeaseLost, match="run run-2"):
                first.renew(CollectorStatus())
            first.release()  # gives up nothing that is another's
            assert _holder(s3_lake) == "run-2"
            second.renew(CollectorStatus())


def test_an_expired_lease_is_taken_over_only_after_the_tolerance_for_other_clocks(s3_lake: Lake) -> None:
    dead = holding(expires_in=-CLOCK_TOLERANCE / 2)
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
    zombie.stdout.read()  # its end; its exit code has not been asked for yet
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    for number, pid in enumerate((gone.pid, zombie.pid)):
        _put(s3_lake, holding(machine=this_machine(), pid=pid))
        with _acquired(s3_lake, f"run-{number}"):
            assert _holder(s3_lake) == f"run-{number}"
    zombie.wait()
    # The same number on another machine, or before a reboot, says nothing.
    _put(s3_lake, holding(pid=gone.pid))
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
def test_exactly_one_of_many_concurrent_runs_acquires_the_lease(lake: Lake, before: str) -> None:
    rounds = 4
    for _ in range(rounds):
        match before:
            case "none":
                with contextlib.suppress(*NOT_FOUND):
                    obstore.delete(lake.store, layout.LEASE_KEY)
            case "released":
                _put(lake, holding(released=True))
            case "expired":
                _put(lake, holding(expires_in=-CLOCK_TOLERANCE - _SECOND))
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
        lease.acquire(_refuse_to_wait)
        holders.append(_holder(lake))
        rival = _lease(lake, "rival")
        with pytest.raises((LeaseHeld, _WouldWait)):
            rival.acquire(_refuse_to_wait)
        if lake.is_s3 and number % 2:
            _put(lake, holding(f"run-{number}", expires_in=-CLOCK_TOLERANCE - _SECOND))
        else:
            lease.release()
    assert holders == [f"run-{number}" for number in range(20)]
    say(f"lease, {lake.uri.split(':')[0]} lake: 20 holders one after another, 20 rivals refused, 0 pairs")
