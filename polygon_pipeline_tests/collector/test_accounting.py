"""Counting: what frames and changes of the connection add to a run's account."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from polygon_pipeline.collector.accounting import archived, count_event, count_frame, count_outside_hours, make_ledger
from polygon_pipeline.lake.archive import ArchivedEvent
from polygon_pipeline.lake.ledger import Account, Connection
from polygon_pipeline.polygon.messages import decode_frame
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind
from polygon_pipeline_tests.support.bars import DAY, NOON, aggregate, at
from polygon_pipeline_tests.support.events import encode
from polygon_pipeline_tests.support.journals import journal_header
from polygon_pipeline_tests.support.nights import first_night


def _at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-01-26T{clock}").replace(tzinfo=UTC)


def _count(account: Account, kind: EventKind, detail: str, at: datetime) -> None:
    count_event(account, archived(ConnectionEvent(kind, detail)), at)


def test_every_event_of_a_frame_is_counted_under_its_kind() -> None:
    account = Account(connections=[Connection(_at("09:00:00"))])
    events = [
        aggregate("SPY", NOON),
        aggregate("SPY", NOON - 60_000),
        {"ev": "status", "status": "success"},
        {"ev": "T", "sym": "SPY"},
        {"ev": "T", "sym": "QQQ"},
        {"ev": "AM", "sym": "../x"},
    ]
    arrival = _at("17:01:00")
    count_frame(account, decode_frame(encode(events), arrival), arrival)
    count_frame(account, decode_frame(b"not JSON", arrival), arrival)
    assert (account.frames, account.events, account.bars, account.statuses) == (2, 7, 2, 1)
    assert (account.other, account.quarantined) == ({"T": 2}, 2)
    assert account.last_received_at == arrival
    [connection] = account.connections
    assert (connection.first_bar_ms, connection.last_bar_ms) == (NOON, NOON - 60_000)


def test_bars_outside_the_hours_of_their_trade_date_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [at(3, 59), at(4, 0), NOON, at(19, 59), at(20, 0), at(21, 30), at(21, 30, date(2026, 1, 25))]
    saturday = at(12, 0, date(2026, 1, 24))
    frame = decode_frame(encode([aggregate("SPY", start) for start in [*starts, saturday]]), _at("23:00:00"))

    def counted() -> int:
        account = Account()
        count_outside_hours(account, frame.aggregates)
        return account.outside_hours

    assert counted() == 5
    first_night(monkeypatch, DAY)
    assert counted() == 2, "in the pause, and on a Saturday"


def test_a_connection_lasts_from_its_subscription_to_its_end_and_keeps_the_cause() -> None:
    account = Account()
    _count(account, EventKind.CONNECTED, "", _at("08:59:59"))
    _count(account, EventKind.SUBSCRIBED, "", _at("09:00:00"))
    _count(account, EventKind.WARNED, "odd", _at("09:30:00"))
    _count(account, EventKind.DISCONNECTED, "the connection was lost", _at("10:00:30"))
    _count(account, EventKind.SUBSCRIBED, "", _at("10:00:31"))
    assert account.connections == [
        Connection(_at("09:00:00"), _at("10:00:30"), "the connection was lost"),
        Connection(_at("10:00:31")),
    ]
    assert account.warnings == ["2026-01-26T09:30:00Z odd"]
    (gap,) = account.gaps("processing")
    assert (gap.start, gap.end, gap.cause) == (_at("10:00:30"), _at("10:00:31"), "the connection was lost")


def test_a_gap_is_open_while_the_run_is_not_connected_and_none_after_its_end() -> None:
    account = Account()
    _count(account, EventKind.SUBSCRIBED, "", _at("09:00:00"))
    _count(account, EventKind.DISCONNECTED, "gone", _at("10:00:30"))
    (gap,) = account.gaps("processing")
    assert gap.end is None
    count_event(account, ArchivedEvent("ended", "the session is over"), _at("10:01:00"))
    assert account.gaps("processing") == []


def test_a_ledger_says_of_its_run_what_the_journal_says() -> None:
    account = Account(events=1)
    _count(account, EventKind.SUBSCRIBED, "", _at("09:00:00"))
    _count(account, EventKind.DISCONNECTED, "gone", _at("10:00:30"))
    header = journal_header("run-007")
    ledger = make_ledger(header, account, complete=False)
    assert (ledger.run, ledger.feed, ledger.session_date, ledger.complete) == ("run-007", "polygon", DAY, False)
    assert (ledger.topics, ledger.time_base) == (header.topics, header.time_base)
    assert ledger.account is account
    assert ledger.gaps == account.gaps("processing")
    assert ledger.imbalance == ["1 events came in, but 0 are accounted for"]


def test_a_late_revision_does_not_set_the_newest_bar_of_a_connection_back() -> None:
    account = Account(connections=[Connection(_at("09:00:00"))])
    for start_ms in (NOON, NOON + 60_000, NOON - 60_000):
        count_frame(account, decode_frame(encode([aggregate("SPY", start_ms)]), _at("17:02:00")), _at("17:02:00"))
    [connection] = account.connections
    assert (connection.first_bar_ms, connection.last_bar_ms) == (NOON, NOON + 60_000)


def test_a_connection_that_was_silent_before_it_was_lost_ended_when_it_was_heard_last() -> None:
    account = Account()
    _count(account, EventKind.SUBSCRIBED, "", _at("15:00:00"))
    lost = ConnectionEvent(EventKind.DISCONNECTED, "no ping was answered", silent_seconds=31.0)
    count_event(account, archived(lost), _at("15:20:30"))
    _count(account, EventKind.SUBSCRIBED, "", _at("15:20:31"))
    (gap,) = account.gaps("processing")
    assert (gap.start, gap.first_minute, gap.last_minute) == (_at("15:19:59"), _at("15:19:00"), _at("15:19:00"))
