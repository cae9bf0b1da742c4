"""The trading days as partitions, and what the settings make of the project."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from polygon_pipeline.defs.partitions import Project, day_tags, days_of, spans
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK, completed_sessions, trading_days
from polygon_pipeline_tests.support.nights import first_night

ALL = Project(date(2003, 9, 10))
LIVE = {"POLYGON_API_KEY": "a-key", "POLYGON_TICKERS": "SPY"}


@pytest.mark.parametrize("closed", ["2025-11-27", "2026-11-21", "2026-11-22", "2012-10-29", "2003-09-09"])
def test_closed_days_are_no_partitions(closed: str) -> None:
    assert not ALL.trading_days.has_partition_key(closed)
    assert not ALL.is_partition(date.fromisoformat(closed))


@pytest.mark.parametrize("traded", ["2003-09-10", "2026-11-20", "2025-11-28"])
def test_trading_days_are_partitions(traded: str) -> None:
    assert ALL.trading_days.has_partition_key(traded)
    assert ALL.is_partition(date.fromisoformat(traded))


def test_the_last_partition_is_a_session_that_has_begun_or_after_a_holiday_the_next() -> None:
    last = date.fromisoformat(ALL.trading_days.get_partition_keys()[-1])
    today = datetime.now(NEW_YORK).date()
    assert last in (trading_days(date(2003, 9, 10), today)[-1], trading_days(today, date(today.year + 1, 1, 31))[0])
    if today.weekday() >= 5:
        assert last.weekday() == 4 or not trading_days(last, today)


@pytest.mark.parametrize(
    ("local", "last", "without_nights"),
    [
        ((2026, 12, 6, 21, 0), "2026-12-07", "2026-12-04"),  # Sunday
        ((2026, 12, 7, 21, 0), "2026-12-08", "2026-12-07"),
        ((2026, 12, 11, 19, 0), "2026-12-14", "2026-12-11"),
        ((2026, 12, 27, 21, 0), "2026-12-29", "2026-12-28"),  # after Christmas, a Friday: one more than needed, 33551
    ],
)
def test_where_there_are_nights_a_sessions_partition_is_there_on_the_evening_before(
    monkeypatch: pytest.MonkeyPatch, local: tuple[int, int, int, int, int], last: str, without_nights: str
) -> None:
    now = datetime(*local, tzinfo=NEW_YORK)
    keys = Project(date(2026, 11, 2)).trading_days.get_partition_keys(now)
    assert keys[-1] == without_nights
    first_night(monkeypatch, "2026-12-07")
    project = Project(date(2026, 11, 2))
    keys = project.trading_days.get_partition_keys(now)
    assert keys[-1] == last
    assert all(project.is_partition(date.fromisoformat(key)) for key in keys)


def test_partitions_begin_where_the_environment_says() -> None:
    assert Project.from_environment(LIVE).history_start == date(2024, 12, 2)
    project = Project.from_environment(LIVE | {"POLYGON_HISTORY_START": "2020-03-09"})
    assert project.trading_days.get_first_partition_key() == "2020-03-09"


def test_the_demos_partitions_begin_a_little_before_the_days_it_plays() -> None:
    days = completed_sessions(datetime.now(UTC), 20)
    assert days[-6] >= Project.from_environment({}).history_start >= days[0]


@pytest.mark.parametrize("wrong", [{"POLYGON_HISTORY_START": "soon"}, {"POLYGON_CHANNELS": "T"}])
def test_a_variable_that_cannot_work_counts_as_not_set(wrong: dict[str, str]) -> None:
    assert Project.from_environment(LIVE | wrong) == Project()


def test_the_channels_decide_on_the_assets_of_seconds() -> None:
    assert Project.from_environment(LIVE | {"POLYGON_CHANNELS": "A"}).channels == (Channel.SECOND,)


def test_days_follow_each_other_over_weekends_and_holidays_in_spans_of_so_many() -> None:
    days = [date(2025, 11, day) for day in (20, 21, 24, 26, 28)]  # the 25th is left out, the 27th is Thanksgiving
    assert spans(days, 2) == [days[:2], days[2:3], days[3:]]
    assert spans([], 2) == []


def test_tags_say_which_days_a_run_makes() -> None:
    days = trading_days(date(2025, 11, 24), date(2025, 12, 1))
    assert days_of(day_tags(days)) == days
    assert days_of({"dagster/partition": "2025-11-28"}) == [date(2025, 11, 28)]
    assert days_of({}) == []
    assert days_of({"dagster/partition": "eu|2025"}) == [], "a partition of a user's own"
