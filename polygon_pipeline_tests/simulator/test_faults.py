"""Faults on request, seen by a raw client."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import websocket

from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import AT_A_FRAME, Fault, Faults, Kind
from polygon_pipeline_tests.simulator.support import START_MS, Client, connect, event, log_in

FEED = [event("AAPL", minute) for minute in range(6)]


def exchange(*plan: Fault, seed: int = 0) -> Exchange:
    """As fast as possible, three bars a frame, so two frames."""
    return Exchange(FEED, speed=0, batch_limit=3, faults=Faults(plan, seed), record=True)


def subscribe(client: Client) -> None:
    assert client.ask("subscribe", "AM.AAPL")[0]["status"] == "success"


def messages(client: Client) -> Iterator[tuple[int, bytes]]:
    """What comes, control frames but pings included, until the end of the socket."""
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


def test_a_dropped_connection_ends_without_a_close_frame_behind_everything_sent() -> None:
    with exchange(Fault(Kind.DROP, after_frames=2)) as served, log_in(served) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST), (TEXT, SECOND)]


def test_a_reset_connection_ends_without_a_close_frame() -> None:
    with exchange(Fault(Kind.RESET, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        assert list(messages(client)) in ([], [(TEXT, FIRST)])


def test_a_closed_connection_ends_with_a_close_frame() -> None:
    with exchange(Fault(Kind.CLOSE, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST), (CLOSE, b"\x03\xe9going away")]


@pytest.mark.parametrize("kind", [Kind.SLOW_CONSUMER, Kind.FORCE_DISCONNECT, Kind.MAX_CONNECTIONS])
def test_an_expelled_client_is_told_why_and_closed_with_1008(kind: Kind) -> None:
    with exchange(Fault(kind, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        bars, (_, status), close = messages(client)
        assert bars == (TEXT, FIRST)
        assert json.loads(status)[0]["status"] == kind
        assert close == (CLOSE, b"\x03\xf0" + kind.encode())


def test_a_truncated_frame_never_arrives() -> None:
    with exchange(Fault(Kind.TRUNCATED_FRAME, after_frames=2)) as served, log_in(served) as client:
        subscribe(client)
        assert list(messages(client)) == [(TEXT, FIRST)]
        assert [frame.payload for frame in served.served[0].frames] == [FIRST]


def test_a_huge_frame_is_announced_and_never_comes() -> None:
    with exchange(Fault(Kind.HUGE_FRAME, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        client.socket.settimeout(0.2)
        with pytest.raises(websocket.WebSocketTimeoutException):
            client.socket.recv()
        assert client.socket.frame_buffer.length == 64 * 2**20


def test_a_stalled_connection_stays_open_and_answers_no_ping() -> None:
    with exchange(Fault(Kind.STALL, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        incoming = messages(client)
        assert next(incoming) == (TEXT, FIRST)
        client.socket.ping()
        client.socket.settimeout(0.3)
        with pytest.raises(websocket.WebSocketTimeoutException):
            next(incoming)
        assert not served.finished.is_set(), "as fast as possible, the market waits"


def test_a_silent_connection_answers_pings_and_sends_nothing_else() -> None:
    with exchange(Fault(Kind.SILENCE, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        incoming = messages(client)
        assert next(incoming) == (TEXT, FIRST)
        client.socket.ping(b"there?")
        assert next(incoming) == (websocket.ABNF.OPCODE_PONG, b"there?")
        assert not served.finished.is_set(), "as fast as possible, the market waits"


@pytest.mark.parametrize("kind", [Kind.STALL, Kind.SILENCE])
def test_a_stall_or_silence_can_end_by_itself(kind: Kind) -> None:
    with exchange(Fault(kind, after_frames=1, seconds=0.1)) as served, log_in(served) as client:
        subscribe(client)
        assert [client.socket.recv(), client.socket.recv()] == [FIRST.decode(), SECOND.decode()]


@pytest.mark.parametrize(
    ("kind", "count", "bars", "other", "bad"),
    [
        (Kind.DUPLICATE, 3, 9, 0, 0),
        (Kind.LATE, 2, 9, 0, 0),
        (Kind.UNKNOWN_KIND, 2, 6, 1, 0),
        (Kind.BAD_EVENT, 2, 6, 0, 1),
        (Kind.NOT_A_NUMBER, 2, 3, 0, 1),
        (Kind.TRUNCATED_JSON, 2, 3, 0, 1),
        (Kind.BROKEN_OBJECT, 3, 6, 0, 1),
        (Kind.DEEP_NESTING, 3, 6, 0, 1),
        (Kind.TEXT_GARBAGE, 3, 6, 0, 1),
        (Kind.BINARY_GARBAGE, 3, 6, 0, 1),
    ],
)
def test_spoilt_frames_are_sent_as_the_record_says(kind: Kind, count: int, bars: int, other: int, bad: int) -> None:
    with exchange(Fault(kind, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        incoming = messages(client)
        received = [next(incoming) for _ in range(count)]
        frames = served.served[0].frames
        assert received == [(TEXT if frame.text else BINARY, frame.payload) for frame in frames]
        parts = [sum(map(len, part)) for part in zip(*(frame[1:4] for frame in frames), strict=True)]
        assert parts == [bars, other, bad]
        for frame in frames:
            assert all(part in frame.payload for part in [*frame.bars, *frame.other, *frame.bad])


def test_the_record_says_what_certainly_arrived() -> None:
    with exchange() as served, log_in(served) as client:
        subscribe(client)
        served.finished.wait()
        assert (len(served.served[0].frames), served.served[0].acknowledged) == (2, 0)
        client.socket.ping(b"last")
        # Reading answers the exchange's pings, and what the exchange answers comes after what it has read.
        *_, last = itertools.takewhile(lambda message: message[1] != b"last", messages(client))
        assert last == (TEXT, SECOND)
        client.socket.ping(b"now")
        assert next(messages(client)) == (websocket.ABNF.OPCODE_PONG, b"now")
        assert served.served[0].acknowledged == 2


def test_a_client_can_be_turned_away_and_let_in_the_next_time() -> None:
    plan = Fault(Kind.AUTH_FAILED, after_frames=0), Fault(Kind.AUTH_TIMEOUT, after_frames=0)
    with exchange(*plan) as served:
        for status in ("auth_failed", "auth_timeout"):
            with connect(served) as client:
                assert client.ask("auth", "any")[0]["status"] == status
        with log_in(served) as client:
            subscribe(client)


def test_a_fault_can_be_appointed_at_a_market_time() -> None:
    faults = Faults([Fault(Kind.DROP, at_ms=START_MS + 3 * 60_000)])
    assert faults.due(AT_A_FRAME, 99, START_MS) is None
    assert faults.due(AT_A_FRAME, 99, START_MS + 3 * 60_000) == Fault(Kind.DROP, at_ms=START_MS + 3 * 60_000)
    assert faults.due(AT_A_FRAME, 99, START_MS + 9 * 60_000) is None


def test_the_same_seed_gives_the_same_faults_at_about_their_rates() -> None:
    def series(seed: int) -> list[Kind | None]:
        faults = Faults([Fault(Kind.DROP, rate=0.1), Fault(Kind.LATE, rate=0.5)], seed)
        due = (faults.due(AT_A_FRAME, frame, 0) for frame in range(10_000))
        return [fault.kind if fault else None for fault in due]

    assert series(1) == series(1) != series(2)
    assert 800 < series(1).count(Kind.DROP) < 1200
    assert 4200 < series(1).count(Kind.LATE) < 4800  # half of the nine tenths that are not dropped


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("explode=1", "there is no fault 'explode'; there are drop, reset, "),
        ("drop=0.1,late", "'late' is not KIND=RATE"),
        ("drop=2", "'drop=2' is not KIND=RATE with a rate from 0 to 1"),
        ("drop=nan", "'drop=nan' is not KIND=RATE"),
    ],
)
def test_a_plan_that_is_none_is_refused_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Faults.parse(text)


def test_a_plan_can_be_given_on_a_command_line() -> None:
    faults = Faults.parse("duplicate=1,drop=0")
    with Exchange(FEED, speed=0, faults=faults) as served, log_in(served) as client, closing(client.socket):
        subscribe(client)
        assert client.socket.recv() == client.socket.recv()
        assert faults.happened == {Kind.DUPLICATE: 1}


@pytest.mark.parametrize("triggers", [{}, {"rate": 0.1, "after_frames": 3}])
def test_a_fault_has_exactly_one_trigger(triggers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exactly one of rate, after_frames and at_ms"):
        Fault(Kind.DROP, **triggers)


def test_a_muted_client_does_not_keep_the_exchange_from_stopping() -> None:
    with exchange(Fault(Kind.STALL, after_frames=1)) as served, log_in(served) as client:
        subscribe(client)
        assert client.socket.recv() == FIRST.decode()
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        stopping.join(timeout=20)
        assert not stopping.is_alive()
