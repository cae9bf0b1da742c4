"""Servers that do what a good exchange does not, and a stream that is watched.

Belongs here: what the stream's tests share. Does not belong here: a well-behaved exchange (polygon_pipeline.simulator).
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

from polygon_pipeline.polygon.stream import Backoff, ConnectionEvent, EventKind, Stream

PATIENCE = 30.0
"""How long a test waits for what must come; only a failing test waits that long."""

KEY = "a-very-secret-key"


class Watched:
    """A stream on a thread of its own, with everything it said. A context manager; the end stops it.

    server: a URL, or a scripted server, which then ends too, so that the stream need not wait for a timeout.
    """

    def __init__(
        self,
        server: str | Scripted,
        topics: Sequence[str] = ("AM.SPY",),
        *,
        key: str = KEY,
        backoff: Backoff | None = None,
        quiet_limit: Callable[[], float | None] = lambda: None,
        on_frames: Callable[[Sequence[bytes]], None] | None = None,
        may_return: Callable[[], bool] = lambda: True,
    ) -> None:
        self.events: list[ConnectionEvent] = []
        self.frames: list[bytes] = []
        self.error: Exception | None = None
        self._changed = threading.Condition()
        self._taken = 0
        self._stop = threading.Event()
        self._server = server
        self._stream = Stream(
            server if isinstance(server, str) else server.url,
            key,
            topics,
            on_frames=on_frames or self._add_frames,
            on_event=self._add_event,
            stop=self._stop,
            backoff=backoff,
            quiet_limit=quiet_limit,
            may_return=may_return,
        )
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stops the stream and waits for its end."""
        self._stop.set()
        if isinstance(self._server, Scripted):
            self._server.leaving.set()
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the stream did not end"

    def next(self, kind: EventKind) -> ConnectionEvent:
        """The next event of that kind, after those that were asked for before."""

        def found() -> bool:
            return any(event.kind is kind for event in self.events[self._taken :])

        with self._changed:
            assert self._changed.wait_for(found, PATIENCE), f"no {kind}; there were {self.events}, {self.error!r}"
            while True:
                event = self.events[self._taken]
                self._taken += 1
                if event.kind is kind:
                    return event

    def wait_for_frame(self, content: bytes) -> None:
        with self._changed:
            arrived = self._changed.wait_for(lambda: any(content in frame for frame in self.frames), PATIENCE)
            assert arrived, f"no {content!r}; there were {self.events}, {self.error!r}"

    def _run(self) -> None:
        try:
            self._stream.run()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def _add_frames(self, frames: Sequence[bytes]) -> None:
        with self._changed:
            self.frames.extend(frames)
            self._changed.notify_all()

    def _add_event(self, event: ConnectionEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()


def status(name: str, message: str = "") -> dict[str, str]:
    return {"ev": "status", "status": name, "message": message}


def subscribed(*topics: str) -> list[dict[str, str]]:
    return [status("success", f"subscribed to: {topic}") for topic in topics]


class Script:
    """One connection, seen from the server that a test scripts."""

    def __init__(self, connection: ServerConnection, number: int, server: Scripted) -> None:
        self._connection = connection
        self.number = number
        """1 for the first connection, 2 for the next."""
        self._server = server

    def say(self, *events: object) -> None:
        self._connection.send(json.dumps(events))

    def say_raw(self, message: str | bytes) -> None:
        self._connection.send(message)

    def say_in_pieces(self, pieces: Iterable[str]) -> None:
        """One message in several WebSocket frames, each sent as soon as it is there."""
        self._connection.send(pieces)

    def close(self, code: int, reason: str) -> None:
        self._connection.close(code, reason)

    def hear(self) -> dict[str, str]:
        """The client's next message."""
        message: dict[str, str] = json.loads(self._connection.recv(PATIENCE))
        self._server.heard.put(message)
        return message

    def welcome(self) -> None:
        """Greets and lets anyone in."""
        self.say(status("connected", "Connected Successfully"))
        assert self.hear()["action"] == "auth"
        self.say(status("auth_success", "authenticated"))

    def acknowledge(self) -> None:
        """Takes one subscribe message and acknowledges all of it."""
        message = self.hear()
        assert message["action"] == "subscribe"
        self.say(*subscribed(*message["params"].split(",")))

    def begin(self) -> None:
        self.welcome()
        self.acknowledge()

    def wait_until_the_client_goes(self) -> None:
        """Until it has gone, or the test is done with it."""
        while not self._server.leaving.is_set():
            with contextlib.suppress(TimeoutError):
                self._connection.recv(0.05)

    def ping_until_the_client_goes(self) -> None:
        while not self._server.leaving.wait(0.02):
            self._connection.ping()

    def drop(self) -> None:
        """Ends the connection without a close frame."""
        self._connection.socket.shutdown(socket.SHUT_RDWR)


class Scripted:
    """A scripted server: what it has heard, and whether it is to go."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.heard: queue.Queue[dict[str, str]] = queue.Queue()
        self.leaving = threading.Event()


@contextmanager
def scripted(script: Callable[[Script], None]) -> Iterator[Scripted]:
    """Serves every connection by the script; one that ends is closed properly. What goes wrong in it is raised."""
    numbers = iter(range(1, 1000))
    errors: list[BaseException] = []

    def handle(connection: ServerConnection) -> None:
        try:
            script(Script(connection, next(numbers), served))
        except ConnectionClosed:
            pass
        except BaseException as error:
            errors.append(error)
            raise

    with serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None, close_timeout=0.1) as server:
        served = Scripted(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/stocks")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
    assert not errors, errors


@contextmanager
def deaf(
    *frames: object, close: bool = False, dripping: bool = False, left: threading.Event | None = None
) -> Iterator[str]:
    """Serves one connection that gets these frames at once and no answer to anything ever; yields the URL.

    close: a close frame follows. dripping: a frame follows that never ends, byte by byte. left: set when the client has
    given the connection up.
    """
    protocol = ServerProtocol()

    def serve_one() -> None:
        connection, _ = listener.accept()
        listener.close()
        with connection:
            requests: list[object] = []
            while not requests:
                protocol.receive_data(connection.recv(65536))
                requests = list(protocol.events_received())
            assert isinstance(requests[0], Request)
            protocol.send_response(protocol.accept(requests[0]))
            for frame in frames:
                protocol.send_text(json.dumps(frame).encode())
            if close:
                protocol.send_close(1000)
            connection.sendall(b"".join(protocol.data_to_send()))
            if dripping:
                connection.sendall(b"\x82\x7e\xff\xff")
                drip(connection)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
            if left:
                left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_one, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/stocks"


@contextmanager
def slow_to_accept() -> Iterator[str]:
    """Serves one connection, whose handshake it answers byte by byte without an end; yields the URL."""

    def serve_one() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nX: ")
            drip(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve_one, daemon=True).start()
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/stocks"


def drip(connection: socket.socket) -> None:
    """Sends a byte now and then until the client goes."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)
