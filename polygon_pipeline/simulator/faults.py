"""Faults on request: when a fault is due, and what it does to a frame or a connection.

Belongs here: the plan of faults, corrupted frames, and the ways to break a connection. Does not belong here: choosing
the connection that is affected, and normal sending (exchange).

A plan is a list of Fault, each with one trigger, so that random and scheduled faults can be combined:

    Faults([Fault(FaultType.DROP, rate=0.01), Fault(FaultType.STALL, after_frames=100, seconds=5)], seed=7)
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket as sockets
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar, cast

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame as WireFrame
from websockets.frames import Opcode

T = TypeVar("T")

_HUGE_BYTES = 64 * 2**20  # far more than any client should accept
_HUGE_MESSAGE_FRAMES = 12
_DRIP_SECONDS = 0.1
_NESTING_DEPTH = 100_000  # brackets; a recursive parser fails long before


class FaultType(StrEnum):
    """What can go wrong. SLOW_CONSUMER, FORCE_DISCONNECT and MAX_CONNECTIONS are the vendor's status names."""

    # The connection ends after the current frame.
    DROP = "drop"  # everything sent arrives, then the TCP connection ends without a close frame
    RESET = "reset"  # the TCP connection is reset, and data in transit is lost
    CLOSE = "close"  # with a close frame
    SLOW_CONSUMER = "slow_consumer"  # this one and the next two: a status, then a close frame with code 1008
    FORCE_DISCONNECT = "force_disconnect"
    MAX_CONNECTIONS = "max_connections"
    TRUNCATED_FRAME = "truncated_frame"  # only half of the frame is sent, then as with DROP
    # The connection stays open but sends nothing useful: for Fault.seconds, or until the client gives up.
    STALL = "stall"  # half-open: not even pings are answered
    SILENCE = "silence"  # pings are answered
    HUGE_FRAME = "huge_frame"  # the header of a 64 MiB frame is sent, and the rest never is
    HUGE_MESSAGE = "huge_message"  # 12 MiB of one message are sent in frames of 1 MiB, and its end never is
    DRIP = "drip"  # a frame is sent byte by byte, ten a second
    # The frame is corrupted, or additional frames are sent with it.
    LATE = "late"  # earlier aggregates are sent again, some of which have been revised since
    DUPLICATE = "duplicate"  # the whole frame is sent twice
    UNKNOWN_KIND = "unknown_kind"  # the frame also contains an event of a type that is not an aggregate
    BAD_EVENT = "bad_event"  # the frame also contains an invalid aggregate
    NOT_A_NUMBER = "not_a_number"  # the frame also contains a NaN, so it is not valid JSON
    TRUNCATED_JSON = "truncated_json"  # the frame's text is cut off
    BROKEN_OBJECT = "broken_object"  # an additional frame: a single JSON object that is cut off
    DEEP_NESTING = "deep_nesting"  # an additional frame: JSON nested too deeply for a recursive parser
    TEXT_GARBAGE = "text_garbage"  # an additional text frame that is not UTF-8
    BINARY_GARBAGE = "binary_garbage"  # an additional binary frame
    # Authentication is refused.
    AUTH_TIMEOUT = "auth_timeout"
    AUTH_FAILED = "auth_failed"


AT_AUTHENTICATION = frozenset({FaultType.AUTH_TIMEOUT, FaultType.AUTH_FAILED})
AT_FRAME = frozenset(FaultType) - AT_AUTHENTICATION


@dataclass(frozen=True)
class Fault:
    """One type of fault and its trigger, which is exactly one of rate, after_frames and at_ms.

    rate: the probability (0 to 1) at every frame of aggregates, or at every authentication. after_frames: once, as
    soon as the exchange has sent this many frames. at_ms: once, as soon as the market time (Unix ms) reaches this.
    seconds: the duration of a stall or silence; None means until the client disconnects.
    """

    kind: FaultType
    rate: float | None = None
    after_frames: int | None = None
    at_ms: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.rate, self.after_frames, self.at_ms).count(None) != 2:
            raise ValueError(f"the fault {self.kind} needs exactly one of rate, after_frames and at_ms")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"the rate of {self.kind} must be from 0 to 1, not {self.rate}")


