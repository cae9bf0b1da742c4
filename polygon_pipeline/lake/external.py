"""Goes over raw-data/ a bounded piece at a time, to notice what other programs wrote there.

Belongs here: which days are listed, from where the last look ended, and whether what is there is news. Does not
belong here: how it is reported (defs.external), and what our own collector counted (lake.ledger).

A bucket may hold thousands of days of any size, and listing is the only way to find a new object. So each look is a few
requests for each of three walks, from the newest day down and round again: the newest day alone, where data comes in
daily; the days that are not reported yet, such as another program's first upload; and all days, where old ones may have
changed. One walk would not do: a first upload of years would keep the newest day waiting for hours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel

if TYPE_CHECKING:
    from obstore import ObjectMeta

# S3 lists a thousand objects a request.
PAGE_OBJECTS = 1000

# Requests that a walk makes in one look: seconds of work, and with one look per minute some dollars per month on AWS.
PAGES = 10

# A day that got no object for so long is taken for uploaded.
QUIET = timedelta(seconds=60)

# Today's may never be quiet: it is news again after this time.
LIVE = timedelta(minutes=5)


class Walk(msgspec.Struct):
    """How far a walk over the days has come. Times in UTC.

    day: the one being listed, or listed last; after: the key it is listed up to, None where all of it is; objects,
    newest: how many bars' objects were seen of it, and when the newest was written; strays: how many others, and the
    key of the first.
    """

    day: date | None = None
    after: str | None = None
    objects: int = 0
    newest: datetime | None = None
    strays: int = 0
    first_stray: str = ""

    def add(self, page: Sequence[ObjectMeta]) -> None:
        """Counts a page of the day's listing."""
        self.after = page[-1]["path"]
        written = [meta["last_modified"] for meta in page if layout.parse_raw_key(meta["path"])]
        if len(written) < len(page):
            self.strays += len(page) - len(written)
            self.first_stray = self.first_stray or next(
                meta["path"] for meta in page if not layout.parse_raw_key(meta["path"])
            )
        if written:
            self.objects += len(written)
            self.newest = max(written) if self.newest is None else max(self.newest, *written)


class Position(msgspec.Struct):
    """Where the next look goes on: small, and kept as JSON between looks."""

    newest: Walk = msgspec.field(default_factory=Walk)
    unreported: Walk = msgspec.field(default_factory=Walk)
    all: Walk = msgspec.field(default_factory=Walk)


class Found(NamedTuple):
    """What a day was found to hold: objects of bars, and when the newest was written (UTC; None without objects).

    strays: how many objects were no bars', and were left alone; first_stray: the key of one.
    """

    day: date
    objects: int
    newest: datetime | None
    strays: int = 0
    first_stray: str = ""


class Report(NamedTuple):
    """What was last reported of a day, and when (UTC)."""

    objects: int
    newest: datetime
    at: datetime


def look(
    lake: Lake,
    position: Position,
    reported: Collection[str],
    today: date,
    pages: int = PAGES,
    page_objects: int = PAGE_OBJECTS,
) -> Iterator[Found]:
    """Goes on from a position, which it moves, and gives the days that it listed to their end, each once.

    reported: the days (YYYY-MM-DD) that were reported before; today: now's trade date. A look lists at most `pages`
    pages of `page_objects` objects three times; of a local lake, which lists in no order, a day as a whole. Raises
    the store's errors; the position is good then too.
    """
    days = _days(lake)
    trading = calendar.trading_days(days[0], today) if days else []
    known = sorted({*days} & {*trading})
    walks = (
        (position.newest, known[-1:]),
        (position.unreported, [day for day in known if day.isoformat() not in reported]),
        (position.all, days),
    )
    seen: set[date] = set()
    for walk, among in walks:
        for found in _go_on(lake, walk, [day for day in among if day not in seen], pages, page_objects):
            seen.add(found.day)
            yield found


def is_news(found: Found, reported: Report | None, now: datetime, today: date) -> bool:
    """Whether a day's objects are others than those last reported, and it is time to say so.

    It is when nothing came for QUIET, so that an upload is reported when it is over; of today, which may be written
    all day, LIVE after the last report.
    """
    if found.newest is None or (reported and (found.objects, found.newest) == (reported.objects, reported.newest)):
        return False
    is_live = found.day == today and (reported is None or now - reported.at >= LIVE)
    return is_live or now - found.newest >= QUIET


def _days(lake: Lake) -> list[date]:
    """The days that have minute bars' objects, in order; folders that are no day's are left out."""
    names = lake.folders(layout.raw_root(Channel.MINUTE))
    return sorted(day for name in names if (day := layout.parse_raw_prefix(name)))


def _go_on(lake: Lake, walk: Walk, days: list[date], pages: int, page_objects: int) -> Iterator[Found]:
    """Moves a walk on by so many pages, at most once over the days."""
    for day in _in_turn(walk, days):
        if pages <= 0:
            return
        if day != walk.day or walk.after is None or not lake.is_s3:  # a local lake's files are in no order
            walk.day, walk.after, walk.objects, walk.newest, walk.strays, walk.first_stray = day, None, 0, None, 0, ""
        pages -= 1
        for page in lake.pages(layout.raw_prefix(Channel.MINUTE, day), walk.after, page_objects):
            walk.add(page)
            if len(page) == page_objects:
                if pages <= 0 and lake.is_s3:
                    return
                pages -= 1
        walk.after = None
        yield Found(day, walk.objects, walk.newest, walk.strays, walk.first_stray)


def _in_turn(walk: Walk, days: list[date]) -> list[date]:
    """From the day under way, or the next older one, downwards; then from the newest."""

    def is_passed(day: date) -> bool:
        return walk.day is not None and (day > walk.day or (day == walk.day and walk.after is None))

    return sorted(days, key=lambda day: (is_passed(day), -day.toordinal()))
