"""Faults on request: when one is due, what it makes of a frame, and what it does to a connection.

Belongs here: the plan of faults, spoilt frames, and the ways of hurting a socket. Does not belong here: which
connection is hurt, and what was sent otherwise (exchange).

A plan is a list of Fault, each with one trigger, so that rates and appointments mix:

    Faults([Fault(Kind.DROP, rate=0.01), Fault(Kind.STALL, after_frames=100, seconds=5)], seed=7)
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

_HUGE_BYTES = 64 * 2**20  # far above what any client should take
_DEEP = 100_000  # brackets; a parser that recurses gives up long before


class Kind(StrEnum):
    """What can go wrong. The three with a status carry the vendor's name for it."""

    # The connection ends, after the frame that was due.
    DROP = "drop"  # everything sent arrives, then the TCP connection ends without a close frame
    RESET = "reset"  # the TCP connection is torn down, and what was in the air is lost
    CLOSE = "close"  # with a close frame
    SLOW_CONSUMER = "slow_consumer"  # this and the next two: a status, then a close frame with code 1008
    FORCE_DISCONNECT = "force_disconnect"
    MAX_CONNECTIONS = "max_connections"
    TRUNCATED_FRAME = "truncated_frame"  # the frame is cut in the middle, then like drop
    # The connection stays, and sends nothing more (for Fault.seconds) or nothing sensible.
    STALL = "stall"  # half-open: not even pings are answered
    SILENCE = "silence"  # pings are answered
    HUGE_FRAME = "huge_frame"  # a frame of 64 MiB is announced and never comes
    # The frame that was due is spoilt, or others come with it.
    LATE = "late"  # aggregates from before come again, among them revisions that were replaced since
    DUPLICATE = "duplicate"  # the whole frame comes twice
    UNKNOWN_KIND = "unknown_kind"  # an event of a kind nobody subscribed to, among the others
    BAD_EVENT = "bad_event"  # an aggregate that is none, among the others
    NOT_A_NUMBER = "not_a_number"  # a NaN, which makes the whole frame something else than JSON
    TRUNCATED_JSON = "truncated_json"  # the frame's text ends early
    BROKEN_OBJECT = "broken_object"  # besides the frame, another that is a bare object and ends early
    DEEP_NESTING = "deep_nesting"  # besides the frame, another that is nested too deeply for a parser's stack
    TEXT_GARBAGE = "text_garbage"  # besides the frame, a text frame that is not even UTF-8
    BINARY_GARBAGE = "binary_garbage"  # besides the frame, a binary one
    # A client that authenticates is turned away.
    AUTH_TIMEOUT = "auth_timeout"
    AUTH_FAILED = "auth_failed"


AT_AUTHENTICATION = frozenset({Kind.AUTH_TIMEOUT, Kind.AUTH_FAILED})
AT_A_FRAME = frozenset(Kind) - AT_AUTHENTICATION


@dataclass(frozen=True)
class Fault:
    """One kind of fault and when it happens: by exactly one of rate, after_frames and at_ms.

    rate: its chance (0 to 1) at every frame of aggregates, or at every authentication. after_frames: once, when the
    exchange has sent so many frames. at_ms: once, when the market's clock (Unix ms) has come so far. seconds: after
    how long a stall or silence ends; None leaves that to the client.
    """

    kind: Kind
    rate: float | None = None
    after_frames: int | None = None
    at_ms: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.rate, self.after_frames, self.at_ms).count(None) != 2:
            raise ValueError(f"the fault {self.kind} needs exactly one of rate, after_frames and at_ms")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"the rate of {self.kind} must be from 0 to 1, not {self.rate}")


class Frame(NamedTuple):
    """One frame as it goes out, and what a good reader makes of it: every event is in one of the three.

    bars: aggregates. other: events of unknown kinds. bad: what is to be refused, verbatim; the whole payload where
    the frame as such cannot be read.
    """

    payload: bytes
    bars: Sequence[bytes] = ()
    other: Sequence[bytes] = ()
    bad: Sequence[bytes] = ()
    text: bool = True


