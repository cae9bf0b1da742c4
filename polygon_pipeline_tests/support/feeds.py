"""Bars as a feed of the simulated exchange has them."""

from __future__ import annotations

import msgspec

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.feed import Event, window_ms
from polygon_pipeline_tests.support.bars import OPENING, JsonObject, aggregate


def feed_event(emit_ms: int, bar: JsonObject) -> Event:
    """A vendor's event (bars) that is sent at that time (Unix ms)."""
    return Event(emit_ms, Channel(bar["ev"]), bar["sym"], msgspec.json.encode(bar))


def event(ticker: str, minute: int, channel: Channel = Channel.MINUTE) -> Event:
    """A bar of that minute of the day's regular hours, sent as it ends."""
    start_ms = OPENING + 60_000 * minute
    end_ms = start_ms + window_ms(channel)
    return feed_event(end_ms, aggregate(ticker, start_ms, ev=channel.value, e=end_ms))
