"""Whole weeks with nights, against a plan in UTC that is written down here and computed from nothing.

The weeks have the first night session, a half day before a holiday, a holiday on a Monday, and both changes of the
clock. What the plan says of a day is held against every bar on its way: its prefix, its part of the day, the daily
bars, the minutes that coverage expects, and when its collector starts and ends.
"""

from __future__ import annotations

import logging
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from polygon_pipeline.collector.collector import Collector
from polygon_pipeline.collector.launching import Start, Wait, decide_live, session_end
from polygon_pipeline.datasets import catalog, quality
from polygon_pipeline.datasets.coverage import Coverage
from polygon_pipeline.datasets.day_state import DayState, day_status
from polygon_pipeline.datasets.normalize import Normalization
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.ledger import SESSION_OVER, Account, Connection, missing_minutes, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY, EPOCH
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.day_files import read
from polygon_pipeline_tests.support.ledgers import ledger_of
from polygon_pipeline_tests.support.nights import first_night

FIRST_NIGHT = "2026-12-07"
MINUTE = timedelta(minutes=1)
_LOG = logging.getLogger("test")


class Planned(NamedTuple):
    """A trading day, its times in UTC as `DD HH:MM`: when its bars begin, the parts that follow, its end."""

    day: str
    begin: str
    pre: str
    regular: str
    post: str
    end: str

    @property
    def date(self) -> date:
        return date.fromisoformat(self.day)

    def at(self, time: str) -> datetime:
        """In the month of the day, or the one before or after where that is nearer."""
        number, clock = time.split()
        found = datetime.fromisoformat(f"{self.day[:7]}-{number}T{clock}+00:00")
        assert abs(found.date() - self.date) <= timedelta(days=1)
        return found

    def part(self, start: datetime) -> str:
        assert self.at(self.begin) <= start < self.at(self.end)
        parts = {"overnight": self.pre, "pre": self.regular, "regular": self.post, "post": self.end}
        return next(name for name, end in parts.items() if start < self.at(end))

    @property
    def minutes(self) -> int:
        return (self.at(self.end) - self.at(self.begin)) // MINUTE


PLAN = [
    # the last days before the first night
    Planned("2026-12-03", "03 09:00", "03 09:00", "03 14:30", "03 21:00", "04 01:00"),
    Planned("2026-12-04", "04 09:00", "04 09:00", "04 14:30", "04 21:00", "05 01:00"),
    # the first night is Sunday's, and Monday's
    Planned("2026-12-07", "07 02:00", "07 09:00", "07 14:30", "07 21:00", "08 01:00"),
    Planned("2026-12-08", "08 02:00", "08 09:00", "08 14:30", "08 21:00", "09 01:00"),
    # a half day before Christmas, which is a Friday: no night from its evening to Sunday's
    Planned("2026-12-23", "23 02:00", "23 09:00", "23 14:30", "23 21:00", "24 01:00"),
    Planned("2026-12-24", "24 02:00", "24 09:00", "24 14:30", "24 18:00", "24 22:00"),
    Planned("2026-12-28", "28 02:00", "28 09:00", "28 14:30", "28 21:00", "29 01:00"),
    # a holiday on a Monday: no night on Sunday, and on its own evening Tuesday's
    Planned("2027-01-15", "15 02:00", "15 09:00", "15 14:30", "15 21:00", "16 01:00"),
    Planned("2027-01-19", "19 02:00", "19 09:00", "19 14:30", "19 21:00", "20 01:00"),
    # the clock goes forward on Sunday, 14 March, and back on Sunday, 7 November: no session has that hour
    Planned("2027-03-12", "12 02:00", "12 09:00", "12 14:30", "12 21:00", "13 01:00"),
    Planned("2027-03-15", "15 01:00", "15 08:00", "15 13:30", "15 20:00", "16 00:00"),
    Planned("2027-11-05", "05 01:00", "05 08:00", "05 13:30", "05 20:00", "06 00:00"),
    Planned("2027-11-08", "08 02:00", "08 09:00", "08 14:30", "08 21:00", "09 01:00"),
]


