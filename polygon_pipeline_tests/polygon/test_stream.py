"""The stream against the simulated exchange, and against servers that misbehave in every way that was met."""

from __future__ import annotations

import gc
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import websocket
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon import frame_buffer, stream
from polygon_pipeline.polygon.messages import decode_frame
from polygon_pipeline.polygon.stream import Backoff, EventKind, Stream, StreamRefused, try_key
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline_tests.support.client import log_in
from polygon_pipeline_tests.support.events import RECEIVED_AT
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.planned_server import Answer, planned_server
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.scripted import (
    KEY,
    PATIENCE,
    Script,
    Watched,
    deaf,
    scripted,
    slow_to_accept,
    status,
    subscribed,
)


def kinds(watched: Watched) -> list[EventKind]:
    return [found.kind for found in watched.events]


def shorten(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    for name, value in seconds.items():
        monkeypatch.setattr(stream, name, value)


# A well-behaved exchange


@pytest.mark.slow
def test_everything_the_exchange_sends_arrives_in_order_and_a_stop_ends_it() -> None:
    feed = [event(ticker, minute) for minute in range(500) for ticker in ("SPY", "BRK.B")]
    with Exchange(feed, speed=0, key=KEY) as exchange, Watched(exchange.url, ["AM.SPY", "AM.BRK.B"]) as watched:
        assert watched.next(EventKind.SUBSCRIBED).detail == "2 of 2 topics"
        watched.wait_for_frame(feed[-1].payload)
        watched.end()
        assert watched.error is None
    frames = [decode_frame(frame, RECEIVED_AT) for frame in watched.frames]
    bars = [(bar.ticker, bar.start_ms) for frame in frames for _, bar in frame.bars]
    assert bars == [(sent.ticker, sent.emit_ms - 60_000) for sent in feed]
    assert [found.status for frame in frames for found in frame.statuses] == [
        "connected",
        "auth_success",
        "success",
        "success",
    ], "statuses are handed on too"
    assert kinds(watched) == [EventKind.CONNECTED, EventKind.SUBSCRIBED, EventKind.DISCONNECTED]
    assert watched.events[-1].detail == "stopped"
    assert watched.events[-1].retry_seconds is None


@pytest.mark.slow
def test_a_stop_ends_a_stream_that_waits_to_reconnect() -> None:
    with Watched(f"ws://127.0.0.1:{free_ports(1)[0]}/stocks", backoff=Backoff(cap_seconds=3600)) as watched:
        for _ in range(3):
            watched.next(EventKind.DISCONNECTED)
        watched.end()
    assert watched.error is None


@pytest.mark.slow
def test_long_lists_are_subscribed_to_in_chunks() -> None:
    topics = [f"AM.T{number}" for number in range(1200)]
    with Exchange([event("T1199", 0)], speed=0, key=KEY) as exchange, Watched(exchange.url, topics) as watched:
        assert watched.next(EventKind.SUBSCRIBED).detail == "1200 of 1200 topics"
        watched.wait_for_frame(b'"T1199"')


def test_no_message_subscribes_to_more_than_the_limit_and_each_topic_comes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten(monkeypatch, TOPICS_PER_MESSAGE=2)

    def script(client: Script) -> None:
        client.welcome()
        for _ in range(3):
            client.acknowledge()
        client.wait_until_the_client_goes()

    topics = ["AM.A", "AM.B", "A.BRK.B", "AM.D", "AM.E"]
    with scripted(script) as server, Watched(server, topics) as watched:
        watched.next(EventKind.SUBSCRIBED)
    messages = [server.heard.get_nowait() for _ in range(4)]
    assert messages == [
        {"action": "auth", "params": KEY},
        {"action": "subscribe", "params": "AM.A,AM.B"},
        {"action": "subscribe", "params": "A.BRK.B,AM.D"},
        {"action": "subscribe", "params": "AM.E"},
    ]


# A stop in the middle


def _bars(count: int) -> list[str]:
    """Frames that are together larger than what the system hands over at once."""
    return [json.dumps([{"ev": "AM", "sym": "SPY", "s": number, "o": "." * 300}]) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_whatever_was_read_off_the_socket_is_kept_when_a_stop_comes_in_the_middle(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, CLOSE_SECONDS=seconds)
    receive, read = websocket._core.recv, bytearray()

    def recording(*arguments: Any) -> bytes:
        piece: bytes = receive(*arguments)
        read.extend(piece)
        return piece

    monkeypatch.setattr(websocket._core, "recv", recording)
    kept: list[bytes] = []
    in_the_middle, go_on = threading.Event(), threading.Event()

    def keep(frames: Sequence[bytes]) -> None:
        kept.extend(frames)
        if any(b'"AM"' in frame for frame in frames):
            in_the_middle.set()
            go_on.wait(PATIENCE)

    bars = _bars(3000)
    frames = [[status("connected")], [status("auth_success")], subscribed("AM.SPY"), *map(json.loads, bars)]
    with deaf(*frames) as url, Watched(url, on_frames=keep) as watched:
        assert in_the_middle.wait(PATIENCE)
        stopping = threading.Thread(target=watched.end)
        stopping.start()
        assert watched._stop.wait(PATIENCE)
        go_on.set()
        stopping.join()
    whole = [bar for bar in bars if bar.encode() in read]
    assert [frame.decode() for frame in kept[3:]] == whole
    assert len(whole) > 100
    if seconds:
        assert whole == bars, "what has arrived is taken too"


def test_what_the_server_sent_before_it_closed_is_kept_when_a_stop_comes_in_the_middle() -> None:
    sent: list[str] = []

    def script(client: Script) -> None:
        client.begin()
        for bar in _bars(3000):
            client.say_raw(bar)
            sent.append(bar)

    with scripted(script) as server, Watched(server) as watched:
        watched.wait_for_frame(b'"s": 99,')
    assert [frame.decode() for frame in watched.frames[3:]][: len(sent)] == sent
    assert len(sent) >= 100


# Refusals


def test_a_wrong_key_ends_it_at_once_and_names_the_variable_but_not_the_key() -> None:
    with Exchange([], key="another key") as exchange, Watched(exchange.url) as watched:
        watched.wait_for_end()
    assert isinstance(watched.error, StreamRefused)
    assert "POLYGON_API_KEY" in str(watched.error)
    assert "authentication failed" in str(watched.error)
    assert kinds(watched) == [EventKind.CONNECTED, EventKind.REFUSED]
    assert KEY not in str(watched.error) + repr(watched.events)


def test_a_key_is_tried_without_subscribing_to_anything() -> None:
    def script(client: Script) -> None:
        client.welcome()
        client.wait_until_the_client_goes()

    with scripted(script) as server:
        assert try_key(server.url, KEY) is None
    assert server.heard.get_nowait() == {"action": "auth", "params": KEY}
    assert server.heard.empty()


def test_a_key_that_is_tried_is_refused_as_any_and_a_server_that_is_not_there_is_told() -> None:
    with Exchange([], key="another-key") as exchange, pytest.raises(StreamRefused, match="POLYGON_API_KEY"):
        try_key(exchange.url, KEY)
    assert "could not connect" in (try_key(f"ws://127.0.0.1:{free_ports(1)[0]}/stocks", KEY) or "")


def test_a_subscription_the_plan_lacks_ends_it_with_what_was_not_acknowledged() -> None:
    def script(client: Script) -> None:
        client.welcome()
        client.hear()
        client.say(*subscribed("AM.SPY"), status("error", "not authorized"))
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server, ["AM.SPY", "A.SPY", "A.QQQ"]) as watched:
        watched.wait_for_end()
    assert isinstance(watched.error, StreamRefused)
    assert "not authorized" in str(watched.error)
    assert "Not acknowledged: A.QQQ, A.SPY." in str(watched.error)
    assert "POLYGON_CHANNELS" in str(watched.error)
    assert kinds(watched) == [EventKind.CONNECTED, EventKind.REFUSED]


@pytest.mark.parametrize("refusal", ["auth_failed", "error"])
def test_what_is_refused_after_it_was_accepted_is_asked_for_again_minutes_later(
    refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    patient = Backoff.next_delay

    def impatient(self: Backoff, live_seconds: float, evicted: bool) -> float:
        waits.append(patient(self, live_seconds, evicted))
        return 0.0

    monkeypatch.setattr(Backoff, "next_delay", impatient)

    def script(client: Script) -> None:
        if client.number == 2:
            client.say(status("connected"))
            client.hear()
            if refusal == "error":
                client.say(status("auth_success"))
                client.hear()
            client.say(status(refusal, "not now"))
        client.begin()
        if client.number == 3:
            client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        watched.next(EventKind.DISCONNECTED)
        assert "(not now)" in watched.next(EventKind.DISCONNECTED).detail
        watched.next(EventKind.SUBSCRIBED)
    assert watched.error is None
    assert waits[1] >= 120


def test_an_error_after_everything_was_acknowledged_is_only_a_warning() -> None:
    def script(client: Script) -> None:
        client.begin()
        client.say(status("error", "odd"))
        client.say({"ev": "AM", "sym": "STILL-HERE"})
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        assert "error (odd)" in watched.next(EventKind.WARNED).detail
        watched.wait_for_frame(b"STILL-HERE")
        watched.end()
    assert watched.error is None
    assert kinds(watched).count(EventKind.CONNECTED) == 1


@pytest.mark.parametrize("kind", ["auth_failed", "error", "force_disconnect", "max_connections", "auth_timeout", "new"])
def test_a_key_that_the_server_repeats_is_in_no_error_and_no_event(kind: str) -> None:
    """Frames are kept as they came; what people read is not the vendor's to fill."""

    def script(client: Script) -> None:
        client.say(status("connected"))
        client.hear()
        client.say(status(kind, f"no access for {KEY}"))
        client.close(1008, f"goodbye {KEY}")

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.REFUSED if kind in ("auth_failed", "error") else EventKind.DISCONNECTED)
        watched.end()
    assert "no access for …" in repr(watched.events)
    assert KEY not in str(watched.error) + repr(watched.error) + repr(watched.events)
    assert any(KEY.encode() in frame for frame in watched.frames)


# Redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.fault("redirects")
def test_a_redirect_is_not_followed(code: int) -> None:
    def script(client: Script) -> None:
        client.begin()
        client.wait_until_the_client_goes()

    with scripted(script) as other, planned_server() as server:
        server.plan["/stocks"] = [Answer(code, headers={"Location": other.url})]
        with Watched(server.url.replace("http://", "ws://") + "/stocks") as watched:
            ended = watched.next(EventKind.DISCONNECTED)
            assert f"answers {code} and leads to '{other.url}'" in ended.detail
            assert "POLYGON_WEBSOCKET_URL" in ended.detail
            assert ended.retry_seconds is not None, "it may be a passing fault of the server"
            watched.next(EventKind.DISCONNECTED)
        assert other.heard.empty()


# Missing acknowledgements


@pytest.mark.slow
def test_topics_without_an_answer_are_named_and_the_bars_of_the_others_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS=1.5)
    # The exchange is silent about channels it does not have, as the vendor is.
    topics = ["AM.SPY", "T.SPY", "Q.QQQ"]
    feed = [event("SPY", minute) for minute in range(5)]
    with Exchange(feed, speed=120, key=KEY) as exchange, Watched(exchange.url, topics) as watched:
        unanswered = watched.next(EventKind.UNACKNOWLEDGED)
        assert unanswered.detail.endswith("Q.QQQ, T.SPY")
        assert watched.next(EventKind.SUBSCRIBED).detail == "1 of 3 topics"
        watched.wait_for_frame(feed[-1].payload)
    assert watched.error is None


