"""Other programs listen to the collector's stream: real sockets before a real journal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import websocket
from hypothesis import given
from hypothesis import strategies as st
from massive import WebSocketClient  # type: ignore[import-untyped, unused-ignore]
from massive.websocket.models import (  # type: ignore[import-untyped, unused-ignore]
    EquityAgg,
    WebSocketMessage,
)
from websockets.exceptions import ConnectionClosedError

from polygon_pipeline.collector import journal as journal_module
from polygon_pipeline.collector import relay as relay_module
from polygon_pipeline.collector.collector import Collector
from polygon_pipeline.collector.journal import Journal, JournalHeader, RecordType
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.collector.relay import Relay, RelayAccess, RelayedFrame
from polygon_pipeline.lake.ledger import TimeBase, Watermark
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.polygon.stream import EventKind
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline_tests.support.bars import NOON, JsonObject, at, plain_bar
from polygon_pipeline_tests.support.client import Client, connect, log_in
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.journals import frame_of, journal_header, publish_leftovers
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.scripted import Watched
from polygon_pipeline_tests.support.waiting import until

TOKEN = "a-secret-of-the-relay"


class Shared:
    """A journal that a test writes, and the relay before it."""

    def __init__(self, lake: Lake, root: Path, header: JournalHeader) -> None:
        self.told: list[str] = []
        self.heard: float | None = None
        self.journal = Journal(root, header)
        self.publisher = Publisher(lake, self.journal, header)
        self.relay = Relay(
            RelayAccess(0, TOKEN),
            self.journal,
            header,
            lake,
            lateness=lambda: self.publisher.account.lateness,
            heard=lambda: self.heard,
            tell=lambda told: self.told.append(told[1]),
        )

    @property
    def url(self) -> str:
        return self.relay.url

    def receive(self, *frames: bytes) -> None:
        for frame in frames:
            self.journal.append(RecordType.FRAME, frame)

    def note(self, kind: str) -> None:
        self.journal.append(RecordType.EVENT, json.dumps({"kind": kind, "detail": ""}).encode())

    def publish(self) -> None:
        """All there is so far is archived, and gone from the journal."""
        wanted = self.publisher.segments_published + 1
        self.journal.rotate()
        until(lambda: self.publisher.step() and self.publisher.segments_published == wanted, "it is there", pause=0.001)


@contextmanager
def sharing(
    lake: Lake, root: Path, topics: Sequence[str] = ("AM.*",), run: str = "run-002", time_base: TimeBase = "processing"
) -> Iterator[Shared]:
    header = msgspec.structs.replace(journal_header(run, lake.uri), topics=tuple(topics), time_base=time_base)
    shared = Shared(lake, root, header)
    shared.relay.start()
    try:
        yield shared
    finally:
        shared.journal.close()
        shared.relay.stop()
        shared.journal.release()


@pytest.fixture(autouse=True)
def _quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_CLOSE_SECONDS", 0.1)


@pytest.fixture
def shared(file_lake: Lake, tmp_path: Path) -> Iterator[Shared]:
    with sharing(file_lake, tmp_path / "journal") as found:
        yield found


def frame(number: int, *tickers: str) -> bytes:
    return frame_of(*(plain_bar(ticker, NOON + number * 60_000, number) for ticker in tickers or ("SPY",)))


@contextmanager
def listening(shared: Shared, topics: str = "AM.*") -> Iterator[Client]:
    with log_in(shared, TOKEN) as client:
        acknowledged = client.ask("subscribe", topics)
        assert [found["message"] for found in acknowledged] == [f"subscribed to: {name}" for name in topics.split(",")]
        yield client


def raw(client: Client) -> bytes:
    found = client.socket.recv()
    return found.encode() if isinstance(found, str) else found


# The protocol


def test_a_frame_comes_verbatim_or_with_the_events_that_are_subscribed_to(shared: Shared) -> None:
    with listening(shared) as everything, listening(shared, "AM.SPY") as some, listening(shared, "AM.QQQ") as other:
        odd = b'[ {"ev":"AM","sym":"SPY","s":1,"new":[1, 2]}\n]'
        mixed = (
            b'[{"ev":"status","status":"success","message":""},{"ev":"AM","sym":"SPY","s":2},{"ev":"T","sym":"SPY"}]'
        )
        both = frame(1, "SPY", "QQQ")
        shared.receive(odd, mixed, b'{"ev":"AM","sym":"SPY","s":3}', b"no JSON", both)
        expected = [odd, b'[{"ev":"AM","sym":"SPY","s":2}]', b'[{"ev":"AM","sym":"SPY","s":3}]']
        assert [raw(everything) for _ in range(4)] == [*expected, both]
        assert [raw(some) for _ in range(3)] == expected
        assert [bar["sym"] for bar in some.receive()] == ["SPY"]
        assert [bar["sym"] for bar in other.receive()] == ["QQQ"]


def test_the_protocol_is_the_vendors(shared: Shared) -> None:
    with connect(shared) as client:
        assert client.greeting == [{"ev": "status", "status": "connected", "message": "Connected Successfully"}]
        assert client.ask("auth", TOKEN) == [{"ev": "status", "status": "auth_success", "message": "authenticated"}]
        for silent in ("AM.SPY", "nonsense", "T.SPY", "AM.", ""):
            client.send("subscribe", silent)
        client.socket.send("{")
        client.socket.send('{"action":"auth"}')
        assert client.receive()[0]["message"] == "subscribed to: AM.SPY"
        client.send("subscribe", "AM.SPY")  # subscribing twice is not answered
        found = client.ask("subscribe", "AM.BRK.B,AM.*")
        assert [each["message"] for each in found] == ["subscribed to: AM.BRK.B", "subscribed to: AM.*"]
        assert client.ask("unsubscribe", "AM.*,AM.IWM") == [
            {"ev": "status", "status": "success", "message": "unsubscribed to: AM.*"}
        ]
        shared.receive(frame(1, "QQQ"), frame(2, "BRK.B"))
        assert client.receive()[0]["sym"] == "BRK.B"


def test_what_the_collector_does_not_have_is_refused_by_name(file_lake: Lake, tmp_path: Path) -> None:
    with sharing(file_lake, tmp_path / "journal", ["AM.SPY", "AM.QQQ"]) as shared, log_in(shared, TOKEN) as client:
        found = client.ask("subscribe", "AM.SPY,AM.IWM,A.*,AM.*,watermark.A,watermark.AM")
        assert [each["message"] for each in found] == [
            "subscribed to: AM.SPY",
            "subscribed to: AM.*",
            "subscribed to: watermark.AM",
            "not collected, so that it cannot be relayed: AM.IWM, A.*, watermark.A",
        ]


@pytest.mark.parametrize(
    "message", ['{"action":"auth","params":"wrong"}', '{"action":"auth","params":""}', '{"action":"subscribe"}', "?"]
)
def test_a_reader_without_the_token_is_dropped_as_the_vendor_does(shared: Shared, message: str) -> None:
    with connect(shared) as client:
        client.socket.send(message)
        assert client.receive()[0]["status"] == "auth_failed"
        assert client.close_code() is None


def test_a_reader_that_does_not_authenticate_is_told_and_dropped(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "AUTH_SECONDS", 0.05)
    with connect(shared) as client:
        assert client.receive()[0]["status"] == "auth_timeout"
        assert client.close_code() is not None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://example.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"host": "example.com"},
        {"host": "127.0.0.1"},
    ],
)
def test_what_a_page_in_a_browser_sends_is_refused(shared: Shared, headers: dict[str, str]) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        websocket.create_connection(shared.url, timeout=10, **headers)


def test_there_may_be_so_many_readers_and_no_more(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MOST_READERS", 1)
    with listening(shared) as client:
        with pytest.raises(websocket.WebSocketBadStatusException, match="503"):
            websocket.create_connection(shared.url, timeout=10)
        shared.receive(frame(1))
        assert raw(client) == frame(1)


def test_a_message_that_is_too_long_ends_its_connection_alone(shared: Shared) -> None:
    with listening(shared) as client, listening(shared) as other:
        client.send("subscribe", "x" * 600_000)
        assert client.close_code() == 1009
        shared.receive(frame(1))
        assert raw(other) == frame(1)


def test_a_port_that_is_taken_is_named_and_ends_nothing(shared: Shared, file_lake: Lake, tmp_path: Path) -> None:
    other = Relay(
        RelayAccess(shared.relay.port, TOKEN),
        shared.journal,
        journal_header(),
        file_lake,
        lateness=dict,
        heard=lambda: None,
        tell=lambda told: shared.told.append(told[1]),
    )
    other.start()
    other.stop()
    assert f"port {shared.relay.port} (POLYGON_RELAY_PORT)" in shared.told[-1]


def test_at_the_end_everything_is_relayed_and_readers_are_told_to_come_back(file_lake: Lake, tmp_path: Path) -> None:
    with sharing(file_lake, tmp_path / "journal") as shared:
        client = Client(shared)
        client.ask("auth", TOKEN)
        client.ask("subscribe", "AM.*")
        shared.receive(*(frame(number) for number in range(50)))
    with closing(client.socket):
        assert [raw(client) for _ in range(50)] == [frame(number) for number in range(50)]
        assert client.receive()[0]["status"] == "force_disconnect"
        assert client.close_code() == 1012
    assert not any(TOKEN in told for told in shared.told)


def test_no_frame_comes_twice_while_segments_are_closed(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_sync(_file: int) -> None:
        time.sleep(0.01)  # the segment is not under way any more, and not closed yet

    monkeypatch.setattr(journal_module, "sync_file", slow_sync)
    monkeypatch.setattr(relay_module, "_TICK_SECONDS", 0.001)
    with listening(shared) as client:
        for number in range(1, 31):
            shared.receive(frame(number))
            if number % 3 == 0:
                assert prices(client, 3) == [number - 2, number - 1, number]
                shared.receive(frame(0))
                assert prices(client, 1) == [0]
                shared.journal.rotate()


# Readers that fail


def test_a_reader_that_never_reads_is_disconnected_and_delays_nobody(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "UNREAD_BYTES", 2**20)
    large = frame_of(*(plain_bar(f"T{number}", NOON, 1) for number in range(500)))
    with listening(shared) as never, listening(shared) as reads:
        sent = 0
        while len(shared.relay._readers) > 1:
            shared.receive(large)
            assert raw(reads) == large
            sent += 1
            assert sent < 1000, "it is kept"
        assert _rest(never) <= sent + 1
        shared.receive(frame(1))
        assert raw(reads) == frame(1)


def _rest(client: Client) -> int:
    """How many messages are there until the connection ends."""
    count = 0
    with contextlib.suppress(websocket.WebSocketException, OSError):
        while client.socket.recv():
            count += 1
    return count


_SCRIPT = """
import json, sys, websocket
url, token = sys.argv[1:]
socket = websocket.create_connection(url)
socket.recv()
for action, params in (("auth", token), ("subscribe", "AM.*")):
    socket.send(json.dumps({"action": action, "params": params}))
    socket.recv()
