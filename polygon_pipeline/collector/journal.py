"""The journal: everything a run received, on local disk and synced, until it is on the lake.

Belongs here: the files' format, appending, syncing, rotating, finding and locking what lost runs left. Does not
belong here: what becomes of the records (collector.publisher).

A run's folder in JOURNAL_DIR:

    journal.json            who wrote it and where it is to be published (JournalHeader)
    lock                    held (flock) by the one process that works on the folder
    state.json              how far it is published (collector.publisher)
    000001.segment …        records: length, CRC-32, time, kind, payload

A record counts once it is synced: readers are given nothing beyond `Journal.end_of`. The last record of a killed
run may be torn; its CRC says so, and no reader ever saw it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import threading
import time
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgspec

from polygon_pipeline.collector.volume import lock_problem
from polygon_pipeline.lake.durable import make_folder, sync_file, sync_path
from polygon_pipeline.lake.lag import Histogram
from polygon_pipeline.lake.ledger import TimeBase

# A segment becomes one archive object, and is held in memory while it does.
SEGMENT_BYTES = 16 * 1024 * 1024
# Between two syncs: what comes meanwhile is synced together. Syncing without a pause takes a tenth of a core and of the
# disk from everybody else, for bars that come a second or more after their window anyway.
_GROUP_SECONDS = 0.02
# The same while somebody waits for what is synced (collector.relay).
_HURRIED_GROUP_SECONDS = 0.001
# A full disk would lose frames: the run fails while there is room to end cleanly.
MIN_FREE_BYTES = 256 * 1024 * 1024

# How exact `received_on` is, and how many changes of the clock it remembers: more come only while a clock that was set
# back catches up.
_CLOCK_TOLERANCE_US = 1000
_CLOCK_CHANGES = 10_000

_DONE = ".published"
_CHECK = struct.Struct("<II")  # payload length, CRC-32 of all that follows
_STAMP = struct.Struct("<QB")  # Unix microseconds, kind
_HEAD_BYTES = _CHECK.size + _STAMP.size


class RecordType(IntEnum):
    """What a record's payload is. The numbers are in the files."""

    FRAME = 1
    EVENT = 2


_TYPES = {int(kind): kind for kind in RecordType}


class JournalRecord(NamedTuple):
    """One record. payload: a frame as received, or an ArchivedEvent as JSON. end: the offset behind it."""

    kind: RecordType
    received_at: datetime
    payload: bytes
    end: int


class JournalError(Exception):
    """The journal cannot be written; the text says why and what to do."""


class JournalHeader(msgspec.Struct, frozen=True):
    """What recovery must know of the run that wrote a journal. topics: its subscriptions, such as `AM.SPY`.

    time_base: which time says what a connection covered (lake.ledger).
    """

    run: str
    session_date: date
    lake_uri: str
    feed: str
    started_at: datetime
    write_objects: bool
    write_frames: bool
    topics: tuple[str, ...] = ()
    time_base: TimeBase = "processing"


class Segments:
    """The reading side of a run's folder, which this process has locked.

    to_synced: how long the frames that this process appends take until they are synced.
    """

    to_synced: Histogram | None = None

    def __init__(self, folder: Path, lock_file: int) -> None:
        self.folder = folder
        self._lock_file = lock_file

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.segment"

    def numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.segment"))

    def end_of(self, number: int) -> tuple[int, bool]:
        """How far a segment may be read, and whether nothing will be added to it."""
        raise NotImplementedError

    def received_on(self, _received_at: datetime) -> float | None:
        """When a record came on this process's clock that never steps (time.monotonic), or None where another process
        received it, or it cannot be told any more."""
        return None

    def torn_tail(self, number: int) -> bytes:
        """What a closed segment holds behind its last whole record: a write that a kill cut short."""
        with self.path(number).open("rb") as file:
            file.seek(self.end_of(number)[0])
            return file.read()

    def backlog_bytes(self) -> int:
        """What waits on disk to be published."""
        total = 0
        for number in self.numbers():
            with contextlib.suppress(FileNotFoundError):  # published since it was listed
                total += self.path(number).stat().st_size
        return total

    def read(self, number: int, start: int, end: int) -> Iterator[JournalRecord]:
        """The records from offset start to end, which must be boundaries that `end_of` or a record gave."""
        with self.path(number).open("rb") as file:
            file.seek(start)
            yield from _records(file.read(end - start), start)

    def discard(self) -> None:
        """Removes the folder: everything in it is on the lake."""
        # Renamed first, in one step: a folder half removed would be recovered without its state.
        done = self.folder.rename(self.folder.with_name(f".{self.folder.name}{_DONE}"))
        sync_path(done.parent)
        shutil.rmtree(done, ignore_errors=True)  # another start may be sweeping it
        os.close(self._lock_file)

    def release(self) -> None:
        """Leaves the folder to the next start."""
        os.close(self._lock_file)