@pytest.mark.slow
def test_where_nothing_is_acknowledged_it_connects_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS=0.5)

    def script(client: Script) -> None:
        if client.number == 1:
            client.welcome()
            client.wait_until_the_client_goes()
        else:
            shorten(monkeypatch, HANDSHAKE_SECONDS=PATIENCE)
            client.begin()
            client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        ended = watched.next(EventKind.DISCONNECTED)
        assert "no subscription was acknowledged" in ended.detail
        assert ended.retry_seconds == 0
        watched.next(EventKind.SUBSCRIBED)


# Lost connections


def drop(client: Script) -> None:
    client.drop()


def slow_consumer(client: Script) -> None:
    client.say(status("slow_consumer", "too slow"))
    client.drop()


def force_disconnect(client: Script) -> None:
    client.say(status("force_disconnect", "maintenance"))


def close(client: Script) -> None:
    """The server library closes a connection whose script ends."""


@pytest.mark.parametrize(
    ("ending", "causes"),
    [
        (drop, ["the connection was lost"]),
        (slow_consumer, ["slow_consumer (too slow)", "the connection was lost"]),
        (force_disconnect, ["force_disconnect (maintenance)", "code 1000"]),
        (close, ["the server closed the connection (code 1000"]),
    ],
)
def test_a_connection_that_ends_is_reported_with_its_cause_and_made_again_at_once(
    ending: Callable[[Script], None], causes: list[str]
) -> None:
    def script(client: Script) -> None:
        client.begin()
        client.say({"ev": "AM", "sym": f"CONNECTION-{client.number}"})
        if client.number == 1:
            ending(client)
        else:
            client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        ended = watched.next(EventKind.DISCONNECTED)
        for cause in causes:
            assert cause in ended.detail
        assert not ended.detail.endswith("."), "a sentence goes on after it"
        assert ended.retry_seconds == 0
        watched.next(EventKind.CONNECTED)
        watched.next(EventKind.SUBSCRIBED)
        watched.wait_for_frame(b"CONNECTION-2")
    assert any(b"CONNECTION-1" in frame for frame in watched.frames), "what came before the end is kept"
    assert (EventKind.WARNED in kinds(watched)) == (len(causes) == 2 and "lost" not in causes[0])


