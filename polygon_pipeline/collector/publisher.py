"""Publishes one journal to the lake: objects, frames, quarantine and ledger. The journal is its queue.

Belongs here: what goes where, in which order, so that a crash at any moment loses and doubles nothing. Does not
belong here: threads, retrying and when to stop (collector.collector).

The crash protocol. A publisher is always in one of four stages (Stage); step() does the work of one. The state file
says how far the journal is published; it is replaced atomically and synced.

TAKE_BATCH
  1. Read the next records and count them in a copy of the account.
  2. Write the state file: `start` and `end` of the batch, the account with it. From here on it counts.
     A crash before: the batch is read again. A crash after: it is read again, but not counted again.
  3. Keep in memory its archive lines, its quarantine lines and its objects.
PUT_OBJECTS
  4. Put each object under a condition: it did not exist, or it is the older revision that was just read. So a late
     retry of an older revision cannot overwrite a newer one. On a local lake, sync them, because the next state file
     passes them. A crash: the objects from `start` on are put again.
ARCHIVE_SEGMENT, when all of a closed segment is taken and its objects are put
  5. Put the segment's frames and quarantine, made of the whole segment: the same bytes under the same keys, however
     often. Put the ledger.
  6. Write the state file: the next segment, from 0.
  7. Delete the segment. A crash before: the next start deletes it.
IDLE: nothing to do until the journal grows.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from enum import Enum, auto
from itertools import chain
from typing import NamedTuple

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from polygon_pipeline.collector.accounting import count_event, count_frame, count_outside_hours, make_ledger
from polygon_pipeline.collector.journal import JournalHeader, JournalRecord, RecordType, Segments, write_atomically
from polygon_pipeline.collector.lateness import Arrivals, Windows
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.archive import ArchivedEvent
from polygon_pipeline.lake.errors import NOT_FOUND, STORE_ERRORS
from polygon_pipeline.lake.ledger import Account, encode_ledger
from polygon_pipeline.lake.records import decode_record, encode_record
from polygon_pipeline.lake.store import Lake, for_each
from polygon_pipeline.market.bars import Bar, Channel
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.polygon.messages import Frame, count_by_day, decode_frames, tickers_by_window, tickers_of

# Read from the journal at once: some 20,000 bars, which bounds both memory and the work repeated after a crash.
BATCH_BYTES = 4 * 1024 * 1024

# Decoded at once: few enough that what is made of them stays in the processor's cache until they are counted.
_CHUNK_BYTES = 64 * 1024

# How late bars came is measured at once for all that came within so long.
_MOMENT = timedelta(milliseconds=100)

# Tries at one object before the batch's rest is tried later: a connection that breaks now and then is no outage.
_OBJECT_TRIES = 3

_Chunk = list[tuple[JournalRecord, Frame | None]]
_BarKey = tuple[Channel, date, str, int]

_decode_event = msgspec.json.Decoder(ArchivedEvent).decode


class Stage(Enum):
    """What step() does next; the module's docstring says what each leaves behind."""

    PUT_OBJECTS = auto()
    TAKE_BATCH = auto()
    ARCHIVE_SEGMENT = auto()
    IDLE = auto()


class _State(msgspec.Struct):
    """How far a journal is published. The account covers everything before `end` of `segment`; the objects of the
    records from `start` to `end` may not be written yet."""

    segment: int = 1
    start: int = 0
    end: int = 0
    account: Account = msgspec.field(default_factory=Account)


class _Taken(NamedTuple):
    """What a record is published as. line: in the archive of days (without any: of the run's own day), where it has
    one. bars: only where objects are written, because making them costs more than everything else. received: when a
    frame of this process came, on the clock that never steps."""

    end: int
    received_at: datetime
    received: float | None
    line: bytes | None
    days: set[date]
    quarantine: list[bytes]
    bars: list[tuple[Channel, Bar]]


