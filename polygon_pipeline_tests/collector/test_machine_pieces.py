"""The journal and the publisher under any interleaving of records, faults and crashes, and what each promises alone.

A crash is played on the real pieces: the objects are abandoned, the folder's lock is let go as the kernel does at a
process's end, and whatever was not yet synced may be cut short or garbled. Faults of the store are raised around
obstore's own functions, before the write or after it (a response that is lost); a kill also at any file operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import obstore
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from obstore.exceptions import GenericError

from polygon_pipeline.collector import journal as journal_module
from polygon_pipeline.collector.collector import Collector, Plan
from polygon_pipeline.collector.journal import (
    Journal,
    JournalError,
    JournalHeader,
    LeftoverJournal,
    RecordType,
    leftovers,
)
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import Ledger, decode_ledger
from polygon_pipeline.lake.store import STORE_ERRORS, Lake, S3Access, open_lake
from polygon_pipeline.market.bars import Channel, iso_seconds
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind
from polygon_pipeline.simulator.exchange import Exchange

_DAY = date(2026, 1, 26)
# Around New York's midnight, so that one frame may hold bars of two session dates.
_STARTS = [1769490000000 - 120_000, 1769490000000 - 60_000, 1769490000000, 1769490000000 + 60_000, 1769576400000]
# A hundred histories wait for thousands of syncs, which this file is not about.
_MEMORY = Path("/dev/shm")


def _no_s3() -> S3Access:
    raise AssertionError("a file lake asks for no access to S3")


def _header(lake: Lake, run: str, write_objects: bool = True, feed: str = "polygon") -> JournalHeader:
    return JournalHeader(run, _DAY, lake.uri, feed, datetime.now(UTC), write_objects, True)


# Faults and kills


class _Killed(BaseException):
    """The process ends here."""


@dataclass
class _Trap:
    """Strikes at the n-th operation of its sort, and at some more from there. Armed by _armed only."""

    sort: str  # "store" or "file"
    effect: str  # "before" and "after" fail the operation; "kill before" and "kill after" end the process
    countdown: int
    times: int = 1
    thread: int = 0
    folder: str = ""
    struck: bool = False

    def due(self, sort: str) -> bool:
        if sort != self.sort:
            return False
        self.countdown -= 1
        due = -self.times <= self.countdown < 0
        self.struck |= due
        return due


# More operations in a row than a publisher tries of its own accord.
_OUTAGE = 40
_trap: _Trap | None = None
_FILE_EVENTS = {"os.remove", "os.rename", "os.rmdir"}


def _watch_files(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: it is asked before a file is opened for writing, renamed or removed, and its error prevents it."""
    trap = _trap
    if trap is None or trap.sort != "file" or threading.get_ident() != trap.thread:
        return
    is_ours = event in _FILE_EVENTS or (event == "open" and str(arguments[0]).startswith(trap.folder))
    if is_ours and trap.due("file"):
        raise _Killed


sys.addaudithook(_watch_files)


def _strike(effect: str) -> None:
    raise _Killed if effect.startswith("kill") else GenericError("the store failed, as this test wishes")


@contextlib.contextmanager
def _armed(trap: _Trap | None, folder: Path) -> Iterator[None]:
    """Puts a trap around obstore's functions, and around the file operations of this thread."""
    global _trap
    if trap is None:
        yield
        return

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            due = trap.due("store")
            if due and "before" in trap.effect:
                _strike(trap.effect)
            result = function(*arguments, **options)
            if due:
                _strike(trap.effect)
            return result

        return call

    def around_async(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **options: Any) -> Any:
            due = trap.due("store")
            if due and "before" in trap.effect:
                _strike(trap.effect)
            result = await function(*arguments, **options)
            if due:
                _strike(trap.effect)
            return result

        return call

    trap.thread, trap.folder = threading.get_ident(), str(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "get", "list"):
            patch.setattr(obstore, name, around(getattr(obstore, name)))
        for name in ("put_async", "get_async"):
            patch.setattr(obstore, name, around_async(getattr(obstore, name)))
        patch.setattr(asyncio, "sleep", functools.partial(asyncio.sleep, 0))  # a pause would only cost time here
        _trap = trap
        try:
            yield
        finally:
            _trap = None


def _was_killed(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_was_killed(inner) for inner in error.exceptions)
    return isinstance(error, _Killed)


