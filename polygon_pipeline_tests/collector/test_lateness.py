"""How late bars come for the first time and again, measured by the collector."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from polygon_pipeline.collector.journal import Journal, RecordType
from polygon_pipeline.collector.lateness import Arrivals
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.lag import RESOLUTION, Lateness, merged
from polygon_pipeline.lake.ledger import Account, Connection
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import NOON, moment, plain_bar
from polygon_pipeline_tests.support.journals import frame_of, journal_header, publish, read_ledger, wait_until_synced

BEFORE = moment(NOON) - timedelta(hours=1)
END = moment(NOON + 60_000)


def came(seconds: float, *tickers: str, start_ms: int = NOON) -> tuple[datetime, dict[tuple[Channel, int], set[str]]]:
    """So long after the end of NOON's bars."""
    return END + timedelta(seconds=seconds), {(Channel.MINUTE, start_ms): set(tickers)}


def measured(account: Account) -> Lateness:
    return account.lateness[Channel.MINUTE]


def test_a_bar_that_comes_again_is_a_revision_and_the_latest_is_kept_exactly() -> None:
    account, arrivals = Account(connections=[Connection(BEFORE)]), Arrivals("processing")
    arrivals.add(account, [came(2, "SPY", "QQQ"), came(70, "SPY", "IWM"), came(840.5, "SPY"), came(300, "QQQ")])
    assert measured(account).first.count == 3
    assert measured(account).revised.count == 3
    assert measured(account).latest_revision_seconds == 840.5
    assert 300 <= measured(account).revised.percentiles().p50 <= 300 * RESOLUTION


def test_what_may_have_come_before_the_connection_counts_as_neither() -> None:
    account, arrivals = Account(connections=[Connection(END + timedelta(minutes=5))]), Arrivals("processing")
    arrivals.add(account, [came(302, "SPY")])
    assert (measured(account).first.count, measured(account).revised.count) == (0, 0)
    arrivals.add(account, [came(310, "SPY")])
    assert (measured(account).first.count, measured(account).revised.count) == (0, 1)


def test_what_is_older_than_everything_remembered_came_before() -> None:
    account, arrivals = Account(connections=[Connection(BEFORE)]), Arrivals("processing", remembered=2)
    later = NOON + 60_000
    arrivals.add(account, [came(1, "SPY", "QQQ"), came(61, "SPY", "QQQ", start_ms=later), came(400, "IWM")])
    assert measured(account).revised.count == 1
    assert measured(account).first.count == 4


def test_of_a_day_that_is_played_the_newest_bar_is_the_time() -> None:
    account, arrivals = Account(connections=[Connection(BEFORE, first_bar_ms=NOON - 60_000)]), Arrivals("event")
    years = 10 * 365 * 86_400
    arrivals.add(account, [came(years, "SPY"), came(years, "SPY", start_ms=NOON + 600_000), came(years, "SPY")])
    assert measured(account).latest_revision_seconds == 600


def test_those_of_several_runs_are_merged_as_if_one_had_measured() -> None:
    one, other = Lateness(), Lateness()
    for lateness, seconds in ((one, 60.0), (other, 800.0)):
        lateness.first.add(1.0, 10)
        lateness.revised.add(seconds)
        lateness.latest_revision_seconds = seconds
    both = merged([one, other])
    assert both.first.count == 20
    assert both.revised.count == 2
    assert both.latest_revision_seconds == 800
    assert one.revised.count == 1
    assert merged([]) == Lateness()


def test_the_ledger_says_how_late_revisions_came(tmp_path: Path, file_lake: Lake) -> None:
    header = journal_header(lake_uri=file_lake.uri)
    journal = Journal(tmp_path, header)
    publisher = Publisher(file_lake, journal, header)
    journal.append(RecordType.EVENT, b'{"kind":"subscribed","detail":""}')
    this_minute = int(datetime.now(UTC).timestamp()) // 60 * 60_000
    for price in (1, 2):
        journal.append(RecordType.FRAME, frame_of(plain_bar("SPY", this_minute, price), plain_bar("QQQ", NOON, price)))
        wait_until_synced(journal)
        publish(publisher)
    journal.close()
    publish(publisher)
    publisher.put_ledger(complete=True)
    journal.release()
    ledger = read_ledger(file_lake)
    measured = ledger.account.lateness[Channel.MINUTE]
    assert ledger.lateness == {Channel.MINUTE: measured.summary()}
    assert measured.first.count == 1, "the other may have come before the connection"
    assert measured.revised.count == 2
    assert measured.latest_revision_seconds > 86_400