@pytest.fixture(autouse=True)
def nights(monkeypatch: pytest.MonkeyPatch) -> None:
    first_night(monkeypatch, FIRST_NIGHT)


def moment(start_ms: int) -> datetime:
    return datetime.fromtimestamp(start_ms / 1000, UTC)


def test_every_minute_of_the_planned_weeks_has_the_planned_trade_date_and_hours() -> None:
    """Between two sessions a minute has the trade date before the pause's end, 21:00, or after it."""
    counted = 0
    for planned, following in zip(PLAN, [*PLAN[1:], None], strict=True):
        at, end = planned.at(planned.begin), planned.at(planned.end)
        while at < end:
            start_ms = int(at.timestamp()) * 1000
            assert calendar.trade_date(start_ms) == planned.date
            assert calendar.is_in_hours(start_ms)
            at += MINUTE
            counted += 1
        if following and calendar.trading_days(planned.date, following.date) == [planned.date, following.date]:
            begin = following.at(following.begin)
            while at < begin:
                start_ms = int(at.timestamp()) * 1000
                assert calendar.trade_date(start_ms) in (planned.date, following.date)
                assert not calendar.is_in_hours(start_ms)
                at += timedelta(minutes=30)
    assert counted == sum(planned.minutes for planned in PLAN) == 2 * 960 + 10 * 1380 + 1200


@pytest.mark.parametrize("planned", PLAN, ids=[planned.day for planned in PLAN])
def test_every_bar_of_a_simulated_day_is_where_the_plan_has_it(planned: Planned, tmp_path: Path) -> None:
    events = list(SyntheticFeed(SyntheticMarket(["GME", "UHT"]), planned.date, [Channel.MINUTE]))
    frames = [archive.frame_line(moment(event.emit_ms), b"[" + event.payload + b"]", ()) for event in events]
    starts = {(event.ticker, event.start_ms) for event in events}
    for ticker, start_ms in starts:
        key = layout.raw_key(Channel.MINUTE, calendar.trade_date(start_ms), ticker, start_ms)
        assert key.startswith(f"raw-data/{planned.day}/")
    (tmp_path / "frames.jsonl.zst").write_bytes(archive.compress(frames))
    normalized, daily, covered = (tmp_path / name for name in ("normalized.parquet", "daily.parquet", "cover.parquet"))
    with Normalization(planned.date, Channel.MINUTE, tmp_path) as normalization:
        normalization.add_frames([tmp_path / "frames.jsonl.zst"])
        normalization.write(normalized)

    rows = read(normalized)
    assert {(row["ticker"], int(row["timestamp"].timestamp()) * 1000) for row in rows} == starts
    assert [row["session"] for row in rows] == [planned.part(row["timestamp"]) for row in rows]
    assert {verdict.broken for verdict in quality.check_rows(normalized, planned.date).values()} == {0}
    parts = Counter(row["session"] for row in rows)
    assert (parts["overnight"] > 0) == (planned.begin != planned.pre)
    assert parts["overnight"] < parts["regular"], "the night is thin"

    with Resampling(planned.date, normalized, tmp_path) as resampling:
        resampling.write(catalog.DAILY_BARS, daily)
        resampling.write(catalog.BARS_1H, tmp_path / "hours.parquet")
    for row in read(daily):
        volumes = {name: row[f"{name}_volume"] for name in ("overnight", "pre_market", "after_hours")}
        for name, part in zip(volumes, ("overnight", "pre", "post"), strict=True):
            of_part = [bar["volume"] for bar in rows if (bar["ticker"], bar["session"]) == (row["ticker"], part)]
            assert volumes[name] == pytest.approx(sum(of_part))
    hourly = {(row["ticker"], row["timestamp"]): row for row in read(tmp_path / "hours.parquet")}
    assert sum(row["bar_count"] for row in hourly.values()) == len(rows)
    assert all(row["session"] == "overnight" for (_, at), row in hourly.items() if at < planned.at(planned.pre))

    first, last = (int(at.timestamp()) * 1000 for at in (planned.at(planned.begin), planned.at(planned.end) - MINUTE))
    with Coverage(planned.date, normalized, None, [(first, last)], tmp_path) as coverage:
        coverage.write(covered)
    for row in read(covered):
        collected = sum(ticker == row["ticker"] for ticker, _ in starts)
        assert (row["expected_minutes"], row["collected_minutes"]) == (planned.minutes, collected)
        assert row["unknown_minutes"] == planned.minutes - collected
        assert row["regular_minutes"] == (planned.at(planned.post) - planned.at(planned.regular)) // MINUTE


