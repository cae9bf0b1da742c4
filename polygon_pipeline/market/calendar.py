"""The trading calendar: which days are sessions and when their parts begin and end.

Belongs here: every question about New York time, holidays, early closes and session dates. The holidays and
early closes are exchange_calendars' XNYS; the extended hours (04:00-09:30 and 16:00-20:00, on half days until
17:00) are the vendor's. Does not belong here: what is done with a session (collecting, partitioning).

Sessions run from 2003-09-10, the vendor's first day of minute bars, to the end of next year or later. The closures
are read from closures.json, because every process of every run needs them, and asking the library takes a second.
The file has what the library says (`python -m polygon_pipeline.market.calendar` writes it, a test compares); where
it does not reach, the library is asked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec

NEW_YORK = ZoneInfo("America/New_York")
FIRST_SESSION = date(2003, 9, 10)

_PRE_MARKET_OPEN = time(4)
_REGULAR_OPEN = time(9, 30)
_CLOSE = time(16)
_EARLY_CLOSE = time(13)
_AFTER_HOURS = timedelta(hours=4)
_HOUR_MS = 3_600_000
_CLOSURES = Path(__file__).with_name("closures.json")


@dataclass(frozen=True)
class Session:
    """One trading day. All times are aware, in UTC; each part's end is exclusive."""

    date: date
    pre_open: datetime
    open: datetime
    close: datetime
    post_close: datetime

    @property
    def is_early_close(self) -> bool:
        return self.close.astimezone(NEW_YORK).time() < _CLOSE


class Closures(msgspec.Struct):
    """The weekdays without a session, and the sessions that close at 13:00, from FIRST_SESSION to `until`."""

    until: date
    closed: list[date]
    early_closes: list[date]


def closures_by_library(until: date) -> Closures:
    """What exchange_calendars says. Raises ValueError if an early close is not at 13:00."""
    import exchange_calendars

    calendar = exchange_calendars.get_calendar("XNYS", start=FIRST_SESSION.isoformat(), end=until.isoformat())
    sessions = {label.date() for label in calendar.sessions}
    early = [label.date() for label in calendar.early_closes]
    for day in early:
        at = calendar.closes[day.isoformat()].to_pydatetime().astimezone(NEW_YORK).time()
        if at != _EARLY_CLOSE:
            raise ValueError(f"{day} closes at {at}; this calendar knows early closes at {_EARLY_CLOSE} only")
    return Closures(until, [day for day in _weekdays(until) if day not in sessions], early)


@functools.cache
def _closures() -> Closures:
    kept = msgspec.json.decode(_CLOSURES.read_bytes(), type=Closures)
    wanted = date(datetime.now(UTC).year + 1, 12, 31)
    return kept if kept.until >= wanted else closures_by_library(wanted)


@functools.cache
def _closes() -> dict[date, datetime]:
    """Every session's date with the end of its regular hours (UTC)."""
    closures = _closures()
    closed, early = set(closures.closed), set(closures.early_closes)
    return {
        day: _new_york(day, _EARLY_CLOSE if day in early else _CLOSE)
        for day in _weekdays(closures.until)
        if day not in closed
    }


@functools.cache
def _trading_days() -> list[date]:
    return list(_closes())


def _weekdays(until: date) -> list[date]:
    span = (until - FIRST_SESSION).days + 1
    return [day for n in range(span) if (day := FIRST_SESSION + timedelta(days=n)).weekday() < 5]


def session(day: date) -> Session | None:
    """The session of that date, or None on a day the market is closed."""
    close = _closes().get(day)
    if close is None:
        return None
    return Session(
        date=day,
        pre_open=_new_york(day, _PRE_MARKET_OPEN),
        open=_new_york(day, _REGULAR_OPEN),
        close=close,
        post_close=close + _AFTER_HOURS,
    )


def trading_days(first: date, last: date) -> list[date]:
    """The dates of the sessions from first to last, both included."""
    return [day for day in _trading_days() if first <= day <= last]


def closed_weekdays() -> list[date]:
    """The Mondays to Fridays without a session: what a daily partitioning must leave out."""
    return _closures().closed


def current_or_next_session(now: datetime) -> Session:
    """The session under way (04:00 to the end of after hours) or else the next one to open."""
    day = now.astimezone(NEW_YORK).date()
    for _ in range(14):  # the longest closure since 2003 was five days
        found = session(day)
        if found and now < found.post_close:
            return found
        day += timedelta(days=1)
    raise ValueError(f"no session within two weeks of {now.isoformat()}; the calendar ends {_trading_days()[-1]}")


def completed_sessions(now: datetime, count: int) -> list[date]:
    """The dates of the last `count` sessions whose after hours have ended, oldest first."""
    today = now.astimezone(NEW_YORK).date()
    past = trading_days(today - timedelta(days=2 * count + 14), today)
    return [day for day in past if (found := session(day)) and found.post_close <= now][-count:] if count else []


def trade_date(start_ms: int) -> date:
    """The New York date of a bar's start (Unix ms): the day's partition, whatever the UTC date is."""
    return _date_of_hour(start_ms // _HOUR_MS)


def day_bounds_ms(day: date) -> tuple[int, int]:
    """A New York day's first millisecond and the next day's, in Unix ms; 23 or 25 hours apart on DST days."""
    first, after = (_new_york(d, time(0)) for d in (day, day + timedelta(days=1)))
    return int(first.timestamp()) * 1000, int(after.timestamp()) * 1000


@functools.lru_cache(maxsize=4096)
def _date_of_hour(hour: int) -> date:
    # New York's midnight always falls on a whole UTC hour, so one answer serves an hour of bars.
    return datetime.fromtimestamp(hour * 3600, NEW_YORK).date()


def _new_york(day: date, at: time) -> datetime:
    return datetime.combine(day, at, NEW_YORK).astimezone(UTC)


if __name__ == "__main__":
    furthest = closures_by_library(date(datetime.now(UTC).year + 2, 12, 31))
    _CLOSURES.write_bytes(msgspec.json.format(msgspec.json.encode(furthest), indent=1) + b"\n")
