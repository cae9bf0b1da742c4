"""One collector a lake: a lease with an expiry, renewed while the collector runs, with its live status inside.

Belongs here: taking, renewing and losing the lease, and judging from outside whether its holder is alive. Does not
belong here: what a collector does when it has lost it (collector.collector), or who is started instead (launching).

On S3 the lease is one object, written under a condition only: it did not exist, or it is the version last read. On
a local lake an OS lock beside it excludes others, and ends with the process. A lease that cannot be renewed because
the store is down is not lost: it is lost when another has taken it.

Another's lease is judged by the renewals that are seen, on one's own clock (Watch): wall clocks differ between
machines. Who has seen one for long enough may tell another, which sees that it is still the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import NOT_FOUND
from polygon_pipeline.lake.lag import LagSummary, LatenessSummary
from polygon_pipeline.lake.ledger import Watermark
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel

TTL = timedelta(seconds=60)
RENEW_SECONDS = 15.0
# Who takes a lease over waits this much longer than it lasts: clocks run differently fast, and a renewal takes time.
TOLERANCE = timedelta(seconds=15)
_TRIES = 5
# A holder that is only cut off from the store learns from Dagster that its run was ended, and closes its stream.
_LEARNS_OF_ITS_END = timedelta(seconds=10)
# How often who waits for a lease looks at it.
_LOOK_SECONDS = 2.0


class LeaseHeld(Exception):
    """Another collector is alive."""


class LeaseLost(Exception):
    """Another collector has taken over."""


class CollectorStatus(msgspec.Struct, frozen=True):
    """How the holder does. Times in UTC; last_bar: when the last published frame arrived; bars: published so far.

    evicted: whether another connection has taken the feed over, and it is not back yet. journal_free_bytes: what the
    journal's disk has left; None where that is not known. lag, lateness: in seconds. watermarks: of what is published.
    The last two by channel. disk_only_seconds: the age of the oldest frame that would be lost with the holder's disk.
    """

    connected: bool = False
    bars: int = 0
    bars_per_second: float = 0.0
    last_bar: datetime | None = None
    backlog_bytes: int = 0
    unpublished_seconds: float = 0.0
    gaps: int = 0
    store_fault: str | None = None
    evicted: bool = False
    journal_free_bytes: int | None = None
    lag: LagSummary = LagSummary()
    lateness: dict[Channel, LatenessSummary] = msgspec.field(default_factory=dict)
    watermarks: dict[Channel, Watermark] = msgspec.field(default_factory=dict)
    disk_only_seconds: float = 0.0


class Holding(msgspec.Struct, frozen=True):
    """The lease's content. owner: who may be asked about the run (Dagster's run id). machine: see this_machine()."""

    run: str
    owner: str
    machine: str
    pid: int
    renewed_at: datetime
    expires_at: datetime
    status: CollectorStatus = CollectorStatus()
    released: bool = False

    def is_free(self, now: datetime) -> bool:
        """Whether nobody seems to collect. By two machines' wall clocks: good enough to show, and nothing else."""
        return self.released or now > self.expires_at + TOLERANCE


class Watch:
    """How long what others write has not changed, as seen by this process, on its own clock.

    clock: in seconds, and it never steps. A change is missed by nobody who looks more often than a lease lasts; who
    looks less often, or could not look because the store was away from the holder too, begins to count anew.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[object, float, float]] = {}  # what, since when, and when it was looked at last

    def unchanged(self, name: str, what: object) -> timedelta:
        """Looks at what stands under a name now."""
        now = self._clock()
        before, since, looked = self._seen.get(name, (None, now, now))
        if what != before or now - looked > TTL.total_seconds():
            since = now
        self._seen[name] = what, since, now
        return timedelta(seconds=now - since)


def read_lease(lake: Lake) -> Holding | None:
    """Who holds the lake's lease, or held it last; None if there never was a holder."""
    content = lake.get(layout.LEASE_KEY)
    return _decode(content) if content else None


def live_run(lake: Lake) -> str | None:
    """The run that collects into the lake now, or None. Raises the store's errors."""
    holding = read_lease(lake)
    return None if holding is None or holding.is_free(datetime.now(UTC)) else holding.run


