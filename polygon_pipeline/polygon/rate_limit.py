"""A limit on requests that all processes of one machine keep together.

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
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How often a waiting request looks again.
_STEP_SECONDS = 0.05
# No turn of any process counts longer, whatever its limit.
_LONGEST_SECONDS = 120.0
# From this many requests per minute on, the limit is kept by the second: 6,000 per minute mean 100 per second.
_BY_THE_SECOND = 600


class Stopped(Exception):
    """Waiting ended because the work that waited was given up."""


class RateLimit:
    """At most `requests` in any `seconds`, over all processes that name the same file.

    The file is a list of doubles, one per turn: until when it counts, on the machine's monotonic clock. It is locked
    (flock) only while it is looked at, so the kernel frees it when a process is killed. in_flight_seconds: within
    which a request that was begun reaches the server; the turn of a killed process counts that much longer.
    """

    def __init__(self, path: Path, requests: int, seconds: float, in_flight_seconds: float = 15.0) -> None:
        if seconds + in_flight_seconds > _LONGEST_SECONDS:
            raise ValueError(f"a turn may count for {_LONGEST_SECONDS:.0f} s, not {seconds + in_flight_seconds:.0f}")
        self._path = path
        self._requests = requests
        self._seconds = seconds
        self._in_flight_seconds = in_flight_seconds
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def per_minute(cls, path: Path, requests: int) -> RateLimit:
        """The limit for a plan's requests per minute; a large one is spread over the minute's seconds."""
        return cls(path, requests // 60, 1.0) if requests >= _BY_THE_SECOND else cls(path, requests, 60.0)

    @property
    def per_second(self) -> float:
        """Requests a second, in the long run."""
        return self._requests / self._seconds

    @contextmanager
    def turn(self, stop: threading.Event) -> Iterator[None]:
        """Waits for a turn and holds it while the request runs. Raises Stopped as soon as `stop` is set."""
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
        with self._locked() as file:
            now = time.monotonic()
            turns = array("d", os.pread(file, os.fstat(file).st_size // 8 * 8, 0))
            # What counts longer than any turn can was written before the machine started.
            free = [place for place, until in enumerate(turns) if not now < until < now + _LONGEST_SECONDS]
            if len(turns) - len(free) >= self._requests:
                return None
            place = free[0] if free else len(turns)
            until = now + self._seconds + self._in_flight_seconds
            os.pwrite(file, array("d", [until]), place * 8)
            return place, until

    def _answered(self, place: int, until: float) -> None:
        with self._locked() as file:
            # A request that took very long has lost its place to another.
            if array("d", os.pread(file, 8, place * 8))[0] == until:
                os.pwrite(file, array("d", [time.monotonic() + self._seconds]), place * 8)

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