def test_a_connection_closed_by_the_server_is_closed_here_too() -> None:
    left = threading.Event()
    frames = [[status("connected")], [status("auth_success")], subscribed("AM.SPY")]
    gc.disable()  # which would close it some time
    try:
        with deaf(*frames, close=True, left=left) as url, Watched(url) as watched:
            watched.next(EventKind.SUBSCRIBED)
            watched.next(EventKind.DISCONNECTED)
            assert left.wait(3)
    finally:
        gc.enable()


def test_after_an_authentication_timeout_it_connects_again() -> None:
    def script(client: Script) -> None:
        if client.number == 1:
            client.say(status("auth_timeout", "authentication timed out"))
        else:
            client.begin()
            client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        assert "auth_timeout" in watched.next(EventKind.DISCONNECTED).detail
        watched.next(EventKind.SUBSCRIBED)


def test_after_an_eviction_it_waits_for_minutes_and_can_still_be_stopped() -> None:
    with Exchange([], key=KEY) as exchange, Watched(exchange.url) as watched:
        watched.next(EventKind.SUBSCRIBED)
        with log_in(exchange, KEY) as other:
            assert "max_connections" in watched.next(EventKind.WARNED).detail
            ended = watched.next(EventKind.DISCONNECTED)
            assert "max_connections" in ended.detail
            assert "1008" in ended.detail
            assert ended.retry_seconds is not None
            assert ended.retry_seconds >= 120
            watched.end()
            assert other.ask("subscribe", "AM.SPY")[0]["status"] == "success", "the other one keeps its connection"
    assert kinds(watched).count(EventKind.CONNECTED) == 1


