"""Up to which minute a run is complete, and what is not claimed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from polygon_pipeline.lake.lag import Lateness
from polygon_pipeline.lake.ledger import Account, Connection, Watermark
from polygon_pipeline.lake.watermark import watermark, watermarks
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, at


def clock(hour: int, minute: int, second: float = 0) -> datetime:
    """That time of DAY in New York, in winter."""
    return datetime(2026, 1, 26, 5, tzinfo=UTC) + timedelta(hours=hour, minutes=minute, seconds=second)


def complete(account: Account, channel: Channel = Channel.MINUTE) -> Watermark | None:
    return watermark(account, channel, "processing", DAY)


def account_of(*connections: Connection, until: datetime) -> Account:
    return Account(connections=list(connections), last_received_at=until)


@pytest.mark.parametrize(
    ("until", "through"),
    [(clock(14, 42, 4), clock(14, 40)), (clock(14, 42, 5), clock(14, 41)), (clock(14, 43, 4.9), clock(14, 41))],
)
def test_a_minute_is_claimed_once_its_bars_had_the_time_to_come(until: datetime, through: datetime) -> None:
    found = complete(account_of(Connection(clock(14, 0, 30)), until=until))
    assert found == Watermark(clock(14, 0), through, (), 5.0)


def test_a_silence_claims_nothing_until_the_server_is_heard_from() -> None:
    account = account_of(Connection(clock(14, 0)), until=clock(14, 41, 10))
    silent = complete(account)
    heard = watermark(account, Channel.MINUTE, "processing", DAY, heard_until=clock(14, 45, 6))
    assert silent
    assert silent.through == clock(14, 40)
    assert heard
    assert heard.through == clock(14, 44)


def test_bars_that_come_later_are_waited_for_longer() -> None:
    account = account_of(Connection(clock(14, 0)), until=clock(14, 42, 10))
    lateness = account.lateness.setdefault(Channel.MINUTE, Lateness())
    lateness.first.add(1.0, 10_000)
    assert complete(account) == Watermark(clock(14, 0), clock(14, 41), (), 5.0)
    lateness.first.add(20.0, 100)
    waiting = complete(account)
    assert waiting
    assert waiting.through == clock(14, 40)
    assert 20 <= waiting.waited_seconds < 22


def test_revisions_are_not_waited_for() -> None:
    account = account_of(Connection(clock(14, 0)), until=clock(14, 42, 10))
    account.lateness[Channel.MINUTE] = Lateness()
    account.lateness[Channel.MINUTE].revised.add(800.0, 1000)
    found = complete(account)
    assert found
    assert found.through == clock(14, 41)


def test_it_goes_on_after_a_gap_and_names_the_minutes_that_it_does_not_claim() -> None:
    account = account_of(
        Connection(clock(14, 0), clock(14, 20, 30), "reset"), Connection(clock(14, 25, 10)), until=clock(14, 42, 10)
    )
    assert complete(account) == Watermark(clock(14, 0), clock(14, 41), ((clock(14, 20), clock(14, 24)),), 5.0)


def test_it_stays_where_it_is_while_there_is_no_connection() -> None:
    account = account_of(Connection(clock(14, 0), clock(14, 20, 30), "reset"), until=clock(14, 20, 20))
    found = watermark(account, Channel.MINUTE, "processing", DAY, heard_until=clock(15, 0))
    assert found == Watermark(clock(14, 0), clock(14, 19), (), 5.0)


def test_a_short_break_within_a_minute_loses_no_minute_bar_but_second_bars() -> None:
    account = account_of(
        Connection(clock(14, 0, 30), clock(14, 20, 30), "reset"), Connection(clock(14, 20, 40)), until=clock(14, 42, 10)
    )
    minutes, seconds = complete(account), complete(account, Channel.SECOND)
    assert minutes == Watermark(clock(14, 0), clock(14, 41), (), 5.0)
    assert seconds == Watermark(clock(14, 1), clock(14, 41), ((clock(14, 20), clock(14, 20)),), 5.0)


def test_nothing_is_claimed_of_a_run_that_brought_no_whole_minute_or_after_the_session() -> None:
    assert complete(Account()) is None
    assert complete(account_of(Connection(clock(14, 0, 10)), until=clock(14, 0, 50))) is None
    ended = complete(account_of(Connection(clock(14, 0)), until=clock(20, 20)))
    assert ended
    assert ended.through == clock(19, 59)


def test_of_a_day_that_is_played_the_bars_own_time_decides() -> None:
    account = Account(
        connections=[
            Connection(clock(9, 0), clock(9, 1), "reset", at(4, 0), at(10, 15)),
            Connection(clock(9, 2), None, "", at(10, 20), at(14, 42)),
        ]
    )
    found = watermark(account, Channel.MINUTE, "event", DAY)
    assert found == Watermark(clock(4, 0), clock(14, 41), ((clock(10, 15), clock(10, 20)),), 5.0)


def test_a_run_has_the_watermarks_of_what_it_subscribed_to() -> None:
    account = account_of(Connection(clock(14, 0)), until=clock(14, 42, 10))
    assert set(watermarks(account, ["AM.SPY", "AM.BRK.B"], "processing", DAY)) == {Channel.MINUTE}
    assert set(watermarks(account, ["AM.*", "A.*"], "processing", DAY)) == {Channel.MINUTE, Channel.SECOND}