class Publisher:
    """Publishes a journal step by step. Not thread-safe. Steps raise the store's errors and can be tried again."""

    def __init__(self, lake: Lake, journal: Segments, header: JournalHeader, batch_bytes: int = BATCH_BYTES) -> None:
        self._lake = lake
        self._journal = journal
        self._header = header
        self._batch_bytes = batch_bytes
        self._state_path = journal.folder / "state.json"
        self._state = _State()
        # The objects of the last batch, until all are put, and when their bars came on the clock that never steps.
        self._pending: dict[str, tuple[bytes, float | None]] = {}
        self._unsynced: set[str] = set()  # those that are put, until all are synced
        self._fresh: dict[str, tuple[date, Channel]] = {}  # those of them that are counted as new, by this process
        self._lines: dict[date, list[bytes]] = defaultdict(list)  # the archive of the segment under way
        self._quarantine: list[bytes] = []
        self._received: list[float] = []  # when the frames of the segment under way came, on the same clock
        self._known = KnownObjects(lake)
        self._arrivals = Arrivals(header.time_base)
        self.tickers: set[str] = set()
        self.segments_published = 0
        if self._state_path.exists():
            self._resume()

    @property
    def account(self) -> Account:
        """What is counted so far. Read it between steps only."""
        return self._state.account

    @property
    def position(self) -> tuple[int, int]:
        """The segment and offset up to which the journal is read."""
        return self._state.segment, self._state.end

    def step(self) -> bool:
        """Does the work of the stage. Returns False when there is none for now."""
        stage, end = self._stage()
        match stage:
            case Stage.PUT_OBJECTS:
                asyncio.run(for_each(list(self._pending.items()), self._put_object))
                self._lake.sync(self._unsynced)
                self._unsynced.clear()
            case Stage.TAKE_BATCH:
                self._take_batch(end)
            case Stage.ARCHIVE_SEGMENT:
                self._archive_segment()
        return stage is not Stage.IDLE

    def _stage(self) -> tuple[Stage, int]:
        """The stage, and up to where the segment under way may be read."""
        if self._pending or self._unsynced:
            return Stage.PUT_OBJECTS, self._state.end
        end, is_closed = self._journal.end_of(self._state.segment)
        if self._state.end < end:
            return Stage.TAKE_BATCH, end
        return (Stage.ARCHIVE_SEGMENT if is_closed else Stage.IDLE), end

    def put_ledger(self, complete: bool) -> None:
        """Writes the account so far, under the run's session date and every date it has bars of."""
        content = encode_ledger(make_ledger(self._header, self.account, complete))
        for day in {self._header.session_date, *self.account.days}:
            self._lake.put(layout.ledger_key(day, self._header.run), content)

    def _resume(self) -> None:
        """Goes on where a crash ended: what was read of the open segment is read again, but not counted again."""
        self._state = msgspec.json.decode(self._state_path.read_bytes(), type=_State)
        for number in self._journal.numbers():
            if number < self._state.segment:  # published; the crash came before it was deleted
                self._journal.path(number).unlink()
        if self._state.end:
            for chunk in self._read(0, self._state.end):
                for taken in self._take(chunk):
                    self._keep_lines(taken)
                    if taken.end > self._state.start:
                        self._keep_objects(taken)

    def _take_batch(self, end: int) -> None:
        """Steps 1 to 3, of the records up to `end` at the most."""
        start = self._state.end
        batch: list[_Taken] = []
        arrived: list[tuple[datetime, Windows]] = []
        account = msgspec.json.decode(msgspec.json.encode(self.account), type=Account)
        for chunk in self._read(start, end):
            batch += self._take(chunk, account)
            arrived += _arrived(chunk)
            end = batch[-1].end
            if end - start >= self._batch_bytes:
                break
        if self._journal.to_synced is not None:
            account.lags.to_synced = self._journal.to_synced  # the journal goes on counting in it
        fresh = self._count_objects(batch, account)
        self._save(_State(self._state.segment, start, end, account))
        # Only now, because until it is saved a batch may be taken again.
        self._known.update(fresh)
        self._arrivals.add(self.account, arrived)
        self._fresh = {
            layout.raw_key(channel, day, ticker, start_ms): (day, channel) for channel, day, ticker, start_ms in fresh
        }
        for taken in batch:
            self._keep_lines(taken)
            self._keep_objects(taken)

    def _read(self, start: int, end: int) -> Iterator[_Chunk]:
        """The records of the segment under way, some at a time."""
        records: list[JournalRecord] = []
        for record in self._journal.read(self._state.segment, start, end):
            records.append(record)
            if record.end - start >= min(_CHUNK_BYTES, self._batch_bytes):
                yield _decode(records)
                records, start = [], record.end
        if records:
            yield _decode(records)

    def _take(self, chunk: _Chunk, account: Account | None = None) -> list[_Taken]:
        """What a chunk's records are published as, counted in the account where one is given."""
        aggregates = [aggregate for _, frame in chunk if frame for aggregate in frame.aggregates]
        counts = count_by_day(aggregates)
        if account:
            self.tickers.update(tickers_of(aggregates))
            count_outside_hours(account, aggregates)
            for (channel, day), count in counts.items():
                account.day(day, channel).bars += count
            for record, frame in chunk:
                if frame is None:
                    count_event(account, _decode_event(record.payload), record.received_at)
                else:
                    count_frame(account, frame, record.received_at)
        days = {day for _, day in counts}
        return [self._taken(record, frame, days) for record, frame in chunk]

    def _taken(self, record: JournalRecord, frame: Frame | None, days: set[date]) -> _Taken:
        """days: those of all the chunk's bars, usually one."""
        at = record.received_at
        if frame is None:
            line = archive.event_line(at, record.payload) if self._header.write_frames else None
            return _Taken(record.end, at, None, line, set(), [], [])
        if len(days) > 1 or not frame.aggregates:
            days = {day for _, day in count_by_day(frame.aggregates)}
        return _Taken(
            record.end,
            at,
            self._journal.received_on(at),
            _archive_line(record, frame) if self._header.write_frames else None,
            days,
            [archive.quarantine_line(at, refusal.raw, refusal.reason) for refusal in frame.refused],
            frame.bars if self._header.write_objects else [],
        )

    def _count_objects(self, batch: list[_Taken], account: Account) -> set[_BarKey]:
        """Counts a batch's new objects and revisions, and returns the bars that the lake does not know."""
        bars = [(trade_date(bar.start_ms), channel, bar) for taken in batch for channel, bar in taken.bars]
        self._known.load({(channel, day) for day, channel, _ in bars})
        fresh: set[_BarKey] = set()
        for day, channel, bar in bars:
            key = (channel, day, bar.ticker, bar.start_ms)
            if key in fresh or key in self._known:
                account.day(day, channel).revisions += 1
            else:
                account.day(day, channel).objects += 1
                fresh.add(key)
        return fresh

    def _keep_lines(self, taken: _Taken) -> None:
        self._quarantine += taken.quarantine
        if taken.line is not None:
            for day in taken.days or {self._header.session_date}:
                self._lines[day].append(taken.line)
            if taken.received is not None:
                self._received.append(taken.received)

    def _keep_objects(self, taken: _Taken) -> None:
        for channel, bar in taken.bars:
            key = layout.raw_key(channel, trade_date(bar.start_ms), bar.ticker, bar.start_ms)
            # A later revision takes the place.
            self._pending[key] = encode_record(bar, taken.received_at), taken.received

    def _archive_segment(self) -> None:
        """Steps 5 to 7."""
        number, run = self._state.segment, self._header.run
        account, quarantine = self.account, list(self._quarantine)
        if torn := self._journal.torn_tail(number):
            account = msgspec.structs.replace(account, torn_bytes=account.torn_bytes + len(torn))
            at = account.last_received_at or self._header.started_at
            quarantine.append(archive.quarantine_line(at, torn, "a journal record that a crash cut short"))
        files = {layout.frames_key(day, run, number): archive.compress(lines) for day, lines in self._lines.items()}
        if quarantine:
            files[layout.quarantine_key(self._header.session_date, run, number)] = b"".join(quarantine)
        for key, content in sorted(files.items()):
            self._lake.put(key, content)
        archived = time.monotonic()
        self.put_ledger(complete=False)
        self._save(_State(number + 1, 0, 0, account))
        # The next segment's archive starts empty, even if removing this one should fail.
        self._lines.clear()
        self._quarantine.clear()
        for received in self._received:
            self.account.lags.to_archive.add(archived - received)
        self._received.clear()
        self.segments_published += 1
        self._journal.path(number).unlink()

    def _save(self, state: _State) -> None:
        write_atomically(self._state_path, msgspec.json.encode(state))
        self._state = state

    async def _put_object(self, item: tuple[str, tuple[bytes, float | None]]) -> None:
        """Step 4: writes a bar's record unless the lake has a later revision; then it is not pending any more."""
        key, (content, received) = item
        for attempt in range(1, _OBJECT_TRIES + 1):
            try:
                while not await self._try_put(key, content):
                    pass
                break
            except STORE_ERRORS:  # obstore does not try a conditional write again whose connection broke
                if attempt == _OBJECT_TRIES:
                    raise
                await asyncio.sleep(0.1 * attempt)
        del self._pending[key]
        if received is not None:
            self.account.lags.to_object.add(time.monotonic() - received)
        self._unsynced.add(key)

    async def _try_put(self, key: str, content: bytes) -> bool:
        """One try; False where another writer changed or removed the object meanwhile."""
        store = self._lake.store
        try:
            await obstore.put_async(store, key, content, mode="create", use_multipart=False)
            return True
        except AlreadyExistsError:
            pass
        try:
            found = await obstore.get_async(store, key)
            existing = bytes(await found.bytes_async())
            if existing != content and key in self._fresh:
                # A journal that is published on another machine has put it since the day's objects were listed.
                count = self.account.day(*self._fresh.pop(key))
                count.objects, count.revisions = count.objects - 1, count.revisions + 1
            if existing != content and _collected_at(existing) <= _collected_at(content):
                # A local store knows no conditional update, and has no other writer: the collector is alone.
                mode = {"e_tag": found.meta["e_tag"]} if self._lake.is_s3 else "overwrite"
                await obstore.put_async(store, key, content, mode=mode, use_multipart=False)  # type: ignore[arg-type]
            return True
        except (PreconditionError, *NOT_FOUND):
            return False


