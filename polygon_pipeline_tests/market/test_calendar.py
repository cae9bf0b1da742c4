"""Sessions, holidays and New York's days, held against facts that are known from elsewhere."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.market import calendar
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline_tests.support.bars import moments

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
def test_the_session_date_is_new_yorks_at_every_moment(moment: datetime) -> None:
    assert calendar.trade_date(ms(moment)) == moment.astimezone(NEW_YORK).date()


@pytest.mark.parametrize(
    ("day", "hours"), [(date(2026, 3, 8), 23), (date(2026, 11, 1), 25), (date(2026, 1, 26), 24), (date(2026, 7, 6), 24)]
)
def test_a_day_has_23_hours_in_spring_and_25_in_autumn(day: date, hours: int) -> None:
    first, after = calendar.day_bounds_ms(day)
    assert after - first == hours * 3_600_000


@given(st.dates(date(2003, 1, 1), date(2032, 1, 1)))
def test_the_bounds_of_a_day_hold_its_bars_and_no_others(day: date) -> None:
    first, after = calendar.day_bounds_ms(day)
    assert calendar.trade_date(first) == calendar.trade_date(after - 1) == day
    assert calendar.trade_date(first - 1) == day - timedelta(days=1)
    assert calendar.trade_date(after) == day + timedelta(days=1)


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
