"""One collector a lake: a lease with an expiry, renewed while the collector runs, with its live status inside.

Belongs here: taking, renewing and losing the lease, and judging from outside whether its holder is alive. Does not
belong here: what a collector does when it has lost it (collector.collector), or who is started instead (launching).

On S3 the lease is one object, written under a condition only: it did not exist, or it is the version last read. On
a local lake an OS lock beside it excludes others, and ends with the process. A lease that cannot be renewed because
the store is down is not lost: no other collector can take it either. It is lost when another has taken it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import NOT_FOUND, Lake

TTL = timedelta(seconds=60)
RENEW_SECONDS = 15.0
# Machines' clocks differ: who takes a lease over waits this much longer than its expiry.
CLOCK_TOLERANCE = timedelta(seconds=15)
_TRIES = 5


class LeaseHeld(Exception):
    """Another collector is alive."""


class LeaseLost(Exception):
    """Another collector has taken over."""


class CollectorStatus(msgspec.Struct, frozen=True):
    """How the holder does. Times in UTC; last_bar: when the last published frame arrived; bars: published so far."""

    connected: bool = False
    bars: int = 0
    bars_per_second: float = 0.0
    last_bar: datetime | None = None
    backlog_bytes: int = 0
    unpublished_seconds: float = 0.0
    gaps: int = 0
    store_fault: str | None = None


class Holding(msgspec.Struct, frozen=True):
    """The lease's content. owner: who may be asked about the run (Dagster's run id); machine: host and boot."""

    run: str
    owner: str
    machine: str
    pid: int
    renewed_at: datetime
    expires_at: datetime
    status: CollectorStatus = CollectorStatus()
    released: bool = False
    process_started: int | None = None

    def is_free(self, now: datetime) -> bool:
        """Whether the next collector may take it: it was released, or its holder is gone.

        Of a process of this machine that is certain, so an outage of the store, in which no lease can be renewed, is
        not taken for its death. Of another machine's there is only the expiry.
        """
        if self.released:
            return True
        if self.machine == this_machine():
            started = process_start(self.pid)
            return started is None or self.process_started not in (None, started)
        return now > self.expires_at + CLOCK_TOLERANCE


def read_lease(lake: Lake) -> Holding | None:
    """Who holds the lake's lease, or held it last; None if there never was a holder."""
    content = lake.get(layout.LEASE_KEY)
    return _decode(content) if content else None


def live_run(lake: Lake) -> str | None:
    """The run that collects into the lake now, or None. Raises the store's errors."""
    holding = read_lease(lake)
    return None if holding is None or holding.is_free(datetime.now(UTC)) else holding.run


class Lease:
    """A collector's side of it. Not thread-safe. The store's errors pass through: the caller tries again."""

    def __init__(self, lake: Lake, run: str, owner: str) -> None:
        self._lake = lake
        self._run = run
        self._owner = owner
        self._status = CollectorStatus()
        self._etag: str | None = None
        self._lock: int | None = None

    def acquire(self, wait: Callable[[float], None] = time.sleep) -> None:
        """Takes the lease, waiting for a dead holder's to expire. Raises LeaseHeld where the holder is alive."""
        if not self._lake.is_s3:
            self._acquire_lock()
            self.renew(CollectorStatus())
            return
        seen: Holding | None = None
        while True:
            holding, self._etag = self._read()
            mine = holding is not None and holding.run == self._run  # taken before, but the answer was lost
            if holding is None or mine or holding.is_free(datetime.now(UTC)):
                with contextlib.suppress(LeaseLost):  # another was quicker: look at it
                    self.renew(CollectorStatus())
                    return
                continue
            if seen is not None and holding.renewed_at != seen.renewed_at:
                raise LeaseHeld(_held(self._lake.uri, holding))
            seen = holding
            wait(2.0)

    def renew(self, status: CollectorStatus) -> None:
        """Extends the lease and shows the status. Raises LeaseLost when another has it."""
        self._status = status
        self._write(released=False)

    def release(self) -> None:
        """Gives the lease up, so that the next collector need not wait."""
        with contextlib.suppress(LeaseLost):
            self._write(released=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, released: bool) -> None:
        now = datetime.now(UTC)
        pid = os.getpid()
        content = msgspec.json.encode(
            Holding(
                run=self._run,
                owner=self._owner,
                machine=this_machine(),
                pid=pid,
                renewed_at=now,
                expires_at=now + TTL,
                status=self._status,
                released=released,
                process_started=process_start(pid),
            )
        )
        if not self._lake.is_s3:
            if self._lock is not None:
                self._lake.put(layout.LEASE_KEY, content)
            return
        for _ in range(_TRIES):
            mode = "create" if self._etag is None else {"e_tag": self._etag}
            try:
                result = obstore.put(self._lake.store, layout.LEASE_KEY, content, mode=mode)  # type: ignore[arg-type]
            except (PreconditionError, AlreadyExistsError, *NOT_FOUND):
                holding, etag = self._read()
                if holding is None or (holding.run, holding.owner) != (self._run, self._owner):
                    raise LeaseLost(_held(self._lake.uri, holding) if holding else "the lease was removed") from None
                self._etag = etag  # our own, of a write whose answer was lost
                continue
            self._etag = result["e_tag"]
            return
        raise LeaseLost(f"{self._lake.uri} refuses every renewal of this collector's own lease")

    def _acquire_lock(self) -> None:
        if self._lock is not None:
            return
        self._lock = os.open(self._lake.local_root / "lease.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            holding = read_lease(self._lake)
            raise LeaseHeld(_held(self._lake.uri, holding) if holding else f"{self._lake.uri} is locked") from None

    def _read(self) -> tuple[Holding | None, str | None]:
        try:
            result = obstore.get(self._lake.store, layout.LEASE_KEY)
        except NOT_FOUND:
            return None, None
        return _decode(bytes(result.bytes())), result.meta["e_tag"]


def _decode(content: bytes) -> Holding | None:
    """An unreadable lease has no holder."""
    try:
        return msgspec.json.decode(content, type=Holding)
    except ValueError:
        return None


def _held(uri: str, holding: Holding) -> str:
    return (
        f"Another collector holds the lease of {uri}: run {holding.run} on {holding.machine.split('/')[0]} (process "
        f"{holding.pid}), renewed {holding.renewed_at:%Y-%m-%dT%H:%M:%SZ}. Two collectors would evict each other."
    )


def this_machine() -> str:
    """The host's name and boot: a process id means something within one boot of one host only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown-boot"
    return f"{socket.gethostname()}/{boot}"


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot (0 where the system does not say), or None if there
    is none. The id alone could be another's by now; a killed process keeps it until its parent has looked."""
    try:
        os.kill(pid, 0)
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except OSError:  # another user's process, or no /proc
        return 0
    return None if state == "Z" else int(fields[18])