class Lease:
    """A collector's side of it. Not thread-safe, but for its properties. The store's errors pass through: the caller
    tries again. clock: as in Watch."""

    def __init__(self, lake: Lake, run: str, owner: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._lake = lake
        self._run = run
        self._owner = owner
        self._status = CollectorStatus()
        self._etag: str | None = None
        self._may_hold = False
        self._lock: int | None = None
        self._clock = clock
        self._confirmed: float | None = None

    @property
    def is_confirmed(self) -> bool:
        """Whether no other can have the lease: the store has taken it for this run, and that has not run out."""
        if not self._lake.is_s3:
            return self._lock is not None
        return self._confirmed is not None and self._clock() - self._confirmed < TTL.total_seconds()

    @property
    def confirmed_seconds(self) -> float | None:
        """How long ago the store took the lease for this run the last time; None if it never did."""
        return None if self._confirmed is None else self._clock() - self._confirmed

    def acquire(
        self,
        wait: Callable[[float], None] = time.sleep,
        ended: Collection[str] = (),
        standby: bool = False,
        was_lost: Callable[[Holding], bool] = lambda _: False,
    ) -> None:
        """Takes the lease. Raises LeaseHeld where the holder is seen to be alive, and waits until that is clear.

        ended: runs that are known to be over, whatever their lease says. standby: a holder that is alive is waited for.
        was_lost: whether the holder's run was ended because this very renewal was seen to be its last.
        """
        if not self._lake.is_s3:
            self._acquire_lock(wait if standby else None)
            self.renew(CollectorStatus())
            return
        watch = Watch(self._clock)  # a new one after an error of the store: the holder cannot renew then either
        first: Holding | None = None
        while True:
            holding, self._etag = self._read()
            mine = holding is not None and holding.run == self._run  # taken before, but the answer was lost
            unchanged = watch.unchanged("", holding)
            if (
                holding is None
                or mine
                or holding.released
                or holding.run in ended
                or unchanged > TTL + TOLERANCE
                or (unchanged > _LEARNS_OF_ITS_END and was_lost(holding))
            ):
                with contextlib.suppress(LeaseLost):  # another was quicker: look at it
                    self.renew(CollectorStatus())
                    return
                continue
            if first is not None and holding != first and not standby:
                raise LeaseHeld(_held(self._lake.uri, holding))
            first = holding
            wait(_LOOK_SECONDS)

    def renew(self, status: CollectorStatus) -> None:
        """Extends the lease and shows the status. Raises LeaseLost when another has it."""
        self._status = status
        self._may_hold = True  # from here on, even if the answer is lost
        self._write(released=False)

    def release(self) -> None:
        """Gives the lease up, so that the next collector need not wait. Leaves another's alone."""
        if self._may_hold:
            with contextlib.suppress(LeaseLost):
                self._write(released=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, released: bool) -> None:
        now, started = datetime.now(UTC), self._clock()
        content = msgspec.json.encode(
            Holding(
                run=self._run,
                owner=self._owner,
                machine=this_machine(),
                pid=os.getpid(),
                renewed_at=now,
                expires_at=now + TTL,
                status=self._status,
                released=released,
            )
        )
        if not self._lake.is_s3:
            if self._lock is not None:
                self._lake.put(layout.LEASE_KEY, content)
                self._confirmed = started
            return
        for _ in range(_TRIES):
            mode = "create" if self._etag is None else {"e_tag": self._etag}
            try:
                result = obstore.put(self._lake.store, layout.LEASE_KEY, content, mode=mode)  # type: ignore[arg-type]
            except (PreconditionError, AlreadyExistsError, *NOT_FOUND):
                holding, etag = self._read()
                if holding is None or (holding.run, holding.owner) != (self._run, self._owner):
                    self._may_hold = False
                    raise LeaseLost(_held(self._lake.uri, holding) if holding else "the lease was removed") from None
                self._etag = etag  # our own, of a write whose answer was lost
                continue
            self._etag = result["e_tag"]
            self._confirmed = started
            return
        raise LeaseLost(f"{self._lake.uri} refuses every renewal of this collector's own lease")

    def _acquire_lock(self, wait: Callable[[float], None] | None) -> None:
        """wait: how to wait while another has it; None to raise LeaseHeld."""
        while self._lock is None:
            lock = os.open(self._lake.local_root / "lease.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
            except BlockingIOError:
                os.close(lock)
                if wait is None:
                    found = read_lease(self._lake)
                    raise LeaseHeld(_held(self._lake.uri, found) if found else f"{self._lake.uri} is locked") from None
                wait(_LOOK_SECONDS)

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
    """Where a process id means the same process: the host's name and boot, and the container's processes in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # macOS has no /proc, and no containers of its own
        return f"{socket.gethostname()}/{uuid.getnode():x}"
