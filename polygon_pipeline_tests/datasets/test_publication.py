"""When flat files are looked for, and what of those that are there is news."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from polygon_pipeline.datasets.publication import Evidence, days_looked_at, news, pause
from polygon_pipeline.market import calendar
from polygon_pipeline.polygon.flat_files import FlatFile, FlatFileKind

FRIDAY, MONDAY = date(2026, 1, 23), date(2026, 1, 26)
END = datetime(2026, 1, 24, 1, tzinfo=UTC)  # Friday, 20:00 in New York
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("hours", "minutes"), [(0, 5), (0.5, 5), (1, 7.5), (4, 30), (8, 60), (15, 60), (7 * 24, 60), (7 * 24 + 1, 360)]
)
def test_an_awaited_file_is_looked_for_from_the_evening_on_with_growing_pauses_until_it_is_given_up(
    hours: float, minutes: float
) -> None:
    """Weekends are no exception: these are hours from Friday evening on."""
    assert pause({FRIDAY: None}, END + hours * HOUR) == timedelta(minutes=minutes)


def test_bars_from_rest_do_not_end_the_waiting_and_a_file_does() -> None:
    assert pause({FRIDAY: ""}, END + HOUR) == pause({FRIDAY: None}, END + HOUR)
    assert pause({FRIDAY: "etag"}, END + HOUR) == timedelta(hours=6)
    assert pause({}, END) == timedelta(hours=6)


def test_the_newest_awaited_day_says_how_long_to_wait() -> None:
    thursday = date(2026, 1, 22)
    assert pause({thursday: None, FRIDAY: None}, END) == timedelta(minutes=5)


def test_the_days_looked_at_ended_within_the_setting() -> None:
    assert days_looked_at(END, 1) == [date(2026, 1, 22), FRIDAY]
    assert days_looked_at(END - timedelta(minutes=1), 1) == [date(2026, 1, 22)]
    assert days_looked_at(END + timedelta(days=2), 1) == []
    month = days_looked_at(END, 30)
    assert month == calendar.trading_days(date(2025, 12, 24), FRIDAY)[-len(month) :]
    assert len(month) >= 19


def test_news_are_files_that_are_new_or_replaced_and_the_age_of_a_replacement_is_told() -> None:
    days = [date(2026, 1, 20), date(2026, 1, 21), date(2026, 1, 22), FRIDAY]
    listed = {day: FlatFile("new", END + 12 * HOUR) for day in days}
    known: dict[date, str | None] = dict(zip(days, ["new", "old", "", None], strict=True))
    assert [(found.day, found.replaced_after) for found in news(FlatFileKind.DAYS, listed, known, END)] == [
        (days[1], timedelta(days=2, hours=12)),
        (days[2], None),
        (FRIDAY, None),
    ]


def test_an_old_day_that_was_never_fetched_is_left_to_a_backfill() -> None:
    listed = {FRIDAY: FlatFile("new", END)}
    assert news(FlatFileKind.DAYS, listed, {FRIDAY: None}, END + timedelta(days=7))
    assert not news(FlatFileKind.DAYS, listed, {FRIDAY: None}, END + timedelta(days=8))


def test_the_evidence_says_what_was_seen_and_when_the_setting_is_too_small_for_it() -> None:
    evidence = Evidence()
    assert "no replaced file was seen yet" in evidence.sentence(30)
    evidence.add(timedelta(days=2))
    evidence.add(timedelta(hours=30))
    assert evidence == Evidence(2, 2.0)
    assert "2 replaced files were seen, the latest 2.0 days after its session" in evidence.sentence(30)
    assert "is to be raised" not in evidence.sentence(30)
    assert "is to be raised" in evidence.sentence(2)
