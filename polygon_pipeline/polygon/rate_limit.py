"""A limit on requests that all processes keep together, of one machine or, with a right that they share, of many.

Belongs here: waiting for a turn, and remembering turns where every process sees them. Does not belong here: what the
turns are for.

The limit is held as the server sees it, in every sliding window: a turn counts from its acquisition until a full
window after its request was answered, so neither a slow connection nor a late arrival can press two windows together.
The rate-limit libraries with a store that processes share count from the permit alone, and cannot be waited for in
steps (pyrate-limiter 4.5), or need a server (limits).
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Protocol

# How often a waiting request looks again.
_STEP_SECONDS = 0.05
# No turn of any process counts longer, whatever its limit.
_LONGEST_SECONDS = 120.0
# A file that nobody has written to for so long, by clocks that are not set to the minute, has no turn that counts.
_RECENT_SECONDS = 600.0
_MARK_BYTES = 16
# From this many requests per minute on, the limit is kept by the second: 6,000 per minute mean 100 per second.
_BY_THE_SECOND = 600


class Stopped(Exception):
    """Waiting ended because the work that waited was given up."""


class Taken(Protocol):
    """A right that is held. left, is_lost: for how many seconds more the turns of the holder before count, when it was
    just taken over from one; or that nobody knows."""

    @property
    def left(self) -> Sequence[float]: ...

    @property
    def is_lost(self) -> bool: ...


class SharedRight(Protocol):
    """The right to ask, which one process of all machines has at a time (lake.token)."""

    def hold(self, left: Callable[[], Sequence[float]]) -> Taken | None: ...

    def give_back(self, left: Sequence[float]) -> None: ...


class RateLimit:
    """At most `requests` in any `seconds`, over all processes that name the same file, or that share a right.

    The file begins with the mark of the clock that its times are of, and is then a list of doubles, one per turn: until
    when it counts, on the machine's monotonic clock. Another machine's times say nothing here: while that one goes on,
    on a volume that both mount, this one waits. The file is locked (flock) only while it is looked at, so the kernel
    frees it when a process is killed. in_flight_seconds: within which a request that was begun reaches the server; the
    turn of a killed process counts that much longer. shared: where the file is this process's own, and other machines
    ask the same server. clock, mark: of this machine.
    """

    def __init__(
        self,
        path: Path,
        requests: int,
        seconds: float,
        in_flight_seconds: float = 15.0,
        shared: SharedRight | None = None,
        clock: Callable[[], float] = time.monotonic,
        mark: str | None = None,
    ) -> None:
        if seconds + in_flight_seconds > _LONGEST_SECONDS:
            raise ValueError(f"a turn may count for {_LONGEST_SECONDS:.0f} s, not {seconds + in_flight_seconds:.0f}")
        self._path = path
        self._requests = requests
        self._seconds = seconds
        self._in_flight_seconds = in_flight_seconds
        self._shared = shared
        self._clock = clock
        self._foreign = b"", 0.0  # what another machine wrote, and since when it has not changed
        self._mark = sha256((mark or _this_clock()).encode()).digest()[:_MARK_BYTES]
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def per_minute(cls, path: Path, requests: int, shared: SharedRight | None = None) -> RateLimit:
        """The limit for a plan's requests per minute; a large one is spread over the minute's seconds."""
        at_once, seconds = (requests // 60, 1.0) if requests >= _BY_THE_SECOND else (requests, 60.0)
        return cls(path, at_once, seconds, shared=shared)

    def close(self) -> None:
        """Gives a shared right back, with the turns that count still. The limit may be used on."""
        if self._shared is not None:
            self._shared.give_back(self._left())

    @property
    def per_second(self) -> float:
        """Requests a second, in the long run."""
        return self._requests / self._seconds

    @contextmanager
    def turn(self, stop: threading.Event) -> Iterator[None]:
        """Waits for a turn and holds it while the request runs. Raises Stopped as soon as `stop` is set, and what the
        shared right raises where its store is away for long."""
        while not stop.is_set():
            if taken := self._take():
                break
            stop.wait(_STEP_SECONDS)
        else:
            raise Stopped
        try:
            yield
        finally:
            self._answered(*taken)

    def _take(self) -> tuple[int, float] | None:
        """A turn: its place in the file and until when it counts. None while all are taken."""
        if self._shared is not None:
            right = self._shared.hold(self._left)
            if right is None:
                return None
            longest = self._seconds + self._in_flight_seconds
            if left := [longest] * self._requests if right.is_lost else right.left:
                self._take_over(left)
        with self._locked() as file:
            now = self._clock()
            if not self._is_ours(file, now):
                return None
            turns = self._turns(file, now)
            free = [place for place, until in enumerate(turns) if until <= now]
            if len(turns) - len(free) >= self._requests:
                return None
            place = free[0] if free else len(turns)
            until = now + self._seconds + self._in_flight_seconds
            _write(file, [until], place)
            return place, until

    def _answered(self, place: int, until: float) -> None:
        with self._locked() as file:
            # A request that took very long has lost its place to another.
            if os.pread(file, _MARK_BYTES, 0) != self._mark:
                return
            if array("d", os.pread(file, 8, _MARK_BYTES + place * 8))[0] == until:
                _write(file, [self._clock() + self._seconds], place)

    def _turns(self, file: int, now: float) -> list[float]:
        """Until when each place's turn counts; where none does, a time that is over."""
        found = os.pread(file, os.fstat(file).st_size, 0)[_MARK_BYTES:]
        # What counts longer than any turn can is damaged.
        return [
            until if now < until < now + _LONGEST_SECONDS else now for until in array("d", found[: len(found) // 8 * 8])
        ]

    def _is_ours(self, file: int, now: float) -> bool:
        """Whether the times are of this machine's clock. Takes the file over where no turn of another's can count."""
        content = os.pread(file, os.fstat(file).st_size, 0)
        if content[:_MARK_BYTES] == self._mark:
            return True
        if content != self._foreign[0]:
            self._foreign = content, now
        is_recent = abs(time.time() - os.fstat(file).st_mtime) < _RECENT_SECONDS
        if content and is_recent and now - self._foreign[1] <= self._seconds + self._in_flight_seconds:
            return False
        os.ftruncate(file, 0)
        os.pwrite(file, self._mark, 0)
        return True

    def _left(self) -> list[float]:
        """For how many seconds more each turn counts."""
        with self._locked() as file:
            now = self._clock()
            return [round(until - now, 3) for until in self._turns(file, now) if until > now]

    def _take_over(self, left: Sequence[float]) -> None:
        with self._locked() as file:
            now = self._clock()
            self._is_ours(file, now)  # it is this process's own
            own = [until for until in self._turns(file, now) if until > now]
            os.ftruncate(file, _MARK_BYTES)
            _write(file, [*own, *(now + min(seconds, _LONGEST_SECONDS - 1) for seconds in left)], 0)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        file = os.open(
            self._path, os.O_RDWR | os.O_CREAT, 0o600
        )  # opened at every call, so that threads exclude each other
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _write(file: int, turns: Sequence[float], place: int) -> None:
    os.pwrite(file, array("d", turns), _MARK_BYTES + place * 8)


def _this_clock() -> str:
    """What tells this machine's monotonic clock from another's, and from its own before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # macOS has no /proc
        return f"{socket.gethostname()}/{uuid.getnode():x}"
