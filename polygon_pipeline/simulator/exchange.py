"""The exchange: the vendor's WebSocket protocol, served on loopback from a separate thread.

Belongs here: connections, subscriptions, the market time and the sending of frames. Does not belong here: the bars
that are sent (synthetic, replay) and the faults themselves (faults). Faults are applied in two places only: `_send`,
through which every frame of aggregates goes, and `_authenticate`.
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
from polygon_pipeline.simulator import faults as fault_actions
from polygon_pipeline.simulator.faults import (
    AT_AUTHENTICATION,
    AT_FRAME,
    Fault,
    Faults,
    FaultType,
    OutgoingFrame,
    plain_frame,
)
from polygon_pipeline.simulator.feed import Event

_CHANNELS = frozenset(Channel)
_EVENTS_PER_READ = 4096  # read from the feed at a time, in a worker thread
_TICK_SECONDS = 0.01  # events that become due within one tick share a frame
# Clients may subscribe in several messages: the feed starts only this long after the first one.
_SETTLE_SECONDS = 0.1
_CLOSE_SECONDS = 1.0
# Periods without events that are longer than this are skipped: a night without a session is longer, and no pause in a
# session or between two is.
_NIGHT_MS = 7 * 3_600_000
# The fault LATE sends this many of the most recent events again.
_RECENT_EVENTS = 1000
_LATE_EVENTS = 10

_EVICTION_MESSAGES = {
    FaultType.SLOW_CONSUMER: "the client reads too slowly",
    FaultType.FORCE_DISCONNECT: "the server is going away",
    FaultType.MAX_CONNECTIONS: "Maximum number of websocket connections exceeded.",
}


class _Request(msgspec.Struct):
    action: str
    params: str


@dataclass(eq=False)
class Served:
    """What one connection was sent, in order: the reference that a test compares the client's ledger with.

    acknowledged: the client has certainly received this many frames, counted from the first. How many of the others
    arrived is unknown, because they may have been in the buffer of a connection that was reset; but there are no gaps
    between those that did arrive.
    """

    frames: list[OutgoingFrame] = field(default_factory=list)
    acknowledged: int = 0


@dataclass(eq=False)
class _Connection:
    """One authenticated connection and its subscriptions."""

    socket: ServerConnection
    key: str
    served: Served
    topics: set[tuple[str, str]] = field(default_factory=set)  # (channel, ticker or *)

    def subscribed(self, events: list[Event]) -> list[bytes]:
        """The payloads of the events that it subscribed to."""
        topics = self.topics
        all_of = {channel for channel in _CHANNELS if (channel, "*") in topics}
        return [event.payload for event in events if event.channel in all_of or (event.channel, event.ticker) in topics]


class Exchange:
    """Serves one feed to all subscribers; a context manager that starts and stops the server.

    feed: an iterable of events in the order of emit_ms, read once, in another thread.
    speed: seconds of market time per second. 0 or infinity sends as fast as clients read, pauses while there is no
    subscriber, and loses only data in transit when a connection ends. At any other speed, market time advances with
    or without subscribers, from the first subscription on (with start_at_once: from the start), and periods of more
    than 7 hours without events, which are nights, are skipped.
    key: the only API key to accept; None accepts any key except an empty one. host: whose address it serves on, this
    machine's loopback or that of a test's own network. port: 0 picks a free one.
    max_connections: per key; one more evicts the oldest. auth_timeout: seconds. batch_limit: the maximum number of
    events per frame. buffer_limit: how many bytes a client may leave unread before it is evicted as a slow consumer;
    not with speed 0 or infinity.
    faults: the faults to inject. record: keep in `served` what every connection was sent. Every frame is then followed
    by a ping, whose answer proves that the frame arrived; and a client that leaves a megabyte unread delays all others.

    An error while serving, also one raised by the feed, stops the server and is raised by stop().
    """

    def __init__(
        self,
        feed: Iterable[Event],
        *,
        speed: float = 1.0,
        key: str | None = None,
        host: str = "127.0.0.1",
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
        self._host = host
        self.port = port
        self._max_connections = max_connections
        self._auth_timeout = auth_timeout
        self._start_at_once = start_at_once
        self._batch_limit = batch_limit
        self._buffer_limit = buffer_limit
        self._faults = faults or Faults()
        self._record = record

        self.finished = threading.Event()
        """Set when the whole feed has been sent and no write buffer holds any of it; also when the server stops."""
        self.sent = 0
        """How many aggregates were sent to open connections, each counted once per connection."""
        self.served: list[Served] = []
        """With record: each authenticated connection's frames, in the order of connecting."""
        self._frames = 0
        self._recent: deque[Event] = deque(maxlen=_RECENT_EVENTS)
        self._connections: list[_Connection] = []
        # A reference is kept to each task, because the event loop itself has only weak references to them.
        self._closing_tasks: set[asyncio.Task[None]] = set()
        # A value of time.monotonic() and the market time in ms at that moment; None until the market starts.
        self._clock: tuple[float, float] | None = None
        self._last_emit_ms = 0
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"ws://{self._host}:{self.port}/stocks"

    @property
    def market_time_ms(self) -> int:
        """The market time in Unix ms, 0 before it starts. With speed 0 or infinity, the last event's emit_ms."""
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
        """Close every connection and the port. Raises the error that stopped the server earlier, if there was one."""
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
        # Like the vendor, it sends no keepalive pings. Compression would take most of the CPU time.
        async with serve(
            self._handle,
            self._host,
            self.port,
            compression=None,
            ping_interval=None,
            close_timeout=_CLOSE_SECONDS,
            write_limit=2**20,
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            play = asyncio.create_task(self._play_feed())
            stop = asyncio.create_task(self._stopping.wait())
            try:
                await asyncio.wait((play, stop), return_when=asyncio.FIRST_COMPLETED)
                if play.done():
                    play.result()  # raises the feed's error
                await stop
            finally:
                play.cancel()
                for connection in self._connections:
                    # Closing waits until the write buffer is empty, which never happens if the client does not read.
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
            self._register(connection)
            async for message in socket:
                self._handle_request(connection, _decode_request(message))
        except ConnectionClosed:
            pass
        except Exception as error:
            self._error = error
            self._stopping.set()
            raise
        finally:
            if connection:
                self._unregister(connection)

    async def _authenticate(self, socket: ServerConnection) -> str | None:
        """The connection's key, or None if the client was refused."""
        try:
            async with asyncio.timeout(self._auth_timeout):
                request = _decode_request(await socket.recv())
            fault = self._faults.due(AT_AUTHENTICATION, self._frames, self.market_time_ms)
            if fault and fault.kind is FaultType.AUTH_TIMEOUT:
                raise TimeoutError
        except TimeoutError:
            await socket.send(_status("auth_timeout", "authentication timed out"))
            return None
        accepted = request and request.action == "auth" and request.params and self._key in (None, request.params)
        if request and accepted and fault is None:
            await socket.send(_status("auth_success", "authenticated"))
            return request.params
        await socket.send(_status("auth_failed", "authentication failed"))
        # The vendor drops the connection without a close frame, so it must not be closed through the library.
        socket.transport.close()
        await socket.wait_closed()
        return None

    def _register(self, connection: _Connection) -> None:
        same_key = [other for other in self._connections if other.key == connection.key]
        self._connections.append(connection)
        for other in same_key[: max(0, len(same_key) + 1 - self._max_connections)]:
            self._evict(other, FaultType.MAX_CONNECTIONS)

    def _evict(self, connection: _Connection, status: FaultType) -> None:
        broadcast([connection.socket], _status(status, _EVICTION_MESSAGES[status]))
        self._close(connection, 1008, status)

    def _close(self, connection: _Connection, code: int, reason: str) -> None:
        """Start closing in the background, so that a client that is slow to answer does not delay the others."""
        self._unregister(connection)
        closing = self._loop.create_task(self._finish_closing(connection.socket, code, reason))
        self._closing_tasks.add(closing)
        closing.add_done_callback(self._closing_tasks.discard)

    async def _finish_closing(self, socket: ServerConnection, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await socket.close(code, reason)
        except TimeoutError:
            socket.transport.abort()

    def _unregister(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        self._update_subscribed()

    def _unregister_closed(self) -> None:
        """Each connection's handler does this too, but later: until then, events would be sent to no client."""
        for connection in list(self._connections):
            if connection.socket.state is not State.OPEN:
                self._unregister(connection)

    def _handle_request(self, connection: _Connection, request: _Request | None) -> None:
        """Acknowledge new topics in one frame. Like the vendor, do not answer anything else."""
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
            self._update_subscribed()

    def _update_subscribed(self) -> None:
        if any(connection.topics for connection in self._connections):
            self._subscribed.set()
        else:
            self._subscribed.clear()

    # The market

    async def _play_feed(self) -> None:
        if not self._start_at_once:
            await self._wait_for_subscriber()
        events = iter(self._feed)
        # A feed may need seconds to make an event: it runs in a worker thread, so that connections are still served.
        while batch := await asyncio.to_thread(lambda: list(islice(events, _EVENTS_PER_READ))):
            position = 0
            while position < len(batch):
                if self._fast:
                    await self._wait_for_subscriber()
                    due = len(batch)
                else:
                    now = await self._wait_until(batch[position].emit_ms)
                    due = max(position + 1, bisect_right(batch, now, key=attrgetter("emit_ms")))
                end = min(due, position + self._batch_limit)
                self._last_emit_ms = batch[end - 1].emit_ms
                if self._faults:
                    self._recent.extend(batch[position:end])
                for connection in list(self._connections):
                    if aggregates := connection.subscribed(batch[position:end]):
                        await self._send(connection, aggregates)
                position = end
                await asyncio.sleep(0)  # lets the connections be served, even when all events are overdue
        for connection in list(self._connections):
            await self._wait_until_flushed(connection)
        self.finished.set()

    async def _wait_for_subscriber(self) -> None:
        self._unregister_closed()
        while not self._subscribed.is_set():
            await self._subscribed.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
            self._unregister_closed()

    async def _wait_until(self, emit_ms: int) -> int:
        """Wait until this market time; returns the market time afterwards."""
        ahead = emit_ms - self.market_time_ms
        if self._clock is None or ahead > _NIGHT_MS:
            self._clock = time.monotonic(), emit_ms
        elif ahead > 0:
            await asyncio.sleep(max(_TICK_SECONDS, ahead / 1000 / self._speed))
        return self.market_time_ms

    async def _send(self, connection: _Connection, aggregates: list[bytes]) -> None:
        """Send one frame of aggregates, each one JSON object; or, if a fault is due, what that fault sends instead."""
        socket = connection.socket
        if socket.state is not State.OPEN:
            return
        if not self._fast and socket.transport.get_write_buffer_size() > self._buffer_limit:
            self._evict(connection, FaultType.SLOW_CONSUMER)
            return
        self._frames += 1
        fault = self._faults.due(AT_FRAME, self._frames, self.market_time_ms)
        if fault is None:
            await self._deliver(connection, plain_frame(aggregates))
        elif fault.kind is FaultType.TRUNCATED_FRAME:
            self._unregister(connection)
            fault_actions.send_truncated(socket, plain_frame(aggregates).payload)
        else:
            late = connection.subscribed(self._faults.sample(self._recent, _LATE_EVENTS))
            for frame in self._faults.outgoing_frames(fault.kind, aggregates, late):
                await self._deliver(connection, frame)
            if socket.state is State.OPEN:
                self._apply_fault(connection, fault)

    async def _deliver(self, connection: _Connection, frame: OutgoingFrame) -> None:
        self.sent += len(frame.bars)
        with suppress(ConnectionClosed):  # data in transit is lost, as with the real exchange
            if self._record:
                connection.served.frames.append(frame)
            if self._fast:
                await connection.socket.send(frame.payload, text=frame.text)
            else:
                # Never waits: one slow client must not delay the others.
                broadcast([connection.socket], frame.payload, text=frame.text)
            if self._record:
                await self._request_acknowledgement(connection)

    async def _request_acknowledgement(self, connection: _Connection) -> None:
        """Send a ping: its answer proves that the client has read everything before it."""
        served, frames = connection.served, len(connection.served.frames)

        def mark_acknowledged(answer: asyncio.Future[float]) -> None:
            if not answer.cancelled() and not answer.exception():
                served.acknowledged = max(served.acknowledged, frames)

        asyncio.ensure_future(await connection.socket.ping()).add_done_callback(mark_acknowledged)

    def _apply_fault(self, connection: _Connection, fault: Fault) -> None:
        """Apply the fault to the connection; faults that only change frames do nothing here."""
        match fault.kind:
            case FaultType.SLOW_CONSUMER | FaultType.FORCE_DISCONNECT | FaultType.MAX_CONNECTIONS:
                self._evict(connection, fault.kind)
            case FaultType.CLOSE:
                self._close(connection, 1001, "going away")
            case FaultType.DROP:
                self._unregister(connection)
                fault_actions.drop(connection.socket)
            case FaultType.RESET:
                self._unregister(connection)
                fault_actions.reset(connection.socket)
            case FaultType.HUGE_FRAME:
                self._unregister(connection)
                fault_actions.announce_huge_frame(connection.socket)
            case FaultType.HUGE_MESSAGE:
                self._unregister(connection)
                fault_actions.begin_huge_message(connection.socket)
            case FaultType.DRIP:
                self._unregister(connection)
                fault_actions.drip(connection.socket, self._loop)
            case FaultType.STALL | FaultType.SILENCE:
                # An unregistered connection is sent nothing; with speed 0, the feed pauses until there is a subscriber.
                self._unregister(connection)
                if fault.kind is FaultType.STALL:
                    fault_actions.discard_writes(connection.socket)
                if fault.seconds is not None:
                    self._loop.call_later(fault.seconds, self._end_silence, connection)

    def _end_silence(self, connection: _Connection) -> None:
        """Resume sending after a stall or a silence."""
        fault_actions.restore_writes(connection.socket)
        if connection.socket.state is State.OPEN:
            self._connections.append(connection)
            self._update_subscribed()

    async def _wait_until_flushed(self, connection: _Connection) -> None:
        while connection.socket.state is State.OPEN and connection.socket.transport.get_write_buffer_size():
            await asyncio.sleep(_TICK_SECONDS)


def _decode_request(message: str | bytes) -> _Request | None:
    """The decoded message of a client, or None if it is not a valid one."""
    try:
        return msgspec.json.decode(message, type=_Request)
    except msgspec.DecodeError:
        return None


def _status(status: str, message: str) -> str:
    return _statuses([(status, message)])


def _statuses(statuses: list[tuple[str, str]]) -> str:
    events = [{"ev": "status", "status": status, "message": message} for status, message in statuses]
    return msgspec.json.encode(events).decode()
