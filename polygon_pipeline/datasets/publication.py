"""When the vendor's flat files are looked for, and which of those that are there are news: decisions on plain data.

Belongs here: how long to wait for the next look, what a look found, and how late replaced files were seen. Does not
belong here: listing the files (polygon.flat_files), and asking for runs (defs.publication).

A file is there when it is listed, whatever the clock says: about 11:00 New York of the next day by the vendor's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import NamedTuple

import msgspec

from polygon_pipeline.market import calendar
from polygon_pipeline.polygon.flat_files import FlatFile, FlatFileKind

# A look at a month's files is one request.
_SHORTEST_PAUSE = timedelta(minutes=5)
_LONGEST_PAUSE = timedelta(hours=1)
# Where nothing is waited for but replaced files.
_REPLACED_PAUSE = timedelta(hours=6)
# Eight hours after a session's end a look is made every hour.
_PAUSE_SHARE = 1 / 8
# A file that is not there by then will not come, or it is a backfill.
_AWAITED_FOR = timedelta(days=7)


class Evidence(msgspec.Struct):
    """How late the vendor replaced files, as far as it was seen: how many, and the greatest age in days, from the end
    of the file's session to its replacement."""

    replaced: int = 0
    oldest_days: float = 0.0

    def add(self, age: timedelta) -> None:
        self.replaced += 1
        self.oldest_days = max(self.oldest_days, round(age / timedelta(days=1), 2))

    def sentence(self, looked_at_days: int) -> str:
        """For people, with what to do where the setting is too small for what was seen."""
        setting = f"files are looked at for {looked_at_days} days (POLYGON_FLAT_FILES_REPLACED_DAYS)"
        if not self.replaced:
            return f"no replaced file was seen yet; {setting}"
        enough = "" if self.oldest_days < 0.8 * looked_at_days else ", which is to be raised"
        return (
            f"{self.replaced} replaced files were seen, the latest {self.oldest_days:.1f} days after its session; "
            f"{setting}{enough}"
        )


class News(NamedTuple):
    """A file to fetch. replaced_after: where we had another, the time from the session's end to this one."""

    day: date
    kind: FlatFileKind
    etag: str
    replaced_after: timedelta | None


def days_looked_at(now: datetime, replaced_days: int) -> list[date]:
    """The sessions that ended within so many days, oldest first."""
    count = replaced_days + 1  # more than there can be
    return [day for day in calendar.completed_sessions(now, count) if now - _end(day) <= timedelta(days=replaced_days)]


def pause(known: Mapping[date, str | None], now: datetime) -> timedelta:
    """How long after a look the next is made. known: the days looked at, each with the ETag of the file that we have,
    "" for bars from REST, None for nothing. It grows with the time since the newest awaited session's end."""
    awaited = [now - _end(day) for day, etag in known.items() if not etag and now - _end(day) <= _AWAITED_FOR]
    if not awaited:
        return _REPLACED_PAUSE
    return max(_SHORTEST_PAUSE, min(_LONGEST_PAUSE, min(awaited) * _PAUSE_SHARE))


def news(
    kind: FlatFileKind, listed: Mapping[date, FlatFile], known: Mapping[date, str | None], now: datetime
) -> list[News]:
    """What is to be fetched. known: as in pause()."""
    found: list[News] = []
    for day, file in listed.items():
        etag, had = file.etag or "", known[day]
        if had is None and now - _end(day) > _AWAITED_FOR:
            continue
        if had != etag:
            found.append(News(day, kind, etag, file.last_modified - _end(day) if had else None))
    return found


def _end(day: date) -> datetime:
    found = calendar.session(day)
    assert found is not None
    return found.post_close
