"""The account: what a gap may have cost, and that an account which does not add up says so."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from polygon_pipeline.collector.account import Account
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind


def _at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-01-26T{clock}").replace(tzinfo=UTC)


def _disconnected(start: str, end: str) -> Account:
    account = Account()
    account.add_event(ConnectionEvent(EventKind.SUBSCRIBED, ""), _at("09:00:00"))
    account.add_event(ConnectionEvent(EventKind.DISCONNECTED, "the connection was lost"), _at(start))
    account.add_event(ConnectionEvent(EventKind.SUBSCRIBED, ""), _at(end))
    return account


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        ("10:00:30", "10:00:31", None, None),
        ("10:00:30", "10:03:01", "10:00:00", "10:02:00"),
        ("10:00:03", "10:00:06", "09:59:00", "09:59:00"),
        ("09:59:59", "10:00:01", "09:59:00", "09:59:00"),
    ],
)
def test_a_gap_names_the_minutes_whose_bars_were_due_in_it(
    start: str, end: str, first: str | None, last: str | None
) -> None:
    (gap,) = _disconnected(start, end).gaps()
    assert (gap.start, gap.end, gap.cause) == (_at(start), _at(end), "the connection was lost")
    assert gap.first_minute == (first and _at(first))
    assert gap.last_minute == (last and _at(last))


def test_a_gap_is_open_while_the_run_is_not_connected_and_none_after_its_end() -> None:
    account = Account()
    account.add_event(ConnectionEvent(EventKind.SUBSCRIBED, ""), _at("09:00:00"))
    account.add_event(ConnectionEvent(EventKind.DISCONNECTED, "gone"), _at("10:00:30"))
    (gap,) = account.gaps()
    assert gap.end is None
    account.add_event(ConnectionEvent(EventKind.ENDED, "the session is over"), _at("10:01:00"))
    assert account.gaps() == []


def test_an_account_that_does_not_add_up_says_where() -> None:
    account = Account(events=3, bars=2, statuses=1)
    account.day(date(2026, 1, 26), Channel.MINUTE).bars = 2
    assert account.imbalance(write_objects=False) == []
    assert account.imbalance(write_objects=True) == ["2026-01-26 AM: 2 bars, but 0 objects and 0 superseded revisions"]
    account.events = 4
    account.day(date(2026, 1, 27), Channel.MINUTE).bars = 1
    assert account.imbalance(write_objects=False) == [
        "4 events came in, but 3 are accounted for",
        "2 bars came in, but 3 are accounted for by day",
    ]
