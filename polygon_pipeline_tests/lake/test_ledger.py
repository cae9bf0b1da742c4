"""Ledgers: what a gap may have cost, whether accounts balance with the lake, and what follows from those of a day."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta

import msgspec
import pytest

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import (
    SESSION_OVER,
    Account,
    Connection,
    Ledger,
    connected_minutes,
    decode_ledger,
    encode_ledger,
    market_time,
    missing_minutes,
    objects_counted,
    read_ledgers,
    reconcile,
    repairable_gaps,
    subscribed_tickers,
)
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.lakes import put_raw_bars
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of

SETTLED = timedelta(minutes=16)


def at(clock: str) -> datetime:
    """That time of the day in UTC, as HH:MM or HH:MM:SS."""
    return datetime.fromisoformat(f"{DAY}T{clock}").replace(tzinfo=UTC)


def connected(*connections: tuple[str, str | None], last: str | None = None) -> Ledger:
    account = Account(
        connections=[Connection(at(since), at(until) if until else None) for since, until in connections],
        last_received_at=at(last) if last else None,
        ended_by="the session is over",
    )
    return ledger_of(account)


# Gaps


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
    before = Connection(at("09:00:00"), at(start), "the connection was lost")
    (gap,) = Account(connections=[before, Connection(at(end))]).gaps("processing")
    assert (gap.start, gap.end, gap.cause) == (at(start), at(end), "the connection was lost")
    assert gap.first_minute == (first and at(first))
    assert gap.last_minute == (last and at(last))


def test_a_gap_of_a_simulated_past_day_is_repaired_once_the_days_own_clock_has_passed_it() -> None:
    """As an earlier version wrote the ledger, without a time base."""
    later = at("12:00") + timedelta(days=35)
    connections = [Connection(later, later, "lost"), Connection(later)]
    for connection, bars in zip(connections, (("09:00", "14:50"), ("15:00", "15:15")), strict=True):
        connection.first_bar_ms, connection.last_bar_ms = (int(at(bar).timestamp() * 1000) for bar in bars)
    content = msgspec.json.encode(
        {
            "run": "r", "feed": "simulated", "session_date": DAY, "started_at": later, "complete": False,
            "write_objects": False, "write_frames": True, "imbalance": [], "gaps": [],
            "account": {"connections": connections},
        }
    )  # fmt: skip
    ledger = decode_ledger(content)
    assert ledger.time_base == "event"

    def repairable() -> int:
        return len(repairable_gaps(DAY, [ledger], 0, SETTLED, later, live_run="r"))

    assert repairable() == 0
    ledger.account.connections[1].last_bar_ms = int(at("15:16").timestamp() * 1000)
    assert repairable() == 1


# Connections


def _clocks(ledgers: list[Ledger]) -> list[tuple[str, str]]:
    return [
        (
            f"{datetime.fromtimestamp(first / 1000, UTC):%H:%M:%S}",
            f"{datetime.fromtimestamp(last / 1000, UTC):%H:%M:%S}",
        )
        for first, last in connected_minutes(ledgers)
    ]


def test_without_a_ledger_or_a_connection_no_minute_was_connected() -> None:
    assert connected_minutes([]) == connected_minutes([connected()]) == []


@pytest.mark.parametrize(
    ("start", "end"),
    [("10:00:30", "10:00:31"), ("10:00:30", "10:03:01"), ("10:00:03", "10:00:06"), ("09:59:59", "10:00:01")],
)
def test_the_connected_minutes_of_a_run_are_all_but_those_of_its_gaps(start: str, end: str) -> None:
    ledger = connected(("09:00:30", start), (end, "11:00:30"))
    inside = {minute for first, last in connected_minutes([ledger]) for minute in range(first, last + 1, 60_000)}
    (gap,) = ledger.gaps
    lost = set()
    if gap.first_minute and gap.last_minute:
        lost = set(range(int(gap.first_minute.timestamp()) * 1000, int(gap.last_minute.timestamp()) * 1000 + 1, 60_000))
    whole = range(int(at("09:00:00").timestamp()) * 1000, int(at("11:00:00").timestamp()) * 1000, 60_000)
    assert inside == set(whole) - lost


def test_a_run_connected_during_anothers_gap_closes_it() -> None:
    first = connected(("09:00:30", "10:00:30"), ("10:30:30", "11:00:30"))
    second = connected(("10:10:30", "10:20:30"))
    assert _clocks([first, second]) == [("09:00:00", "09:59:00"), ("10:10:00", "10:19:00"), ("10:30:00", "10:59:00")]
    assert _clocks([connected(("09:50:00", "10:45:00")), first]) == [("09:00:00", "10:59:00")]


def test_a_run_that_takes_over_within_a_minute_leaves_no_gap() -> None:
    assert _clocks([connected(("09:00:30", "10:00:30")), connected(("10:00:40", "11:00:30"))]) == [
        ("09:00:00", "10:59:00")
    ]


def test_a_connection_without_an_end_counts_to_the_last_frame() -> None:
    assert _clocks([connected(("09:00:30", None), last="09:30:10")]) == [("09:00:00", "09:29:00")]
    assert _clocks([connected(("09:00:30", None))]) == []


# Over several runs


def played(*bars: tuple[str, str], complete: bool = True, started: str = "09:00", ended_by: str = "") -> Ledger:
    """A run of a past day that is played. bars: the first and last bar of each connection."""
    account = Account(
        connections=[
            Connection(at(started), None, "", *(int(at(bar).timestamp() * 1000) for bar in of_one)) for of_one in bars
        ],
        ended_by=ended_by,
    )
    run = f"run of {started}"
    return ledger_of(account, run=run, complete=complete, started_at=at(started), time_base="event")


def missing(*ledgers: Ledger, live_run: str | None = None) -> list[tuple[str, str]]:
    spans = missing_minutes(DAY, ledgers, at("23:59"), live_run)
    return [(f"{first:%H:%M}", f"{last:%H:%M}") for first, last in spans]


def test_what_a_lost_machine_received_after_its_last_checkpoint_is_a_gap_until_its_journal_is_published() -> None:
    lost = connected(("08:00", None), last="16:55:10")
    lost.complete, lost.account.ended_by = False, ""
    taken_over = connected(("17:36:10", "23:59:30"))
    assert missing(lost, taken_over) == [("16:55", "17:35")]
    lost.account.last_received_at, lost.complete = at("17:34:50"), True
    assert missing(lost, taken_over) == [("17:34", "17:35")]


def test_the_second_run_of_a_played_day_has_only_what_came_after_its_first_bar() -> None:
    first = played(("09:00", "16:55"), complete=False)
    second = played(("17:36", "23:59"), started="10:00", ended_by=SESSION_OVER)
    assert missing(first, second) == [("16:55", "17:36")]
    first.account.connections[0].last_bar_ms = int(at("17:37").timestamp() * 1000)  # its journal is published
    assert missing(first, second) == []


def test_the_clock_of_a_played_day_is_that_of_its_last_run_and_no_lost_runs() -> None:
    lost, now = played(("09:00", "16:55"), complete=False), at("23:00") + timedelta(days=35)
    assert market_time([lost], now) == at("16:56")
    live = played(("17:36", "18:00"), complete=False, started="10:00")
    assert market_time([live, lost], now) == at("18:01")
    assert market_time([played(("17:36", "18:00"), started="10:00"), lost], now) == now


def test_of_a_lost_run_whose_ledger_knows_of_no_bar_everything_before_the_next_run_is_missing() -> None:
    second = played(("17:36", "23:59"), started="10:00", ended_by=SESSION_OVER)
    assert missing(played(complete=False), second) == [("09:00", "17:36")]
    assert missing(played(complete=True), second) == [], "it ended and had received nothing: the feed had not begun"


def test_a_played_day_that_begins_anew_with_each_run_has_no_gap() -> None:
    again = played(("09:07", "23:59"), started="10:00", ended_by=SESSION_OVER)
    assert missing(played(("09:04", "12:00")), again) == []


@pytest.mark.parametrize(
    ("topics", "tickers"),
    [
        ([("AM.SPY", "A.QQQ"), ("AM.IBM", "AM.SPY")], ["IBM", "SPY"]),
        ([("AM.SPY",), ("AM.*",)], None),
        ([("AM.SPY",), ()], None),  # from before the topics were kept: any ticker
        ([("A.*",)], []),
        ([], []),
    ],
)
def test_the_subscribed_tickers_are_those_of_every_run(
    topics: list[tuple[str, ...]], tickers: list[str] | None
) -> None:
    assert subscribed_tickers([ledger_of(Account(), topics=of_run) for of_run in topics]) == tickers


# Balance


def test_an_account_that_does_not_add_up_is_described() -> None:
    account = Account(events=3, bars=2, statuses=1)
    account.day(DAY, Channel.MINUTE).bars = 2
    assert account.imbalance(write_objects=False) == []
    assert account.imbalance(write_objects=True) == ["2026-01-26 AM: 2 bars, but 0 objects and 0 superseded revisions"]
    account.events = 4
    account.day(date(2026, 1, 27), Channel.MINUTE).bars = 1
    assert account.imbalance(write_objects=False) == [
        "4 events came in, but 3 are accounted for",
        "2 bars came in, but 3 are accounted for by day",
    ]


def put(lake: Lake, run: str, account: Account) -> None:
    lake.put(layout.ledger_key(DAY, run), encode_ledger(ledger_of(account, run=run)))


def test_a_days_ledgers_balance_with_the_objects_on_the_lake(file_lake: Lake) -> None:
    put(file_lake, "ONE", account_of(2))
    under_way = ledger_of(account_of(1), run="TWO", complete=False)
    file_lake.put(layout.ledger_key(DAY, "TWO"), encode_ledger(under_way))
    put_raw_bars(file_lake, DAY, "SPY", minutes=3)
    balance = reconcile(file_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.runs, balance.unfinished, balance.bars) == ([], 2, ["TWO"], 3)
    assert (balance.objects_counted, balance.objects_on_lake) == (3, 3)
    put_raw_bars(file_lake, DAY, "QQQ")  # another writer's
    balance = reconcile(file_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.objects_counted, balance.objects_on_lake) == ([], 3, 4)


def test_a_day_without_ledgers_balances(file_lake: Lake) -> None:
    put_raw_bars(file_lake, DAY, "SPY")
    balance = reconcile(file_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.runs, balance.objects_counted, balance.objects_on_lake) == ([], 0, 0, 1)


TORN = "20260126T090000Z-torn"


def test_a_missing_object_an_imbalance_and_an_unreadable_ledger_are_errors_that_name_the_run(file_lake: Lake) -> None:
    put(file_lake, "ONE", account_of(2))
    put_raw_bars(file_lake, DAY, "SPY")
    wrong = account_of(0)
    wrong.events = 5
    put(file_lake, "TWO", wrong)
    file_lake.put(layout.ledger_key(DAY, TORN), b"{")
    assert objects_counted(file_lake, DAY, Channel.MINUTE) == 2
    assert list(read_ledgers(file_lake, DAY).unreadable) == [layout.ledger_key(DAY, TORN)]
    unreadable, imbalance, missing = reconcile(file_lake, DAY, Channel.MINUTE).errors
    assert f"{file_lake.url(layout.ledger_key(DAY, TORN))} cannot be read" in unreadable
    assert imbalance == "TWO: 5 events came in, but 0 are accounted for"
    assert missing == "the ledgers count 2 objects, but only 1 are on the lake"


def test_what_is_no_ledger_by_its_name_is_left_alone_and_balances(file_lake: Lake) -> None:
    put(file_lake, "ONE", account_of(1))
    put_raw_bars(file_lake, DAY, "SPY")
    file_lake.put("ledger/2026-01-26/notes.json", b"to do: lunch")
    file_lake.put("raw-data/2026-01-26/SPY/notes.json", b"{}")
    assert read_ledgers(file_lake, DAY).strays == ["ledger/2026-01-26/notes.json"]
    balance = reconcile(file_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.objects_on_lake) == ([], 1)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59Z", "2026-01-26T12:00:00"])
@pytest.mark.parametrize("name", ["started_at", "since", "until", "last_received_at"])
def test_a_ledger_with_an_impossible_time_cannot_be_read(name: str, time: str) -> None:
    at = datetime(2026, 1, 26, 15, tzinfo=UTC)
    account = Account(connections=[Connection(at, at)], last_received_at=at)
    whole = json.loads(encode_ledger(ledger_of(account)))
    place = {"started_at": whole, "last_received_at": whole["account"]}.get(name, whole["account"]["connections"][0])
    place[name] = time
    with pytest.raises(ValueError, match="the time"):
        decode_ledger(json.dumps(whole).encode())


@pytest.mark.parametrize("start_ms", [10**30, 10**17, -(10**14), 0])
def test_a_ledger_with_an_impossible_bar_cannot_be_read(start_ms: int) -> None:
    account = Account(connections=[Connection(datetime(2026, 1, 26, 15, tzinfo=UTC), last_bar_ms=5)])
    content = encode_ledger(ledger_of(account)).replace(b'"last_bar_ms": 5', b'"last_bar_ms": %d' % start_ms)
    with pytest.raises(ValueError, match=r"."):
        decode_ledger(content)
