"""What the vendor's WebSocket messages say: one frame in, its bars, statuses and refusals out.

Belongs here: the vendor's field names, what each really means, and what is refused. Does not belong here: the
connection (polygon.stream), or what any bar must keep (market.bars).

A frame is an object or an array of them, of mixed kinds. An event of an unknown kind is counted and left alone;
one that claims to be an aggregate or a status and cannot be read is refused with its reason, and the rest of its
frame is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from polygon_pipeline.market.bars import (
    SHARES_LIMIT,
    Bar,
    Channel,
    Price,
    Shares,
    shares,
    ticker_error,
    timestamp_error,
)
from polygon_pipeline.market.calendar import trade_date


class Status(msgspec.Struct, frozen=True, tag_field="ev", tag="status"):
    """What the server says about the connection, a subscription or an error."""

    status: str
    message: str = ""


class Aggregate(msgspec.Struct, frozen=True, gc=False, tag_field="ev"):
    """The fields of `A` and `AM` that a bar or its normalized row needs; the frame itself keeps the others.

    `op` is the day's official open on the live feed (0 before 09:30), so the window's open is `o`, and `op` serves
    only where `o` is absent, as the project's specification allows. `dv` and `dav` are `v` and `av` with fractional
    shares, as decimal strings.
    """

    sym: str
    s: int | float
    h: Price
    l: Price  # noqa: E741 the vendor's name
    c: Price
    o: Price | None = None
    op: Price | None = None
    v: Shares | None = None
    dv: str | None = None
    vw: Price | None = None
    av: float | None = None
    a: float | None = None
    z: float | None = None
    otc: bool | None = None
    dav: Any = None  # whatever it is, it is no reason to refuse a bar


class MinuteAggregate(Aggregate, frozen=True, gc=False, tag="AM"):
    """An `AM` event."""


class SecondAggregate(Aggregate, frozen=True, gc=False, tag="A"):
    """An `A` event."""


_CHANNELS: dict[type[Aggregate], Channel] = {MinuteAggregate: Channel.MINUTE, SecondAggregate: Channel.SECOND}


class Refusal(NamedTuple):
    """An event that could not be accepted. position: its index in the frame, None when the whole frame is refused."""

    position: int | None
    raw: bytes
    reason: str


class Frame(NamedTuple):
    """What a frame held. Each of its events is in exactly one of the four; every aggregate stands for a bar."""

    aggregates: Sequence[Aggregate] = ()
    statuses: Sequence[Status] = ()
    other: Sequence[str] = ()
    refused: Sequence[Refusal] = ()

    @property
    def events(self) -> int:
        """How many events the frame held; a frame that cannot be read counts as one."""
        return len(self.aggregates) + len(self.statuses) + len(self.other) + len(self.refused)

    @property
    def newest_start_ms(self) -> int:
        """The latest start (Unix ms) of its bars, of which there must be some."""
        return int(max(aggregate.s for aggregate in self.aggregates))

    @property
    def last_start_ms(self) -> int:
        """The start (Unix ms) of its last bar, of which there must be some."""
        return int(self.aggregates[-1].s)

    @property
    def bars(self) -> list[tuple[Channel, Bar]]:
        """The bars, in the order of their events. Built at every call, because only the objects need them."""
        return [(_CHANNELS[type(aggregate)], _bar(aggregate)) for aggregate in self.aggregates]

    def arrivals(self, channel: Channel) -> list[Arrival]:
        """The bars of a channel with everything that their events say, in their order."""
        return [_arrival(aggregate) for aggregate in self.aggregates if _CHANNELS[type(aggregate)] is channel]


class Arrival(NamedTuple):
    """A bar as one event brought it, with all that its normalized row needs: the columns of polygon.sql.

    start_ms: Unix ms. Prices are US dollars, volumes shares; day_*: of the day so far.
    """

    ticker: str
    start_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    vwap: float | None = None
    day_open: float | None = None
    day_volume: float | None = None
    day_vwap: float | None = None
    average_trade_size: float | None = None
    otc: bool | None = None


class _Kind(msgspec.Struct):
    ev: str


_Event = Status | MinuteAggregate | SecondAggregate
_OBJECT = re.compile(rb"\s*\{")
# Whatever a hostile frame provokes: nesting of thousands of levels overflows the decoder's stack.
_UNDECODABLE = (msgspec.DecodeError, ValueError, RecursionError)
_KNOWN_KINDS = {"status", *Channel}
# Sound tickers met so far: there are some 11,000, and they come again every minute.
_seen: set[str] = set()
_MOST_SEEN = 50_000
# Volumes that need no closer look: a number that a float surely holds, below SHARES_LIMIT.
_PLAIN_VOLUMES = re.compile(r"(?:-?[0-9]{1,14}(?:\.[0-9]{1,15})?,)*")
_PLAIN_BITS = 53
# Nearly every frame is an array of known events and decodes in one go; what is not goes event by event.
_decode_events = msgspec.json.Decoder(list[_Event]).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_kind = msgspec.json.Decoder(_Kind).decode


def decode_frame(payload: bytes, received_at: datetime) -> Frame:
    """Reads one frame as received (UTF-8 JSON). received_at: aware; bars beyond the day after it are refused.

    Never raises for bad input: what cannot be accepted is in `refused`, verbatim, with a reason.
    """
    sound = _decode_sound([payload], received_at)
    return sound[0] if sound else _decode_piecemeal(payload, received_at)


def decode_frames(payloads: Sequence[bytes], received_at: Sequence[datetime]) -> list[Frame]:
    """Reads many frames, each as decode_frame does. Small ones cost a fifth that way. The times must not decrease."""
    sound = _decode_sound(payloads, received_at[0]) if payloads else []
    if sound is not None:
        return sound
    return [decode_frame(payload, at) for payload, at in zip(payloads, received_at, strict=True)]


def count_by_day(aggregates: Sequence[Aggregate]) -> Counter[tuple[Channel, date]]:
    """How many bars there are of each channel and session date."""
    days = {trade_date(int(start)) for start in {aggregate.s for aggregate in aggregates}}
    kinds = set(map(type, aggregates))
    if len(days) == len(kinds) == 1:  # as nearly always
        return Counter({(_CHANNELS[kinds.pop()], days.pop()): len(aggregates)})
    return Counter([(_CHANNELS[type(aggregate)], trade_date(int(aggregate.s))) for aggregate in aggregates])


def tickers_by_window(aggregates: Sequence[Aggregate]) -> dict[tuple[Channel, int], set[str]]:
    """The tickers that have bars among these, by channel and start (Unix ms)."""
    starts = {aggregate.s for aggregate in aggregates}
    kinds = set(map(type, aggregates))
    if len(starts) == len(kinds) == 1:  # as nearly always
        return {(_CHANNELS[kinds.pop()], int(starts.pop())): tickers_of(aggregates)}
    found: dict[tuple[Channel, int], set[str]] = {}
    for aggregate in aggregates:
        found.setdefault((_CHANNELS[type(aggregate)], int(aggregate.s)), set()).add(aggregate.sym)
    return found


def tickers_of(aggregates: Sequence[Aggregate]) -> set[str]:
    """The tickers that have bars among these."""
    return {aggregate.sym for aggregate in aggregates}


def decode_statuses(payload: bytes) -> Sequence[Status]:
    """Only the statuses of a frame: what the connection itself needs, at the cost of a search where there are none."""
    if b'"status"' not in payload:
        return ()
    try:
        return [event for event in _decode_events(payload) if isinstance(event, Status)]
    except _UNDECODABLE:
        return _decode_piecemeal(payload, None).statuses


def _decode_sound(payloads: Sequence[bytes], received_at: datetime) -> list[Frame] | None:
    """The frames, where each is an array of statuses and acceptable aggregates and nothing else; None otherwise."""
    try:
        frames = [_decode_events(payload) for payload in payloads]
        _check_text(b"".join(payloads))
    except _UNDECODABLE:
        return None
    events = list(chain.from_iterable(frames))
    only_aggregates = Status not in set(map(type, events))
    aggregates: Any = events if only_aggregates else [event for event in events if not isinstance(event, Status)]
    if not _all_sound(aggregates, received_at) and any(_error_of(event, received_at) for event in aggregates):
        return None
    if only_aggregates:
        sound: Any = frames
        return [Frame(frame) for frame in sound]
    return [
        Frame(
            [event for event in frame if not isinstance(event, Status)],
            [event for event in frame if isinstance(event, Status)],
        )
        for frame in frames
    ]


def _decode_piecemeal(payload: bytes, received_at: datetime | None) -> Frame:
    """Event by event, so that one bad event costs no other. Without received_at, aggregates are left out."""
    try:
        is_object = _OBJECT.match(payload) is not None
        parts = [msgspec.Raw(payload)] if is_object else _decode_parts(payload)
    except msgspec.ValidationError:
        return Frame(refused=[Refusal(None, payload, "the frame is neither an object nor an array")])
    except _UNDECODABLE as error:
        return Frame(refused=[Refusal(None, payload, f"the frame is not JSON: {error}")])
    aggregates: list[Aggregate] = []
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
                if reason := _error_of(event, received_at):
                    raise ValueError(reason)
                aggregates.append(event)
        except _UNDECODABLE as error:
            refused.append(Refusal(None if is_object else index, part, str(error)))
    return Frame(aggregates, statuses, other, refused)


def _check_text(content: bytes) -> None:
    """Raises for text that is not Unicode: the decoder leaves the fields it does not need unread, and readers of the
    archive would stumble over them."""
    if not content.isascii():
        content.decode()
    if b"\\" in content and b"\\u" in content:  # the first is the quicker search; an escape may be half of a character
        msgspec.json.decode(content)


def _all_sound(aggregates: Sequence[Aggregate], received_at: datetime) -> bool:
    """Whether _error_of would certainly find nothing: the same rules for a whole frame at once, a fifth of the work."""
    if any(
        type(start) is not int or timestamp_error(start, received_at) for start in {event.s for event in aggregates}
    ):
        return False
    if not _seen.issuperset(tickers := {event.sym for event in aggregates}):
        if any(ticker_error(ticker) for ticker in tickers):
            return False
        if len(_seen) > _MOST_SEEN:
            _seen.clear()
        _seen.update(tickers)
    if None in [event.o for event in aggregates]:
        return False
    fractional = [event.dv for event in aggregates if event.dv is not None]
    if len(fractional) < len(aggregates) and any(
        type(event.v) is not int or event.v.bit_length() > _PLAIN_BITS for event in aggregates if event.dv is None
    ):
        return False
    # A volume with a comma of its own makes one comma more.
    text = ",".join(fractional) + "," if fractional else ""
    return text.count(",") == len(fractional) and _PLAIN_VOLUMES.fullmatch(text) is not None


def _error_of(event: Aggregate, received_at: datetime) -> str | None:
    """Why there is no bar that this aggregate stands for, or None if there is."""
    start_ms = int(event.s)
    if start_ms != event.s:
        return f"the timestamp {event.s} is not a whole number of milliseconds"
    if error := ticker_error(event.sym) or timestamp_error(start_ms, received_at):
        return error
    if _open(event) is None:
        return "there is no opening price: neither o nor a non-zero op"
    volume = _volume(event)
    if volume is None:
        return "there is no volume: neither v nor dv"
    try:
        number = shares(volume)
    except ValueError as error:
        return str(error)
    return None if abs(number) < SHARES_LIMIT else f"the volume {str(volume)[:40]} is not below {SHARES_LIMIT:.0e}"


def _bar(event: Aggregate) -> Bar:
    """The bar a sound aggregate stands for."""
    opened, volume = _open(event), _volume(event)
    assert opened is not None
    assert volume is not None
    return Bar(event.sym, int(event.s), opened, event.h, event.l, event.c, shares(volume), event.vw)


def _arrival(event: Aggregate) -> Arrival:
    """What polygon.sql.ARRIVAL_COLUMNS makes of the same event."""
    bar = _bar(event)
    return Arrival(
        *bar._replace(volume=float(bar.volume)),
        day_open=event.op or None,
        day_volume=event.av if (fractional := _number(event.dav)) is None else fractional,
        day_vwap=event.a,
        average_trade_size=event.z,
        otc=bool(event.otc),
    )


def _number(value: Any) -> float | None:
    """A decimal string as a float, or None where it is something else."""
    try:
        return float(shares(value))
    except (ValueError, TypeError):
        return None


def _open(event: Aggregate) -> float | None:
    return event.o if event.o is not None else event.op or None  # an op of 0 means: not open yet


def _volume(event: Aggregate) -> int | float | str | None:
    return event.dv if event.dv is not None else event.v