@pytest.mark.slow
def test_after_an_eviction_it_connects_again_only_when_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "next_delay", lambda *_, **__: 0.0)
    asked: list[int] = []

    def may_return() -> bool:
        asked.append(kinds(watched).count(EventKind.CONNECTED))
        return len(asked) > 2

    def script(client: Script) -> None:
        client.begin()
        if client.number == 1:
            client.drop()
        elif client.number == 2:
            client.say(status("max_connections", "another connection"))
        else:
            client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server, may_return=may_return) as watched:
        for _ in range(3):
            watched.next(EventKind.SUBSCRIBED)
    assert asked == [2, 2, 2], "of the eviction alone, until it may"


@pytest.mark.slow
def test_an_unreachable_exchange_is_retried_until_it_is_reachable() -> None:
    [port] = free_ports(1)
    with Watched(f"ws://127.0.0.1:{port}/stocks", backoff=Backoff(cap_seconds=0.05)) as watched:
        waits = [watched.next(EventKind.DISCONNECTED) for _ in range(8)]
        assert all("could not connect" in ended.detail for ended in waits)
        assert waits[0].retry_seconds == 0
        assert all(0 < (ended.retry_seconds or 0) <= 0.05 for ended in waits[1:])
        with Exchange([], key=KEY, port=port):
            watched.next(EventKind.SUBSCRIBED)
            watched.end()
    assert KEY not in repr(watched.events)