class Journal(Segments):
    """The journal of a run under way. append() is for one thread; everything else for any.

    append() only writes: a thread of the journal's own syncs whatever has come since the last sync, so a slow disk
    makes larger groups instead of a slower socket.

    on_synced: called on that thread after every sync; it must be quick, and raise nothing. is_hurried: whether somebody
    waits for what is synced.
    """

    def __init__(self, root: Path, header: JournalHeader, segment_bytes: int = SEGMENT_BYTES) -> None:
        _require_locks(root)
        folder = root / header.run
        make_folder(folder)
        super().__init__(folder, _lock(folder))
        self._segment_bytes = segment_bytes
        self._changed = threading.Condition()
        self._last_us = 0
        self._clocks: deque[tuple[int, int]] = deque(maxlen=_CLOCK_CHANGES)  # a stamp; from it on, monotonic less stamp
        self._unsynced: list[tuple[float, int]] = []  # when frames came, and how many
        self.on_synced: Callable[[], None] | None = None
        self.is_hurried = False
        self.to_synced: Histogram = Histogram()
        self.frames = 0
        self._first: dict[int, float] = {}  # when each segment's first frame came
        self._closed: dict[int, int] = {}
        self._closing: list[tuple[int, int, int]] = []
        self._number = 0
        self._file = -1
        self._written = self._synced = 0
        self._failure: JournalError | None = None
        self._is_open = True
        self._open_next()
        # Last, because a folder is a journal once it has a header: no other run recovers a folder that is being made.
        write_atomically(self.folder / "journal.json", msgspec.json.encode(header))
        self._syncer = threading.Thread(target=self._sync_until_closed, name="journal-sync", daemon=True)
        self._syncer.start()

    def append(self, kind: RecordType, *payloads: bytes) -> None:
        """Adds a record each, stamped with the time, in one write. Raises JournalError when they cannot be kept."""
        received = time.monotonic()
        with self._changed:
            if self._failure:
                raise self._failure
            records: list[bytes] = []
            now_us = time.time_ns() // 1000
            self._note_clock(max(now_us, self._last_us + 1), round(received * 1_000_000))
            for payload in payloads:
                # Strictly increasing, so that the time alone orders a bar's revisions.
                self._last_us = max(now_us, self._last_us + 1)
                body = _STAMP.pack(self._last_us, kind) + payload
                records += _CHECK.pack(len(payload), zlib.crc32(body)), body
            content = b"".join(records)
            try:
                _write_all(self._file, content)
            except OSError as error:
                os.ftruncate(self._file, self._written)
                self._failure = JournalError(f"The journal {self.folder} cannot be written: {error}. Free some space.")
                raise self._failure from error
            self._written += len(content)
            if kind is RecordType.FRAME:
                self.frames += len(payloads)
                self._first.setdefault(self._number, received)
                self._unsynced.append((received, len(payloads)))
            if self._written >= self._segment_bytes:
                self._close_segment()
            self._changed.notify_all()

    def continue_after(self, moment: datetime | None) -> None:
        """Stamps no record with that time or an earlier one: earlier runs received until then, by clocks of their own,
        and the time alone orders a bar's revisions."""
        if moment is not None:
            with self._changed:
                self._last_us = max(self._last_us, round(moment.timestamp() * 1_000_000))

    def received_on(self, received_at: datetime) -> float | None:
        stamp_us = round(received_at.timestamp() * 1_000_000)
        with self._changed:
            at = bisect_right(self._clocks, stamp_us, key=lambda clock: clock[0])
            return (stamp_us + self._clocks[at - 1][1]) / 1_000_000 if at else None

    def first_received(self, number: int) -> float | None:
        """When the oldest frame of that segment and later ones came, on the clock that never steps; None without any.

        Earlier segments are forgotten.
        """
        with self._changed:
            self._first = {segment: at for segment, at in self._first.items() if segment >= number}
            return min(self._first.values(), default=None)

    def free_bytes(self) -> int:
        """What the journal's disk has left."""
        return shutil.disk_usage(self.folder.parent).free  # the folder itself goes with its run

    def rotate(self) -> None:
        """Closes the segment under way, so that it is archived now. Does nothing to an empty one."""
        with self._changed:
            if self._is_open and self._written:
                self._close_segment()
                self._changed.notify_all()

    def close(self) -> None:
        """Syncs and closes; what is there stays to be published. Raises JournalError if syncing fails."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        self._syncer.join()
        if self._failure:
            raise self._failure

    def end_of(self, number: int) -> tuple[int, bool]:
        with self._changed:
            if number in self._closed:
                return self._closed[number], True
            return (self._synced, False) if number == self._number else (0, False)

    def is_synced(self, number: int, offset: int) -> bool:
        """Whether that is the end of everything that was appended, and all of it is synced."""
        with self._changed:
            return number == self._number and offset == self._written == self._synced

    def wait(self, number: int, offset: int, seconds: float) -> None:
        """Waits until there is something to read behind that offset, or the time is over."""
        with self._changed:
            self._changed.wait_for(
                lambda: number in self._closed or (number == self._number and self._synced > offset), seconds
            )

    def _note_clock(self, stamp_us: int, monotonic_us: int) -> None:
        """Remembers how far a record's stamp is from the clock that never steps, where that has changed: one number
        serves all records between two changes, however many wait on disk."""
        ahead = monotonic_us - stamp_us
        if not self._clocks or abs(ahead - self._clocks[-1][1]) > _CLOCK_TOLERANCE_US:
            self._clocks.append((stamp_us, ahead))

    def _close_segment(self) -> None:
        self._closing.append((self._number, self._file, self._written))
        self._open_next()

    def _open_next(self) -> None:
        self._number += 1
        self._file = os.open(self.path(self._number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._written = self._synced = 0
        sync_path(self.folder)

    def _sync_until_closed(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing or self._written > self._synced or not self._is_open, timeout=1
                    )
                    closing, self._closing = self._closing, []
                    number, file, written = self._number, self._file, self._written
                    received, self._unsynced = self._unsynced, []
                    last = not self._is_open and not closing and written == self._synced
                for _, closed_file, _ in closing:
                    sync_file(closed_file)
                    os.close(closed_file)
                if written > self._synced:
                    sync_file(file)
                now = time.monotonic()
                for at, frames in received:
                    self.to_synced.add(now - at, frames)
                self._check_space()
                with self._changed:
                    self._closed.update({closed: size for closed, _, size in closing})
                    if number == self._number:
                        self._synced = max(self._synced, written)
                    if last:
                        os.close(self._file)
                        self._closed[self._number] = self._written
                    self._changed.notify_all()
                if on_synced := self.on_synced:
                    on_synced()
                if last:
                    return
                time.sleep(_HURRIED_GROUP_SECONDS if self.is_hurried else _GROUP_SECONDS)
        except Exception as error:  # noqa: BLE001 whatever ends this thread, nothing is safe without it
            with self._changed:
                self._failure = JournalError(
                    f"The journal {self.folder} cannot be synced: {type(error).__name__}: {error}. Check that disk."
                )
                self._changed.notify_all()

    def _check_space(self) -> None:
        free = self.free_bytes()
        if free < MIN_FREE_BYTES and not self._failure:
            self._failure = JournalError(
                f"The disk of JOURNAL_DIR ({self.folder}) has only {free >> 20} MiB left. The collector stops while "
                "it can still keep what it has received: free some space, or let the lake take the backlog."
            )


class LeftoverJournal(Segments):
    """The journal of a lost run, being recovered by this process: nothing is added to it."""

    def __init__(self, folder: Path, lock_file: int) -> None:
        super().__init__(folder, lock_file)
        self.header = msgspec.json.decode((folder / "journal.json").read_bytes(), type=JournalHeader)

    def last_received_at(self) -> datetime | None:
        """When the run received its last record that is still here."""
        for number in reversed(self.numbers()):
            records = list(self.read(number, 0, self.end_of(number)[0]))
            if records:
                return records[-1].received_at
        return None

    def end_of(self, number: int) -> tuple[int, bool]:
        if not self.path(number).exists():
            return 0, False
        return max((record.end for record in _records(self.path(number).read_bytes(), 0)), default=0), True


def leftovers(root: Path) -> list[LeftoverJournal]:
    """Locks and returns the journals below JOURNAL_DIR that no process works on, oldest run first.

    Raises JournalError where a lock of another machine would not be seen.
    """
    _require_locks(root)
    for done in root.glob(f".*{_DONE}"):  # a kill came while it was removed
        shutil.rmtree(done, ignore_errors=True)
    found = []
    for header in sorted(root.glob("*/journal.json")):
        try:
            lock_file = _lock(header.parent)
        except (BlockingIOError, FileNotFoundError):
            continue  # its run is alive, or published and removed while we looked
        try:
            found.append(LeftoverJournal(header.parent, lock_file))
        except FileNotFoundError:  # removed since
            os.close(lock_file)
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file so that a crash leaves the old content or the new, synced."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        sync_file(file.fileno())
    temporary.replace(path)
    sync_path(path.parent)


def _records(content: bytes, offset: int) -> Iterator[JournalRecord]:
    """The records in content, which begins at offset of its file; stops at the first that is not whole."""
    view = memoryview(content)
    at = 0
    while at + _HEAD_BYTES <= len(content):
        length, checksum = _CHECK.unpack_from(content, at)
        begin, end = at + _HEAD_BYTES, at + _HEAD_BYTES + length
        if end > len(content) or checksum != zlib.crc32(view[at + _CHECK.size : end]):
            return
        received_us, kind = _STAMP.unpack_from(content, at + _CHECK.size)
        at = end
        received_at = datetime.fromtimestamp(received_us / 1_000_000, UTC)
        yield JournalRecord(_TYPES[kind], received_at, content[begin:end], offset + at)


def _write_all(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _require_locks(root: Path) -> None:
    if problem := lock_problem(root):
        raise JournalError(
            f"JOURNAL_DIR ({root}) cannot be used, because two machines could publish one journal: {problem}"
        )


def _lock(folder: Path) -> int:
    """Takes the folder's lock, which ends with the process; BlockingIOError if another has it."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise
    return file
