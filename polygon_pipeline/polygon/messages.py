"""What the vendor's WebSocket messages say: one frame in, its bars, statuses and refusals out.

Belongs here: the vendor's field names, what each really means, and what is refused. Does not belong here: the
connection (polygon.stream), or what a bar may be whoever sent it (market.bars).

A frame is an object or an array of them, of mixed kinds. An event of an unknown kind is counted and left alone;
one that claims to be an aggregate or a status and cannot be read is refused with its reason, and the rest of its
frame is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from polygon_pipeline.market.bars import Bar, Channel, shares, ticker_fault, timestamp_fault


class Status(msgspec.Struct, frozen=True, tag_field="ev", tag="status"):
    """What the server says about the connection, a subscription or an error."""

    status: str
    message: str = ""


class _Aggregate(msgspec.Struct, frozen=True, tag_field="ev"):
    """The fields of `A` and `AM` that a bar or its normalized row needs; the frame itself keeps the others.

    `op` is the day's official open on the live feed (0 before 09:30), so the window's open is `o`, and `op` serves
    only where `o` is absent, as the project's specification allows. `dv` is `v` with fractional shares, as a decimal
    string.
    """

    sym: str
    s: int | float
    h: float
    l: float  # noqa: E741 the vendor's name
    c: float
    o: float | None = None
    op: float | None = None
    v: int | float | None = None
    dv: str | None = None
    vw: float | None = None
    av: float | None = None
    a: float | None = None
    z: float | None = None
    otc: bool | None = None


class MinuteAggregate(_Aggregate, frozen=True, tag="AM"):
    """An `AM` event."""


class SecondAggregate(_Aggregate, frozen=True, tag="A"):
    """An `A` event."""


class Refusal(NamedTuple):
    """An event that could not be accepted. position: its index in the frame, None when the whole frame is refused."""

    position: int | None
    raw: bytes
    reason: str


class Frame(NamedTuple):
    """What a frame held. Each of its events is in exactly one of the four."""

    bars: Sequence[tuple[Channel, Bar]] = ()
    statuses: Sequence[Status] = ()
    other: Sequence[str] = ()
    refused: Sequence[Refusal] = ()

    @property
    def events(self) -> int:
        """How many events the frame held; a frame that cannot be read counts as one."""
        return len(self.bars) + len(self.statuses) + len(self.other) + len(self.refused)


class _Kind(msgspec.Struct):
    ev: str


_Event = Status | MinuteAggregate | SecondAggregate
_OBJECT = re.compile(rb"\s*\{")
# Whatever a hostile frame provokes: nesting of thousands of levels overflows the decoder's stack.
_UNDECODABLE = (msgspec.DecodeError, ValueError, RecursionError)
_KNOWN_KINDS = {"status", *Channel}
# Nearly every frame is an array of known events and decodes in one go; what is not goes event by event.
_decode_events = msgspec.json.Decoder(list[_Event]).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_kind = msgspec.json.Decoder(_Kind).decode


def decode_frame(payload: bytes, received_at: datetime) -> Frame:
    """Reads one frame as received (UTF-8 JSON). received_at: aware; bars beyond the day after it are refused.

    Never raises for bad input: what cannot be accepted is in `refused`, verbatim, with a reason.
    """
    try:
        events = _decode_events(payload)
        _check_text(payload)
    except _UNDECODABLE:
        return _decode_piecemeal(payload, received_at)
    bars: list[tuple[Channel, Bar]] = []
    statuses: list[Status] = []
    for event in events:
        if isinstance(event, Status):
            statuses.append(event)
            continue
        try:
            bars.append(_bar(event, received_at))
        except ValueError:
            return _decode_piecemeal(payload, received_at)
    return Frame(bars, statuses)


def decode_statuses(payload: bytes) -> Sequence[Status]:
    """Only the statuses of a frame: what the connection itself needs, at the cost of a search where there are none."""
    if b'"status"' not in payload:
        return ()
    try:
        return [event for event in _decode_events(payload) if isinstance(event, Status)]
    except _UNDECODABLE:
        return _decode_piecemeal(payload, None).statuses


def _decode_piecemeal(payload: bytes, received_at: datetime | None) -> Frame:
    """Event by event, so that one bad event costs no other. Without received_at, bars are left out."""
    try:
        is_object = _OBJECT.match(payload) is not None
        parts = [msgspec.Raw(payload)] if is_object else _decode_parts(payload)
    except msgspec.ValidationError:
        return Frame(refused=[Refusal(None, payload, "the frame is neither an object nor an array")])
    except _UNDECODABLE as error:
        return Frame(refused=[Refusal(None, payload, f"the frame is not JSON: {error}")])
    bars: list[tuple[Channel, Bar]] = []
    statuses: list[Status] = []
    other: list[str] = []
    refused: list[Refusal] = []
    for index, raw in enumerate(parts):
        part = bytes(raw)
        try:
            _check_text(part)
            kind = _decode_kind(part).ev
            if kind not in _KNOWN_KINDS:
                other.append(kind)
                continue
            event = _decode_event(part)
            if isinstance(event, Status):
                statuses.append(event)
            elif received_at is not None:
                bars.append(_bar(event, received_at))
        except _UNDECODABLE as error:
            refused.append(Refusal(None if is_object else index, part, str(error)))
    return Frame(bars, statuses, other, refused)


def _check_text(content: bytes) -> None:
    """Raises for text that is not Unicode: the decoder leaves the fields it does not need unread, and readers of the
    archive would stumble over them."""
    if not content.isascii():
        content.decode()
    if b"\\u" in content:  # an escape may be half of a character
        msgspec.json.decode(content)


def _bar(event: _Aggregate, received_at: datetime) -> tuple[Channel, Bar]:
    """The bar an aggregate stands for; ValueError says why there is none."""
    start_ms = int(event.s)
    if start_ms != event.s:
        raise ValueError(f"the timestamp {event.s} is not a whole number of milliseconds")
    if fault := ticker_fault(event.sym) or timestamp_fault(start_ms, received_at):
        raise ValueError(fault)
    price_open = event.o if event.o is not None else event.op or None  # an op of 0 means: not open yet
    if price_open is None:
        raise ValueError("there is no opening price: neither o nor a non-zero op")
    volume = event.dv if event.dv is not None else event.v
    if volume is None:
        raise ValueError("there is no volume: neither v nor dv")
    bar = Bar(event.sym, start_ms, price_open, event.h, event.l, event.c, shares(volume), event.vw)
    return (Channel.MINUTE if isinstance(event, MinuteAggregate) else Channel.SECOND), bar
