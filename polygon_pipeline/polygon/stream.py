"""One connection after another to the vendor's WebSocket, for as long as it is wanted.

Belongs here: connecting, authenticating, subscribing, noticing that a connection is dead, and when to try again.
Does not belong here: what frames mean beyond their statuses (polygon.messages) and what becomes of them.

The stream only receives: every frame goes to `on_frames` before the socket is asked for more, and every change of
the connection goes to `on_event`, in the order they came. Nothing is replayed by the server after a reconnect, so the
time between `disconnected` and the next `subscribed` is a gap.
"""

from __future__ import annotations

import contextlib
import random
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import websocket

from polygon_pipeline.polygon import frame_buffer
from polygon_pipeline.polygon.errors import without_key
from polygon_pipeline.polygon.messages import Status, decode_statuses

# Others ping every 20-25 s; a server that answers nothing for 30 s is gone, whatever the socket says.
PING_SECONDS = 20.0
SILENCE_SECONDS = 30.0
# From connecting to the open socket, however slowly the server's answer comes.
CONNECT_SECONDS = 10.0
# From the open socket to the last acknowledgement. Thousands of tickers are acknowledged within a second or two.
HANDSHAKE_SECONDS = 20.0
# How long the server may take to answer our close frame.
CLOSE_SECONDS = 1.0
# Topics in one subscribe message: far below any limit met so far, and few messages for a long list.
TOPICS_PER_MESSAGE = 500
# A connection that was not heard for so long may have been dead; what is shorter says nothing.
_LONG_SILENCE_SECONDS = 5.0
# How often deadlines are looked at while frames come.
_CHECK_SECONDS = 0.5

_SOCKET_ERRORS = (websocket.WebSocketException, OSError, ValueError)


class StreamRefused(Exception):
    """The server will not serve these credentials or subscriptions, and never did in this stream's life."""


class EventKind(StrEnum):
    CONNECTED = "connected"  # the socket is open; not yet subscribed
    SUBSCRIBED = "subscribed"  # bars flow from here on
    UNACKNOWLEDGED = "unacknowledged"  # subscriptions the server did not confirm in time
    WARNED = "warned"  # the server announced trouble
    DISCONNECTED = "disconnected"
    REFUSED = "refused"


class ConnectionEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of the connection. After a disconnect: retry_seconds, how long until the next attempt; evicted: whether
    another connection took the place; silent_seconds: for how long the server had not been heard, where that was long:
    the connection may have been dead for as long."""

    kind: EventKind
    detail: str
    retry_seconds: float | None = None
    evicted: bool = False
    silent_seconds: float | None = None


@dataclass
class Backoff:
    """How long to wait before connecting again: at once, then 1, 2, 4 … 60 s with full jitter, for ever.

    A connection that was healthy for a minute starts the series again. After an eviction (`max_connections`) the
    wait is minutes: the account's other connection took over, and two collectors that come back at once would
    evict each other for ever. So it is after a refusal that may pass.
    """

    random: random.Random = field(default_factory=random.Random)
    cap_seconds: float = 60.0
    healthy_seconds: float = 60.0
    _failures: int = 0

    def next_delay(self, live_seconds: float, evicted: bool) -> float:
        """live_seconds: how long the connection that just ended was subscribed."""
        if live_seconds >= self.healthy_seconds:
            self._failures = 0
        self._failures += 1
        if evicted:
            return self.random.uniform(120, 300)
        if self._failures == 1:
            return 0.0
        ceiling = min(self.cap_seconds, 2.0 ** min(self._failures - 2, 16))
        return self.random.uniform(ceiling / 2, ceiling)


@dataclass
class _Connection:
    """What is known of the connection under way."""

    unacknowledged: set[str]
    opened: float = field(default_factory=time.monotonic)
    subscribed: float | None = None
    last_heard: float = field(default_factory=time.monotonic)
    last_frame: float = field(default_factory=time.monotonic)
    pinged: float = field(default_factory=time.monotonic)
    checked: float = 0.0
    closing: float | None = None
    readable: bool = True
    warning: str | None = None
    evicted: bool = False
    refused: bool = False

    @property
    def live_seconds(self) -> float:
        return time.monotonic() - self.subscribed if self.subscribed else 0.0


class _Disconnected(Exception):
    """The connection is over; the text is its cause."""


class _ReceiverFailed(Exception):
    """on_frames failed; its error is the cause. It comes out of reading the socket, and is no error of the socket."""


class Stream:
    """Receives frames until `stop` is set; run() blocks, and is meant for a thread of its own.

    topics: subscriptions such as `AM.AAPL` or `AM.*`. on_frames and on_event are called on the stream's thread and
    must be quick; an exception they raise ends the stream. quiet_limit: how many seconds a subscribed connection may
    bring no frame, asked every second; None says that silence is normal now. A list that stays silent is given twice
    the time with every connection, until a frame comes. may_return: whether to connect again after an eviction, asked
    every second until it is so.

    heard: when the server was heard last, on the clock that never steps (time.monotonic); everything that it had sent
    by then has been passed on. None before it is subscribed.
    """

    def __init__(
        self,
        url: str,
        key: str,
        topics: Sequence[str],
        *,
        on_frames: Callable[[Sequence[bytes]], None],
        on_event: Callable[[ConnectionEvent], None],
        stop: threading.Event,
        backoff: Backoff | None = None,
        quiet_limit: Callable[[], float | None] = lambda: None,
        may_return: Callable[[], bool] = lambda: True,
    ) -> None:
        frame_buffer.verify()
        self._url = url
        self._key = key
        self._topics = list(topics)
        self._on_frames = on_frames
        self._on_event = on_event
        self._received: list[bytes] = []
        self._stop = stop
        self._backoff = backoff or Backoff()
        self._quiet_limit = quiet_limit
        self._may_return = may_return
        self._patience = 1.0
        self._accepted = False
        self.heard: float | None = None

    def run(self) -> None:
        """Returns when stopped. Raises StreamRefused where trying again cannot help."""
        try:
            self._run()
        except _ReceiverFailed as failure:
            raise failure.__cause__ or failure from None

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = _Connection(unacknowledged=set(self._topics))
            try:
                self._serve(connection)
            except _Disconnected as ended:
                cause = str(ended)
            except StreamRefused as refusal:
                self._report(ConnectionEvent(EventKind.REFUSED, str(refusal)))
                raise
            if connection.warning:
                cause = f"{connection.warning}; {cause}"
            silent = time.monotonic() - connection.last_heard
            silent_seconds = round(silent, 3) if silent > _LONG_SILENCE_SECONDS else None
            if self._stop.is_set():
                self._report(ConnectionEvent(EventKind.DISCONNECTED, cause, silent_seconds=silent_seconds))
                return
            delay = self._backoff.next_delay(connection.live_seconds, connection.evicted or connection.refused)
            self._report(
                ConnectionEvent(EventKind.DISCONNECTED, cause, round(delay, 3), connection.evicted, silent_seconds)
            )
            self._stop.wait(delay)
            while connection.evicted and not self._stop.is_set() and not self._may_return():
                self._stop.wait(1)

    def _serve(self, connection: _Connection) -> None:
        with self._socket(connection) as socket:
            connection.opened = connection.last_heard = connection.pinged = time.monotonic()
            self._report(ConnectionEvent(EventKind.CONNECTED, "the socket is open"))
            while True:
                for status in self._receive(socket, connection):
                    self._handle_status(status, socket, connection)

    @contextlib.contextmanager
    def _socket(self, connection: _Connection) -> Iterator[websocket.WebSocket]:
        socket = websocket.WebSocket(skip_utf8_validation=True)  # in pure Python it costs 10 ms a frame
        try:
            self._connect(socket)
            frame_buffer.install(socket, lambda: self._before_receiving(socket, connection))
            socket.settimeout(1)  # so that stop, pings and deadlines are looked at every second
            yield socket
        finally:
            try:
                self._take_rest(socket, connection)
                self._deliver()
            finally:
                socket.shutdown()

    def _take_rest(self, socket: websocket.WebSocket, connection: _Connection) -> None:
        """Closes the connection, and takes what is read already or comes before the server's close frame: the library's
        own close() drops it."""
        connection.closing = time.monotonic()
        if not socket.connected:
            return
        with contextlib.suppress(*_SOCKET_ERRORS):
            socket.send_close()
        with contextlib.suppress(_Disconnected):
            while connection.readable:
                self._receive(socket, connection)

    def _connect(self, socket: websocket.WebSocket) -> None:
        """Opens the socket. The library reads the server's answer byte by byte for as long as bytes come, so another
        thread ends it."""
        done, deadline = threading.Event(), time.monotonic() + CONNECT_SECONDS

        def watch() -> None:
            while not done.wait(0.2):
                opened = socket.sock  # set once TCP and TLS are there, and taken away when connecting fails
                if opened and (self._stop.is_set() or time.monotonic() > deadline):
                    with contextlib.suppress(OSError):
                        opened.shutdown(sockets.SHUT_RDWR)

        watching = threading.Thread(target=watch, name="connecting", daemon=True)
        watching.start()
        try:
            # The key goes where the configuration says, and nowhere that an answer says.
            socket.connect(self._url, timeout=CONNECT_SECONDS, redirect_limit=0)
        except _SOCKET_ERRORS as error:
            reason = f"no answer within {CONNECT_SECONDS:.0f} s" if time.monotonic() > deadline else str(error)
            if answer := socket.handshake_response:  # it is kept of a redirect alone
                reason = (
                    f"it answers {answer.status} and leads to {answer.headers.get('location')!r}, which the API key is "
                    "not sent to. If that is the vendor's, set POLYGON_WEBSOCKET_URL to it"
                )
            raise _Disconnected(f"could not connect to {self._url}: {self._safe(reason)[:500]}") from error
        finally:
            done.set()
            watching.join()

    def _before_receiving(self, socket: websocket.WebSocket, connection: _Connection) -> None:
        """Before every wait for the server, in the middle of a message too: what was received is passed on, and the
        connection ends where it is not wanted any more or a deadline is over."""
        self._deliver()
        if connection.subscribed:
            self.heard = connection.last_heard
        now = time.monotonic()
        if connection.closing is not None:
            if now - connection.closing > CLOSE_SECONDS:
                raise _Disconnected("the server did not close the connection")
        elif self._stop.is_set():
            raise _Disconnected("stopped")
        elif now - connection.checked > _CHECK_SECONDS:
            self._check_deadlines(socket, connection)

    def _receive(self, socket: websocket.WebSocket, connection: _Connection) -> Sequence[Status]:
        """Waits a second at most for a message, hands on a frame, and returns its statuses."""
        try:
            opcode, data = socket.recv_data(control_frame=True)
        except websocket.WebSocketTimeoutException:  # of the answer to a ping, too
            self._before_receiving(socket, connection)
            return ()
        except frame_buffer.MessageRefused as error:
            connection.readable = False
            raise _Disconnected(str(error)) from error
        except _SOCKET_ERRORS as error:
            connection.readable = False
            raise _lost(error) from error
        connection.last_heard = time.monotonic()
        if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
            self._received.append(data)
            if connection.subscribed:
                connection.last_frame = connection.last_heard
                self._patience = 1.0
            return decode_statuses(data)
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            connection.readable = False
            code, reason = int.from_bytes(data[:2]), data[2:].decode(errors="replace")
            raise _Disconnected(f"the server closed the connection (code {code}: {reason or 'no reason given'})")
        return ()

    def _handle_status(self, status: Status, socket: websocket.WebSocket, connection: _Connection) -> None:
        status = Status(self._safe(status.status), self._safe(status.message))
        match status.status:
            case "connected":
                _send(socket, "auth", self._key)
            case "auth_success":
                for start in range(0, len(self._topics), TOPICS_PER_MESSAGE):
                    _send(socket, "subscribe", ",".join(self._topics[start : start + TOPICS_PER_MESSAGE]))
            case "success":
                topics = status.message.removeprefix("subscribed to:").split(",")
                connection.unacknowledged.difference_update(topic.strip() for topic in topics)
                if not connection.unacknowledged and not connection.subscribed:
                    self._mark_subscribed(connection)
            case "auth_failed":
                self._refuse(
                    connection,
                    f"{self._url} refused the API key ({status.message or status.status}). "
                    "Set POLYGON_API_KEY (or MASSIVE_API_KEY) to a key whose plan includes WebSocket access, then "
                    "start again.",
                )
            case "error" if connection.unacknowledged:
                missing = ", ".join(sorted(connection.unacknowledged))
                self._refuse(
                    connection,
                    f"{self._url} refused a subscription ({status.message or status.status}). Not acknowledged: "
                    f"{missing}. Check POLYGON_CHANNELS and POLYGON_TICKERS against what the plan includes.",
                )
            case "max_connections":
                connection.evicted = True
                self._warn(status, connection)
            case _:  # slow_consumer, force_disconnect, auth_timeout, and whatever the vendor adds
                self._warn(status, connection)

    def _refuse(self, connection: _Connection, reason: str) -> None:
        """Ends the stream; but what was accepted before is asked for again, minutes later."""
        if not self._accepted:
            raise StreamRefused(reason)
        connection.refused = True
        raise _Disconnected(f"{reason} It accepted the same before, so this may pass.")

    def _warn(self, status: Status, connection: _Connection) -> None:
        connection.warning = f"the server said {status.status} ({status.message})"
        self._report(ConnectionEvent(EventKind.WARNED, connection.warning))

    def _mark_subscribed(self, connection: _Connection) -> None:
        connection.subscribed = connection.last_frame = time.monotonic()
        self._accepted = True
        confirmed = len(self._topics) - len(connection.unacknowledged)
        self._report(ConnectionEvent(EventKind.SUBSCRIBED, f"{confirmed} of {len(self._topics)} topics"))

    def _deliver(self) -> None:
        """Passes on what was received: many small frames cost the journal little more than one."""
        received, self._received = self._received, []
        if received:
            try:
                self._on_frames(received)
            except Exception as error:
                raise _ReceiverFailed from error

    def _report(self, event: ConnectionEvent) -> None:
        self._deliver()
        self._on_event(msgspec.structs.replace(event, detail=self._safe(event.detail)))

    def _safe(self, text: str) -> str:
        return without_key(text, self._key)

    def _check_deadlines(self, socket: websocket.WebSocket, connection: _Connection) -> None:
        """Pings, and ends a connection that is dead or whose handshake takes too long."""
        connection.checked = now = time.monotonic()
        if now - connection.last_heard > SILENCE_SECONDS:
            raise _Disconnected(f"the server sent no whole message and answered no ping for {SILENCE_SECONDS:.0f} s")
        if now - connection.pinged > PING_SECONDS:
            connection.pinged = now
            try:
                socket.ping()
            except _SOCKET_ERRORS as error:
                raise _lost(error) from error
        limit = self._quiet_limit() if connection.subscribed else None
        if limit is not None and now - connection.last_frame > limit * self._patience:
            self._patience *= 2
            raise _Disconnected(f"no bar came for {now - connection.last_frame:.0f} s while the market was open")
        if not connection.subscribed and now - connection.opened > HANDSHAKE_SECONDS:
            if len(connection.unacknowledged) == len(self._topics):
                raise _Disconnected(f"no subscription was acknowledged within {HANDSHAKE_SECONDS:.0f} s")
            # The others flow: leaving them to ask again would cost bars and be answered no better.
            missing = ", ".join(sorted(connection.unacknowledged))
            self._report(ConnectionEvent(EventKind.UNACKNOWLEDGED, f"no answer to the subscription to {missing}"))
            self._mark_subscribed(connection)


def try_key(url: str, key: str) -> str | None:
    """Connects and authenticates once, subscribes to nothing, and closes: None, or why it did not come to that.

    Takes half a minute at the most. Raises StreamRefused for a key that is refused. Where the account has one
    connection, this takes it from whoever has it.
    """
    stop, accepted = threading.Event(), threading.Event()
    problems: list[str] = []

    def look(frames: Sequence[bytes]) -> None:
        if any(status.status == "auth_success" for frame in frames for status in decode_statuses(frame)):
            accepted.set()
            stop.set()

    def note(event: ConnectionEvent) -> None:
        if event.kind is EventKind.DISCONNECTED:
            problems.append(event.detail)
            stop.set()

    Stream(url, key, [], on_frames=look, on_event=note, stop=stop).run()
    return None if accepted.is_set() else problems[0]


def _lost(error: Exception) -> _Disconnected:
    return _Disconnected(f"the connection was lost: {str(error).rstrip('.') or type(error).__name__}")


def _send(socket: websocket.WebSocket, action: str, params: str) -> None:
    try:
        socket.send(msgspec.json.encode({"action": action, "params": params}).decode())
    except _SOCKET_ERRORS as error:
        raise _lost(error) from error