print("listening", flush=True)
while True:
    socket.recv()
"""


@pytest.mark.slow
def test_a_reader_that_is_killed_is_gone_and_costs_nobody_else_a_frame(shared: Shared) -> None:
    with listening(shared) as survivor:
        process = subprocess.Popen([sys.executable, "-c", _SCRIPT, shared.url, TOKEN], stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.readline() == b"listening\n"
        shared.receive(frame(1))
        process.kill()
        process.wait()
        process.stdout.close()
        shared.receive(*(frame(number) for number in range(2, 100)))
        assert [raw(survivor) for _ in range(99)] == [frame(number) for number in range(1, 100)]
        until(lambda: len(shared.relay._readers) == 1, "it is gone")


# Replay


def replay(client: Client, params: str, since: datetime | int = 0) -> None:
    since_ms = since if isinstance(since, int) else int(since.timestamp() * 1000)
    client.socket.send(json.dumps({"action": "replay", "params": params, "since": since_ms}))


def prices(client: Client, count: int) -> list[int]:
    """The prices of so many frames' bars; statuses are passed over."""
    found: list[int] = []
    while len(found) < count:
        found += [bar["o"] for bar in client.receive() if bar["ev"] == "AM"]
    return found


def test_a_reader_gets_what_it_missed_and_then_what_comes_without_a_hole_or_a_double(
    file_lake: Lake, tmp_path: Path
) -> None:
    root = tmp_path / "journal"
    before = Journal(root, journal_header("run-001", file_lake.uri))  # a run of the same day that is lost
    before.append(RecordType.FRAME, frame(0, "SPY", "QQQ"), frame(1))
    before.close()
    before.release()
    publish_leftovers(file_lake, root)
    with sharing(file_lake, root) as shared, log_in(shared, TOKEN) as client:
        shared.receive(frame(2), frame(3))
        shared.publish()
        assert shared.journal.numbers() != [1]
        shared.receive(frame(4))
        going, number = threading.Event(), 5

        def receive_on() -> None:
            nonlocal number
            while not going.wait(0.001):
                shared.receive(frame(number))
                number += 1

        receiving = threading.Thread(target=receive_on)
        receiving.start()
        try:
            replay(client, "AM.SPY")
            assert client.receive()[0]["message"] == "subscribed to: AM.SPY"
            replayed = []
            while (found := client.receive())[0]["ev"] == "AM":
                replayed.append(found[0]["o"])
            assert found[0]["status"] == "replayed"
            assert found[0]["message"] == f"{len(replayed)} frames; what follows is live"
        finally:
            time.sleep(0.05)
            going.set()
            receiving.join()
        live = prices(client, number - len(replayed))
        assert replayed + live == list(range(number))
        assert len(replayed) >= 5
        assert live


