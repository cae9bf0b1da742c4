"""The account: what a gap may have cost, and that an account which does not add up says so."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from polygon_pipeline.collector.accounting import archived, count_event, make_ledger
from polygon_pipeline.collector.journal import JournalHeader
from polygon_pipeline.lake.archive import ArchivedEvent
from polygon_pipeline.lake.ledger import Account, Connection, Ledger, connected_minutes
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind


def _at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-01-26T{clock}").replace(tzinfo=UTC)


def _disconnected(start: str, end: str) -> Account:
    account = Account()
    count_event(account, archived(ConnectionEvent(EventKind.SUBSCRIBED, "")), _at("09:00:00"))
    count_event(account, archived(ConnectionEvent(EventKind.DISCONNECTED, "the connection was lost")), _at(start))
    count_event(account, archived(ConnectionEvent(EventKind.SUBSCRIBED, "")), _at(end))
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
    (gap,) = _disconnected(start, end).gaps("processing")
    assert (gap.start, gap.end, gap.cause) == (_at(start), _at(end), "the connection was lost")
    assert gap.first_minute == (first and _at(first))
    assert gap.last_minute == (last and _at(last))


def test_a_gap_is_open_while_the_run_is_not_connected_and_none_after_its_end() -> None:
    account = Account()
    count_event(account, archived(ConnectionEvent(EventKind.SUBSCRIBED, "")), _at("09:00:00"))
    count_event(account, archived(ConnectionEvent(EventKind.DISCONNECTED, "gone")), _at("10:00:30"))
    (gap,) = account.gaps("processing")
    assert gap.end is None
    count_event(account, ArchivedEvent("ended", "the session is over"), _at("10:01:00"))
    assert account.gaps("processing") == []


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


def _ledger(*connections: tuple[str, str | None], last: str | None = None) -> Ledger:
    day = date(2026, 1, 26)
    account = Account(
        connections=[Connection(_at(since), _at(until) if until else None) for since, until in connections],
        last_received_at=_at(last) if last else None,
        ended_by="the session is over",
    )
    header = JournalHeader("RUN", day, "file:///lake", "simulator", _at("09:00:00"), True, True)
    return make_ledger(header, account, complete=False)


def _clocks(ledgers: list[Ledger]) -> list[tuple[str, str]]:
    return [
        (
            f"{datetime.fromtimestamp(first / 1000, UTC):%H:%M:%S}",
            f"{datetime.fromtimestamp(last / 1000, UTC):%H:%M:%S}",
        )
        for first, last in connected_minutes(ledgers)
    ]


def test_nobody_was_connected_without_a_ledger_or_a_connection() -> None:
    assert connected_minutes([]) == connected_minutes([_ledger()]) == []


@pytest.mark.parametrize(
    ("start", "end"),
    [("10:00:30", "10:00:31"), ("10:00:30", "10:03:01"), ("10:00:03", "10:00:06"), ("09:59:59", "10:00:01")],
)
def test_the_connected_minutes_of_a_run_are_all_but_those_of_its_gaps(start: str, end: str) -> None:
    ledger = _ledger(("09:00:30", start), (end, "11:00:30"))
    inside = {minute for first, last in connected_minutes([ledger]) for minute in range(first, last + 1, 60_000)}
    (gap,) = ledger.gaps
    lost = set()
    if gap.first_minute and gap.last_minute:
        lost = set(range(int(gap.first_minute.timestamp()) * 1000, int(gap.last_minute.timestamp()) * 1000 + 1, 60_000))
    whole = range(int(_at("09:00:00").timestamp()) * 1000, int(_at("11:00:00").timestamp()) * 1000, 60_000)
    assert inside == set(whole) - lost


def test_a_run_that_covers_anothers_gap_closes_it() -> None:
    first = _ledger(("09:00:30", "10:00:30"), ("10:30:30", "11:00:30"))
    second = _ledger(("10:10:30", "10:20:30"))
    assert _clocks([first, second]) == [("09:00:00", "09:59:00"), ("10:10:00", "10:19:00"), ("10:30:00", "10:59:00")]
    assert _clocks([_ledger(("09:50:00", "10:45:00")), first]) == [("09:00:00", "10:59:00")]


def test_a_run_that_takes_over_within_a_minute_leaves_no_gap() -> None:
    assert _clocks([_ledger(("09:00:30", "10:00:30")), _ledger(("10:00:40", "11:00:30"))]) == [("09:00:00", "10:59:00")]


def test_a_connection_without_an_end_counts_to_the_last_frame() -> None:
    assert _clocks([_ledger(("09:00:30", None), last="09:30:10")]) == [("09:00:00", "09:29:00")]
    assert _clocks([_ledger(("09:00:30", None))]) == []
