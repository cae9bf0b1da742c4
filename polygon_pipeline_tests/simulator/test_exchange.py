"""The exchange's protocol, as a raw client and the vendor's official client see it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
import websocket
from massive import WebSocketClient  # type: ignore[import-untyped, unused-ignore]
from massive.websocket.models import (  # type: ignore[import-untyped, unused-ignore]
    EquityAgg,
    WebSocketMessage,
)

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY, OPENING
from polygon_pipeline_tests.support.client import collect, connect, log_in
from polygon_pipeline_tests.support.feeds import event


def success(message: str) -> dict[str, str]:
    return {"ev": "status", "status": "success", "message": message}


@pytest.fixture
def quiet() -> Iterator[Exchange]:
    """An exchange with an empty feed."""
    with Exchange([]) as exchange:
        yield exchange


def test_the_greeting_and_authentication_are_like_the_vendors(quiet: Exchange) -> None:
    assert re.fullmatch(r"ws://127\.0\.0\.1:\d+/stocks", quiet.url)
    with connect(quiet) as client:
        assert client.greeting == [
            {"ev": "status", "status": "connected", "message": "Connected Successfully (simulated exchange)"}
        ]
        assert client.ask("auth", "any") == [{"ev": "status", "status": "auth_success", "message": "authenticated"}]


@pytest.mark.parametrize(
    "message",
    [
        '{"action":"auth","params":"wrong"}',
        '{"action":"auth","params":""}',
        '{"action":"subscribe","params":"AM.*"}',
        "?",
    ],
)
def test_a_client_without_the_right_key_is_dropped_without_a_close_frame(message: str) -> None:
    with Exchange([], key="right") as exchange, connect(exchange) as client:
        client.socket.send(message)
        assert client.receive() == [{"ev": "status", "status": "auth_failed", "message": "authentication failed"}]
        assert client.close_code() is None


def test_an_empty_key_is_refused_even_if_any_key_is_accepted() -> None:
    with Exchange([]) as exchange, connect(exchange) as client:
        assert client.ask("auth", "")[0]["status"] == "auth_failed"


@pytest.mark.slow
def test_a_client_that_does_not_authenticate_is_timed_out() -> None:
    with Exchange([], auth_timeout=0.05) as exchange, connect(exchange) as client:
        assert client.receive()[0]["status"] == "auth_timeout"
        assert client.close_code() == 1000


def test_new_topics_are_acknowledged_one_by_one_in_one_frame(quiet: Exchange) -> None:
    with log_in(quiet) as client:
        assert client.ask("subscribe", "AM.AAPL,A.BRK.B,AM.*,AM.KIMpL") == [
            success(f"subscribed to: {topic}") for topic in ("AM.AAPL", "A.BRK.B", "AM.*", "AM.KIMpL")
        ]


def test_invalid_and_repeated_topics_are_not_acknowledged_and_unknown_tickers_are(
    quiet: Exchange,
) -> None:
    with log_in(quiet) as client:
        assert client.ask("subscribe", "AM.AAPL,AM.AAPL") == [success("subscribed to: AM.AAPL")]
        for nothing in ("AM.AAPL", "T.AAPL", "am.AAPL", "AM.", "AM", "", "*"):
            client.send("subscribe", nothing)
        client.send("dance", "AM.AAPL")
        client.socket.send("[1")
        client.send("unsubscribe", "AM.MSFT")
        # If one of these had been answered, that answer would be received here.
        assert client.ask("subscribe", "AM.AAPL,AM.NOSUCH") == [success("subscribed to: AM.NOSUCH")]
        assert client.ask("unsubscribe", "AM.AAPL") == [success("unsubscribed to: AM.AAPL")]
        assert client.ask("subscribe", "AM.AAPL") == [success("subscribed to: AM.AAPL")]


def test_only_subscribed_tickers_are_sent_with_case_and_dots_compared_exactly() -> None:
    tickers = ("BRK.B", "BRK", "KIMpL", "KIMPL", "AAPL")
    feed = [event(ticker, 0, channel) for channel in Channel for ticker in tickers]
    with Exchange(feed, speed=0) as exchange:
        received, _ = collect(exchange, "AM.BRK.B,A.KIMpL,AM.NOSUCH,A.aapl")
    assert [(bar["ev"], bar["sym"]) for bar in received] == [("AM", "BRK.B"), ("A", "KIMpL")]
    assert exchange.sent == 2


def test_a_star_subscribes_to_a_whole_channel_and_each_bar_is_sent_once() -> None:
    feed = [event("AAPL", 0), event("MSFT", 0), event("AAPL", 0, Channel.SECOND)]
    with Exchange(feed, speed=0) as exchange:
        received, _ = collect(exchange, "AM.*,AM.AAPL")
    assert [(bar["ev"], bar["sym"]) for bar in received] == [("AM", "AAPL"), ("AM", "MSFT")]


@pytest.mark.slow
def test_at_unlimited_speed_nothing_is_lost_and_frames_are_filled_up_to_the_limit() -> None:
    feed = [event(f"T{number}", 0) for number in range(20_000)]
    with Exchange(feed, speed=float("inf"), batch_limit=250) as exchange:
        received, sizes = collect(exchange, "AM.*")
        assert exchange.market_time_ms == OPENING + 60_000
    assert received == [json.loads(bar.payload) for bar in feed]
    assert exchange.sent == 20_000
    assert max(sizes) == 250


@pytest.mark.slow
def test_at_unlimited_speed_the_feed_waits_while_there_is_no_subscriber() -> None:
    # More than the socket buffers hold, so that part of it is still unsent when the first client disconnects.
    feed = [event("AAPL", minute) for minute in range(60_000)]
    last = json.loads(feed[-1].payload)
    with Exchange(feed, speed=0) as exchange:
        with log_in(exchange) as client:
            client.ask("subscribe", "AM.*")
            seen = client.receive()
        with log_in(exchange) as client:
            client.ask("subscribe", "AM.*")
            later = client.receive()
            while later[-1] != last:
                later += client.receive()
        assert exchange.finished.wait(20)
        assert exchange.sent == len(feed)
    assert seen == [json.loads(bar.payload) for bar in feed[: len(seen)]]
    # Data in transit when the first client disconnected is lost; everything after it is received.
    assert later == [json.loads(bar.payload) for bar in feed[-len(later) :]]


@pytest.mark.slow
def test_market_time_advances_without_subscribers_and_nothing_is_sent_again() -> None:
    feed = [event("AAPL", minute) for minute in range(5)]
    with Exchange(feed, speed=600) as exchange:
        assert exchange.market_time_ms == 0, "it waits for the first subscription"
        with log_in(exchange) as client:
            client.ask("subscribe", "AM.AAPL")
            first = client.receive()
        assert exchange.finished.wait(20)
        assert exchange.market_time_ms >= feed[-1].emit_ms
        with log_in(exchange) as client:
            client.ask("subscribe", "AM.AAPL")
            client.socket.settimeout(0.3)
            with pytest.raises(websocket.WebSocketTimeoutException):
                client.receive()
    assert first[0] == json.loads(feed[0].payload)


def test_the_market_can_start_at_once() -> None:
    with Exchange([event("AAPL", 0), event("AAPL", 1)], speed=6000, start_at_once=True) as exchange:
        assert exchange.finished.wait(20)
        assert exchange.sent == 0


def test_nights_are_skipped() -> None:
    feed = [event("AAPL", 0), event("AAPL", 16 * 60), event("AAPL", 3 * 24 * 60)]
    with Exchange(feed, speed=1) as exchange:
        received, _ = collect(exchange, "AM.*")
    assert len(received) == 3


@pytest.mark.slow
def test_one_more_connection_on_the_same_key_evicts_the_oldest(quiet: Exchange) -> None:
    with log_in(quiet) as old, log_in(quiet, "another key") as other, log_in(quiet) as new:
        assert old.receive()[0]["status"] == "max_connections"
        assert old.close_code() == 1008
        for client in (new, other):
            assert client.ask("subscribe", "AM.AAPL") == [success("subscribed to: AM.AAPL")]


def test_with_more_connections_allowed_none_is_evicted_below_the_limit() -> None:
    with Exchange([], max_connections=4) as exchange, ExitStack() as stack:
        clients = [stack.enter_context(log_in(exchange)) for _ in range(5)]
        assert clients[0].receive()[0]["status"] == "max_connections"
        for client in clients[1:]:
            assert client.ask("subscribe", "AM.AAPL") == [success("subscribed to: AM.AAPL")]


def test_with_more_connections_allowed_each_receives_everything() -> None:
    feed = [event("AAPL", 0), event("AAPL", 1)]
    with (
        Exchange(feed, speed=0, max_connections=2) as exchange,
        log_in(exchange) as one,
        log_in(exchange) as two,
    ):
        for client in (one, two):
            client.send("subscribe", "AM.AAPL")
        for client in (one, two):
            assert client.receive() == [success("subscribed to: AM.AAPL")]
            assert client.receive() == [json.loads(bar.payload) for bar in feed]
        assert exchange.finished.wait(20)
        assert exchange.sent == 4


@pytest.mark.slow
def test_a_client_that_does_not_read_is_evicted_and_does_not_delay_the_feed() -> None:
    feed = [event(f"T{number}", 0) for number in range(100_000)]
    with Exchange(feed, speed=1, buffer_limit=2**20) as exchange, log_in(exchange) as client:
        client.ask("subscribe", "AM.*")
        assert exchange.finished.wait(30)
        assert 0 < exchange.sent < len(feed)
        with suppress(websocket.WebSocketConnectionClosedException, ConnectionResetError):
            while client.socket.recv():
                pass


@pytest.mark.slow
def test_the_exchange_stops_even_if_a_client_does_not_read() -> None:
    feed = [event(f"T{number}", 0) for number in range(100_000)]
    with Exchange(feed, speed=0) as exchange, log_in(exchange) as client:
        client.ask("subscribe", "AM.*")
        client.receive()
        exchange.stop()
        assert not exchange.serving


def test_an_error_of_the_feed_stops_the_server_and_reaches_the_caller() -> None:
    def broken() -> Iterator[Event]:
        yield event("AAPL", 0)
        raise ValueError("the feed is broken")

    with pytest.raises(ValueError, match="the feed is broken"), Exchange(broken(), start_at_once=True) as exchange:
        assert exchange.finished.wait(20)


def test_a_port_in_use_is_an_error_at_once(quiet: Exchange) -> None:
    with pytest.raises(OSError, match=str(quiet.port)), Exchange([], port=quiet.port):
        pass
    with pytest.raises(ValueError, match="speed"):
        Exchange([], speed=-1)


def test_the_vendors_official_client_understands_the_exchange() -> None:
    market = SyntheticMarket(["AAPL", "BRK.B", "TCEHY"])
    feed = list(SyntheticFeed(market, DAY, [Channel.MINUTE]))
    received: list[WebSocketMessage] = []

    async def take(messages: list[WebSocketMessage]) -> None:
        received.extend(messages)

    async def run(exchange: Exchange) -> None:
        client = WebSocketClient(
            "key",
            feed=f"127.0.0.1:{exchange.port}",
            secure=False,
            subscriptions=["AM.AAPL", "AM.BRK.B", "AM.TCEHY"],
            max_reconnects=0,
        )
        assert client.url == exchange.url
        task = asyncio.create_task(client.connect(take))
        while len(received) < len(feed) and not task.done():
            await asyncio.sleep(0.02)
        await client.close()
        await task

    with Exchange(feed, speed=0, key="key") as exchange:
        asyncio.run(asyncio.wait_for(run(exchange), 30))

    assert len(received) == len(feed)
    for message, sent in zip(received, feed, strict=True):
        wire = json.loads(sent.payload)
        assert isinstance(message, EquityAgg)
        assert message == EquityAgg(
            event_type="AM",
            symbol=wire["sym"],
            volume=wire["v"],
            accumulated_volume=wire["av"],
            official_open_price=wire["op"],
            vwap=wire["vw"],
            open=wire["o"],
            close=wire["c"],
            high=wire["h"],
            low=wire["l"],
            aggregate_vwap=wire["a"],
            average_size=wire["z"],
            start_timestamp=wire["s"],
            end_timestamp=wire["e"],
            otc=wire.get("otc"),
            fractional_volume=wire["dv"],
            fractional_accumulated_volume=wire["dav"],
        )
