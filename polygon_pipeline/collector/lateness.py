"""How late bars come: which of them come for the first time, which come again, and how long after their end.

Belongs here: telling the two apart in bounded memory, and measuring. Does not belong here: how it is kept (lake.lag),
and what follows from it (lake.watermark).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from polygon_pipeline.lake.lag import Lateness
from polygon_pipeline.lake.ledger import Account, TimeBase
from polygon_pipeline.market.bars import Channel

# Bars that are remembered: two hours of the whole market's minutes, in some 50 MB.
_REMEMBERED = 1_000_000

# A channel and a start (Unix ms), and the tickers that have a bar there.
Windows = Mapping[tuple[Channel, int], set[str]]


class Arrivals:
    """Measures one run's bars. Lateness is by the market's time: the clock, or the newest bar's end where the feed
    plays a past day.

    A bar that was sent before a connection began may have come then, to nobody: where it is not known, it is counted as
    neither. What is older than everything remembered came before.
    """

    def __init__(self, time_base: TimeBase, remembered: int = _REMEMBERED) -> None:
        self._time_base = time_base
        self._limit = remembered
        self._seen: dict[tuple[Channel, int], set[str]] = {}
        self._count = 0
        self._forgotten: dict[Channel, int] = {}  # the latest start of which nothing is remembered any more
        self._newest_end_ms = 0

    def add(self, account: Account, arrived: Iterable[tuple[datetime, Windows]]) -> None:
        """Measures bars, in the order in which they came, into the account that has counted them."""
        for received_at, windows in arrived:
            for (channel, start_ms), tickers in windows.items():
                end_ms = start_ms + channel.window_ms
                self._newest_end_ms = max(self._newest_end_ms, end_ms)
                late = max(0.0, (self._now_ms(received_at) - end_ms) / 1000)
                again = self._came_before(channel, start_ms, tickers)
                lateness = account.lateness.setdefault(channel, Lateness())
                if again:
                    lateness.revised.add(late, again)
                    lateness.latest_revision_seconds = max(lateness.latest_revision_seconds, round(late, 3))
                if again < len(tickers) and end_ms > _begin_ms(account, self._time_base):
                    lateness.first.add(late, len(tickers) - again)

    def _came_before(self, channel: Channel, start_ms: int, tickers: set[str]) -> int:
        """How many of these came before; from now on all have."""
        if start_ms <= self._forgotten.get(channel, 0):
            return len(tickers)
        seen = self._seen.get((channel, start_ms))
        if seen is None:
            self._seen[channel, start_ms] = set(tickers)
            self._count += len(tickers)
            self._forget()
            return 0
        before = len(seen)
        seen |= tickers
        self._count += len(seen) - before
        return len(tickers) - (len(seen) - before)

    def _forget(self) -> None:
        while self._count > self._limit and len(self._seen) > 1:
            channel, start_ms = oldest = next(iter(self._seen))
            self._count -= len(self._seen.pop(oldest))
            self._forgotten[channel] = max(self._forgotten.get(channel, 0), start_ms)

    def _now_ms(self, received_at: datetime) -> float:
        return received_at.timestamp() * 1000 if self._time_base == "processing" else self._newest_end_ms


def _begin_ms(account: Account, time_base: TimeBase) -> float:
    """When the last connection began to bring bars, by the market's time."""
    if not account.connections:
        return 0
    connection = account.connections[-1]
    return connection.since.timestamp() * 1000 if time_base == "processing" else connection.first_bar_ms or 0
