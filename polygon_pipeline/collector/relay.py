"""The relay: other programs of this machine listen to the stream that the collector has, by the vendor's own protocol.

Belongs here: the server, its readers, what each of them gets, and the replay of what one missed. Does not belong here:
the stream itself (polygon.stream), the journal (collector.journal), and what a watermark claims (lake.watermark).

The vendor allows one connection. A frame is sent to readers after it is synced in the journal, in the order of the
journal, which is all that the relay reads: the thread that receives does nothing for it. A reader that does not read is
disconnected, and delays nobody. docs/relay.md says what programs see.

One thread with one event loop. `_advance` reads what is synced and sends it to the readers that are live, without
waiting for any of them; a replay reads the same journal up to exactly that place, and then its reader is live.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http import HTTPStatus
from pathlib import Path

import msgspec
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from polygon_pipeline.collector.accounting import count_event, note_bars
from polygon_pipeline.collector.journal import Journal, JournalHeader, JournalRecord, RecordType
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.archive import ArchivedEvent, read_frames
from polygon_pipeline.lake.errors import STORE_ERRORS, brief
from polygon_pipeline.lake.lag import Lateness
from polygon_pipeline.lake.ledger import Account, Watermark
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.lake.watermark import watermark
from polygon_pipeline.market.bars import Channel, timestamp_error
from polygon_pipeline.market.calendar import clock

# Connections at once, the unauthenticated included.
MOST_READERS = 16
AUTH_SECONDS = 10.0
# What a reader may leave unread: some minutes of the whole market's minute bars.
UNREAD_BYTES = 32 * 2**20
# The longest message of a reader: some 40,000 topics.
_MESSAGE_BYTES = 512 * 1024
# How long a replay waits for its reader to read on.
_REPLAY_PATIENCE_SECONDS = 30.0
_CLOSE_SECONDS = 1.0
_END_SECONDS = 5.0
# How often a reader is told of a watermark at the most, and looked for one when no frame comes.
_WATERMARK_SECONDS = 0.1
_TICK_SECONDS = 0.25
# By how much the clock of the lake's server may differ from this machine's.
_CLOCKS_DIFFER = timedelta(minutes=30)

_WATERMARK = "watermark"
_CHANNELS = frozenset(Channel)
_KNOWN = _CHANNELS | {_WATERMARK}

# The library would log what it is sent, and any failure of a client's.
_SILENT = logging.Logger("relay", logging.CRITICAL + 1)

# A channel and a ticker, or `*`; or `watermark` and a channel.
Topic = tuple[str, str]


@dataclass(frozen=True)
class RelayAccess:
    """Where the stream is shared on this machine, and what a reader must know. port: 0 for a free one."""

    port: int
    token: str = field(repr=False)


class _Request(msgspec.Struct):
    """What a reader asks for. since: Unix ms."""

    action: str
    params: str
    since: int = 0


class _Head(msgspec.Struct, gc=False):
    """What an event is about."""

    ev: str
    sym: str = ""
    s: int | float = 0


_decode_request = msgspec.json.Decoder(_Request).decode
_decode_heads = msgspec.json.Decoder(list[_Head]).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_event = msgspec.json.Decoder(ArchivedEvent).decode
_UNDECODABLE = (msgspec.DecodeError, ValueError, RecursionError)


class RelayedFrame:
    """A frame, and what each subscription gets of it.

    bars: the heads of its aggregates. An event that cannot be read is left out.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._parts: list[bytes] | None = None  # of the heads, where not every event has one
        self._made: dict[frozenset[Topic], bytes | None] = {}

    @cached_property
    def _heads(self) -> list[_Head]:
        try:
            if not self._payload.isascii():
                self._payload.decode()
            return _decode_heads(self._payload)
        except _UNDECODABLE:
            return self._piecemeal()

    @property
    def bars(self) -> list[_Head]:
        return [head for head in self._heads if head.ev in _CHANNELS]

    def matching(self, topics: frozenset[Topic]) -> bytes | None:
        """The frame verbatim where all of it is subscribed to, an array of the events that are, or None."""
        if topics not in self._made:
            self._made[topics] = self._make(topics) if topics else None
        return self._made[topics]

    def _make(self, topics: frozenset[Topic]) -> bytes | None:
        wholly = {kind for kind, name in topics if name == "*"}
        wanted = [head.ev in wholly or (head.ev, head.sym) in topics for head in self._heads]
        if not any(wanted):
            return None
        if self._parts is None and all(wanted):
            return self._payload
        parts = self._parts if self._parts is not None else [bytes(part) for part in _decode_parts(self._payload)]
        return b"[" + b",".join(part for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted) + b"]"

    def _piecemeal(self) -> list[_Head]:
        """Event by event; a frame that is one object is an array of one."""
        self._parts, heads = [], []
        try:
            is_object = self._payload.lstrip().startswith(b"{")
            parts = [self._payload] if is_object else [bytes(part) for part in _decode_parts(self._payload)]
        except _UNDECODABLE:
            return []
        for part in parts:
            try:
                part.decode()
                heads.append(_decode_head(part))
                self._parts.append(part)
            except _UNDECODABLE:
                continue
        return heads


