"""Sessions, holidays and New York's days, held against facts that are known from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polygon_pipeline.market import calendar, hours
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline_tests.support.bars import moments
from polygon_pipeline_tests.support.nights import first_night

HOLIDAYS_2026 = [
    date(2026, 1, 1),
    date(2026, 1, 19),
    date(2026, 2, 16),
    date(2026, 4, 3),
    date(2026, 5, 25),
    date(2026, 6, 19),
    date(2026, 7, 3),
    date(2026, 9, 7),
    date(2026, 11, 26),
    date(2026, 12, 25),
]
# Sandy, and the days of mourning for Reagan, Ford, Bush and Carter.
UNPLANNED = [
    date(2012, 10, 29),
    date(2012, 10, 30),
    date(2004, 6, 11),
    date(2007, 1, 2),
    date(2018, 12, 5),
    date(2025, 1, 9),
]


# No night is expected; one from its earliest date; from a Monday; and, of a simulated feed, from long before.
NIGHTS_FROM = pytest.mark.parametrize("first_night", [None, date(2026, 12, 1), date(2027, 3, 15), date(2026, 1, 26)])


@pytest.fixture(scope="module")
def nights_from() -> Iterator[Callable[[date | None], None]]:
    """Sets the first trade date with a night session; None for none. One for all examples of a test."""
    with pytest.MonkeyPatch.context() as environment:
        yield lambda first: first_night(environment, first)


def utc(*when: int) -> datetime:
    return datetime(*when, tzinfo=UTC)  # type: ignore[arg-type, misc, unused-ignore]


def ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def test_a_winter_session_runs_from_four_to_eight_in_new_york() -> None:
    assert calendar.session(date(2026, 1, 26)) == calendar.Session(
        date=date(2026, 1, 26),
        pre_open=utc(2026, 1, 26, 9),
        open=utc(2026, 1, 26, 14, 30),
        close=utc(2026, 1, 26, 21),
        post_close=utc(2026, 1, 27, 1),
    )


def test_a_summer_session_is_an_hour_earlier_in_utc() -> None:
    session = calendar.session(date(2026, 7, 6))
    assert session
    assert (session.pre_open, session.post_close) == (utc(2026, 7, 6, 8), utc(2026, 7, 7, 0))
    assert not session.is_early_close


@pytest.mark.parametrize("day", [date(2026, 11, 27), date(2026, 12, 24), date(2024, 7, 3)])
def test_a_half_day_closes_at_one_and_ends_at_five(day: date) -> None:
    session = calendar.session(day)
    assert session
    assert session.is_early_close
    ends = [moment.astimezone(NEW_YORK) for moment in (session.close, session.post_close)]
    assert [(end.date(), end.hour, end.minute) for end in ends] == [(day, 13, 0), (day, 17, 0)]


@pytest.mark.parametrize("day", [*HOLIDAYS_2026, *UNPLANNED, date(2026, 1, 24), date(2026, 1, 25)])
def test_holidays_weekends_and_unplanned_closures_have_no_session(day: date) -> None:
    assert calendar.session(day) is None


def test_the_closed_weekdays_of_a_year_are_its_holidays() -> None:
    closed = calendar.closed_weekdays()
    assert [day for day in closed if day.year == 2026] == HOLIDAYS_2026
    assert set(UNPLANNED) <= set(closed)
    assert all(day.weekday() < 5 and calendar.session(day) is None for day in closed)


def test_sessions_begin_with_the_vendors_first_day_of_minute_bars() -> None:
    assert calendar.trading_days(date(2003, 9, 1), date(2003, 9, 12)) == [
        date(2003, 9, 10),
        date(2003, 9, 11),
        date(2003, 9, 12),
    ]
    assert calendar.session(date(2003, 9, 9)) is None


def test_sessions_are_known_to_the_end_of_the_year_after_next() -> None:
    this_year = datetime.now(UTC).year
    assert calendar.trading_days(date(this_year + 2, 12, 20), date(this_year + 3, 12, 31))


def test_trading_days_include_both_ends_and_skip_closed_days() -> None:
    assert calendar.trading_days(date(2026, 1, 16), date(2026, 1, 20)) == [date(2026, 1, 16), date(2026, 1, 20)]
    assert calendar.trading_days(date(2026, 1, 17), date(2026, 1, 19)) == []


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        (utc(2026, 1, 26, 4, 59, 59), date(2026, 1, 25)),
        (utc(2026, 1, 26, 5), date(2026, 1, 26)),
        (utc(2026, 1, 27, 0, 30), date(2026, 1, 26)),  # 19:30 in New York: UTC is a day ahead
        (utc(2026, 1, 27, 4, 59, 59), date(2026, 1, 26)),
        (utc(2026, 7, 6, 3, 59), date(2026, 7, 5)),
        (utc(2026, 7, 6, 4), date(2026, 7, 6)),
        (utc(2026, 3, 8, 4, 59), date(2026, 3, 7)),  # the clocks go forward at 07:00 UTC
        (utc(2026, 3, 9, 3, 59), date(2026, 3, 8)),
        (utc(2026, 3, 9, 4), date(2026, 3, 9)),
        (utc(2026, 11, 1, 3, 59), date(2026, 10, 31)),  # and back at 06:00
        (utc(2026, 11, 2, 4, 59), date(2026, 11, 1)),
        (utc(2026, 11, 2, 5), date(2026, 11, 2)),
    ],
)
def test_a_bar_belongs_to_the_new_york_date_of_its_start(moment: datetime, day: date) -> None:
    assert calendar.trade_date(ms(moment)) == day


@given(moments)
def test_before_the_earliest_night_the_trade_date_is_new_yorks(moment: datetime) -> None:
    local = moment.astimezone(NEW_YORK)
    assume(local < datetime(2026, 11, 30, 21, tzinfo=NEW_YORK))
    assert calendar.trade_date(ms(moment)) == local.date()


@pytest.mark.parametrize(
    ("day", "hours"), [(date(2026, 3, 8), 23), (date(2026, 11, 1), 25), (date(2026, 1, 26), 24), (date(2026, 7, 6), 24)]
)
def test_a_day_has_23_hours_in_spring_and_25_in_autumn(day: date, hours: int) -> None:
    first, after = calendar.new_york_day_ms(day)
    assert (first, after) == calendar.day_bounds_ms(day)
    assert after - first == hours * 3_600_000


@NIGHTS_FROM
@given(data=st.data())
def test_every_moment_is_within_the_bounds_of_its_trade_date_and_of_no_other(
    nights_from: Callable[[date | None], None], first_night: date | None, data: st.DataObject
) -> None:
    nights_from(first_night)
    moment_ms = ms(data.draw(moments))
    day = calendar.trade_date(moment_ms)
    first, after = calendar.day_bounds_ms(day)
    assert first <= moment_ms < after
    for other in (
        day - timedelta(days=data.draw(st.integers(1, 5))),
        day + timedelta(days=data.draw(st.integers(1, 5))),
    ):
        begin, end = calendar.day_bounds_ms(other)
        assert begin <= end
        assert not begin <= moment_ms < end


@NIGHTS_FROM
@given(day=st.dates(date(2003, 1, 1), date(2032, 1, 1)))
def test_the_bounds_of_days_follow_each_other_and_hold_their_bars_and_no_others(
    nights_from: Callable[[date | None], None], first_night: date | None, day: date
) -> None:
    nights_from(first_night)
    first, after = calendar.day_bounds_ms(day)
    assert after == calendar.day_bounds_ms(day + timedelta(days=1))[0]
    if first == after:
        assert calendar.session(day) is None, "only closed days have no moment"
        assert day >= min(first_night or hours.EARLIEST_NIGHT, hours.EARLIEST_NIGHT)
        return
    assert calendar.trade_date(first) == calendar.trade_date(after - 1) == day
    assert calendar.trade_date(first - 1) < day < calendar.trade_date(after)


@NIGHTS_FROM
@given(one=moments, other=moments)
def test_a_later_moment_has_no_earlier_trade_date(
    nights_from: Callable[[date | None], None], first_night: date | None, one: datetime, other: datetime
) -> None:
    nights_from(first_night)
    earlier, later = sorted((ms(one), ms(other)))
    assert calendar.trade_date(earlier) <= calendar.trade_date(later)


@NIGHTS_FROM
@given(day=st.sampled_from(calendar.trading_days(date(2025, 1, 2), date(2028, 12, 1))))
def test_a_session_is_within_the_bounds_of_its_day_and_has_the_same_hours_all_year(
    nights_from: Callable[[date | None], None], first_night: date | None, day: date
) -> None:
    nights_from(first_night)
    found = calendar.session(day)
    assert found
    first, after = calendar.day_bounds_ms(day)
    assert first <= ms(found.begin) < ms(found.post_close) <= after
    has_night = first_night is not None and day >= first_night
    assert found.minutes == (780 if found.is_early_close else 960) + (420 if has_night else 0)
    local = found.begin.astimezone(NEW_YORK)
    assert (local.date(), local.hour) == ((day - timedelta(days=1), 21) if has_night else (day, 4))
    assert [calendar.is_in_hours(at) for at in (ms(found.begin) - 1, ms(found.begin), ms(found.post_close) - 1)] == [
        False,
        True,
        True,
    ]
    assert not calendar.is_in_hours(ms(found.post_close))


@pytest.mark.parametrize("first_night", [None, date(2026, 12, 7), date(2027, 6, 1)])
@pytest.mark.parametrize(
    ("local", "day"),
    [
        ((2026, 12, 1, 21, 30), date(2026, 12, 2)),  # Tuesday's evening is Wednesday's
        ((2026, 12, 2, 3, 59), date(2026, 12, 2)),
        ((2026, 12, 2, 20, 59), date(2026, 12, 2)),  # in the pause
        ((2026, 12, 6, 21, 30), date(2026, 12, 7)),  # Sunday's is Monday's
        ((2026, 12, 4, 21, 30), date(2026, 12, 7)),  # on Friday's there is none
        ((2026, 12, 24, 21, 0), date(2026, 12, 28)),  # the evening before a holiday belongs to no session
        ((2026, 12, 25, 10, 0), date(2026, 12, 28)),
        ((2027, 1, 17, 21, 0), date(2027, 1, 19)),
        ((2027, 1, 18, 21, 0), date(2027, 1, 19)),  # the holiday's own evening is the next session's
        ((2026, 11, 30, 21, 0), date(2026, 12, 1)),  # the earliest that can be
        ((2026, 11, 30, 20, 59), date(2026, 11, 30)),
        ((2026, 11, 27, 21, 30), date(2026, 11, 27)),  # before it, nothing changes
        ((2026, 11, 29, 21, 30), date(2026, 11, 29)),
    ],
)
def test_a_bar_at_night_is_filed_under_the_session_of_the_night_whether_nights_are_expected_or_not(
    nights_from: Callable[[date | None], None],
    first_night: date | None,
    local: tuple[int, int, int, int, int],
    day: date,
) -> None:
    nights_from(first_night)
    assert calendar.trade_date(ms(datetime(*local, tzinfo=NEW_YORK))) == day


def test_only_the_variable_gives_a_session_a_night(nights_from: Callable[[date | None], None]) -> None:
    nights_from(None)
    monday = date(2026, 12, 7)
    found = calendar.session(monday)
    assert found
    assert (found.night_open, found.begin) == (None, found.pre_open)
    nights_from(date(2026, 12, 8))
    assert calendar.session(monday) == found, "the day before the first is as it was"
    nights_from(monday)
    with_night = calendar.session(monday)
    assert with_night
    assert with_night.begin == with_night.night_open == utc(2026, 12, 7, 2)
    assert (with_night.pre_open, with_night.post_close) == (found.pre_open, found.post_close)


@pytest.mark.parametrize("value", ["", " ", "soon", "2026-13-01", "20261"])
def test_a_value_that_is_no_date_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    first_night(monkeypatch, value)
    assert hours.night_session_from() is None


def test_a_clock_names_the_weekday_of_an_evening_that_is_another_days(
    nights_from: Callable[[date | None], None],
) -> None:
    nights_from(date(2026, 12, 7))
    assert calendar.clock(datetime(2026, 12, 6, 21, 30, tzinfo=NEW_YORK)) == "Sun 21:30"
    assert calendar.clock(datetime(2026, 12, 7, 0, 5, 7, tzinfo=NEW_YORK), seconds=True) == "00:05:07"
    assert calendar.clock(datetime(2026, 1, 25, 21, 30, tzinfo=NEW_YORK)) == "21:30"


@pytest.mark.parametrize(
    ("local", "day", "is_begun"),
    [
        ((2026, 12, 6, 20, 59), date(2026, 12, 7), False),  # Sunday
        ((2026, 12, 6, 21, 0), date(2026, 12, 7), True),
        ((2026, 12, 7, 19, 59), date(2026, 12, 7), True),
        ((2026, 12, 7, 20, 0), date(2026, 12, 8), False),  # the pause
        ((2026, 12, 7, 21, 0), date(2026, 12, 8), True),
        ((2026, 12, 11, 20, 0), date(2026, 12, 14), False),  # Friday
        ((2026, 12, 11, 21, 30), date(2026, 12, 14), False),
        ((2026, 12, 24, 17, 0), date(2026, 12, 28), False),  # a half day before a holiday
        ((2026, 12, 24, 21, 0), date(2026, 12, 28), False),
        ((2026, 12, 27, 21, 0), date(2026, 12, 28), True),
    ],
)
def test_a_session_begins_at_nine_on_the_evening_before(
    nights_from: Callable[[date | None], None],
    local: tuple[int, int, int, int, int],
    day: date,
    is_begun: bool,
) -> None:
    nights_from(date(2026, 12, 7))
    now = datetime(*local, tzinfo=NEW_YORK)
    found = calendar.current_or_next_session(now)
    assert (found.date, found.begin <= now) == (day, is_begun)


@pytest.mark.parametrize(
    ("now", "day"),
    [
        (utc(2026, 1, 26, 8, 59), date(2026, 1, 26)),  # before pre-market
        (utc(2026, 1, 26, 18), date(2026, 1, 26)),
        (utc(2026, 1, 27, 0, 59, 59), date(2026, 1, 26)),  # after hours, and the next day in UTC
        (utc(2026, 1, 27, 1), date(2026, 1, 27)),  # the end is exclusive
        (utc(2026, 1, 24, 12), date(2026, 1, 26)),  # Saturday
        (utc(2026, 1, 17, 2), date(2026, 1, 20)),  # before a long weekend
        (utc(2026, 11, 27, 21, 59), date(2026, 11, 27)),
        (utc(2026, 11, 27, 22), date(2026, 11, 30)),  # a half day is over at 17:00
        (utc(2012, 10, 27, 12), date(2012, 10, 31)),
    ],
)
def test_the_session_to_collect_is_the_current_or_the_next(now: datetime, day: date) -> None:
    assert calendar.current_or_next_session(now).date == day


def test_beyond_the_calendar_there_is_no_next_session() -> None:
    with pytest.raises(ValueError, match="the calendar ends"):
        calendar.current_or_next_session(utc(2099, 1, 1))


def test_a_session_is_completed_when_its_after_hours_have_ended() -> None:
    assert calendar.completed_sessions(utc(2026, 1, 27, 0, 59), 2) == [date(2026, 1, 22), date(2026, 1, 23)]
    assert calendar.completed_sessions(utc(2026, 1, 27, 1), 2) == [date(2026, 1, 23), date(2026, 1, 26)]
    assert calendar.completed_sessions(utc(2026, 1, 20, 3), 1) == [date(2026, 1, 16)]


@pytest.mark.parametrize("count", [1, 5, 60, 252])
def test_as_many_completed_sessions_as_asked_for_oldest_first(count: int) -> None:
    days = calendar.completed_sessions(utc(2026, 1, 26, 18), count)
    assert len(days) == count
    assert days == calendar.trading_days(days[0], date(2026, 1, 23))


def test_the_stored_closures_equal_the_librarys() -> None:
    """When this fails after an upgrade: python -m polygon_pipeline.market.calendar, and look at the difference."""
    kept = calendar._closures()
    assert kept == calendar.closures_by_library(kept.until)