@pytest.mark.slow
def test_a_connection_whose_pings_are_not_answered_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, PING_SECONDS=0.2, SILENCE_SECONDS=1.5, _LONG_SILENCE_SECONDS=1.0)
    frames = [[status("connected")], [status("auth_success")], subscribed("AM.SPY")]
    with deaf(*frames) as url, Watched(url) as watched:
        watched.next(EventKind.SUBSCRIBED)
        lost = watched.next(EventKind.DISCONNECTED)
        assert "answered no ping" in lost.detail
        assert (lost.silent_seconds or 0) >= 1.5, "it may have been dead for as long"


@pytest.mark.slow
def test_a_silent_connection_whose_pings_are_answered_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, PING_SECONDS=0.1, SILENCE_SECONDS=1.5)

    def script(client: Script) -> None:
        client.begin()
        time.sleep(3)
        client.say({"ev": "AM", "sym": f"CONNECTION-{client.number}"})
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.wait_for_frame(b"CONNECTION-1")


@pytest.mark.slow
def test_no_bars_while_the_market_is_open_ends_a_connection_and_the_next_has_twice_the_time() -> None:
    def script(client: Script) -> None:
        client.begin()
        client.ping_until_the_client_goes()  # it is alive, and has nothing to say

    with scripted(script) as server, Watched(server, quiet_limit=lambda: 0.3) as watched:
        waited = [watched.next(EventKind.DISCONNECTED).detail for _ in range(3)]
    assert all(detail.startswith("no bar came for ") for detail in waited)
    assert int(waited[-1].split()[4]) >= 1, "four times the first one's time, in whole seconds"


def test_a_frame_whose_announced_length_is_too_large_ends_the_connection_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame_buffer, "MAX_MESSAGE_BYTES", 10_000)

    def script(client: Script) -> None:
        client.begin()
        if client.number == 1:
            client.say_raw("[" + " " * 9_998 + "]")
            client.say_raw("[" + " " * 9_999 + "]")
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        assert "10001 bytes" in watched.next(EventKind.DISCONNECTED).detail
        watched.next(EventKind.SUBSCRIBED)
    assert [len(frame) for frame in watched.frames if len(frame) > 9_000] == [10_000]


# Messages without an end, and a stop that ends them all

HANDSHAKE = [[status("connected")], [status("auth_success")], subscribed("AM.SPY")]


def test_a_message_of_many_frames_is_refused_by_what_they_add_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_buffer, "MAX_MESSAGE_BYTES", 100_000)

    def script(client: Script) -> None:
        client.begin()
        if client.number == 1:
            client.say_in_pieces(itertools.repeat("x" * 1000))
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        assert "101000 bytes" in watched.next(EventKind.DISCONNECTED).detail
        watched.next(EventKind.SUBSCRIBED)


@pytest.mark.fault("drip feeds")
def test_a_message_that_comes_in_small_frames_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_buffer, "MESSAGE_SECONDS", 0.2)

    def script(client: Script) -> None:
        client.begin()
        if client.number == 1:
            client.say_in_pieces(slowly())
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        assert "did not end within" in watched.next(EventKind.DISCONNECTED).detail
        watched.next(EventKind.SUBSCRIBED)