@dataclass(eq=False)
class _Reader:
    """A connection that has the token. said: the watermarks it was told. replaying: its replay, under way."""

    socket: ServerConnection
    topics: frozenset[Topic] = frozenset()
    said: dict[Channel, Watermark] = field(default_factory=dict)
    replaying: asyncio.Task[None] | None = None


class Relay:
    """Serves a run's journal from start() to stop(). What goes wrong in it ends the relay alone.

    lateness: how late the run's bars come, as measured so far. heard: when the server was heard last and everything it
    had sent was in the journal, on the clock that never steps; None before. tell: gets what is for the run's
    log, with its level.
    """

    def __init__(
        self,
        access: RelayAccess,
        journal: Journal,
        header: JournalHeader,
        lake: Lake,
        lateness: Callable[[], Mapping[Channel, Lateness]],
        heard: Callable[[], float | None],
        tell: Callable[[tuple[int, str]], object],
    ) -> None:
        self.port = access.port
        self._token = access.token.encode()
        self._journal = journal
        self._header = header
        self._lake = lake
        self._lateness = lateness
        self._heard = heard
        self._tell = tell
        self._collected = frozenset(_topics(header.topics))
        self._position = (1, 0)  # the segment and the offset up to which it is relayed
        self._account = Account()  # of what is relayed: connections, and of a day that is played the newest bars
        for kind, _ in self._collected:
            self._account.day(header.session_date, Channel(kind))
        self._heard_until: datetime | None = None
        self._connections = 0
        self._stopping = False
        self._readers: set[_Reader] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._looked = 0.0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/stocks"

    def start(self) -> None:
        """Returns when it serves, or has said why it does not."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Relays what is synced, and closes every connection."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._synced.set)
        self._thread.join(_END_SECONDS)  # a replay may wait for a store that is away

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            text = f"port {self.port} (POLYGON_RELAY_PORT) cannot be had: {error}"
            self._tell((logging.WARNING, f"The stream is not shared: {text}. The collector goes on."))
        except Exception as error:  # noqa: BLE001 the collector goes on without it
            self._tell((logging.ERROR, f"The stream is not shared any more: {brief(error)}. The collector goes on."))
        finally:
            self._journal.on_synced, self._journal.is_hurried = None, False
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._synced = asyncio.Event()
        self._one_replay = asyncio.Semaphore(1)  # reading a day takes processor and memory
        self._journal.on_synced = self._note_synced
        # Compression would take most of the processor's time.
        async with serve(
            self._handle,
            "127.0.0.1",
            self.port,
            process_request=self._admit,
            compression=None,
            max_size=_MESSAGE_BYTES,
            max_queue=4,
            open_timeout=5,
            ping_interval=None,
            close_timeout=_CLOSE_SECONDS,
            server_header=None,
            logger=_SILENT,
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._tell((logging.INFO, f"the stream is shared on {self.url}"))
            self._ready.set()
            try:
                while not self._stopping:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_SECONDS):
                            await self._synced.wait()
                    self._synced.clear()
                    self._look_at_the_stream()
            finally:
                for reader in list(self._readers):  # 1012, a restart: clients come back after it
                    self._cut(reader, 1012, "force_disconnect", "the collector ends")
                await asyncio.gather(*self._closing)

    def _note_synced(self) -> None:
        """On the journal's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._synced.set)

    # Connections

    def _admit(self, socket: ServerConnection, request: Request) -> Response | None:
        """Refuses what no program of this machine sends: a browser may be made to open any address."""
        hosts = [f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")]
        # A page has the origin of the server that it came from, which this one never is; some libraries send it so.
        origins = {"", *(f"http://{host}" for host in hosts)}
        host, origin = request.headers.get_all("Host"), request.headers.get_all("Origin") or [""]
        if len(host) != 1 or host[0] not in hosts or len(origin) != 1 or origin[0] not in origins:
            return socket.respond(HTTPStatus.FORBIDDEN, "This serves programs of this machine.\n")
        if self._connections >= MOST_READERS:
            return socket.respond(HTTPStatus.SERVICE_UNAVAILABLE, "There are too many readers.\n")
        return None

    async def _handle(self, socket: ServerConnection) -> None:
        self._connections += 1
        reader = _Reader(socket)
        try:
            await socket.send(_status("connected", "Connected Successfully"))
            if not await self._authenticate(socket):
                return
            self._readers.add(reader)
            self._journal.is_hurried = True
            async for message in socket:
                with contextlib.suppress(*_UNDECODABLE):
                    self._answer(reader, _decode_request(message))
        except ConnectionClosed:
            pass
        finally:
            self._connections -= 1
            self._readers.discard(reader)
            self._journal.is_hurried = bool(self._readers)
            if reader.replaying:
                reader.replaying.cancel()

    async def _authenticate(self, socket: ServerConnection) -> bool:
        try:
            async with asyncio.timeout(AUTH_SECONDS):
                message = await socket.recv()
        except TimeoutError:
            await socket.send(_status("auth_timeout", "authentication timed out"))
            return False
        with contextlib.suppress(*_UNDECODABLE):
            request = _decode_request(message)
            if request.action == "auth" and hmac.compare_digest(request.params.encode(), self._token):
                await socket.send(_status("auth_success", "authenticated"))
                return True
        await socket.send(_status("auth_failed", "authentication failed"))
        socket.transport.close()  # as the vendor does it, without a close frame
        await socket.wait_closed()
        return False

    def _answer(self, reader: _Reader, request: _Request) -> None:
        """Acknowledges new topics in one frame; like the vendor, it answers to nothing else that it does not know."""
        topics = [topic for topic in dict.fromkeys(_topics(request.params.split(","))) if topic[0] in _KNOWN]
        match request.action:
            case "subscribe":
                self._subscribe(reader, topics)
            case "unsubscribe":
                gone = [topic for topic in topics if topic in reader.topics]
                reader.topics -= frozenset(gone)
                self._send(reader, *[_event("success", f"unsubscribed to: {_name(topic)}") for topic in gone])
            case "replay":
                if reader.replaying or any(topic[0] in _CHANNELS for topic in reader.topics):
                    self._send(reader, _event("error", "a replay comes first: ask for it before you subscribe to bars"))
                else:
                    reader.replaying = asyncio.create_task(self._replay(reader, topics, request.since))

    def _subscribe(self, reader: _Reader, topics: Sequence[Topic]) -> list[Topic]:
        """Returns those that are collected, of which the reader has some from now on."""
        new = [topic for topic in topics if topic not in reader.topics]
        unknown = [topic for topic in new if not self._collects(topic)]
        served = [topic for topic in new if topic not in unknown]
        reader.topics |= frozenset(served)
        events = [_event("success", f"subscribed to: {_name(topic)}") for topic in served]
        if unknown:
            names = ", ".join(map(_name, unknown[:20]))
            events.append(_event("error", f"not collected, so that it cannot be relayed: {names}"))
        self._send(reader, *events)
        self._say_watermarks([reader])
        return served

    def _collects(self, topic: Topic) -> bool:
        """`*` is everything of a channel that is collected."""
        kind, name = topic
        if kind == _WATERMARK:
            return any(channel == name for channel, _ in self._collected)
        return topic in self._collected or any(
            channel == kind and "*" in (name, ticker) for channel, ticker in self._collected
        )

    # Live

    def _look_at_the_stream(self) -> None:
        heard = self._heard()
        self._advance()
        # Nothing waits to be synced, so that everything that was heard until then is relayed.
        if heard is not None and self._journal.is_synced(*self._position):
            self._heard_until = datetime.now(UTC) - timedelta(seconds=time.monotonic() - heard)
        self._say_watermarks(self._readers)

    def _advance(self) -> None:
        """Sends what is synced to the readers that are live."""
        while True:
            number, offset = self._position
            end, is_closed = self._journal.end_of(number)
            end = max(end, offset)  # 0 while it is being closed
            if end > offset:
                for record in self._journal.read(number, offset, end):
                    self._relay(record)
            self._position = (number + 1, 0) if is_closed else (number, end)
            if not is_closed:
                return

    def _relay(self, record: JournalRecord) -> None:
        self._heard_until = self._account.last_received_at = record.received_at
        if record.kind is RecordType.EVENT:
            count_event(self._account, _decode_event(record.payload), record.received_at)
            return
        frame = RelayedFrame(record.payload)
        if self._header.time_base == "event":
            starts = [start for bar in frame.bars if not timestamp_error(start := int(bar.s), record.received_at)]
            if starts:
                note_bars(self._account, max(starts), starts[-1])
        for reader in list(self._readers):
            if reader.replaying is None and (content := frame.matching(reader.topics)):
                self._push(reader, content)

    def _push(self, reader: _Reader, content: bytes) -> None:
        """Never waits: a reader that leaves too much unread goes."""
        if reader.socket.transport.get_write_buffer_size() > UNREAD_BYTES:
            self._cut(reader, 1008, "slow_consumer", "the client reads too slowly")
        else:
            broadcast([reader.socket], content, text=True)

    def _send(self, reader: _Reader, *events: Mapping[str, object]) -> None:
        if events:
            self._push(reader, msgspec.json.encode(events))

    def _cut(self, reader: _Reader, code: int, status: str, reason: str) -> None:
        """Ends a connection in the background, as soon as the reader takes the reason, or without it."""
        self._readers.discard(reader)

        async def close() -> None:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await reader.socket.close(code, status)
            except TimeoutError:
                reader.socket.transport.abort()

        broadcast([reader.socket], _status(status, reason))
        closing = self._loop.create_task(close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    # Watermarks

    def _say_watermarks(self, readers: Collection[_Reader]) -> None:
        """Tells each reader that asked for it how far what it was sent is complete, where that has changed."""
        listening = [reader for reader in readers if reader.replaying is None and _watched(reader)]
        if not listening or (readers is self._readers and time.monotonic() - self._looked < _WATERMARK_SECONDS):
            return
        self._looked = time.monotonic()
        self._account.lateness = dict(self._lateness())
        for channel in sorted(frozenset[Channel]().union(*map(_watched, listening))):
            found = watermark(
                self._account, channel, self._header.time_base, self._header.session_date, self._heard_until
            )
            if found is None:
                continue
            for reader in listening:
                before = reader.said.get(channel)
                if channel in _watched(reader) and (before is None or found.through > before.through):
                    reader.said[channel] = found
                    self._send(reader, self._watermark_event(channel, found))

    def _watermark_event(self, channel: Channel, found: Watermark) -> dict[str, object]:
        gaps = [(_ms(first), _ms(last)) for first, last in found.gaps]
        return {
            "ev": "status",
            "status": _WATERMARK,
            "message": f"complete through {clock(found.through)} New York"
            + (f", without {_spans(found)}" if gaps else ""),
            "channel": channel,
            "first": _ms(found.first),
            "through": _ms(found.through),
            "gaps": gaps,
            "waited_seconds": found.waited_seconds,
            "sent_until": _ms(self._account.last_received_at) if self._account.last_received_at else None,
        }

    # Replay

    async def _replay(self, reader: _Reader, topics: Sequence[Topic], since_ms: int) -> None:
        """Sends what the reader missed of the run's session, and makes it live where that ends."""
        try:
            served = frozenset(self._subscribe(reader, topics))
            since = datetime.fromtimestamp(min(max(since_ms, 0), 2**42) / 1000, UTC)
            frames = await self._replay_until_live(reader, served, since)
        except STORE_ERRORS as error:
            self._cut(reader, 1011, "replay_failed", f"the archive cannot be read now: {brief(error)}")
        except TimeoutError:
            self._cut(reader, 1008, "slow_consumer", "the client reads too slowly")
        except ConnectionClosed:
            pass
        except Exception as error:  # noqa: BLE001 it costs this reader alone
            self._cut(reader, 1011, "replay_failed", f"the replay ended: {brief(error)}")
        else:
            self._send(reader, _event("replayed", f"{frames} frames; what follows is live"))
            self._say_watermarks([reader])

    async def _replay_until_live(self, reader: _Reader, topics: frozenset[Topic], since: datetime) -> int:
        async with self._one_replay:
            sent = 0
            earlier = self._earlier_runs(topics, since)
            while (chunk := await asyncio.to_thread(next, earlier, None)) is not None:
                sent += await self._send_chunk(reader, chunk)
            place, after = (1, 0), since - timedelta(microseconds=1)
            while place != self._position:
                number, offset = place
                end, is_closed = self._journal.end_of(number)
                if number == self._position[0]:
                    end, is_closed = self._position[1], False
                records = await asyncio.to_thread(self._own_records, number, offset, end, after)
                for at in range(0, len(records), 100):
                    chunk = await asyncio.to_thread(_matching, [frame for _, frame in records[at : at + 100]], topics)
                    sent += await self._send_chunk(reader, chunk)
                after = records[-1][0] if records else after
                place = (number + 1, 0) if is_closed else (number, end)
            reader.replaying = None  # nothing is awaited between this and the last look at the place
            return sent

    async def _send_chunk(self, reader: _Reader, chunk: Sequence[bytes]) -> int:
        for content in chunk:
            async with asyncio.timeout(_REPLAY_PATIENCE_SECONDS):
                await reader.socket.send(content, text=True)
        return len(chunk)

    def _earlier_runs(self, topics: frozenset[Topic], since: datetime) -> Iterator[list[bytes]]:
        """What the session's other runs archived from then on, some frames at a time. Raises the store's errors."""
        prefix = layout.frames_prefix(self._header.session_date)
        keys = [
            meta["path"]
            for page in self._lake.pages(prefix)
            for meta in page
            if layout.is_frames_key(meta["path"]) and meta["last_modified"] >= since - _CLOCKS_DIFFER
        ]
        for key in sorted(keys):
            if not key.startswith(f"{prefix}{self._header.run}-"):
                frames = [frame for at, frame in self._archived(key) if at >= since]
                for at in range(0, len(frames), 100):
                    yield _matching(frames[at : at + 100], topics)

    def _own_records(self, number: int, offset: int, end: int, after: datetime) -> list[tuple[datetime, bytes]]:
        """This run's frames of a part of a segment that came later than that; its time is strictly increasing."""
        try:
            found = [
                (record.received_at, record.payload)
                for record in self._journal.read(number, offset, end)
                if record.kind is RecordType.FRAME
            ]
        except FileNotFoundError:  # it is published, and its archive was put before it was removed
            if not self._header.write_frames:
                raise LookupError("what was published is not archived, because write_frames is off") from None
            found = self._archived(layout.frames_key(self._header.session_date, self._header.run, number))
        return [(at, frame) for at, frame in found if at > after]

    def _archived(self, key: str) -> list[tuple[datetime, bytes]]:
        """An archive's frames; none where it has none of the session. What cannot be read in it is left out."""
        content = self._lake.get(key)
        if content is None:
            return []
        with tempfile.NamedTemporaryFile(suffix=".jsonl.zst") as file:
            file.write(content)
            file.flush()
            return [(line.received_at, bytes(line.frame)) for line in read_frames(Path(file.name), lambda _: None)]


def _topics(names: Sequence[str]) -> list[Topic]:
    """`AM.BRK.B` is the ticker `BRK.B`: only the first dot divides."""
    return [(kind, name) for kind, dot, name in (name.strip().partition(".") for name in names) if dot and name]


def _name(topic: Topic) -> str:
    return ".".join(topic)


def _watched(reader: _Reader) -> frozenset[Channel]:
    """The channels whose watermarks a reader asked for."""
    return frozenset(Channel(name) for kind, name in reader.topics if kind == _WATERMARK and name in _CHANNELS)


def _matching(frames: Sequence[bytes], topics: frozenset[Topic]) -> list[bytes]:
    return [content for frame in frames if (content := RelayedFrame(frame).matching(topics))]


def _spans(found: Watermark) -> str:
    return ", ".join(f"{clock(first)} to {clock(last)}" for first, last in found.gaps)


def _event(status: str, message: str) -> dict[str, object]:
    return {"ev": "status", "status": status, "message": message}


def _status(status: str, message: str) -> str:
    return msgspec.json.encode([_event(status, message)]).decode()


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)