class KnownObjects:
    """Which bars have an object on the lake, so that new ones and revisions are counted before they are put.

    A bit per second of a ticker's hour: a day of second bars of 500 tickers takes 5 MB, where a set takes 1.5 GB.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._days: set[tuple[Channel, date]] = set()
        self._hours: dict[tuple[Channel, str, int], bytearray] = {}

    def load(self, days: set[tuple[Channel, date]]) -> None:
        """Lists the objects of days not met before."""
        for channel, day in days - self._days:
            for page in self._lake.pages(layout.raw_prefix(channel, day)):
                for meta in page:
                    if parsed := layout.parse_raw_key(meta["path"]):
                        self._add(channel, *parsed)
            self._days.add((channel, day))

    def __contains__(self, key: _BarKey) -> bool:
        """Whether a bar of a loaded day is on the lake."""
        channel, _, ticker, start_ms = key
        hour, second = divmod(start_ms // 1000, 3600)
        seconds = self._hours.get((channel, ticker, hour))
        return seconds is not None and bool(seconds[second >> 3] & 1 << (second & 7))

    def update(self, keys: set[_BarKey]) -> None:
        for channel, _, ticker, start_ms in keys:
            self._add(channel, ticker, start_ms)

    def _add(self, channel: Channel, ticker: str, start_ms: int) -> None:
        hour, second = divmod(start_ms // 1000, 3600)
        seconds = self._hours.setdefault((channel, ticker, hour), bytearray(450))
        seconds[second >> 3] |= 1 << (second & 7)


def _decode(records: list[JournalRecord]) -> _Chunk:
    received = [record for record in records if record.kind is RecordType.FRAME]
    frames = iter(decode_frames([record.payload for record in received], [record.received_at for record in received]))
    return [(record, next(frames) if record.kind is RecordType.FRAME else None) for record in records]


def _arrived(chunk: _Chunk) -> list[tuple[datetime, Windows]]:
    """Which bars came when. What was received within a moment is taken together, a bar that came twice in it once."""
    received = [(record.received_at, frame.aggregates) for record, frame in chunk if frame and frame.aggregates]
    if received and received[-1][0] - received[0][0] < _MOMENT:
        return [(received[0][0], tickers_by_window(list(chain.from_iterable(frame for _, frame in received))))]
    return [(at, tickers_by_window(aggregates)) for at, aggregates in received]


def _archive_line(record: JournalRecord, frame: Frame) -> bytes | None:
    """The frame verbatim where it is JSON; where only parts of it are, those; None where nothing is."""
    if not frame.refused:
        return archive.frame_line(record.received_at, record.payload, ())
    positions = [refusal.position for refusal in frame.refused]
    if None in positions:
        return None
    try:
        msgspec.json.decode(record.payload)
    except (msgspec.DecodeError, ValueError, RecursionError):
        sound = archive.without_events(record.payload, [position for position in positions if position is not None])
        return archive.frame_line(record.received_at, sound, ()) if sound != b"[]" else None
    return archive.frame_line(record.received_at, record.payload, [p for p in positions if p is not None])


def _collected_at(content: bytes) -> str:
    """When a record was collected; an unreadable one is older than anything."""
    try:
        return decode_record(content).collected_at
    except ValueError:
        return ""
