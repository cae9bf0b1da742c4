"""The trading calendar: which days are sessions, when their parts begin and end, and which trade date a time has.

Belongs here: every question about New York time, holidays, early closes and trade dates. The holidays and early closes
are exchange_calendars' XNYS. Does not belong here: the times of day (market.hours), and what is done with a session
(collecting, partitioning).

Sessions run from 2003-09-10, the vendor's first day of minute bars, to the end of next year or later. The closures
are read from closures.json, because every process of every run needs them, and asking the library takes a second.
The file has what the library says (`python -m polygon_pipeline.market.calendar` writes it, a test compares); where
it does not reach, the library is asked.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec

from polygon_pipeline.market import hours

NEW_YORK = ZoneInfo("America/New_York")
FIRST_SESSION = date(2003, 9, 10)

_DAY = timedelta(days=1)
_HOUR_MS = 3_600_000
_CLOSURES = Path(__file__).with_name("closures.json")


@dataclass(frozen=True)
class Session:
    """One trading day. All times are aware, in UTC; each part's end is exclusive.

    night_open: 21:00 of the evening before; None where the day has no night session.
    """

    date: date
    pre_open: datetime
    open: datetime
    close: datetime
    post_close: datetime
    night_open: datetime | None = None

    @property
    def begin(self) -> datetime:
        """When its first bar may start."""
        return self.night_open or self.pre_open

    @property
    def minutes(self) -> int:
        """From its begin to its end: 960, or 1,380 with a night; on half days 780 or 1,200."""
        return (self.post_close - self.begin) // timedelta(minutes=1)

    @property
    def is_early_close(self) -> bool:
        return self.close.astimezone(NEW_YORK).time() < hours.CLOSE


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
        if at != hours.EARLY_CLOSE:
            raise ValueError(f"{day} closes at {at}; this calendar knows early closes at {hours.EARLY_CLOSE} only")
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
        day: _new_york(day, hours.EARLY_CLOSE if day in early else hours.CLOSE)
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
        pre_open=_new_york(day, hours.PRE_MARKET_OPEN),
        open=_new_york(day, hours.REGULAR_OPEN),
        close=close,
        post_close=close + hours.AFTER_HOURS,
        night_open=_new_york(day - _DAY, hours.NIGHT_OPEN) if hours.has_night(day) else None,
    )


def trading_days(first: date, last: date) -> list[date]:
    """The dates of the sessions from first to last, both included."""
    return [day for day in _trading_days() if first <= day <= last]


def closed_weekdays() -> list[date]:
    """The Mondays to Fridays without a session: what a daily partitioning must leave out."""
    return _closures().closed


def current_or_next_session(now: datetime) -> Session:
    """The session under way, from its begin to the end of after hours, or else the next one to begin."""
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
    """The trade date of a bar's start (Unix ms): its prefix in the lake and its partition, whatever the UTC date is.

    Every moment has one, and a later moment no earlier one. Until the trade date hours.filed_by_night_from(), it is the
    New York date. From there on a trade date begins right after the pause, at 21:00 of the evening before, and what
    comes while the market is closed (a weekend, a holiday and the evening before it) has the next session's.
    """
    return _date_of_hour(start_ms // _HOUR_MS, hours.filed_by_night_from())


def trade_date_at(moment: datetime) -> date:
    """The trade date of an aware time."""
    return trade_date(int(moment.timestamp() * 1000))


def day_bounds_ms(day: date) -> tuple[int, int]:
    """A trade date's first millisecond and the first after it, in Unix ms: the reverse of trade_date.

    They are equal where no moment has that date: on closed days from hours.filed_by_night_from() on.
    """
    by_night_from = hours.filed_by_night_from()
    return _first_ms(day, by_night_from), _first_ms(day + _DAY, by_night_from)


def new_york_day_ms(day: date) -> tuple[int, int]:
    """A New York day's first millisecond and the next day's, in Unix ms; 23 or 25 hours apart on DST days."""
    return _unix_ms(_new_york(day, time(0))), _unix_ms(_new_york(day + _DAY, time(0)))


def is_in_hours(start_ms: int) -> bool:
    """Whether a bar's start (Unix ms) is within the hours of its trade date's session."""
    return _is_hour_in_hours(start_ms // _HOUR_MS, hours.night_session_from())


def clock(moment: datetime, seconds: bool = False) -> str:
    """An aware time as New York's clock shows it, `14:42`, and with its weekday, `Sun 21:30`, where its trade date is
    a later day."""
    local = moment.astimezone(NEW_YORK)
    weekday = "" if trade_date_at(moment) == local.date() else f"{local:%a} "
    return f"{weekday}{local:%H:%M:%S}" if seconds else f"{weekday}{local:%H:%M}"


@functools.lru_cache(maxsize=4096)
def _date_of_hour(hour: int, by_night_from: date) -> date:
    # New York's midnight and 21:00 always fall on a whole UTC hour, so one answer serves an hour of bars.
    local = datetime.fromtimestamp(hour * 3600, NEW_YORK)
    day = local.date() + _DAY if local.time() >= hours.NIGHT_OPEN else local.date()
    if day < by_night_from:
        return local.date()
    days = _trading_days()
    place = bisect_left(days, day)
    return days[place] if place < len(days) else day  # beyond the calendar every day counts


def _first_ms(day: date, by_night_from: date) -> int:
    """The first millisecond whose trade date is that day or a later one."""
    if day < by_night_from:
        return new_york_day_ms(day)[0]
    days = _trading_days()
    place = bisect_left(days, day)
    # It begins on the evening of the session before it, or of the last day that was New York's.
    before = days[place - 1] if 0 < place < len(days) else day - _DAY
    return _unix_ms(_new_york(max(before, by_night_from - _DAY), hours.NIGHT_OPEN))


@functools.lru_cache(maxsize=4096)
def _is_hour_in_hours(hour: int, _night_session_from: date | None) -> bool:
    # Every session begins and ends on a whole hour.
    at = datetime.fromtimestamp(hour * 3600, UTC)
    found = session(trade_date_at(at))
    return found is not None and found.begin <= at < found.post_close


def _unix_ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000


def _new_york(day: date, at: time) -> datetime:
    return datetime.combine(day, at, NEW_YORK).astimezone(UTC)


if __name__ == "__main__":
    furthest = closures_by_library(date(datetime.now(UTC).year + 2, 12, 31))
    _CLOSURES.write_bytes(msgspec.json.format(msgspec.json.encode(furthest), indent=1) + b"\n")
