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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
import websocket

from polygon_pipeline.polygon.messages import Status, decode_statuses

# Others ping every 20-25 s; a server that answers nothing for 30 s is gone, whatever the socket says.
PING_SECONDS = 20.0
SILENCE_SECONDS = 30.0
# From connecting to the last acknowledgement. Thousands of tickers are acknowledged within a second or two.
HANDSHAKE_SECONDS = 20.0
# Topics in one subscribe message: far below any limit met so far, and few messages for a long list.
TOPICS_A_MESSAGE = 500
# The whole market's minute in one frame is 2.5 MB. What is larger is no frame of this feed, and would fill memory.
MAX_FRAME_BYTES = 8 * 1024 * 1024

_BUFFER_BYTES = 256 * 1024
# How often deadlines are looked at while frames come.
_WATCH_SECONDS = 0.5

_SOCKET_ERRORS = (websocket.WebSocketException, OSError, ValueError)


class StreamRefused(Exception):
    """The server will not serve these credentials or subscriptions; trying again cannot help."""


class EventKind(StrEnum):
    CONNECTED = "connected"  # the socket is open; not yet subscribed
    SUBSCRIBED = "subscribed"  # bars flow from here on
    UNACKNOWLEDGED = "unacknowledged"  # subscriptions the server did not confirm in time
    WARNED = "warned"  # the server announced trouble
    DISCONNECTED = "disconnected"
    REFUSED = "refused"
    ENDED = "ended"  # the run ended on purpose; said by the collector, never by the stream


class ConnectionEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of the connection. retry_seconds: how long until the next attempt, after a disconnect."""

    kind: EventKind
    detail: str
    retry_seconds: float | None = None


@dataclass
class Backoff:
    """How long to wait before connecting again: at once, then 1, 2, 4 … 60 s with full jitter, for ever.

    A connection that was healthy for a minute starts the series again. After an eviction (`max_connections`) the
    wait is minutes: the account's other connection took over, and two collectors that come back at once would
    evict each other for ever.
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
    heard: float = field(default_factory=time.monotonic)
    fed: float = field(default_factory=time.monotonic)
    pinged: float = field(default_factory=time.monotonic)
    watched: float = 0.0
    warning: str | None = None
    evicted: bool = False

    @property
    def live_seconds(self) -> float:
        return time.monotonic() - self.subscribed if self.subscribed else 0.0


class _Disconnected(Exception):
    """The connection is over; the text is its cause."""


class _NotKept(Exception):
    """on_frames failed; its error is the cause. Not to be taken for an error of the socket, in whose midst it comes."""