class Faults:
    """A plan under way. The same plan, seed and sequence of frames give the same faults. Not thread-safe."""

    def __init__(self, plan: Iterable[Fault] = (), seed: int = 0) -> None:
        self._plan = list(plan)
        self._random = random.Random(seed)
        self.happened: Counter[Kind] = Counter()
        """How often each kind happened so far."""

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Faults:
        """From `KIND=RATE,...`, as on the command line. ValueError says what is wrong."""
        plan = []
        for part in text.split(","):
            kind, _, rate = part.partition("=")
            if kind not in list(Kind):
                raise ValueError(f"there is no fault {kind!r}; there are {', '.join(Kind)}")
            try:
                plan.append(Fault(Kind(kind), rate=float(rate)))
            except ValueError as error:
                raise ValueError(f"{part!r} is not KIND=RATE with a rate from 0 to 1") from error
        return cls(plan, seed)

    def __bool__(self) -> bool:
        return bool(self._plan)

    def due(self, kinds: AbstractSet[Kind], frames: int, market_ms: int) -> Fault | None:
        """The fault of these kinds that is to happen now; at most one, in the order of the plan."""
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
        """So many of them at random, or as many as there are."""
        return self._random.sample(earlier, min(count, len(earlier)))

    def spoil(self, kind: Kind, aggregates: list[bytes], earlier: list[bytes]) -> list[Frame]:
        """The frames to send instead of a plain one of the aggregates. earlier: what a late bar may be."""
        whole = plain_frame(aggregates)
        victim = self._random.choice(aggregates)
        match kind:
            case Kind.LATE:
                return [plain_frame([*aggregates, *earlier])]
            case Kind.DUPLICATE:
                return [whole, whole]
            case Kind.UNKNOWN_KIND:
                other = self._random.choice(_UNKNOWN)
                return [Frame(self._join(aggregates, other), aggregates, other=[other])]
            case Kind.BAD_EVENT:
                bad = self._random.choice(_BAD)(json.loads(victim))
                return [Frame(self._join(aggregates, bad), aggregates, bad=[bad])]
            case Kind.NOT_A_NUMBER:
                return [_refused(self._join(aggregates, _edited(json.loads(victim), c=math.nan)))]
            case Kind.TRUNCATED_JSON:
                return [_refused(whole.payload[: self._random.randrange(1, len(whole.payload))])]
            case Kind.BROKEN_OBJECT:
                return [whole, _refused(victim[: self._random.randrange(1, len(victim))])]
            case Kind.DEEP_NESTING:
                return [whole, _refused(b'{"ev":"AM","x":%b%b}' % (b"[" * _DEEP, b"]" * _DEEP))]
            case Kind.TEXT_GARBAGE:
                return [whole, _refused("<html>503 – try again".encode() + b"\xff\x00" + self._random.randbytes(20))]
            case Kind.BINARY_GARBAGE:
                # The first byte begins no JSON value, whatever comes after it.
                return [whole, _refused(b"\x80" + self._random.randbytes(200))._replace(text=False)]
            case _:
                return [whole]

    def _join(self, aggregates: list[bytes], other: bytes) -> bytes:
        """A frame with one more event somewhere in it."""
        events = list(aggregates)
        events.insert(self._random.randint(0, len(events)), other)
        return _array(events)


def plain_frame(aggregates: list[bytes]) -> Frame:
    """A frame as it should be, of aggregates that are one JSON object each."""
    return Frame(_array(aggregates), aggregates)


def _array(events: list[bytes]) -> bytes:
    return b"[" + b",".join(events) + b"]"


def _refused(payload: bytes) -> Frame:
    return Frame(payload, bad=[payload])


_UNKNOWN = (
    b'{"ev":"LULD","T":"AAPL","h":231.5,"l":209.4,"i":[0],"z":3,"t":1769437800000,"q":7}',
    b'{"ev":"T","sym":"AAPL","x":4,"p":230.1,"s":100,"t":1769437800000,"q":7}',
    b'{"ev":"am","sym":"AAPL"}',
)


def _edited(event: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps(event | fields, separators=(",", ":")).encode()


# Each makes one bad event out of a good aggregate.
_BAD: tuple[Callable[[dict[str, Any]], bytes], ...] = (
    lambda event: _edited({name: value for name, value in event.items() if name != "h"}),
    lambda event: _edited(event, sym="A/../B"),
    lambda event: _edited(event, sym=""),
    lambda event: _edited(event, sym=7),
    lambda event: _edited(event, s=event["s"] + 0.5),
    lambda event: _edited(event, s=0),
    lambda event: _edited(event, o="1.5"),
    lambda event: _edited(event, dv="many"),
    lambda event: _edited(event, c=math.inf).replace(b"Infinity", b"1e400"),
    lambda event: b'{"ev":"AM"}',
    lambda event: b'{"ev":"status"}',
    lambda event: b'{"sym":"AAPL"}',
    lambda event: b"null",
)


# What can be done to a socket. Each leaves it to the exchange to send nothing more.


def drop(socket: ServerConnection) -> None:
    """End the sending side in TCP's orderly way, behind everything sent, without a WebSocket close frame."""
    socket.transport.write_eof()
    mute(socket)


def reset(socket: ServerConnection) -> None:
    """Tear the connection down with a TCP reset."""
    raw = socket.transport.get_extra_info("socket")
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    socket.transport.abort()


def cut(socket: ServerConnection, payload: bytes) -> None:
    """Send half of a frame, then drop."""
    frame = WireFrame(Opcode.TEXT, payload).serialize(mask=False)
    socket.transport.write(frame[: len(frame) // 2])
    drop(socket)


def announce_huge(socket: ServerConnection) -> None:
    """Send the head of a huge frame, and one byte of it."""
    socket.transport.write(struct.pack("!BBQ", 0x80 | Opcode.TEXT, 127, _HUGE_BYTES) + b"[")


def mute(socket: ServerConnection) -> None:
    """Let nothing out any more, answers to pings included; what the client sends is still read."""
    socket.transport = cast(asyncio.Transport, _Muted(socket.transport))


def unmute(socket: ServerConnection) -> None:
    """Undo mute."""
    if isinstance(socket.transport, _Muted):
        socket.transport = socket.transport.transport


class _Muted:
    """A transport that swallows what is written.

    Not paused reading, which the library undoes by itself, and which would hide that the client has gone.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def write(self, _data: bytes) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)