def test_a_replay_begins_where_it_is_asked_to(shared: Shared) -> None:
    shared.receive(frame(1), frame(2))
    shared.publish()
    shared.receive(frame(3))
    time.sleep(0.005)
    since = datetime.now(UTC)
    time.sleep(0.005)
    shared.receive(frame(4))
    until(lambda: shared.journal.is_synced(*shared.relay._position), "it is relayed", pause=0.001)
    with log_in(shared, TOKEN) as client:
        replay(client, "AM.*", since)
        assert prices(client, 1) == [4]
        assert client.receive()[0]["message"] == "1 frames; what follows is live"
        shared.receive(frame(5))
        assert prices(client, 1) == [5]


def test_a_replay_comes_before_subscribing_and_once(shared: Shared) -> None:
    with listening(shared) as client:
        replay(client, "AM.*")
        assert client.receive()[0]["status"] == "error"
        shared.receive(frame(1))
        assert raw(client) == frame(1)


def test_a_replay_whose_archive_cannot_be_had_fails_aloud(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.receive(frame(1))
    shared.publish()

    def away(_self: Lake, _key: str) -> bytes:
        raise OSError("the store is away")

    monkeypatch.setattr(Lake, "get", away)
    with listening(shared) as other, log_in(shared, TOKEN) as client:
        replay(client, "AM.*")
        assert client.receive()[0]["status"] == "success"
        assert client.receive()[0]["status"] == "replay_failed"
        assert client.close_code() == 1011
        shared.receive(frame(2))
        assert raw(other) == frame(2)


def test_a_replay_that_waits_for_the_store_does_not_keep_the_collector_from_ending(
    file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_END_SECONDS", 0.2)
    asked, back = threading.Event(), threading.Event()

    def away(_self: Lake, _key: str) -> None:
        asked.set()
        back.wait(30)

    with sharing(file_lake, tmp_path / "journal") as shared, log_in(shared, TOKEN) as client:
        shared.receive(frame(1))
        shared.publish()
        monkeypatch.setattr(Lake, "get", away)
        replay(client, "AM.*")
        assert asked.wait(10)
        shared.relay.stop()
        assert not back.is_set()
        back.set()


# Watermarks


def test_who_asked_for_it_is_told_of_each_minute_that_is_complete_after_its_bars(
    file_lake: Lake, tmp_path: Path
) -> None:
    with (
        sharing(file_lake, tmp_path / "journal", time_base="event") as shared,
        listening(shared, "AM.*,watermark.AM") as client,
        listening(shared) as other,
    ):
        shared.note("subscribed")
        for number in range(3):
            shared.receive(frame(number))
        came: list[JsonObject] = []
        while not came or came[-1].get("through") != NOON + 60_000:
            came += client.receive()
        *_, mark = came
        assert [found["o"] for found in came if found["ev"] == "AM"] == [0, 1, 2]
        assert (mark["ev"], mark["status"], mark["channel"]) == ("status", "watermark", "AM")
        assert mark["message"] == "complete through 12:01 New York"
        assert (mark["first"], mark["gaps"]) == (at(4, 0), [])
        assert abs(mark["sent_until"] / 1000 - time.time()) < 60
        for number in range(3):
            assert raw(other) == frame(number)
        shared.note("disconnected")
        shared.note("subscribed")
        shared.receive(frame(10), frame(11), frame(12))
        while came[-1].get("through") != NOON + 11 * 60_000:
            came += client.receive()
        assert came[-1]["message"] == "complete through 12:11 New York, without 12:02 to 12:10"
        assert came[-1]["gaps"] == [[NOON + 2 * 60_000, NOON + 10 * 60_000]]
        assert raw(other) == frame(10)


def test_a_quiet_minute_is_complete_once_the_server_was_heard_after_it(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "_TICK_SECONDS", 0.01)
    given: list[datetime | None] = []

    def watched(*arguments: Any) -> Watermark | None:
        given.append(arguments[-1])
        return None

    monkeypatch.setattr(relay_module, "watermark", watched)
    shared.note("subscribed")
    with listening(shared, "watermark.AM"):
        shared.heard = time.monotonic() + 100
        until(
            lambda: given and given[-1] and given[-1] > datetime.now(UTC) + timedelta(seconds=90),
            "it was heard",
            pause=0.005,
        )


# With a collector


def test_the_vendors_client_and_our_own_listen_to_a_collector_unchanged(file_lake: Lake, tmp_path: Path) -> None:
    feed = [event(ticker, minute) for minute in range(50) for ticker in ("SPY", "BRK.B")]
    [port] = free_ports(1)
    received: list[EquityAgg] = []
    theirs = WebSocketClient(
        TOKEN, feed=f"127.0.0.1:{port}", secure=False, subscriptions=["AM.SPY", "AM.BRK.B"], max_reconnects=0
    )

    async def take(messages: list[WebSocketMessage]) -> None:
        received.extend(messages)

    async def run(over: threading.Event) -> None:
        task = asyncio.create_task(theirs.connect(take))
        while not over.is_set() and not task.done():
            await asyncio.sleep(0.02)
        await theirs.close()
        with contextlib.suppress(ConnectionClosedError):  # the collector ended, and it may connect once only
            await task

    over = threading.Event()
    with Exchange(feed, speed=0) as exchange:
        wanted = plan(
            exchange.url, tmp_path / "journal", relay=RelayAccess(port, TOKEN), time_base="event", topics=["AM.*"]
        )
        collector = Collector(file_lake, wanted, logging.getLogger("relayed"))
        watched = Watched(f"ws://127.0.0.1:{port}/stocks", ["AM.SPY"], key=TOKEN)
        listener = threading.Thread(target=lambda: asyncio.run(run(over)))

        def ending() -> str | None:
            if not listener.ident:  # before the stream begins, so that all of it is heard
                watched.__enter__()
                watched.next(EventKind.SUBSCRIBED)
                listener.start()
                until(lambda: theirs.subs, "the vendor's client has subscribed", pause=0.005)
                time.sleep(0.1)
            return "all is heard" if len(received) == len(feed) and exchange.finished.is_set() else None

        collector.run(ending, lambda _: None)
        over.set()
        listener.join()
        watched.end()
    assert [(bar.symbol, bar.start_timestamp) for bar in received] == [(sent.ticker, sent.start_ms) for sent in feed]
    ours = [bar for content in watched.frames for bar in json.loads(content) if bar["ev"] == "AM"]
    assert ours == [json.loads(sent.payload) for sent in feed if sent.ticker == "SPY"]


# What a subscription gets of a frame


@given(st.lists(st.tuples(st.sampled_from(["AM", "A", "T", "status"]), st.sampled_from(["SPY", "QQQ", "*"]))))
def test_every_event_that_is_subscribed_to_comes_once_in_its_order(events: list[tuple[str, str]]) -> None:
    frame = [{"ev": kind, "sym": ticker, "n": number} for number, (kind, ticker) in enumerate(events)]
    for topics in ({("AM", "*")}, {("AM", "SPY"), ("A", "*")}, {("A", "QQQ")}, set[tuple[str, str]]()):
        wanted = [found for found in frame if (found["ev"], "*") in topics or (found["ev"], found["sym"]) in topics]
        content = RelayedFrame(json.dumps(frame).encode()).matching(frozenset(topics))
        assert (json.loads(content) if content else []) == wanted


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        (b'[{"ev":"AM","sym":7},{"ev":"AM","sym":"SPY"},3]', b'[{"ev":"AM","sym":"SPY"}]'),
        (b'[{"ev":"AM","sym":"\xff"},{"ev":"AM","sym":"SPY"}]', b'[{"ev":"AM","sym":"SPY"}]'),
        (b'[{"ev":"AM","sym":"SPY"}', None),
        (b"[" * 100_000, None),
        (b"", None),
    ],
)
def test_an_event_that_cannot_be_read_costs_itself(payload: bytes, content: bytes | None) -> None:
    assert RelayedFrame(payload).matching(frozenset({("AM", "*")})) == content
