"""A client that shows the protocol as it is: raw messages in, raw frames out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Protocol

import websocket

from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline_tests.support.bars import JsonObject


class Server(Protocol):
    """Whoever speaks the protocol."""

    @property
    def url(self) -> str: ...


class Client:
    """One connection; `connected` has been read from it."""

    def __init__(self, exchange: Server) -> None:
        self.socket = websocket.create_connection(exchange.url, timeout=20, skip_utf8_validation=True)  # it is slow
        self.greeting = self.receive()

    def send(self, action: str, params: str) -> None:
        self.socket.send(json.dumps({"action": action, "params": params}))

    def receive(self) -> list[JsonObject]:
        """The next frame's events."""
        frame = json.loads(self.socket.recv())
        assert isinstance(frame, list)
        return frame

    def ask(self, action: str, params: str) -> list[JsonObject]:
        self.send(action, params)
        return self.receive()

    def close_code(self) -> int | None:
        """The code of the close frame that is next, or None if the socket ends without one."""
        try:
            opcode, data = self.socket.recv_data()
        except websocket.WebSocketConnectionClosedException:
            return None
        assert opcode == websocket.ABNF.OPCODE_CLOSE, data
        return int.from_bytes(data[:2])


@contextmanager
def connect(exchange: Server) -> Iterator[Client]:
    client = Client(exchange)
    with closing(client.socket):
        yield client


@contextmanager
def log_in(exchange: Server, key: str = "any") -> Iterator[Client]:
    with connect(exchange) as client:
        assert client.ask("auth", key)[0]["status"] == "auth_success"
        yield client


def collect(exchange: Exchange, topics: str) -> tuple[list[JsonObject], list[int]]:
    """Everything the exchange has for the topics, and how many events each frame held."""
    with log_in(exchange) as client:
        assert len(client.ask("subscribe", topics)) == len(topics.split(","))
        received: list[JsonObject] = []
        sizes: list[int] = []
        # What was sent is known only at the end, and the last frames may be read before or after that.
        while not exchange.finished.is_set() or len(received) < exchange.sent:
            client.socket.settimeout(0.2)
            try:
                events = client.receive()
            except websocket.WebSocketTimeoutException:
                continue
            received += events
            sizes.append(len(events))
        return received, sizes
