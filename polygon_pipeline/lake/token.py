"""A right that one process at a time has, over all machines that use an S3 lake: an object written conditionally.

Belongs here: taking it, keeping it, giving it back, and what its last holder left behind. Does not belong here: what it
is a right to (polygon.rate_limit counts the requests), and the collector's lease, which shows how it does
(collector.lease).

No clock of one machine is compared with another's: a holder counts up, and who sees no change for LOST_SECONDS on its
own clock that never steps takes over. What is left behind is in seconds from when it was read, so that a slow reader
only waits longer; after twenty minutes by the wall clock it is forgotten, because S3 refuses clocks that are more than
fifteen minutes wrong. Who waits says so in the object, and the holder gives way when it has had its time.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from polygon_pipeline.lake.errors import NOT_FOUND, STORE_ERRORS
from polygon_pipeline.lake.store import Lake

# How often a holder renews: a request to the store each, however much it does with its right.
RENEW_SECONDS = 5.0
# A holder that cannot renew so long has lost its right, and others take over that see no renewal for longer than that.
LOST_SECONDS = 30.0
_TOLERANCE_SECONDS = 5.0
# How often who waits looks.
_LOOK_SECONDS = 1.0
# How long a holder has it before it gives way to another that waits.
_TURN_SECONDS = 20.0
_FORGOTTEN = timedelta(minutes=20)
# How long a store may be away before who waits is told.
_PATIENCE_SECONDS = 60.0


class _Content(msgspec.Struct, frozen=True):
    """holder: none when it was given back. count: changes with each renewal. wanted: another waits. left: what a holder
    that gave it back left behind."""

    holder: str | None = None
    count: int = 0
    wanted: bool = False
    left: tuple[float, ...] = ()


class Taken(NamedTuple):
    """The right is held. left: what the holder before left behind, when it was just taken over. is_lost: that holder is
    gone without a word, and left nobody knows what."""

    left: tuple[float, ...] = ()
    is_lost: bool = False


class Token:
    """The right of that name. Threads may share it. clock: in seconds, and it never steps."""

    def __init__(self, lake: Lake, key: str, clock: Callable[[], float] = time.monotonic, seconds: float = 1.0) -> None:
        """seconds: how long a second is, for tests."""
        self._lake, self._key, self._clock, self._second = lake, key, clock, seconds
        self._me = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._etag: str | None = None
        self._seen: _Content | None = None
        self._unchanged_since = self._well_since = self._looked = clock()
        self._confirmed: float | None = None
        self._taken = self._next = clock()

    def hold(self, left: Callable[[], Sequence[float]]) -> Taken | None:
        """Whether the right is held now, renewed where that is due; None while it is not. Never waits for others.

        left: what would be left behind now, in seconds; asked when the right is given to another that waits for it.
        Raises the store's errors when it is away for a minute; until then a right that cannot be renewed is not held.
        """
        with self._lock:
            now = self._clock()
            if now < self._next:
                return Taken() if self._is_held(now) else None
            try:
                taken = self._renew(left) if self._confirmed is not None else self._try_to_take()
            except STORE_ERRORS:
                if self._clock() - self._well_since > _PATIENCE_SECONDS * self._second:
                    raise
                self._next = self._clock() + _LOOK_SECONDS * self._second
                return Taken() if self._is_held(self._clock()) else None
            self._well_since = self._clock()
            return taken

    def give_back(self, left: Sequence[float]) -> None:
        """Lets another have it at once. A store that is away lets them wait until they see that nobody renews."""
        with self._lock:
            if self._confirmed is not None:
                with contextlib.suppress(*STORE_ERRORS):
                    self._give(left)

    def _is_held(self, now: float) -> bool:
        return self._confirmed is not None and now - self._confirmed < LOST_SECONDS * self._second

    def _renew(self, left: Callable[[], Sequence[float]]) -> Taken | None:
        assert self._seen
        if not self._put(_Content(self._me, self._seen.count + 1, self._seen.wanted)):
            self._look()
            if self._seen.holder != self._me:
                self._confirmed = None
                return None  # somebody saw no renewal for too long
            return self._renew(left)  # another says that it waits, or the answer to an earlier renewal was lost
        if self._seen.wanted and self._clock() - self._taken > _TURN_SECONDS * self._second:
            self._give(left())
            return None
        return Taken()

    def _try_to_take(self) -> Taken | None:
        self._look()
        assert self._seen
        before, now = self._seen, self._clock()
        is_lost = now - self._unchanged_since > (LOST_SECONDS + _TOLERANCE_SECONDS) * self._second
        if before.holder not in (None, self._me) and not is_lost:
            if not before.wanted:
                self._write(msgspec.structs.replace(before, wanted=True))
            self._next = self._clock() + _LOOK_SECONDS * self._second
            return None
        if not self._put(_Content(self._me, before.count + 1)):
            return None  # another was quicker
        self._taken = self._clock()
        return Taken(() if before.holder else before.left, is_lost=before.holder is not None)

    def _give(self, left: Sequence[float]) -> None:
        assert self._seen
        self._confirmed = None
        given = _Content(None, self._seen.count + 1, left=tuple(left))
        while not self._write(given):  # another says at this moment that it waits
            self._look()
            if self._seen.holder != self._me:
                break
        self._next = self._clock() + 3 * _LOOK_SECONDS * self._second  # the other looks first

    def _put(self, content: _Content) -> bool:
        """Takes or renews it. False where the object is not as it was seen."""
        began = self._clock()
        if not self._write(content):
            return False
        self._confirmed, self._next = began, began + RENEW_SECONDS * self._second
        return True

    def _write(self, content: _Content) -> bool:
        mode = "create" if self._etag is None else {"e_tag": self._etag}
        try:
            result = obstore.put(self._lake.store, self._key, msgspec.json.encode(content), mode=mode)  # type: ignore[arg-type]
        except (AlreadyExistsError, PreconditionError, *NOT_FOUND):
            return False
        self._etag = result["e_tag"]
        self._note(content)
        return True

    def _look(self) -> None:
        try:
            result = obstore.get(self._lake.store, self._key)
            self._etag = result.meta["e_tag"]
            found = msgspec.json.decode(bytes(result.bytes()), type=_Content)
            if datetime.now(UTC) - result.meta["last_modified"] > _FORGOTTEN:
                found = msgspec.structs.replace(found, left=())
        except NOT_FOUND:
            self._etag, found = None, _Content()
        except ValueError:  # somebody's own: as if a holder were lost
            found = _Content(holder="unreadable")
        self._note(found)

    def _note(self, content: _Content) -> None:
        """Since when it stands as it does; who could not look for long may have missed a renewal."""
        now = self._clock()
        is_same = self._seen is not None and (content.holder, content.count) == (self._seen.holder, self._seen.count)
        if not is_same or now - self._looked > LOST_SECONDS * self._second:
            self._unchanged_since = now
        self._seen, self._looked = content, now
