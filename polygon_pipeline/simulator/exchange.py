"""The exchange: the vendor's protocol, served on loopback from a thread of its own.

Belongs here: connections, subscriptions, the market's clock and the sending of frames. Does not belong here: what is
sent (synthetic, replay), and what goes wrong on request (faults): that has two places, `_send`, through which every
frame of aggregates goes, and `_authenticate`.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from types import TracebackType
from typing import Self

import msgspec
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator import faults as harm
from polygon_pipeline.simulator.faults import AT_A_FRAME, AT_AUTHENTICATION, Fault, Faults, Frame, Kind, plain_frame
from polygon_pipeline.simulator.feed import Event

_CHANNELS = frozenset(Channel)
_EVENTS_A_READ = 4096  # taken from the feed at once, in a worker thread
_TICK_SECONDS = 0.01  # what becomes due within one shares a frame
# Clients may subscribe in several messages: the feed lets them finish before it begins.
_SETTLE_SECONDS = 0.1
_CLOSE_SECONDS = 1.0
# No session is this long silent and every night is longer, so longer silences are skipped.
_NIGHT_MS = 7 * 3_600_000
# Late bars are taken from so many events before, and so many at once.
_REMEMBERED = 1000
_LATE_EVENTS = 10

_EXPULSIONS = {
    Kind.SLOW_CONSUMER: "the client reads too slowly",
    Kind.FORCE_DISCONNECT: "the server is going away",
    Kind.MAX_CONNECTIONS: "Maximum number of websocket connections exceeded.",
}


class _Request(msgspec.Struct):
    action: str
    params: str


@dataclass(eq=False)
class Served:
    """What one connection was sent, in order: the truth to hold a client's account against.

    acknowledged: so many frames, from the first, the client has certainly received. Of the others nobody here can
    know how many arrived, only that it was an unbroken run of them: they may have been in the buffer of a connection
    that was torn down.
    """

    frames: list[Frame] = field(default_factory=list)
    acknowledged: int = 0


@dataclass(eq=False)
class _Connection:
    """One authenticated connection and what it subscribed to."""

    socket: ServerConnection
    key: str
    served: Served
    topics: set[tuple[str, str]] = field(default_factory=set)  # (channel, ticker or *)

    def wanted(self, events: list[Event]) -> list[bytes]:
        topics = self.topics
        whole = {channel for channel in _CHANNELS if (channel, "*") in topics}
        return [event.payload for event in events if event.channel in whole or (event.channel, event.ticker) in topics]


class Exchange:
    """Serves one feed to whoever subscribes; a context manager around the serving.

    feed: events in the order of emit_ms; anything iterable, read once, in another thread.
    speed: seconds of market time a second. 0 or infinity sends as fast as clients read, waits while nobody
    subscribes, and loses only what is in the air when a connection ends. At any other speed market time goes on
    whether or not anybody listens, from the first subscription (with start_at_once: from the start), and silences of
    more than 7 hours, which are nights, are skipped.
    key: the one API key to accept; None accepts any but the empty one. port: 0 picks a free one.
    max_connections: for each key; one more evicts the oldest. auth_timeout: seconds. batch_limit: the most events in
    a frame. buffer_limit: bytes a client may leave unread, at a speed, before it is dropped as a slow consumer.
    faults: what is to go wrong. record: keep in `served` what every connection was sent. Each frame is then followed by
    a ping, whose answer proves that it arrived; and a client that leaves a megabyte unread holds up the market.

    What goes wrong while serving, a feed's error among it, ends the serving and is raised by stop().
    """

    def __init__(
        self,
        feed: Iterable[Event],
        *,
        speed: float = 1.0,
        key: str | None = None,
        port: int = 0,
        max_connections: int = 1,
        auth_timeout: float = 10.0,
        start_at_once: bool = False,
        batch_limit: int = 300,
        buffer_limit: int = 64 * 2**20,
        faults: Faults | None = None,
        record: bool = False,
    ) -> None:
        if not speed >= 0:
            raise ValueError(f"speed must be 0 or more, not {speed}")
        self._feed = feed
        self._speed = speed
        self._fast = speed == 0 or math.isinf(speed)
        self._key = key
        self.port = port
        self._max_connections = max_connections
        self._auth_timeout = auth_timeout
        self._start_at_once = start_at_once
        self._batch_limit = batch_limit
        self._buffer_limit = buffer_limit
        self._faults = faults or Faults()
        self._record = record

        self.finished = threading.Event()
        """Set when the feed has been sent to its end and no socket holds any of it back; also when serving ends."""
        self.sent = 0
        """How many aggregates were handed to open connections, each counted once for every connection."""
        self.served: list[Served] = []
        """With record: each authenticated connection's frames, in the order of connecting."""
        self._frames = 0
        self._earlier: deque[Event] = deque(maxlen=_REMEMBERED)
        self._connections: list[_Connection] = []
        self._closings: set[asyncio.Task[None]] = set()  # held, because the loop itself holds tasks only weakly
        # A moment of time.monotonic() and its market time in ms; None until the market starts.
        self._clock: tuple[float, float] | None = None
        self._last_emit_ms = 0
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/stocks"

    @property
    def market_time_ms(self) -> int:
        """The market's clock in Unix ms, 0 before it starts. As fast as possible: the last event's emit_ms."""
        if self._fast or self._clock is None:
            return self._last_emit_ms
        started, market_ms = self._clock
        return int(market_ms + (time.monotonic() - started) * 1000 * self._speed)

    @property
    def serving(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="simulated-exchange", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            self.stop()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close every connection and the port. Raises what ended the serving before, if anything did."""
        if self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
        if self._error:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - stop() raises it, in the thread that can act on it
            self._error = error
        finally:
            self._ready.set()
            self.finished.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._subscribed = asyncio.Event()
        # The vendor leaves pings to its clients, and compressing would be all that this process does.
        async with serve(
            self._handle,
            "127.0.0.1",
            self.port,
            compression=None,
            ping_interval=None,
            close_timeout=_CLOSE_SECONDS,
            write_limit=2**20,
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            play = asyncio.create_task(self._play())
            stop = asyncio.create_task(self._stopping.wait())
            try:
                await asyncio.wait((play, stop), return_when=asyncio.FIRST_COMPLETED)
                if play.done():
                    play.result()  # raises the feed's error
                await stop
            finally:
                play.cancel()
                for connection in self._connections:
                    # Closing waits for what is still to be read, and a client that does not read would never let it.
                    if connection.socket.transport.get_write_buffer_size():
                        connection.socket.transport.abort()

    # Connections

    async def _handle(self, socket: ServerConnection) -> None:
        connection = None
        try:
            await socket.send(_status("connected", "Connected Successfully (simulated exchange)"))
            key = await self._authenticate(socket)
            if key is None:
                return
            connection = _Connection(socket, key, Served())
            if self._record:
                self.served.append(connection.served)
            self._admit(connection)
            async for message in socket:
                self._answer(connection, _request(message))
        except ConnectionClosed:
            pass
        except Exception as error:
            self._error = error
            self._stopping.set()
            raise
        finally:
            if connection:
                self._forget(connection)

    async def _authenticate(self, socket: ServerConnection) -> str | None:
        """The connection's key, or None once it has been turned away."""
        try:
            async with asyncio.timeout(self._auth_timeout):
                request = _request(await socket.recv())
            fault = self._faults.due(AT_AUTHENTICATION, self._frames, self.market_time_ms)
            if fault and fault.kind is Kind.AUTH_TIMEOUT:
                raise TimeoutError
        except TimeoutError:
            await socket.send(_status("auth_timeout", "authentication timed out"))
            return None
        accepted = request and request.action == "auth" and request.params and self._key in (None, request.params)
        if request and accepted and fault is None:
            await socket.send(_status("auth_success", "authenticated"))
            return request.params
        await socket.send(_status("auth_failed", "authentication failed"))
        # The vendor drops the connection without a close frame, so the library's way of closing must not come first.
        socket.transport.close()
        await socket.wait_closed()
        return None

    def _admit(self, connection: _Connection) -> None:
        same_key = [other for other in self._connections if other.key == connection.key]
        self._connections.append(connection)
        for other in same_key[: max(0, len(same_key) + 1 - self._max_connections)]:
            self._expel(other, Kind.MAX_CONNECTIONS)

    def _expel(self, connection: _Connection, status: Kind) -> None:
        broadcast([connection.socket], _status(status, _EXPULSIONS[status]))
        self._close(connection, 1008, status)

    def _close(self, connection: _Connection, code: int, reason: str) -> None:
        """Begin the closing; a client that takes its time over it holds up nobody."""
        self._forget(connection)
        closing = self._loop.create_task(self._finish(connection.socket, code, reason))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)

    async def _finish(self, socket: ServerConnection, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await socket.close(code, reason)
        except TimeoutError:
            socket.transport.abort()

    def _forget(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        self._note_subscriptions()

    def _forget_departed(self) -> None:
        """Their handlers do it too, but only later: until then the market would be played to nobody."""
        for connection in list(self._connections):
            if connection.socket.state is not State.OPEN:
                self._forget(connection)

    def _answer(self, connection: _Connection, request: _Request | None) -> None:
        """Acknowledge new topics in one frame. The vendor is silent about all else, and so is this."""
        if request is None or request.action not in ("subscribe", "unsubscribe"):
            return
        acknowledged = []
        for topic in request.params.split(","):
            channel, _, ticker = topic.partition(".")
            subscribing = request.action == "subscribe"
            if channel not in _CHANNELS or not ticker or ((channel, ticker) in connection.topics) == subscribing:
                continue
            if subscribing:
                connection.topics.add((channel, ticker))
            else:
                connection.topics.remove((channel, ticker))
            acknowledged.append(("success", f"{request.action}d to: {topic}"))
        if acknowledged:
            broadcast([connection.socket], _statuses(acknowledged))
            self._note_subscriptions()

    def _note_subscriptions(self) -> None:
        if any(connection.topics for connection in self._connections):
            self._subscribed.set()
        else:
            self._subscribed.clear()

    # The market

    async def _play(self) -> None:
        if not self._start_at_once:
            await self._somebody_subscribed()
        events = iter(self._feed)
        # A feed may think for seconds before an event: in a worker thread, so that connections are served meanwhile.
        while batch := await asyncio.to_thread(lambda: list(islice(events, _EVENTS_A_READ))):
            position = 0
            while position < len(batch):
                if self._fast:
                    await self._somebody_subscribed()
                    due = len(batch)
                else:
                    now = await self._until(batch[position].emit_ms)
                    due = max(position + 1, bisect_right(batch, now, key=attrgetter("emit_ms")))
                end = min(due, position + self._batch_limit)
                self._last_emit_ms = batch[end - 1].emit_ms
                if self._faults:
                    self._earlier.extend(batch[position:end])
                for connection in list(self._connections):
                    if wanted := connection.wanted(batch[position:end]):
                        await self._send(connection, wanted)
                position = end
                await asyncio.sleep(0)  # connections are served, even when everything is overdue
        for connection in list(self._connections):
            await self._flush(connection)
        self.finished.set()

    async def _somebody_subscribed(self) -> None:
        self._forget_departed()
        while not self._subscribed.is_set():
            await self._subscribed.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
            self._forget_departed()

    async def _until(self, emit_ms: int) -> int:
        """Wait for that market time; the market time it is then."""
        ahead = emit_ms - self.market_time_ms
        if self._clock is None or ahead > _NIGHT_MS:
            self._clock = time.monotonic(), emit_ms
        elif ahead > 0:
            await asyncio.sleep(max(_TICK_SECONDS, ahead / 1000 / self._speed))
        return self.market_time_ms

    async def _send(self, connection: _Connection, aggregates: list[bytes]) -> None:
        """Send one frame of aggregates, each one JSON object, or what a fault makes of it."""
        socket = connection.socket
        if socket.state is not State.OPEN:
            return
        if not self._fast and socket.transport.get_write_buffer_size() > self._buffer_limit:
            self._expel(connection, Kind.SLOW_CONSUMER)
            return
        self._frames += 1
        fault = self._faults.due(AT_A_FRAME, self._frames, self.market_time_ms)
        if fault is None:
            await self._deliver(connection, plain_frame(aggregates))
        elif fault.kind is Kind.TRUNCATED_FRAME:
            self._forget(connection)
            harm.cut(socket, plain_frame(aggregates).payload)
        else:
            late = connection.wanted(self._faults.sample(self._earlier, _LATE_EVENTS))
            for frame in self._faults.spoil(fault.kind, aggregates, late):
                await self._deliver(connection, frame)
            if socket.state is State.OPEN:
                self._inflict(connection, fault)

    async def _deliver(self, connection: _Connection, frame: Frame) -> None:
        self.sent += len(frame.bars)
        with suppress(ConnectionClosed):  # what was in the air is lost, as it is on a real exchange
            if self._record:
                connection.served.frames.append(frame)
            if self._fast:
                await connection.socket.send(frame.payload, text=frame.text)
            else:
                # Never waits: one slow reader must not hold up the market.
                broadcast([connection.socket], frame.payload, text=frame.text)
            if self._record:
                await self._ask_for_receipt(connection)

    async def _ask_for_receipt(self, connection: _Connection) -> None:
        """A ping, because a client answers it when it has read everything before it."""
        served, frames = connection.served, len(connection.served.frames)

        def note(answer: asyncio.Future[float]) -> None:
            if not answer.cancelled() and not answer.exception():
                served.acknowledged = max(served.acknowledged, frames)

        asyncio.ensure_future(await connection.socket.ping()).add_done_callback(note)

    def _inflict(self, connection: _Connection, fault: Fault) -> None:
        """Do to the connection what the fault says; those that only spoil frames do nothing."""
        match fault.kind:
            case Kind.SLOW_CONSUMER | Kind.FORCE_DISCONNECT | Kind.MAX_CONNECTIONS:
                self._expel(connection, fault.kind)
            case Kind.CLOSE:
                self._close(connection, 1001, "going away")
            case Kind.DROP:
                self._forget(connection)
                harm.drop(connection.socket)
            case Kind.RESET:
                self._forget(connection)
                harm.reset(connection.socket)
            case Kind.HUGE_FRAME:
                self._forget(connection)
                harm.announce_huge(connection.socket)
            case Kind.STALL | Kind.SILENCE:
                # To be forgotten is to get nothing: as fast as possible, the market waits for whoever comes next.
                self._forget(connection)
                if fault.kind is Kind.STALL:
                    harm.mute(connection.socket)
                if fault.seconds is not None:
                    self._loop.call_later(fault.seconds, self._remember, connection)

    def _remember(self, connection: _Connection) -> None:
        """The end of a stall or a silence."""
        harm.unmute(connection.socket)
        if connection.socket.state is State.OPEN:
            self._connections.append(connection)
            self._note_subscriptions()

    async def _flush(self, connection: _Connection) -> None:
        while connection.socket.state is State.OPEN and connection.socket.transport.get_write_buffer_size():
            await asyncio.sleep(_TICK_SECONDS)


def _request(message: str | bytes) -> _Request | None:
    """The client's message, or None if it is not one."""
    try:
        return msgspec.json.decode(message, type=_Request)
    except msgspec.DecodeError:
        return None


def _status(status: str, message: str) -> str:
    return _statuses([(status, message)])


def _statuses(statuses: list[tuple[str, str]]) -> str:
    events = [{"ev": "status", "status": status, "message": message} for status, message in statuses]
    return msgspec.json.encode(events).decode()