_traps = (
    st.none()
    | st.builds(
        _Trap,
        st.just("store"),
        st.sampled_from(["before", "after", "before", "after", "kill before", "kill after"]),
        st.sampled_from([0, 0, 1, 1, 2, 3, 5]),
        st.sampled_from([1, 1, _OUTAGE]),
    )
    | st.builds(_Trap, st.just("file"), st.just("kill before"), st.integers(0, 9))
)


# The records, and what must become of them


def _bar(ticker: str, start_ms: int, price: int, channel: str = "AM", **more: object) -> dict[str, object]:
    prices = dict.fromkeys("ohlc", price)
    return {"ev": channel, "sym": ticker, "s": start_ms, "e": start_ms + 60_000, "v": 7, "vw": price, **prices, **more}


_bars = st.builds(
    _bar,
    st.sampled_from(["SPY", "BRK.B", "a b%2F#é"]),
    st.sampled_from(_STARTS),
    st.integers(1, 999),
    st.sampled_from(["AM", "AM", "A"]),
)
_refused = st.sampled_from(
    [{"ev": "AM", "sym": "../x"}, {"ev": "A", "sym": "SPY", "s": 5}, {"no": "kind"}, {"ev": "status"}, 7]
)
_others = st.sampled_from([{"ev": "status", "status": "x", "message": "m"}, {"ev": "T", "sym": "SPY", "p": 1}])
_frames = st.builds(list.__add__, st.lists(_bars, max_size=4), st.lists(_refused | _others, max_size=1)).flatmap(
    st.permutations
)
_garbage = st.sampled_from([b"", b"\xff\xfe", b"not JSON", b'[{"ev":"AM","sym":"SPY"', b'"text"', b"\x00" * 40])


@dataclass
class _Sent:
    """A record as it was appended: payload, and where it lies. parts: a frame's events; None: not JSON."""

    kind: RecordType
    payload: bytes
    parts: list[Any] | None
    run: str
    segment: int
    end: int


@dataclass
class _Totals:
    examples: int = 0
    crashes: int = 0
    kills_within: int = 0
    faults: int = 0
    records: int = 0
    bars: int = 0
    objects: int = 0
    torn: int = 0


