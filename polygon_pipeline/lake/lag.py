"""Lags: how long frames and bars took from their receipt, and how late bars came, in a fixed number of buckets.

Belongs here: counting times in bounded memory, their percentiles, and how both are stored. Does not belong here: taking
the times (collector.journal, collector.publisher, collector.lateness).

A bucket's end is 2^(1/8), or 9 %, above its beginning, so a percentile is at most that much too large, and never too
small. From 0.1 ms to 194 days these are 288 buckets; what is shorter or longer is counted in the first or the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta

import msgspec

_PER_OCTAVE = 8
# Bucket n holds what is above 2^((n - 1) / 8) and up to 2^(n / 8) seconds.
_FIRST, _LAST = -13 * _PER_OCTAVE, 24 * _PER_OCTAVE

SHORTEST_SECONDS = 2.0 ** (_FIRST / _PER_OCTAVE)
LONGEST_SECONDS = 2.0 ** (_LAST / _PER_OCTAVE)
RESOLUTION = 2.0 ** (1 / _PER_OCTAVE)


class Percentiles(msgspec.Struct, frozen=True):
    """In seconds. count: how many were measured."""

    count: int = 0
    p50: float = 0.0
    p99: float = 0.0
    p999: float = 0.0


class Histogram(msgspec.Struct):
    """Times in seconds. buckets: the count of each bucket that has any, by its number. One thread may add while others
    read."""

    total_seconds: float = 0.0
    buckets: dict[int, int] = msgspec.field(default_factory=dict)

    def add(self, seconds: float, count: int = 1) -> None:
        """Counts so many times of this length."""
        number = math.ceil(math.log2(seconds) * _PER_OCTAVE) if seconds > SHORTEST_SECONDS else _FIRST
        number = min(number, _LAST)
        self.buckets[number] = self.buckets.get(number, 0) + count
        self.total_seconds += seconds * count

    def include(self, other: Histogram) -> None:
        """Counts what another has counted, too."""
        for number, count in other.buckets.items():
            self.buckets[number] = self.buckets.get(number, 0) + count
        self.total_seconds += other.total_seconds

    @property
    def count(self) -> int:
        return sum(self.buckets.copy().values())

    def percentiles(self) -> Percentiles:
        """All 0.0 where nothing was measured."""
        ordered = self._ordered()
        count = sum(found for _, found in ordered)
        if not count:
            return Percentiles()
        return Percentiles(count, *(_at(ordered, math.ceil(share * count)) for share in (0.5, 0.99, 0.999)))

    def cumulative(self, first: int, last: int) -> list[tuple[float, int]]:
        """The counts of what took at most 2^first, 2^(first + 1) … 2^last seconds, each with that limit."""
        ordered = self._ordered()
        return [
            (2.0**power, sum(found for number, found in ordered if number <= power * _PER_OCTAVE))
            for power in range(first, last + 1)
        ]

    def _ordered(self) -> list[tuple[int, int]]:
        return sorted(self.buckets.copy().items())


class Lags(msgspec.Struct):
    """A run's lags from receiving a frame, on the clock that never steps.

    to_synced: until each frame was durable in the journal. to_object: until each bar's object was put; of several
    revisions put together, the last. to_archive: until each frame's archive was put. Frames of a journal that a later
    run publishes are in none: their clock ended with their process.
    """

    to_synced: Histogram = msgspec.field(default_factory=Histogram)
    to_object: Histogram = msgspec.field(default_factory=Histogram)
    to_archive: Histogram = msgspec.field(default_factory=Histogram)

    def summary(self) -> LagSummary:
        return LagSummary(self.to_synced.percentiles(), self.to_object.percentiles(), self.to_archive.percentiles())


class Lateness(msgspec.Struct):
    """How late the bars of a channel came after their end, by the market's time.

    first: bars that came for the first time; revised: bars that came again, of which the latest was so late.
    """

    first: Histogram = msgspec.field(default_factory=Histogram)
    revised: Histogram = msgspec.field(default_factory=Histogram)
    latest_revision_seconds: float = 0.0

    def summary(self) -> LatenessSummary:
        return LatenessSummary(self.first.percentiles(), self.revised.percentiles(), self.latest_revision_seconds)


def merged(found: Iterable[Lateness]) -> Lateness:
    """Those of several runs, as if one had counted."""
    total = Lateness()
    for lateness in found:
        total.first.include(lateness.first)
        total.revised.include(lateness.revised)
        total.latest_revision_seconds = max(total.latest_revision_seconds, lateness.latest_revision_seconds)
    return total


class LatenessSummary(msgspec.Struct, frozen=True):
    """Lateness as people read it; in seconds."""

    first: Percentiles = Percentiles()
    revised: Percentiles = Percentiles()
    latest_revision_seconds: float = 0.0


def revisions_came(lateness: LatenessSummary, revised_for: timedelta) -> str:
    """For people: how late revisions came, beside how long they are waited for."""
    waited = f"they are waited for {revised_for.total_seconds() / 60:.0f} min (POLYGON_REVISION_MINUTES)"
    if not lateness.revised.count:
        return f"no revision was measured; {waited}"
    latest = lateness.latest_revision_seconds / 60
    # A percentile is up to 9 % too large, and would be read as later than the latest.
    half, most = min(lateness.revised.p50 / 60, latest), min(lateness.revised.p99 / 60, latest)
    return (
        f"half of {lateness.revised.count:,} revisions came within {half:.1f} min of the bar's end, 99 of 100 within "
        f"{most:.1f}, the latest after {latest:.1f}; {waited}"
    )


class LagSummary(msgspec.Struct, frozen=True):
    """Lags as people read them."""

    to_synced: Percentiles = Percentiles()
    to_object: Percentiles = Percentiles()
    to_archive: Percentiles = Percentiles()


def _at(ordered: list[tuple[int, int]], rank: int) -> float:
    """The end of the bucket in which the time of that rank (1 for the shortest) is."""
    for number, found in ordered:
        rank -= found
        if rank <= 0:
            return float(f"{2.0 ** (number / _PER_OCTAVE):.4g}")
    raise AssertionError(f"no time of rank {rank}")