def slowly() -> Iterator[str]:
    while True:
        time.sleep(0.02)
        yield "x"


@pytest.mark.slow
@pytest.mark.fault("drip feeds")
def test_a_frame_that_comes_byte_by_byte_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, SILENCE_SECONDS=0.5)
    with deaf(*HANDSHAKE, dripping=True) as url, Watched(url) as watched:
        watched.next(EventKind.SUBSCRIBED)
        assert "no whole message" in watched.next(EventKind.DISCONNECTED).detail


def test_a_stop_ends_a_frame_that_comes_byte_by_byte() -> None:
    with deaf(*HANDSHAKE, dripping=True) as url, Watched(url) as watched:
        watched.next(EventKind.SUBSCRIBED)
        watched.end()
    assert watched.events[-1].detail == "stopped"


def test_a_stop_ends_a_message_that_comes_in_small_frames() -> None:
    def script(client: Script) -> None:
        client.begin()
        client.say_in_pieces(slowly())

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        watched.end()
    assert watched.events[-1].detail == "stopped"


@pytest.mark.slow
@pytest.mark.fault("drip feeds")
def test_a_server_that_accepts_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, CONNECT_SECONDS=0.5)
    with slow_to_accept() as url, Watched(url) as watched:
        assert "no answer within" in watched.next(EventKind.DISCONNECTED).detail


def test_a_stop_ends_connecting_to_a_server_that_accepts_byte_by_byte() -> None:
    with slow_to_accept() as url, Watched(url) as watched:
        watched.end()
    assert watched.error is None


def test_what_was_read_off_the_socket_before_a_stop_is_passed_on() -> None:
    bars = [[{"ev": "AM", "sym": f"T{number}"}] for number in range(200)]
    stop, frames = threading.Event(), list[bytes]()
    with deaf(*HANDSHAKE, *bars) as url:
        Stream(
            url,
            KEY,
            ["AM.SPY"],
            on_frames=frames.extend,
            on_event=lambda event: stop.set() if event.kind is EventKind.SUBSCRIBED else None,
            stop=stop,
        ).run()
    assert [json.loads(frame) for frame in frames] == [*HANDSHAKE, *bars]


# Frames of every shape


def test_a_status_may_be_a_bare_object() -> None:
    def script(client: Script) -> None:
        client.say_raw(json.dumps(status("connected")))
        assert client.hear() == {"action": "auth", "params": KEY}
        client.say_raw(json.dumps(status("auth_success")))
        assert client.hear() == {"action": "subscribe", "params": "AM.SPY,AM.QQQ"}
        for topic in ("AM.SPY", "AM.QQQ"):
            client.say_raw(json.dumps(subscribed(topic)[0]))
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server, ["AM.SPY", "AM.QQQ"]) as watched:
        assert watched.next(EventKind.SUBSCRIBED).detail == "2 of 2 topics"


def test_several_topics_may_be_acknowledged_by_one_status() -> None:
    def script(client: Script) -> None:
        client.welcome()
        client.hear()
        client.say(status("success", "subscribed to: AM.SPY, AM.BRK.B"))
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server, ["AM.SPY", "AM.BRK.B"]) as watched:
        assert watched.next(EventKind.SUBSCRIBED).detail == "2 of 2 topics"


def test_undecodable_messages_are_passed_on_verbatim_and_do_not_end_the_connection() -> None:
    texts = ["", "?", "[", "null", '{"ev":"status"}', '[{"ev":"status","status":5}]']
    binaries = [b"\xff\x00", b'["status", \xff]']
    everything: list[str | bytes] = [*texts, *binaries]

    def script(client: Script) -> None:
        for message in everything:
            client.say_raw(message)
        client.begin()
        for message in everything:
            client.say_raw(message)
        client.say({"ev": "AM", "sym": "AFTER"})
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        watched.wait_for_frame(b"AFTER")
    expected = [*(text.encode() for text in texts), *binaries]
    assert watched.frames[: len(expected)] == expected
    assert watched.frames[-1 - len(expected) : -1] == expected
    assert kinds(watched) == [EventKind.CONNECTED, EventKind.SUBSCRIBED, EventKind.DISCONNECTED]


