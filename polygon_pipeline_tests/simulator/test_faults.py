"""Faults on request, as a raw client sees them."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import websocket

from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import AT_FRAME, Fault, Faults, FaultType
from polygon_pipeline_tests.support.bars import OPENING
from polygon_pipeline_tests.support.client import Client, connect, log_in
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.waiting import until

FEED = [event("AAPL", minute) for minute in range(6)]


def exchange(*plan: Fault, seed: int = 0) -> Exchange:
    """At unlimited speed, with three bars per frame, so two frames."""
    return Exchange(FEED, speed=0, batch_limit=3, faults=Faults(plan, seed), record=True)


def subscribe(client: Client) -> None:
    assert client.ask("subscribe", "AM.AAPL")[0]["status"] == "success"


def messages(client: Client) -> Iterator[tuple[int, bytes]]:
    """All messages until the socket ends, including control frames except pings."""
    client.socket.cont_frame.skip_utf8_validation = True
    while True:
        try:
            opcode, data = client.socket.recv_data(control_frame=True)
        except (websocket.WebSocketConnectionClosedException, ConnectionResetError):
            return
        if opcode != websocket.ABNF.OPCODE_PING:
            yield opcode, data
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            return


TEXT, BINARY, CLOSE = websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_CLOSE
FIRST, SECOND = (b"[%b]" % b",".join(bar.payload for bar in bars) for bars in (FEED[:3], FEED[3:]))


def test_a_dropped_connection_ends_without_a_close_frame_after_everything_sent() -> None:
    with exchange(Fault(FaultType.DROP, after_frames=2)) as server, log_in(server) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST), (TEXT, SECOND)]


def test_a_reset_connection_ends_without_a_close_frame() -> None:
    with exchange(Fault(FaultType.RESET, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert list(messages(client)) in ([], [(TEXT, FIRST)])


@pytest.mark.slow
def test_a_closed_connection_ends_with_a_close_frame() -> None:
    with exchange(Fault(FaultType.CLOSE, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST), (CLOSE, b"\x03\xe9going away")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FaultType.SLOW_CONSUMER, FaultType.FORCE_DISCONNECT, FaultType.MAX_CONNECTIONS])
def test_an_evicted_client_receives_the_reason_and_close_code_1008(kind: FaultType) -> None:
    with exchange(Fault(kind, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        bars, (_, status), close = messages(client)
        assert bars == (TEXT, FIRST)
        assert json.loads(status)[0]["status"] == kind
        assert close == (CLOSE, b"\x03\xf0" + kind.encode())


def test_a_truncated_frame_never_arrives() -> None:
    with exchange(Fault(FaultType.TRUNCATED_FRAME, after_frames=2)) as server, log_in(server) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST)]
        assert [frame.payload for frame in server.served[0].frames] == [FIRST]


def test_of_a_huge_frame_only_the_header_is_sent() -> None:
    with exchange(Fault(FaultType.HUGE_FRAME, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        client.socket.settimeout(0.2)
        with pytest.raises(websocket.WebSocketTimeoutException):
            client.socket.recv()
        assert client.socket.frame_buffer.length == 64 * 2**20


def test_a_huge_message_has_no_last_frame() -> None:
    with exchange(Fault(FaultType.HUGE_MESSAGE, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        skip_the_ping(client)
        frames = [client.socket.recv_frame() for _ in range(12)]
        assert [(frame.opcode, frame.fin, len(frame.data)) for frame in frames] == [
            (TEXT if number == 0 else 0, 0, 2**20) for number in range(12)
        ]


def skip_the_ping(client: Client) -> None:
    """The one that asks whether the first frame has arrived."""
    assert client.socket.recv_frame().opcode == websocket.ABNF.OPCODE_PING


@pytest.mark.slow
def test_of_a_dripping_frame_a_byte_comes_now_and_then() -> None:
    with exchange(Fault(FaultType.DRIP, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        skip_the_ping(client)
        raw = client.socket.sock
        received = b""
        while len(received) < 7:
            received += raw.recv(7)
        assert received == b"\x81\x7e\xff\xff   "


@pytest.mark.slow
def test_a_stalled_connection_stays_open_and_answers_no_ping() -> None:
    with exchange(Fault(FaultType.STALL, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        incoming = messages(client)
        assert next(incoming) == (TEXT, FIRST)
        client.socket.ping()
        client.socket.settimeout(0.3)
        with pytest.raises(websocket.WebSocketTimeoutException):
            next(incoming)
        assert not server.finished.is_set(), "at unlimited speed, the feed waits for a subscriber"


def test_a_silent_connection_answers_pings_and_sends_nothing_else() -> None:
    with exchange(Fault(FaultType.SILENCE, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        incoming = messages(client)
        assert next(incoming) == (TEXT, FIRST)
        client.socket.ping(b"there?")
        assert next(incoming) == (websocket.ABNF.OPCODE_PONG, b"there?")
        assert not server.finished.is_set(), "at unlimited speed, the feed waits for a subscriber"


@pytest.mark.parametrize("kind", [FaultType.STALL, FaultType.SILENCE])
def test_a_stall_or_silence_can_end_by_itself(kind: FaultType) -> None:
    with exchange(Fault(kind, after_frames=1, seconds=0.1)) as server, log_in(server) as client:
        subscribe(client)
        assert [client.socket.recv(), client.socket.recv()] == [FIRST.decode(), SECOND.decode()]


@pytest.mark.parametrize(
    ("kind", "count", "bars", "other", "bad"),
    [
        (FaultType.DUPLICATE, 3, 9, 0, 0),
        (FaultType.LATE, 2, 9, 0, 0),
        (FaultType.UNKNOWN_KIND, 2, 6, 1, 0),
        (FaultType.BAD_EVENT, 2, 6, 0, 1),
        (FaultType.NOT_A_NUMBER, 2, 3, 0, 1),
        (FaultType.TRUNCATED_JSON, 2, 3, 0, 1),
        (FaultType.BROKEN_OBJECT, 3, 6, 0, 1),
        (FaultType.DEEP_NESTING, 3, 6, 0, 1),
        (FaultType.TEXT_GARBAGE, 3, 6, 0, 1),
        (FaultType.BINARY_GARBAGE, 3, 6, 0, 1),
    ],
)
def test_the_record_has_the_corrupted_frames_as_they_were_sent(
    kind: FaultType, count: int, bars: int, other: int, bad: int
) -> None:
    with exchange(Fault(kind, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        incoming = messages(client)
        received = [next(incoming) for _ in range(count)]
        frames = server.served[0].frames
        assert received == [(TEXT if frame.text else BINARY, frame.payload) for frame in frames]
        parts = [sum(map(len, part)) for part in zip(*(frame[1:4] for frame in frames), strict=True)]
        assert parts == [bars, other, bad]
        for frame in frames:
            assert all(part in frame.payload for part in [*frame.bars, *frame.other, *frame.bad])


def test_the_record_counts_the_frames_that_certainly_arrived() -> None:
    with exchange() as server, log_in(server) as client:
        subscribe(client)
        server.finished.wait()
        assert (len(server.served[0].frames), server.served[0].acknowledged) == (2, 0)
        client.socket.ping(b"last")
        # By reading, the client answers the exchange's pings.
        *_, last = itertools.takewhile(lambda message: message[1] != b"last", messages(client))
        assert last == (TEXT, SECOND)
        until(lambda: server.served[0].acknowledged == 2, "both frames are acknowledged")


def test_a_client_can_be_refused_and_accepted_the_next_time() -> None:
    plan = Fault(FaultType.AUTH_FAILED, after_frames=0), Fault(FaultType.AUTH_TIMEOUT, after_frames=0)
    with exchange(*plan) as server:
        for status in ("auth_failed", "auth_timeout"):
            with connect(server) as client:
                assert client.ask("auth", "any")[0]["status"] == status
        with log_in(server) as client:
            subscribe(client)


def test_a_fault_can_be_scheduled_at_a_market_time() -> None:
    faults = Faults([Fault(FaultType.DROP, at_ms=OPENING + 3 * 60_000)])
    assert faults.due(AT_FRAME, 99, OPENING) is None
    assert faults.due(AT_FRAME, 99, OPENING + 3 * 60_000) == Fault(FaultType.DROP, at_ms=OPENING + 3 * 60_000)
    assert faults.due(AT_FRAME, 99, OPENING + 9 * 60_000) is None


def test_the_same_seed_gives_the_same_faults_at_roughly_their_rates() -> None:
    def series(seed: int) -> list[FaultType | None]:
        faults = Faults([Fault(FaultType.DROP, rate=0.1), Fault(FaultType.LATE, rate=0.5)], seed)
        due = (faults.due(AT_FRAME, frame, 0) for frame in range(10_000))
        return [fault.kind if fault else None for fault in due]

    assert series(1) == series(1) != series(2)
    assert 800 < series(1).count(FaultType.DROP) < 1200
    assert 4200 < series(1).count(FaultType.LATE) < 4800  # half of the 90 % that are not dropped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("explode=1", "there is no fault 'explode'; there are drop, reset, "),
        ("drop=0.1,late", "'late' is not KIND=RATE"),
        ("drop=2", "'drop=2' is not KIND=RATE with a rate from 0 to 1"),
        ("drop=nan", "'drop=nan' is not KIND=RATE"),
    ],
)
def test_an_invalid_plan_is_refused_with_an_explanation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Faults.parse(text)


def test_a_plan_can_be_parsed_from_the_command_line() -> None:
    faults = Faults.parse("duplicate=1,drop=0")
    with Exchange(FEED, speed=0, faults=faults) as server, log_in(server) as client, closing(client.socket):
        subscribe(client)
        assert client.socket.recv() == client.socket.recv()
        assert faults.happened == {FaultType.DUPLICATE: 1}


@pytest.mark.parametrize("triggers", [{}, {"rate": 0.1, "after_frames": 3}])
def test_a_fault_has_exactly_one_trigger(triggers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exactly one of rate, after_frames and at_ms"):
        Fault(FaultType.DROP, **triggers)


@pytest.mark.slow
def test_a_stalled_client_does_not_keep_the_exchange_from_stopping() -> None:
    with exchange(Fault(FaultType.STALL, after_frames=1)) as server, log_in(server) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(timeout=20)
        assert not stopping.is_alive()