class OutgoingFrame(NamedTuple):
    """One frame as it is sent, and how a correct client classifies its events: each is in one of the three lists.

    bars: aggregates. other: events of unknown types. bad: what the client must reject, verbatim; the whole payload
    if the frame cannot be decoded at all.
    """

    payload: bytes
    bars: Sequence[bytes] = ()
    other: Sequence[bytes] = ()
    bad: Sequence[bytes] = ()
    text: bool = True


class Faults:
    """A plan in execution. The same plan, seed and sequence of frames give the same faults. Not thread-safe."""

    def __init__(self, plan: Iterable[Fault] = (), seed: int = 0) -> None:
        self._plan = list(plan)
        self._random = random.Random(seed)
        self.happened: Counter[FaultType] = Counter()
        """How often each type of fault has happened so far."""

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Faults:
        """Parse `KIND=RATE,...`, as given on the command line. ValueError says what is wrong."""
        plan = []
        for part in text.split(","):
            kind, _, rate = part.partition("=")
            if kind not in list(FaultType):
                raise ValueError(f"there is no fault {kind!r}; there are {', '.join(FaultType)}")
            try:
                plan.append(Fault(FaultType(kind), rate=float(rate)))
            except ValueError as error:
                raise ValueError(f"{part!r} is not KIND=RATE with a rate from 0 to 1") from error
        return cls(plan, seed)

    def __bool__(self) -> bool:
        return bool(self._plan)

    def due(self, kinds: AbstractSet[FaultType], frames: int, market_ms: int) -> Fault | None:
        """The first fault of the plan, among these types, that happens now."""
        for fault in self._plan:
            if fault.kind not in kinds:
                continue
            if fault.rate is not None:
                if self._random.random() >= fault.rate:
                    continue
            elif frames < (fault.after_frames or 0) or market_ms < (fault.at_ms or 0):
                continue
            else:
                self._plan.remove(fault)
            self.happened[fault.kind] += 1
            return fault
        return None

    def sample(self, earlier: Sequence[T], count: int) -> list[T]:
        """A random sample of this size, or of all there are if fewer."""
        return self._random.sample(earlier, min(count, len(earlier)))

    def outgoing_frames(self, kind: FaultType, aggregates: list[bytes], late: list[bytes]) -> list[OutgoingFrame]:
        """The frames to send in place of a plain frame of the aggregates. late: aggregates that LATE sends again."""
        plain = plain_frame(aggregates)
        sample = self._random.choice(aggregates)
        match kind:
            case FaultType.LATE:
                return [plain_frame([*aggregates, *late])]
            case FaultType.DUPLICATE:
                return [plain, plain]
            case FaultType.UNKNOWN_KIND:
                other = self._random.choice(_UNKNOWN_EVENTS)
                return [OutgoingFrame(self._insert(aggregates, other), aggregates, other=[other])]
            case FaultType.BAD_EVENT:
                bad = self._random.choice(_MAKE_BAD_EVENT)(json.loads(sample))
                return [OutgoingFrame(self._insert(aggregates, bad), aggregates, bad=[bad])]
            case FaultType.NOT_A_NUMBER:
                return [_bad_frame(self._insert(aggregates, _changed(json.loads(sample), c=math.nan)))]
            case FaultType.TRUNCATED_JSON:
                return [_bad_frame(plain.payload[: self._random.randrange(1, len(plain.payload))])]
            case FaultType.BROKEN_OBJECT:
                return [plain, _bad_frame(sample[: self._random.randrange(1, len(sample))])]
            case FaultType.DEEP_NESTING:
                nested = b"[" * _NESTING_DEPTH + b"]" * _NESTING_DEPTH
                return [plain, _bad_frame(b'{"ev":"AM","x":%b}' % nested)]
            case FaultType.TEXT_GARBAGE:
                return [plain, _bad_frame("<html>503 – try again".encode() + b"\xff\x00" + self._random.randbytes(20))]
            case FaultType.BINARY_GARBAGE:
                # The first byte, 0x80, cannot start a JSON value, so this is never valid JSON by chance.
                return [plain, _bad_frame(b"\x80" + self._random.randbytes(200))._replace(text=False)]
            case _:
                return [plain]

    def _insert(self, aggregates: list[bytes], other: bytes) -> bytes:
        """A frame's payload with one more event at a random position."""
        events = list(aggregates)
        events.insert(self._random.randint(0, len(events)), other)
        return _array(events)


