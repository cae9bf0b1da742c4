"""The journal and the publisher under any interleaving of records, faults and crashes.

A crash is played on the real pieces: the objects are abandoned, the folder's lock is let go as the kernel does at a
process's end, and whatever was not yet synced may be cut short or garbled. Faults and kills within an operation are
support.traps'.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from polygon_pipeline.collector.journal import Journal, LeftoverJournal, RecordType, leftovers
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import STORE_ERRORS
from polygon_pipeline.lake.ledger import Ledger, decode_ledger
from polygon_pipeline.market.bars import Channel, iso_seconds
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind
from polygon_pipeline_tests.support.archives import archived_lines, quarantined_entries
from polygon_pipeline_tests.support.bars import DAY, plain_bar
from polygon_pipeline_tests.support.folders import folder_in_memory
from polygon_pipeline_tests.support.journals import journal_header
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.traps import Trap, armed, was_killed

pytestmark = [pytest.mark.slow, pytest.mark.fault("crashes at any operation")]

# Around New York's midnight, so that one frame may hold bars of two trade dates.
_STARTS = [1769490000000 - 120_000, 1769490000000 - 60_000, 1769490000000, 1769490000000 + 60_000, 1769576400000]
# More operations in a row than a publisher tries of its own accord.
_OUTAGE = 40

_traps = (
    st.none()
    | st.builds(
        Trap,
        st.just("store"),
        st.sampled_from(["before", "after", "before", "after", "kill before", "kill after"]),
        st.sampled_from([0, 0, 1, 1, 2, 3, 5]),
        st.sampled_from([1, 1, _OUTAGE]),
    )
    | st.builds(Trap, st.just("file"), st.just("kill before"), st.integers(0, 9))
)


# The records, and what must become of them

_bars = st.builds(
    plain_bar,
    st.sampled_from(["SPY", "BRK.B", "a b%2F#é"]),
    st.sampled_from(_STARTS),
    st.integers(1, 999),
    st.sampled_from([Channel.MINUTE, Channel.MINUTE, Channel.SECOND]),
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
        self.resources = contextlib.ExitStack()
        self.folder = self.resources.enter_context(folder_in_memory())  # a hundred histories have thousands of syncs
        self.lake = local_lake(self.folder / "lake")
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
        self.header = journal_header(f"run-{self.runs:03d}", self.lake.uri, write_objects=self.write_objects)
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
    def publish(self, traps: list[Trap | None], steps: int, rotate: bool) -> None:
        """Some steps; after a fault of the store, some more under the next trap."""
        if rotate:
            self.journal.rotate()
        self.settle()
        for trap in traps:
            try:
                with armed(trap, self.folder):
                    for _ in range(steps):
                        self.step()
                return
            except STORE_ERRORS:
                assert trap is not None
                assert trap.struck
                self.totals.faults += 1
            except BaseException as error:
                if not was_killed(error):
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
            self.resources.close()

    def check(self) -> None:
        assert list(self.root.iterdir()) == []
        wanted_lines, latest, bars, objects = self.truth()
        received: dict[bytes, str] = {}
        for day, wanted in wanted_lines.items():
            lines = list(archived_lines(self.lake, day))
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
                lines[DAY].append(sent.payload)
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
            for day in days or {DAY}:
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
        """Every refused part is there once, and every torn end."""
        entries = list(quarantined_entries(self.lake))
        torn = [entry for entry in entries if "cut short" in entry.reason]
        assert sorted(entry.raw.hex() for entry in torn) == sorted(self.torn)
        wanted = Counter(
            json.dumps(part).encode()
            for sent in self.sent
            for part in (sent.parts or () if sent.kind is RecordType.FRAME else ())
            if _is_refused(part)
        ) + Counter(sent.payload for sent in self.sent if sent.kind is RecordType.FRAME and sent.parts is None)
        assert Counter(entry.raw for entry in entries if entry not in torn) == wanted


def _is_refused(part: Any) -> bool:
    if not isinstance(part, dict) or "ev" not in part:
        return True
    return part["ev"] in ("AM", "A", "status") and "o" not in part and "message" not in part


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
        f"interleavings: {totals.examples} histories, {totals.crashes} crashes ({totals.kills_within} within a "
        f"step, {totals.torn} torn segments), {totals.faults} store faults, {totals.records} records and "
        f"{totals.bars} bars that had to survive, {totals.objects} objects, 0 lost, 0 doubled"
    )


def test_a_kill_or_a_failure_at_any_operation_of_a_history_changes_nothing_in_the_end(
    say: Callable[[str], None],
) -> None:
    totals = _Collecting.totals = _Totals()
    for sort, effect in [(s, e) for s in ("store", "file") for e in ("before", "after", "kill before", "kill after")]:
        if sort == "file" and effect != "kill before":
            continue
        countdown, struck = 0, True
        while struck:
            trap = Trap(sort, effect, countdown, 1 if "kill" in effect else _OUTAGE)
            _play_the_history(trap)
            struck = trap.struck
            countdown += 1
    assert totals.kills_within > 30
    assert totals.faults > 20
    say(
        f"every operation: {totals.kills_within} kills and {totals.faults} failures, each at another operation "
        f"of the same history; {totals.bars} bars, 0 lost, 0 doubled"
    )


def _play_the_history(trap: Trap) -> None:
    """Two runs: the first ends in a power loss, so that the second recovers it, under the trap, before its own."""
    machine = _Collecting()
    machine.begin(write_objects=True)
    first, second, midnight = _STARTS[0], _STARTS[1], _STARTS[2]
    machine.receive_a_burst(
        [[plain_bar("SPY", first, 1)], [plain_bar("SPY", first, 2), plain_bar("IBM", midnight, 3)], [7]]
    )
    machine.publish([None], 3, rotate=True)
    machine.notice_a_change_of_the_connection(EventKind.SUBSCRIBED)
    machine.receive_a_burst([[plain_bar("SPY", first, 4)], [plain_bar("SPY", second, 5, Channel.SECOND)]])
    machine.power_loss([[plain_bar("IBM", first, 6)]], [("cut", 40)])
    machine.receive_a_burst([[plain_bar("SPY", first, 8)], [plain_bar("IBM", midnight, 9)]])
    machine.receive_garbage(b"not JSON")
    machine.publish([trap, None], 40, rotate=True)
    machine.teardown()