def test_a_fragmented_frame_is_passed_on_verbatim_and_whole() -> None:
    payload = '[{"ev":"AM","sym":"É",  "note":"\\u00e9"}]'

    def script(client: Script) -> None:
        client.begin()
        client.say_in_pieces([payload[:5], payload[5:20], payload[20:]])
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.wait_for_frame(payload.encode())
    assert payload.encode() in watched.frames


def test_an_error_while_keeping_a_frame_ends_the_stream() -> None:
    def fail(_: Sequence[bytes]) -> None:
        raise OSError("the disk is full")

    with Exchange([], key=KEY) as exchange, Watched(exchange.url, on_frames=fail) as watched:
        watched.wait_for_end()
    assert isinstance(watched.error, OSError)
    assert str(watched.error) == "the disk is full"


def test_nesting_too_deep_to_decode_does_not_end_the_connection() -> None:
    def script(client: Script) -> None:
        client.begin()
        client.say_raw('[{"ev":"status","x":' + "[" * 5000 + "]" * 5000 + "}]")
        client.say({"ev": "AM", "sym": "AFTER"})
        client.wait_until_the_client_goes()

    with scripted(script) as server, Watched(server) as watched:
        watched.next(EventKind.SUBSCRIBED)
        while watched.error is None and not any(b"AFTER" in frame for frame in watched.frames):
            time.sleep(0.02)
    assert watched.error is None


# How long to wait

ends = st.lists(st.tuples(st.floats(0, 10_000), st.booleans()), min_size=1, max_size=40)


@given(ends, st.integers(0, 1000))
def test_waits_are_never_negative_and_never_beyond_their_caps(connections: list[tuple[float, bool]], seed: int) -> None:
    backoff = Backoff(random.Random(seed))
    for live_seconds, evicted in connections:
        delay = backoff.next_delay(live_seconds, evicted)
        assert (120 <= delay <= 300) if evicted else (0 <= delay <= 60)


@given(ends, st.integers(0, 1000), st.floats(60, 10_000))
def test_after_a_healthy_minute_the_next_attempt_is_immediate(
    connections: list[tuple[float, bool]], seed: int, healthy: float
) -> None:
    backoff = Backoff(random.Random(seed))
    for live_seconds, evicted in connections:
        backoff.next_delay(live_seconds, evicted)
    assert backoff.next_delay(healthy, evicted=False) == 0
    assert backoff.next_delay(0, evicted=False) > 0


@given(st.integers(0, 1000), st.lists(st.floats(0, 59), min_size=20, max_size=40))
def test_the_first_wait_is_none_and_the_others_double_up_to_the_cap(seed: int, unhealthy: list[float]) -> None:
    backoff = Backoff(random.Random(seed))
    delays = [backoff.next_delay(live_seconds, evicted=False) for live_seconds in unhealthy]
    assert delays[0] == 0
    for number, delay in enumerate(delays[1:]):
        ceiling = min(60, 2**number)
        assert ceiling / 2 <= delay <= ceiling


def test_two_evicted_collectors_wait_for_different_times() -> None:
    delays = {Backoff(random.Random(seed)).next_delay(0, evicted=True) for seed in range(20)}
    assert len(delays) == 20


def test_waits_stay_finite_however_long_an_outage_lasts() -> None:
    backoff = Backoff(random.Random(1))
    assert max(backoff.next_delay(0, evicted=False) for _ in range(5000)) <= 60


@pytest.mark.slow
def test_both_channels_of_a_ticker_are_two_topics() -> None:
    feed = [event("SPY", 0, Channel.SECOND), event("SPY", 0)]
    with Exchange(feed, speed=0, key=KEY) as exchange, Watched(exchange.url, ["AM.SPY", "A.SPY"]) as watched:
        assert watched.next(EventKind.SUBSCRIBED).detail == "2 of 2 topics"
        watched.wait_for_frame(feed[-1].payload)
    assert any(feed[0].payload in frame for frame in watched.frames)