class _Collecting(RuleBasedStateMachine):
    """One lake and one journal folder, through many runs."""

    totals: ClassVar[_Totals] = _Totals()

    @initialize(write_objects=st.sampled_from([True, True, True, False]))
    def begin(self, write_objects: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pieces-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self.lake = open_lake((self.folder / "lake").as_uri(), _no_s3)
        self.root = self.folder / "journal"
        self.write_objects = write_objects
        self.sent: list[_Sent] = []
        self.torn: list[str] = []
        self.serial = self.runs = 0
        self.start()

    def start(self) -> None:
        """What a collector does first: leftovers, then a journal and a publisher of its own."""
        self.left = leftovers(self.root)
        self.recovering: tuple[LeftoverJournal, Publisher] | None = None
        self.runs += 1
        self.header = _header(self.lake, f"run-{self.runs:03d}", self.write_objects)
        self.journal = Journal(self.root, self.header, segment_bytes=700)
        self.publisher = Publisher(self.lake, self.journal, self.header, batch_bytes=400)

    def append(self, kind: RecordType, payload: bytes, parts: list[Any] | None) -> None:
        number = max(self.journal.numbers())
        self.journal.append(kind, payload)
        end = self.journal.path(number).stat().st_size
        self.sent.append(_Sent(kind, payload, parts, self.header.run, number, end))

    def settle(self) -> None:
        """Waits until all is synced."""
        for number in self.journal.numbers():
            size = self.journal.path(number).stat().st_size
            while (end := self.journal.end_of(number))[0] < size:
                self.journal.wait(number, end[0], 1)

    @rule(frames=st.lists(_frames, min_size=1, max_size=6))
    def receive_a_burst(self, frames: list[list[Any]]) -> None:
        for events in frames:
            self.receive(events)

    def receive(self, events: list[Any]) -> None:
        self.serial += 1
        events = [{**event, "serial": self.serial} if isinstance(event, dict) else event for event in events]
        self.append(RecordType.FRAME, json.dumps(events).encode() + b" " * self.serial, events)

    @rule(garbage=_garbage)
    def receive_garbage(self, garbage: bytes) -> None:
        self.serial += 1
        self.append(RecordType.FRAME, garbage + b" garbage %d" % self.serial, None)

    @rule(kind=st.sampled_from([EventKind.SUBSCRIBED, EventKind.DISCONNECTED, EventKind.WARNED]))
    def notice_a_change_of_the_connection(self, kind: EventKind) -> None:
        self.serial += 1
        self.append(RecordType.EVENT, msgspec.json.encode(ConnectionEvent(kind, f"number {self.serial}")), None)

    @rule()
    def rotate(self) -> None:
        self.journal.rotate()

    @rule(traps=st.lists(_traps, min_size=1, max_size=4), steps=st.integers(1, 12), rotate=st.booleans())
    def publish(self, traps: list[_Trap | None], steps: int, rotate: bool) -> None:
        """Some steps; after a fault of the store, some more under the next trap."""
        if rotate:
            self.journal.rotate()
        self.settle()
        for trap in traps:
            try:
                with _armed(trap, self.folder):
                    for _ in range(steps):
                        self.step()
                return
            except STORE_ERRORS:
                assert trap is not None
                assert trap.struck
                self.totals.faults += 1
            except BaseException as error:
                if not _was_killed(error):
                    raise
                self.totals.kills_within += 1
                self.crash([], [])
                return

    def step(self) -> None:
        """A step of the recovery as long as there is something to recover, then one of the run's own."""
        if self.recovering is None and self.left:
            self.recovering = self.left[0], Publisher(self.lake, self.left[0], self.left[0].header)
        if self.recovering is None:
            self.publisher.step()
            return
        journal, publisher = self.recovering
        if publisher.step():
            return
        publisher.put_ledger(complete=True)
        journal.discard()
        del self.left[0]
        self.recovering = None

    @precondition(lambda self: self.runs < 6)
    @rule(
        unsynced=st.lists(_frames, max_size=4),
        damages=st.lists(
            st.tuples(st.sampled_from(["cut", "garble", "zeros", "junk"]), st.integers(0, 2000)), max_size=3
        ),
    )
    def power_loss(self, unsynced: list[list[Any]], damages: list[tuple[str, int]]) -> None:
        """What was appended since the last sync may be whole, cut short or garbled."""
        self.settle()
        safe = {number: self.journal.path(number).stat().st_size for number in self.journal.numbers()}
        for events in unsynced:
            self.receive(events)
        self.crash([(number, safe.get(number, 0)) for number in self.journal.numbers()], damages)

    def crash(self, unsafe: list[tuple[int, int]], damages: list[tuple[str, int]]) -> None:
        self.totals.crashes += 1
        # The folder of a run that dies keeps its files: closing here only ends the thread that a kill would end.
        self.journal.close()
        self.journal.release()
        for journal in self.left:
            with contextlib.suppress(OSError):  # its discard had begun
                journal.release()
        for (number, safe), (sort, position) in zip(unsafe, damages, strict=False):
            self.damage(number, safe, sort, position)
        self.start()

    def damage(self, number: int, safe: int, sort: str, position: int) -> None:
        path = self.journal.path(number)
        content = bytearray(path.read_bytes())
        at = safe + position % (len(content) - safe + 1)
        if sort == "cut":
            del content[at:]
        elif sort == "zeros":
            content[at:] = bytes(len(content) - at)
        elif sort == "junk":
            content[at:] = b"\x00\x00\x00\x05" * 11
        elif at < len(content):
            content[at] ^= 0x55
        if bytes(content) == path.read_bytes():
            return
        path.write_bytes(content)
        mine = [sent for sent in self.sent if (sent.run, sent.segment) == (self.header.run, number)]
        lost = [sent for sent in mine if sent.end > at]
        assert all(sent.end > safe for sent in lost)
        self.sent = [sent for sent in self.sent if not any(sent is gone for gone in lost)]
        whole = max((sent.end for sent in mine if sent.end <= at), default=0)
        if len(content) > whole:
            self.torn.append(bytes(content[whole:]).hex())
            self.totals.torn += 1

    def teardown(self) -> None:
        if not hasattr(self, "journal"):
            return
        try:
            self.settle()
            while self.left:
                self.step()
            self.journal.close()
            while self.publisher.step():
                pass
            self.publisher.put_ledger(complete=True)
            self.journal.discard()
            self.check()
        finally:
            shutil.rmtree(self.folder)

    def check(self) -> None:
        assert list(self.root.iterdir()) == []
        wanted_lines, latest, bars, objects = self.truth()
        received: dict[bytes, str] = {}
        for day, wanted in wanted_lines.items():
            lines = _archive(self.lake, day)
            assert sorted(line.content for line in lines) == sorted(wanted)
            received |= {line.content: line.received_at for line in lines}
        assert {parts[1] for key in self.lake.keys("raw-frames") if (parts := key.split("/"))} == {
            day.isoformat() for day, lines in wanted_lines.items() if lines
        }
        ledgers = {key: decode_ledger(self.lake.get(key) or b"") for key in self.lake.keys("ledger")}
        for ledger in ledgers.values():
            assert ledger.complete
            assert ledger.imbalance == []
        by_run = {ledger.run: ledger for ledger in ledgers.values()}
        assert len(by_run) == self.runs
        self.check_accounts(by_run, bars)
        self.check_quarantine()
        for (channel, day), keys in objects.items():
            counts = [ledger.account.days.get(day, {}).get(channel) for ledger in by_run.values()]
            on_lake = self.lake.keys(layout.raw_prefix(channel, day))
            if not self.write_objects:
                assert on_lake == []
                continue
            assert set(on_lake) == keys
            assert sum(count.objects for count in counts if count) == len(on_lake)
        if self.write_objects:
            for key, (price, payload) in latest.items():
                record = json.loads(self.lake.get(key) or b"")
                assert record["bar_data"]["close"] == price
                assert record["collected_at"] == received[payload][:23] + "Z"
            self.totals.objects += len(latest)
        self.totals.examples += 1
        self.totals.records += len(self.sent)
        self.totals.bars += sum(bars.values())

    def truth(
        self,
    ) -> tuple[
        dict[date, list[bytes]], dict[str, tuple[int, bytes]], Counter[str], dict[tuple[Channel, date], set[str]]
    ]:
        """From what was sent and survived: the archive's lines by day, each object's latest revision, bars by run."""
        lines: dict[date, list[bytes]] = defaultdict(list)
        latest: dict[str, tuple[int, bytes]] = {}
        bars: Counter[str] = Counter()
        objects: dict[tuple[Channel, date], set[str]] = defaultdict(set)
        for sent in self.sent:
            if sent.kind is RecordType.EVENT:
                lines[_DAY].append(sent.payload)
                continue
            if sent.parts is None:
                continue
            days = set()
            for part in sent.parts:
                if isinstance(part, dict) and "o" in part:
                    channel, day = Channel(part["ev"]), trade_date(part["s"])
                    days.add(day)
                    bars[sent.run] += 1
                    key = f"{layout.raw_prefix(channel, day)}{part['sym']}/{iso_seconds(part['s'])}.json"
                    objects[channel, day].add(key)
                    latest[key] = part["c"], sent.payload
            for day in days or {_DAY}:
                lines[day].append(sent.payload)
        return lines, latest, bars, objects

    def check_accounts(self, ledgers: dict[str, Ledger], bars: Counter[str]) -> None:
        for run, ledger in ledgers.items():
            mine = [sent for sent in self.sent if sent.run == run]
            frames = [sent for sent in mine if sent.kind is RecordType.FRAME]
            parts = [part for sent in frames for part in sent.parts or ()]
            refused = sum(sent.parts is None for sent in frames) + sum(_is_refused(part) for part in parts)
            account = ledger.account
            assert account.frames == len(frames)
            assert account.bars == bars[run]
            assert account.quarantined == refused
            assert account.events == len(parts) + sum(sent.parts is None for sent in frames)
            subscribed = sum(b'"subscribed"' in sent.payload for sent in mine if sent.kind is RecordType.EVENT)
            assert len(account.connections) == subscribed

    def check_quarantine(self) -> None:
        """Every refusal once, and every torn end."""
        entries = [json.loads(line) for key in self.lake.keys("quarantine") for line in _lines(self.lake, key)]
        torn = [entry for entry in entries if "cut short" in entry["reason"]]
        assert sorted(_raw(entry).hex() for entry in torn) == sorted(self.torn)
        wanted = Counter(
            json.dumps(part).encode()
            for sent in self.sent
            for part in (sent.parts or () if sent.kind is RecordType.FRAME else ())
            if _is_refused(part)
        ) + Counter(sent.payload for sent in self.sent if sent.kind is RecordType.FRAME and sent.parts is None)
        assert Counter(_raw(entry) for entry in entries if entry not in torn) == wanted


def _is_refused(part: Any) -> bool:
    if not isinstance(part, dict) or "ev" not in part:
        return True
    return part["ev"] in ("AM", "A", "status") and "o" not in part and "message" not in part


def _raw(entry: dict[str, str]) -> bytes:
    import base64

    return base64.b64decode(entry["raw_base64"]) if "raw_base64" in entry else entry["raw"].encode()


@dataclass
class _Line:
    received_at: str
    content: bytes


def _lines(lake: Lake, key: str) -> list[bytes]:
    content = lake.get(key) or b""
    if key.endswith(".zst"):
        content = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    return content.splitlines(keepends=True)


def _archive(lake: Lake, day: date) -> list[_Line]:
    """The archive's lines of a day, each with the frame or event exactly as it is kept."""
    found = []
    for key in lake.keys(layout.frames_prefix(day)):
        for line in _lines(lake, key):
            entry = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            raw = bytes(entry.get("frame") or entry["event"])
            start = line.index(raw)
            end = line.rindex(b', "refused"') if "refused" in entry else line.rindex(b"}")
            found.append(_Line(json.loads(bytes(entry["received_at"])), line[start:end]))
    return found


def test_any_interleaving_of_records_faults_and_crashes_leaves_every_record_on_the_lake_once(
    say: Callable[[str], None],
) -> None:
    _Collecting.totals = totals = _Totals()
    run_state_machine_as_test(
        _Collecting,
        settings=settings(
            max_examples=80,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert totals.crashes
    assert totals.kills_within
    assert totals.faults
    assert totals.torn
    say(
        f"machine pieces: {totals.examples} histories, {totals.crashes} crashes ({totals.kills_within} within a "
        f"step, {totals.torn} torn segments), {totals.faults} store faults, {totals.records} records and "
        f"{totals.bars} bars that had to survive, {totals.objects} objects, 0 lost, 0 doubled"
    )


def test_a_history_killed_or_failed_at_every_single_operation_ends_the_same(say: Callable[[str], None]) -> None:
    totals = _Collecting.totals = _Totals()
    for sort, effect in [(s, e) for s in ("store", "file") for e in ("before", "after", "kill before", "kill after")]:
        if sort == "file" and effect != "kill before":
            continue
        countdown, struck = 0, True
        while struck:
            trap = _Trap(sort, effect, countdown, 1 if "kill" in effect else _OUTAGE)
            _play_the_history(trap)
            struck = trap.struck
            countdown += 1
    assert totals.kills_within > 30
    assert totals.faults > 20
    say(
        f"every operation: {totals.kills_within} kills and {totals.faults} failures, each at another operation "
        f"of the same history; {totals.bars} bars, 0 lost, 0 doubled"
    )


def _play_the_history(trap: _Trap) -> None:
    """Two runs: the first ends in a power loss, so that the second recovers it, under the trap, before its own."""
    machine = _Collecting()
    machine.begin(write_objects=True)
    first, second, midnight = _STARTS[0], _STARTS[1], _STARTS[2]
    machine.receive_a_burst([[_bar("SPY", first, 1)], [_bar("SPY", first, 2), _bar("IBM", midnight, 3)], [7]])
    machine.publish([None], 3, rotate=True)
    machine.notice_a_change_of_the_connection(EventKind.SUBSCRIBED)
    machine.receive_a_burst([[_bar("SPY", first, 4)], [_bar("SPY", second, 5, "A")]])
    machine.power_loss([[_bar("IBM", first, 6)]], [("cut", 40)])
    machine.receive_a_burst([[_bar("SPY", first, 8)], [_bar("IBM", midnight, 9)]])
    machine.receive_garbage(b"not JSON")
    machine.publish([trap, None], 40, rotate=True)
    machine.teardown()


@pytest.mark.parametrize("order", [("run-001", "run-002"), ("run-002", "run-001")])
def test_the_later_revision_wins_whichever_journal_is_published_first(
    order: tuple[str, str], tmp_path: Path, lake: Lake
) -> None:
    """As when the laptop that died last week comes back, after another machine has collected and been corrected."""
    frames = {"run-001": _frame(_bar("SPY", _STARTS[0], 1)), "run-002": _frame(_bar("SPY", _STARTS[0], 2))}
    for run, frame in frames.items():
        _finished_journal(tmp_path / run, lake, [frame], run)
    for run in (*order, *order):
        _publish_everything(lake, tmp_path / run)
    (key,) = lake.keys("raw-data")
    assert json.loads(lake.get(key) or b"")["bar_data"]["close"] == 2
    counts = [_ledger(lake, run).account.days[_DAY][Channel.MINUTE] for run in order]
    assert [(count.objects, count.revisions) for count in counts] == [(1, 0), (0, 1)]


# The journal by itself


def _finished_journal(root: Path, lake: Lake, frames: list[bytes], run: str = "run-001", feed: str = "polygon") -> Path:
    """What a run leaves that died after its last sync."""
    journal = Journal(root, _header(lake, run, feed=feed))
    for payload in frames:
        journal.append(RecordType.FRAME, payload)
    journal.close()
    journal.release()
    return journal.folder


def _publish_everything(lake: Lake, root: Path) -> None:
    for journal in leftovers(root):
        publisher = Publisher(lake, journal, journal.header)
        while publisher.step():
            pass
        publisher.put_ledger(complete=True)
        journal.discard()


def _frame(*bars: dict[str, object]) -> bytes:
    return json.dumps(bars).encode()


def _ledger(lake: Lake, run: str = "run-001") -> Ledger:
    return decode_ledger(lake.get(layout.ledger_key(_DAY, run)) or b"")


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_segment_damaged_at_any_byte_gives_back_every_record_before_the_damage(
    damage: str, tmp_path: Path, file_lake: Lake
) -> None:
    payloads = [b"one", b"", b"three" * 9, bytes(range(256))]
    path = _finished_journal(tmp_path, file_lake, payloads) / "000001.segment"
    content = path.read_bytes()
    (journal,) = leftovers(tmp_path)
    ends = [record.end for record in journal.read(1, 0, len(content))]
    assert ends[-1] == len(content)
    for at in range(len(content)):
        damaged = content[:at] if damage == "cut" else content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        path.write_bytes(damaged)
        end, closed = journal.end_of(1)
        whole = sum(end <= at for end in ends)
        assert closed
        assert [record.payload for record in journal.read(1, 0, end)] == payloads[:whole]
        assert journal.torn_tail(1) == damaged[ends[whole - 1] if whole else 0 :]


@given(at=st.integers(0, 600), flip=st.integers(1, 255), steps=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_segment_that_rots_before_or_while_it_is_recovered_never_stops_the_recovery(
    at: int, flip: int, steps: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lake, root = open_lake((Path(folder) / "lake").as_uri(), _no_s3), Path(folder) / "journal"
        frames = [_frame(_bar("SPY", _STARTS[0], price)) for price in range(1, 6)]
        path = _finished_journal(root, lake, frames) / "000001.segment"
        (journal,) = leftovers(root)
        publisher = Publisher(lake, journal, journal.header, batch_bytes=150)
        for _ in range(steps):
            publisher.step()
        journal.release()
        content = bytearray(path.read_bytes())
        at %= len(content)
        content[at] ^= flip
        path.write_bytes(content)
        _publish_everything(lake, root)
        assert leftovers(root) == []
        kept = [line.content for line in _archive(lake, _DAY)]
        assert kept == frames[: at * len(frames) // len(content)]
        assert _ledger(lake).account.torn_bytes == len(content) - len(kept) * len(content) // len(frames)


_TAKER = """
import sys
from pathlib import Path
from polygon_pipeline.collector.journal import leftovers
sys.stdin.readline()
mine = leftovers(Path(sys.argv[1]))
print(*(journal.header.run for journal in mine), flush=True)
sys.stdin.read()
"""


def test_two_processes_never_get_the_same_journal(tmp_path: Path, file_lake: Lake) -> None:
    runs = [f"run-{number:03d}" for number in range(12)]
    for run in runs:
        _finished_journal(tmp_path, file_lake, [b"[]"], run)
    with contextlib.ExitStack() as stack:
        takers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _TAKER, str(tmp_path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(3)
        ]
        for taker in takers:
            assert taker.stdin
            taker.stdin.write("go\n")
            taker.stdin.flush()
        taken = [taker.stdout.readline().split() for taker in takers if taker.stdout]
        assert sorted(run for mine in taken for run in mine) == runs
        assert leftovers(tmp_path) == []
        for taker in takers:
            taker.kill()
            taker.wait()
    # A lock ends with its process, however that ended.
    assert [journal.header.run for journal in leftovers(tmp_path)] == runs


def test_a_journal_under_way_is_no_leftover(tmp_path: Path, file_lake: Lake) -> None:
    journal = Journal(tmp_path, _header(file_lake, "run-001"))
    assert leftovers(tmp_path) == []
    journal.close()
    assert leftovers(tmp_path) == []
    journal.release()
    assert [left.header.run for left in leftovers(tmp_path)] == ["run-001"]


def test_records_bear_strictly_increasing_times_and_come_back_in_order(tmp_path: Path, file_lake: Lake) -> None:
    journal = Journal(tmp_path, _header(file_lake, "run-001"), segment_bytes=500)
    payloads = [b"%d" % number for number in range(200)]
    for payload in payloads:
        journal.append(RecordType.FRAME, payload)
    journal.close()
    records = [record for n in journal.numbers() for record in journal.read(n, 0, journal.end_of(n)[0])]
    assert len(journal.numbers()) > 5
    assert [record.payload for record in records] == payloads
    assert all(one.received_at < next_one.received_at for one, next_one in pairwise(records))
    journal.release()


@pytest.mark.parametrize("other", ["lake", "feed"])
def test_a_leftover_of_another_lake_or_feed_is_left_alone_and_said_so(
    other: str, tmp_path: Path, file_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    another = open_lake((tmp_path / "another").as_uri(), _no_s3)
    root, frame = tmp_path / "journal", _frame(_bar("SPY", _STARTS[0], 1))
    if other == "lake":
        _finished_journal(root, another, [frame])
    else:
        _finished_journal(root, file_lake, [frame], feed="simulated")
    _finished_journal(root, file_lake, [frame], "run-002")
    with Exchange([], speed=0) as exchange:
        plan = Plan(
            run="run-003",
            owner="me",
            session_date=_DAY,
            feed="polygon",
            url=exchange.url,
            key="key",
            topics=["AM.*"],
            journal_dir=root,
        )
        assert Collector(file_lake, plan, logging.getLogger("test")).run(lambda: "enough", lambda _: None) == "enough"
    assert [path.name for path in root.iterdir()] == ["run-001"]
    assert "belongs to the" in caplog.text
    (left,) = leftovers(root)  # let go, too
    left.release()
    assert file_lake.get(layout.ledger_key(_DAY, "run-001")) is None
    assert _ledger(file_lake, "run-002").complete
    assert another.keys("") == []
    if other == "lake":
        _publish_everything(another, root)
        assert [line.content for line in _archive(another, _DAY)] == [frame]


# A full disk

_FILLER = """
import resource, sys
from datetime import UTC, date, datetime
from pathlib import Path
from polygon_pipeline.collector.collector import Collector, Plan
from polygon_pipeline.collector.journal import Journal, JournalError, JournalHeader, RecordType

header = JournalHeader("run-001", date(2026, 1, 26), sys.argv[2], "polygon", datetime.now(UTC), True, True)
journal = Journal(Path(sys.argv[1]), header)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
taken = 0
try:
    while True:
        journal.append(RecordType.FRAME, b"x" * 700)
        taken += 1
except JournalError as error:
    print(taken, error)
try:
    journal.append(RecordType.FRAME, b"y")
except JournalError:
    print("still refused")
"""


def test_a_journal_that_cannot_grow_fails_loudly_and_keeps_all_it_has_taken(tmp_path: Path, file_lake: Lake) -> None:
    command = [sys.executable, "-c", _FILLER, str(tmp_path), file_lake.uri]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    taken, _, sentence = said[0].partition(" ")
    assert "cannot be written" in sentence
    assert "Free some space" in sentence
    assert said[1] == "still refused"
    (journal,) = leftovers(tmp_path)
    end, closed = journal.end_of(1)
    assert closed
    assert [record.payload for record in journal.read(1, 0, end)] == [b"x" * 700] * int(taken)
    assert int(taken) == 10_000 // 717
    assert journal.torn_tail(1) == b""


def test_a_disk_that_is_nearly_full_fails_the_journal_while_what_it_has_can_still_be_published(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "journal"
    header = _header(file_lake, "run-001")
    journal = Journal(root, header)
    monkeypatch.setattr(journal_module, "MIN_FREE_BYTES", 2**62)
    frame = _frame(_bar("SPY", _STARTS[0], 1))
    journal.append(RecordType.FRAME, frame)
    journal.wait(1, 0, 60)
    with pytest.raises(JournalError, match="free some space"):
        journal.append(RecordType.FRAME, frame)
    with pytest.raises(JournalError, match="MiB left"):
        journal.close()
    publisher = Publisher(file_lake, journal, header)
    while publisher.step():
        pass
    assert [line.content for line in _archive(file_lake, _DAY)] == [frame]
    journal.discard()


# What these tests have found once


def test_a_torn_end_is_quarantined_once_however_often_archiving_is_retried(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    path = _finished_journal(root, file_lake, [_frame(_bar("SPY", _STARTS[0], 1))]) / "000001.segment"
    path.write_bytes(path.read_bytes() + b"torn")
    (journal,) = leftovers(root)
    publisher = Publisher(file_lake, journal, journal.header)
    publisher.step()
    publisher.step()
    with _armed(_Trap("store", "before", 0), tmp_path), pytest.raises(GenericError):
        publisher.step()
    while publisher.step():
        pass
    assert len(_lines(file_lake, layout.quarantine_key(_DAY, "run-001", 1))) == 1


def test_a_kill_at_any_moment_of_removing_a_published_journal_changes_no_ledger_and_leaves_no_litter(
    tmp_path: Path, file_lake: Lake
) -> None:
    root = tmp_path / "journal"
    moments, trap = 0, _Trap("file", "kill before", 0)
    while not moments or trap.struck:
        run = f"run-{moments:03d}"
        trap = _Trap("file", "kill before", moments)
        _finished_journal(root, file_lake, [_frame(_bar("SPY", _STARTS[0], 1))], run)
        (journal,) = leftovers(root)
        publisher = Publisher(file_lake, journal, journal.header)
        while publisher.step():
            pass
        publisher.put_ledger(complete=True)
        before = _ledger(file_lake, run)
        assert before.account.bars == 1
        try:
            with _armed(trap, root):
                journal.discard()
        except _Killed:
            journal.release()
        _publish_everything(file_lake, root)
        assert _ledger(file_lake, run) == before
        assert list(root.iterdir()) == []
        moments += 1
    assert moments > 3


def test_a_batch_whose_state_cannot_be_saved_is_taken_again_and_counted_once(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    frame = _frame(_bar("SPY", _STARTS[0], 1))
    _finished_journal(root, file_lake, [frame])
    (journal,) = leftovers(root)
    publisher = Publisher(file_lake, journal, journal.header)
    in_the_way = journal.folder / "state.new"  # as a full disk would be: the state cannot be written
    in_the_way.mkdir()
    with pytest.raises(STORE_ERRORS):  # which a collector tries again
        publisher.step()
    in_the_way.rmdir()
    while publisher.step():
        pass
    publisher.put_ledger(complete=True)
    assert [line.content for line in _archive(file_lake, _DAY)] == [frame]
    count = _ledger(file_lake).account.days[_DAY][Channel.MINUTE]
    assert (count.bars, count.objects, count.revisions) == (1, 1, 0)


def test_no_bar_that_is_accepted_has_a_name_that_a_file_lake_cannot_hold(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    _finished_journal(root, file_lake, [_frame(_bar("\N{CHART WITH UPWARDS TREND}" * 64, _STARTS[0], 1))])
    _publish_everything(file_lake, root)
    assert _ledger(file_lake).account.events == 1


def test_the_backlog_can_be_asked_for_while_segments_are_published(tmp_path: Path, file_lake: Lake) -> None:
    """The lease's thread and the main thread ask; the publisher's removes. An error there ends the run."""
    folder = _finished_journal(tmp_path, file_lake, [b"[]"])
    (journal,) = leftovers(tmp_path)
    for number in range(1, 3000):
        (folder / f"{number:06d}.segment").write_bytes(b"x")

    def publish() -> None:
        for number in range(1, 3000):
            (folder / f"{number:06d}.segment").unlink()

    thread = threading.Thread(target=publish)
    thread.start()
    while thread.is_alive():
        journal.backlog_bytes()
    thread.join()


def test_a_run_that_starts_while_another_ends_disturbs_neither(tmp_path: Path, file_lake: Lake) -> None:
    over = threading.Event()
    stumbled: list[OSError] = []

    def start_again_and_again() -> None:
        while not over.is_set():
            try:
                for journal in leftovers(tmp_path):
                    journal.release()
            except OSError as error:
                stumbled.append(error)

    thread = threading.Thread(target=start_again_and_again)
    thread.start()
    for number in range(300):
        journal = Journal(tmp_path, _header(file_lake, f"run-{number:03d}"))
        journal.close()
        try:
            journal.discard()
        except OSError as error:
            stumbled.append(error)
    over.set()
    thread.join()
    assert stumbled == []