class Stream:
    """Receives frames until `stop` is set; run() blocks, and is meant for a thread of its own.

    topics: subscriptions such as `AM.AAPL` or `AM.*`. on_frames and on_event are called on the stream's thread and
    must be quick; an exception they raise ends the stream. quiet_limit: how many seconds a subscribed connection may
    bring no frame, asked every second; None says that silence is normal now. A list that stays silent is given twice
    the time with every connection, until a frame comes.
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
    ) -> None:
        self._url = url
        self._key = key
        self._topics = list(topics)
        self._on_frames = on_frames
        self._on_event = on_event
        self._received: list[bytes] = []
        self._stop = stop
        self._backoff = backoff or Backoff()
        self._quiet_limit = quiet_limit
        self._patience = 1.0

    def run(self) -> None:
        """Returns when stopped. Raises StreamRefused where trying again cannot help."""
        try:
            self._run()
        except _NotKept as failure:
            raise failure.__cause__ or failure from None

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = _Connection(unacknowledged=set(self._topics))
            try:
                self._serve(connection)
                cause = "stopped"
            except _Disconnected as ended:
                cause = str(ended)
            except StreamRefused as refusal:
                self._tell(ConnectionEvent(EventKind.REFUSED, str(refusal)))
                raise
            if connection.warning:
                cause = f"{connection.warning}; {cause}"
            if self._stop.is_set():
                self._tell(ConnectionEvent(EventKind.DISCONNECTED, cause))
                return
            delay = self._backoff.next_delay(connection.live_seconds, connection.evicted)
            self._tell(ConnectionEvent(EventKind.DISCONNECTED, cause, round(delay, 3)))
            self._stop.wait(delay)

    def _serve(self, connection: _Connection) -> None:
        with self._socket() as socket:
            connection.opened = connection.heard = connection.pinged = time.monotonic()
            self._tell(ConnectionEvent(EventKind.CONNECTED, "the socket is open"))
            while not self._stop.is_set():
                for status in self._receive(socket, connection):
                    self._obey(status, socket, connection)
                if time.monotonic() - connection.watched > _WATCH_SECONDS:
                    self._watch(socket, connection)

    @contextlib.contextmanager
    def _socket(self) -> Iterator[websocket.WebSocket]:
        socket = websocket.WebSocket(skip_utf8_validation=True)  # in pure Python it costs 10 ms a frame
        try:
            _bound_frames(socket)
            _buffer(socket, self._hand_over)
            try:
                socket.connect(self._url, timeout=10)
            except _SOCKET_ERRORS as error:
                raise _Disconnected(f"could not connect to {self._url}: {error}") from error
            socket.settimeout(1)  # so that stop, pings and deadlines are looked at every second
            yield socket
        finally:
            try:
                self._hand_over()
            finally:
                with contextlib.suppress(websocket.WebSocketException, OSError):
                    socket.close(timeout=1)
                socket.shutdown()  # after the server's own close frame, close() leaves the descriptor open

    def _receive(self, socket: websocket.WebSocket, connection: _Connection) -> Sequence[Status]:
        """Waits a second at most for a message, hands on a frame, and returns its statuses."""
        try:
            opcode, data = socket.recv_data(control_frame=True)
        except websocket.WebSocketTimeoutException:
            return ()
        except _SOCKET_ERRORS as error:
            raise _lost(error) from error
        connection.heard = time.monotonic()
        if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
            self._received.append(data)
            if connection.subscribed:
                connection.fed = connection.heard
                self._patience = 1.0
            return decode_statuses(data)
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            code, reason = int.from_bytes(data[:2]), data[2:].decode(errors="replace")
            raise _Disconnected(f"the server closed the connection (code {code}: {reason or 'no reason given'})")
        return ()

    def _obey(self, status: Status, socket: websocket.WebSocket, connection: _Connection) -> None:
        match status.status:
            case "connected":
                _send(socket, "auth", self._key)
            case "auth_success":
                for start in range(0, len(self._topics), TOPICS_A_MESSAGE):
                    _send(socket, "subscribe", ",".join(self._topics[start : start + TOPICS_A_MESSAGE]))
            case "success":
                topics = status.message.removeprefix("subscribed to:").split(",")
                connection.unacknowledged.difference_update(topic.strip() for topic in topics)
                if not connection.unacknowledged and not connection.subscribed:
                    self._begin(connection)
            case "auth_failed":
                raise StreamRefused(
                    f"{self._url} refused the API key ({status.message or status.status}). "
                    "Set POLYGON_API_KEY to a key whose plan includes WebSocket access, then start again."
                )
            case "error" if connection.unacknowledged:
                missing = ", ".join(sorted(connection.unacknowledged))
                raise StreamRefused(
                    f"{self._url} refused a subscription ({status.message or status.status}). Not acknowledged: "
                    f"{missing}. Check POLYGON_CHANNELS and POLYGON_TICKERS against what the plan includes."
                )
            case "max_connections":
                connection.evicted = True
                self._warn(status, connection)
            case _:  # slow_consumer, force_disconnect, auth_timeout, and whatever the vendor adds
                self._warn(status, connection)

    def _warn(self, status: Status, connection: _Connection) -> None:
        connection.warning = f"the server said {status.status} ({status.message})"
        self._tell(ConnectionEvent(EventKind.WARNED, connection.warning))

    def _begin(self, connection: _Connection) -> None:
        connection.subscribed = connection.fed = time.monotonic()
        confirmed = len(self._topics) - len(connection.unacknowledged)
        self._tell(ConnectionEvent(EventKind.SUBSCRIBED, f"{confirmed} of {len(self._topics)} topics"))

    def _hand_over(self) -> None:
        """Gives away what was received: many small frames cost the journal little more than one."""
        received, self._received = self._received, []
        if received:
            try:
                self._on_frames(received)
            except Exception as error:
                raise _NotKept from error

    def _tell(self, event: ConnectionEvent) -> None:
        self._hand_over()
        self._on_event(event)

    def _watch(self, socket: websocket.WebSocket, connection: _Connection) -> None:
        """Pings, and ends a connection that is dead or whose handshake takes too long."""
        connection.watched = now = time.monotonic()
        if now - connection.heard > SILENCE_SECONDS:
            raise _Disconnected(f"the server sent nothing and answered no ping for {SILENCE_SECONDS:.0f} s")
        if now - connection.pinged > PING_SECONDS:
            connection.pinged = now
            try:
                socket.ping()
            except _SOCKET_ERRORS as error:
                raise _lost(error) from error
        limit = self._quiet_limit() if connection.subscribed else None
        if limit is not None and now - connection.fed > limit * self._patience:
            self._patience *= 2
            raise _Disconnected(f"no bar came for {now - connection.fed:.0f} s while the market was open")
        if not connection.subscribed and now - connection.opened > HANDSHAKE_SECONDS:
            if len(connection.unacknowledged) == len(self._topics):
                raise _Disconnected(f"no subscription was acknowledged within {HANDSHAKE_SECONDS:.0f} s")
            # The others flow: leaving them to ask again would cost bars and be answered no better.
            missing = ", ".join(sorted(connection.unacknowledged))
            self._tell(ConnectionEvent(EventKind.UNACKNOWLEDGED, f"no answer to the subscription to {missing}"))
            self._begin(connection)


def _bound_frames(socket: websocket.WebSocket) -> None:
    """Refuses a frame by its announced length, before its payload is read into memory."""
    buffer = socket.frame_buffer
    read_length = buffer.recv_length

    def recv_length() -> None:
        read_length()
        if buffer.length > MAX_FRAME_BYTES:
            raise _Disconnected(f"the server announced a frame of {buffer.length} bytes, above {MAX_FRAME_BYTES}")

    buffer.recv_length = recv_length


def _buffer(socket: websocket.WebSocket, before_receiving: Callable[[], None]) -> None:
    """Takes what has arrived at once: asking the system for every header and length costs more than all the rest, and
    each time the stream may have to wait its turn behind the thread that publishes."""
    receive = socket.frame_buffer.recv
    waiting = memoryview(b"")

    def buffered(size: int) -> bytes:
        nonlocal waiting
        if not waiting:
            before_receiving()
            waiting = memoryview(receive(_BUFFER_BYTES))
        taken, waiting = waiting[:size], waiting[size:]
        return bytes(taken)

    socket.frame_buffer.recv = buffered


def _lost(error: Exception) -> _Disconnected:
    return _Disconnected(f"the connection was lost: {type(error).__name__}: {error}")


def _send(socket: websocket.WebSocket, action: str, params: str) -> None:
    try:
        socket.send(msgspec.json.encode({"action": action, "params": params}).decode())
    except _SOCKET_ERRORS as error:
        raise _lost(error) from error
