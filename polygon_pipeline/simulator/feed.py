"""The events that a feed gives to the exchange, and the JSON encoding of an aggregate.

Belongs here: the event, a filter for feeds, and the vendor's field names and their order. Does not belong here: making
events (synthetic, replay) and sending them (exchange).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from msgspec import UNSET, UnsetType

from polygon_pipeline.market.bars import Channel


class Event(msgspec.Struct, frozen=True, gc=False):
    """One aggregate, encoded only once for all connections it is sent to.

    emit_ms: when the vendor would send it, in Unix ms of market time. payload: one JSON object. A feed is any
    iterable of these, in the order of emit_ms.
    """

    emit_ms: int
    channel: Channel
    ticker: str
    payload: bytes

    @property
    def start_ms(self) -> int:
        """The start of the bar's window, Unix ms, read from the payload."""
        return msgspec.json.decode(self.payload, type=_Start).s


class _Start(msgspec.Struct):
    s: int


class Omitting:
    """A feed without the events for which `omit` is true: the vendor fails to send them to any client.

    Omitting(feed, lambda event: (event.ticker, event.start_ms) in lost)
    """

    def __init__(self, feed: Iterable[Event], omit: Callable[[Event], bool]) -> None:
        self.feed, self.omit = feed, omit

    def __iter__(self) -> Iterator[Event]:
        return (event for event in self.feed if not self.omit(event))


class Aggregate(msgspec.Struct, gc=False):
    """One `A` or `AM` event. Fields that are UNSET are left out of the JSON. Times in Unix ms, volumes in shares."""

    ev: str
    sym: str
    volume: int | float = msgspec.field(name="v")
    day_volume: int | float = msgspec.field(name="av")
    day_open: float | UnsetType = msgspec.field(name="op")
    vwap: float | UnsetType = msgspec.field(name="vw")
    open: float = msgspec.field(name="o")
    close: float = msgspec.field(name="c")
    high: float = msgspec.field(name="h")
    low: float = msgspec.field(name="l")
    day_vwap: float | UnsetType = msgspec.field(name="a")
    average_trade_size: int | UnsetType = msgspec.field(name="z")
    start_ms: int = msgspec.field(name="s")
    end_ms: int = msgspec.field(name="e")
    decimal_volume: str | UnsetType = msgspec.field(name="dv", default=UNSET)
    decimal_day_volume: str | UnsetType = msgspec.field(name="dav", default=UNSET)
    otc: bool | UnsetType = UNSET


_encoder = msgspec.json.Encoder()


def encode(aggregates: Iterable[Aggregate]) -> list[bytes]:
    """Each aggregate as compact JSON. Like the vendor's JSON, whole prices have no `.0`."""
    lines = _encoder.encode_lines(list(aggregates))
    # Only a number can end with `.0,`: in a ticker or decimal string, a closing quote comes before the comma.
    return lines.replace(b".0,", b",").splitlines()


def window_ms(channel: Channel) -> int:
    """The length of the channel's window in ms."""
    return 60_000 if channel is Channel.MINUTE else 1_000