def plain_frame(aggregates: list[bytes]) -> OutgoingFrame:
    """A frame without any fault, from aggregates that are one JSON object each."""
    return OutgoingFrame(_array(aggregates), aggregates)


def _array(events: list[bytes]) -> bytes:
    return b"[" + b",".join(events) + b"]"


def _bad_frame(payload: bytes) -> OutgoingFrame:
    return OutgoingFrame(payload, bad=[payload])


_UNKNOWN_EVENTS = (
    b'{"ev":"LULD","T":"AAPL","h":231.5,"l":209.4,"i":[0],"z":3,"t":1769437800000,"q":7}',
    b'{"ev":"T","sym":"AAPL","x":4,"p":230.1,"s":100,"t":1769437800000,"q":7}',
    b'{"ev":"am","sym":"AAPL"}',
)


def _changed(event: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps(event | fields, separators=(",", ":")).encode()


# Each turns a valid aggregate into one bad event.
_MAKE_BAD_EVENT: tuple[Callable[[dict[str, Any]], bytes], ...] = (
    lambda event: _changed({name: value for name, value in event.items() if name != "h"}),
    lambda event: _changed(event, sym="A/../B"),
    lambda event: _changed(event, sym=""),
    lambda event: _changed(event, sym=7),
    lambda event: _changed(event, s=event["s"] + 0.5),
    lambda event: _changed(event, s=0),
    lambda event: _changed(event, o="1.5"),
    lambda event: _changed(event, dv="many"),
    lambda event: _changed(event, c=math.inf).replace(b"Infinity", b"1e400"),
    lambda event: b'{"ev":"AM"}',
    lambda event: b'{"ev":"status"}',
    lambda event: b'{"sym":"AAPL"}',
    lambda event: b"null",
)


# Ways to break a connection. After each of them, the exchange must send nothing more.


def drop(socket: ServerConnection) -> None:
    """Shut down the sending side of TCP, after everything already sent, without a WebSocket close frame."""
    socket.transport.write_eof()
    discard_writes(socket)


def reset(socket: ServerConnection) -> None:
    """Reset the TCP connection."""
    raw = socket.transport.get_extra_info("socket")
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.transport.abort()


def send_truncated(socket: ServerConnection, payload: bytes) -> None:
    """Send half of a frame, then drop the connection."""
    frame = WireFrame(Opcode.TEXT, payload).serialize(mask=False)
    socket.transport.write(frame[: len(frame) // 2])
    drop(socket)


def announce_huge_frame(socket: ServerConnection) -> None:
    """Send the header of a huge frame and one byte of its payload."""
    socket.transport.write(struct.pack("!BBQ", 0x80 | Opcode.TEXT, 127, _HUGE_BYTES) + b"[")


def begin_huge_message(socket: ServerConnection) -> None:
    """Send frames of one message, without its last one."""
    for number in range(_HUGE_MESSAGE_FRAMES):
        opcode = Opcode.CONT if number else Opcode.TEXT
        socket.transport.write(WireFrame(opcode, b" " * 2**20, fin=False).serialize(mask=False))


def drip(socket: ServerConnection, loop: asyncio.AbstractEventLoop) -> None:
    """Send the header of a frame, and then a byte of it now and then until the client disconnects."""
    transport = socket.transport
    discard_writes(socket)
    transport.write(struct.pack("!BBH", 0x80 | Opcode.TEXT, 126, 0xFFFF))

    def next_byte() -> None:
        if not transport.is_closing():
            transport.write(b" ")
            loop.call_later(_DRIP_SECONDS, next_byte)

    next_byte()


def discard_writes(socket: ServerConnection) -> None:
    """Send nothing any more, not even answers to pings. What the client sends is still read."""
    socket.transport = cast(asyncio.Transport, _WriteDiscardingTransport(socket.transport))


def restore_writes(socket: ServerConnection) -> None:
    """Undo discard_writes."""
    if isinstance(socket.transport, _WriteDiscardingTransport):
        socket.transport = socket.transport.transport


class _WriteDiscardingTransport:
    """A transport that discards what is written.

    Pausing reading would not do: the library resumes it by itself, and the exchange would not notice that the client
    has disconnected.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def write(self, _data: bytes) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)