@pytest.mark.parametrize("planned", PLAN, ids=[planned.day for planned in PLAN])
def test_one_collector_runs_from_a_days_begin_to_twenty_minutes_after_its_end(planned: Planned) -> None:
    begin, end = planned.at(planned.begin), session_end(planned.date)
    assert end == planned.at(planned.end) + timedelta(minutes=20)
    second = timedelta(seconds=1)
    assert isinstance(decide_live(begin - second, begin, []), Wait)
    for now in (begin, planned.at(planned.pre), planned.at(planned.regular), end - second):
        assert decide_live(now, begin, []) == Start(planned.date, 1)
    assert isinstance(decide_live(end, begin, []), Wait), "the pause, a weekend or a holiday"


@pytest.mark.parametrize("planned", PLAN, ids=[planned.day for planned in PLAN])
def test_minutes_are_missed_from_a_days_begin_on(planned: Planned) -> None:
    begin, end = planned.at(planned.begin), planned.at(planned.end)
    assert missing_minutes(planned.date, [], end) == [(begin, end - MINUTE)]
    connection = Connection(begin + timedelta(hours=1), end + timedelta(minutes=20), "the session is over")
    late = ledger_of(Account(connections=[connection]), session_date=planned.date)
    assert missing_minutes(planned.date, [late], end) == [(begin, begin + timedelta(minutes=59))]


@pytest.mark.slow
def test_a_simulated_session_with_a_night_is_collected_whole_into_one_day(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulated feed may have nights before any market has: its days are past."""
    first_night(monkeypatch, DAY)
    feed = SyntheticFeed(SyntheticMarket(["GME", "UHT"]), DAY, [Channel.MINUTE])
    sunday_evening = calendar.session(DAY)
    assert sunday_evening
    assert (EPOCH + timedelta(milliseconds=min(event.start_ms for event in feed))).date() == date(2026, 1, 26)
    with Exchange(feed, speed=0) as exchange:
        wanted = plan(exchange.url, tmp_path / "journal", feed="simulated", time_base="event")

        def ending() -> str | None:
            return SESSION_OVER if exchange.finished.is_set() else None

        Collector(file_lake, wanted, _LOG).run(ending, lambda _: None)
    bars = {(event.ticker, event.start_ms) for event in feed}
    expected = {layout.raw_key(Channel.MINUTE, DAY, ticker, start_ms) for ticker, start_ms in bars}
    assert {*file_lake.keys("raw-data")} == expected
    assert any("2026-01-26T02:" in key for key in expected), "Sunday, 21:00 to 22:00"
    [ledger] = read_ledgers(file_lake, DAY).ledgers
    assert (ledger.imbalance, ledger.account.outside_hours, ledger.gaps) == ([], 0, [])
    status = day_status(DAY, [ledger], 0, datetime(2026, 2, 1, tzinfo=UTC))
    assert status.state is DayState.COMPLETE, "from the begin of the night on"
    first_night(monkeypatch, None)
    assert calendar.trade_date(min(start_ms for _, start_ms in bars)) == date(2026, 1, 25), "it was for this feed alone"
