"""What people are told of a run: how it stands, how it ended, and what its lease says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec

from polygon_pipeline.collector.collector import Progress
from polygon_pipeline.collector.lease import CollectorStatus, Holding
from polygon_pipeline.collector.telling import farewell, live_status, standing, summary
from polygon_pipeline.lake.ledger import SESSION_OVER, Account, Connection
from polygon_pipeline.lake.watermark import watermarks
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.leases import holding

NOW = datetime(2026, 1, 26, 19, 42, 30, tzinfo=UTC)  # 14:42 New York
WANTED = tuple(f"T{number}" for number in range(12))


def progress_of(
    account: Account, backlog_bytes: int = 0, fault: str | None = None, tickers: int = 12, disk_only: float = 0.0
) -> Progress:
    waits = 7.0 if backlog_bytes else 0.0
    return Progress(
        account,
        frozenset({DAY}),
        tickers,
        gaps=len(account.gaps("processing")),
        connected=True,
        evicted=False,
        elapsed_seconds=60.0,
        backlog_frames=0,
        backlog_bytes=backlog_bytes,
        unpublished_seconds=waits,
        disk_only_seconds=disk_only,
        store_fault=fault,
        store_faults=0,
        lease_seconds=None,
        journal_free_bytes=0,
    )


def account_with_a_gap() -> Account:
    """Lost at 10:15 New York, and back at 10:20."""
    lost, back = datetime(2026, 1, 26, 15, 15, tzinfo=UTC), datetime(2026, 1, 26, 15, 20, tzinfo=UTC)
    return Account(bars=8910, connections=[Connection(lost - timedelta(hours=1), lost, "reset"), Connection(back)])


def test_a_checkpoint_says_in_one_sentence_how_the_run_stands() -> None:
    said = standing(progress_of(account_with_a_gap()), 8910, WANTED, "processing", NOW)
    assert said == "14:42 New York: 8,910 bars, 12 of 12 tickers, 1 gap, nothing waits"


def test_up_to_where_the_run_is_complete_stands_in_the_sentence_and_in_its_lease() -> None:
    marks = watermarks(
        account_with_a_gap(), ["AM.*"], "processing", DAY, heard_until=NOW + timedelta(seconds=35)
    ) | watermarks(account_with_a_gap(), ["A.*"], "processing", DAY, heard_until=NOW)
    said = standing(replace(progress_of(account_with_a_gap()), watermarks=marks), 8910, WANTED, "processing", NOW)
    assert "1 gap, complete through 14:41, nothing waits" in said
    lease = msgspec.structs.replace(holding(now=NOW), status=CollectorStatus(True, watermarks=marks))
    stored = msgspec.json.decode(msgspec.json.encode(lease), type=Holding)
    assert "complete through 14:41" in live_status(stored, NOW)


def test_what_is_not_as_it_should_be_stands_in_the_sentence() -> None:
    account = account_with_a_gap()
    account.quarantined = 3
    account.connections[-1].until, account.connections[-1].ended_by = NOW, "no answer"
    said = standing(progress_of(account, 3_200_000, "503", tickers=11), 8910, WANTED, "processing", NOW)
    assert said == (
        "14:42 New York: 8,910 bars, 11 of 12 tickers, 2 gaps, 3 quarantined, not connected (no answer), "
        "3.2 MB wait on disk, for 7 s (503)"
    )


def test_what_would_be_lost_with_the_disk_is_said_and_not_what_is_on_its_way() -> None:
    said = [standing(progress_of(Account(), disk_only=s), 0, WANTED, "processing", NOW) for s in (4.0, 287.4)]
    assert [text.rpartition(", ")[2] for text in said] == ["nothing waits", "287 s of frames on this disk only"]
    status = CollectorStatus(disk_only_seconds=61.0)
    told = live_status(msgspec.structs.replace(holding(now=NOW), status=status), NOW)
    assert "nothing waits, 61 s of frames on this disk only; said" in told


def test_the_whole_market_has_no_number_of_tickers_to_reach() -> None:
    assert "no gaps" in standing(progress_of(Account()), 0, ("*",), "processing", NOW)
    assert " 12 tickers," in standing(progress_of(Account()), 0, ("*",), "processing", NOW)


def test_a_past_day_that_is_played_has_its_own_clock() -> None:
    newest = datetime(2026, 1, 26, 16, 4, tzinfo=UTC)  # the minute that ends at 11:05 New York
    account = Account(bars=1, connections=[Connection(NOW, last_bar_ms=int(newest.timestamp() * 1000))])
    assert standing(progress_of(account), 1, WANTED, "event", NOW).startswith("11:05 New York: ")


def test_a_good_end_is_a_summary_with_the_gaps_in_new_yorks_time() -> None:
    account = account_with_a_gap()
    account.ended_by = SESSION_OVER
    assert summary(progress_of(account), DAY, WANTED, "processing") == (
        "Collected 2026-01-26: 8,910 bars, 12 of 12 tickers, 1 gap (10:14 to 10:19 New York). Everything that was "
        "received is on the lake. It ended because the session is over."
    )


def test_a_termination_says_what_is_safe_and_what_is_not_collected() -> None:
    said = farewell(progress_of(Account(bars=8910)), DAY, WANTED, "processing", True, NOW)
    assert said == (
        "Terminated by hand at 14:42 New York. 8,910 bars, 12 of 12 tickers, no gaps. Everything that was received is "
        "on the lake. Not collected: what the market of 2026-01-26 does from now until 20:00. It stays ended; launch "
        "collect_aggregates to go on. What is missed comes from the vendor's history."
    )
    stopped = farewell(progress_of(Account(), 12_300), DAY, WANTED, "processing", False, NOW)
    assert stopped.startswith("Stopped at 14:42")
    assert "12.3 kB of what was received wait in the journal on this machine" in stopped
    assert "The next start of Dagster goes on" in stopped


def test_a_termination_after_the_session_misses_nothing() -> None:
    after = datetime(2026, 1, 27, 1, 10, tzinfo=UTC)  # 20:10 New York: revisions only
    assert "Not collected" not in farewell(progress_of(Account()), DAY, WANTED, "processing", True, after)


def test_the_lease_says_how_the_collector_at_work_does() -> None:
    status = CollectorStatus(True, 8910, 98.2, NOW - timedelta(seconds=27), 0, 0.0, 1)
    held = msgspec.structs.replace(holding(now=NOW), renewed_at=NOW - timedelta(seconds=4), status=status)
    assert live_status(held, NOW) == (
        "connected, 8,910 bars, 98.2 a second, the last came at 14:42:03 New York, 1 gap, nothing waits; said 4 s ago"
    )
    for nobodys in (None, holding(now=NOW, released=True), holding(now=NOW, expires_in=-timedelta(minutes=2))):
        assert live_status(nobodys, NOW) == "it has no lease yet, or is about to end"
