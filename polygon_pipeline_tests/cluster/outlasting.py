"""What outlasts a machine: the account and the days where its disk is lost too, and the stream where another stands by.

`make cluster` runs it, as root, after scenarios.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline.collector.lease import read_lease
from polygon_pipeline.datasets.catalog import BAR_COVERAGE, NORMALIZED_BARS, Dataset
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import missing_minutes, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import clock, completed_sessions
from polygon_pipeline.simulator.faults import OutgoingFrame
from polygon_pipeline.simulator.rest_server import HistoryServer
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.cluster.cluster import Cluster, Pair
from polygon_pipeline_tests.cluster.machines import EXCHANGE, Machine
from polygon_pipeline_tests.cluster.scenarios import VARIABLES, Story, WatchedExchange, playing
from polygon_pipeline_tests.cluster.servers import Volume
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.made_days import day_state, made_day
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

_CHECKPOINT_SECONDS = 10
# To close a segment and to send it, where two cores have a cluster to run besides.
_ARCHIVING_SECONDS = 5
_FAST = 160.0  # a session takes 6 minutes


class TimedExchange(WatchedExchange):
    """It knows when each frame was sent, by time.monotonic()."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent_at: dict[bytes, float] = {}

    async def _deliver(self, connection: Any, frame: OutgoingFrame) -> None:
        self.sent_at.setdefault(frame.payload, time.monotonic())
        await super()._deliver(connection, frame)


@pytest.mark.timeout(1500)
def test_a_lost_disk_costs_what_was_not_archived_and_the_vendors_history_fills_it_without_anybody(
    tmp_path: Path, s3: SeaweedFS, say: Callable[[str], None]
) -> None:
    # Two sessions are to be played, and the first is: its history is published, whatever the hour is.
    day, _ = completed_sessions(datetime.now(UTC), 2)
    market = SyntheticMarket(WATCH_LIST)
    feed = SyntheticFeed(market, day, [Channel.MINUTE])
    with ExitStack() as ending:
        exchange = ending.enter_context(TimedExchange(feed, speed=_FAST, key="simulator", host=EXCHANGE, record=True))
        history = ending.enter_context(
            HistoryServer(market.day_bars, key="simulator", host=EXCHANGE, clock=lambda: exchange.market_time_ms)
        )
        variables = {
            **VARIABLES,
            "POLYGON_TICKERS": "*",  # archived as frames alone, so that a lost disk costs bars
            "FAST_DEMO_SESSIONS": "2",
            "POLYGON_CHECKPOINT_SECONDS": str(_CHECKPOINT_SECONDS),
            "POLYGON_REST_URL": history.url,
            "POLYGON_REST_REQUESTS_PER_MINUTE": "6000",
            "CLUSTER_EXCHANGE": exchange.url,
        }
        cluster = Cluster(tmp_path, s3, variables, days_per_run=5)
        ending.callback(cluster.close)
        cluster.start()
        lake = cluster.lake
        story = Story(cluster, exchange, say)
        first = story.collects(None, "the sensor starts a collector")
        machine = story.machine_of(first)
        archives = len(lake.keys(layout.frames_prefix(day)))
        until(lambda: len(lake.keys(layout.frames_prefix(day))) > archives, "a segment is archived")
        time.sleep(_CHECKPOINT_SECONDS - 2)  # so that the next one has much to lose

        story.begins(f"its machine is lost with its disk; a checkpoint is made every {_CHECKPOINT_SECONDS} s")
        lost_at = time.monotonic()
        machine.lose()
        [served] = exchange.served
        received = served.frames[: served.acknowledged]
        shutil.rmtree(machine.folder)
        second = story.collects(first, "the other machine collects")
        assert story.machine_of(second) is not machine

        archived = {bytes(line.content) for line in archived_lines(lake, day) if line.is_frame}
        missing = [frame for frame in received if frame.payload not in archived]
        ages = [lost_at - exchange.sent_at[frame.payload] for frame in missing]
        story.tells(
            f"{len(missing)} of {len(received)} frames were on that disk alone, the oldest for {max(ages):.1f} s, with "
            f"{sum(len(frame.bars) for frame in missing)} bars"
        )
        # What is promised, and no matter of speed.
        assert max(ages) <= _CHECKPOINT_SECONDS + _ARCHIVING_SECONDS

        until(exchange.finished.is_set, "the session is played", 600, 0.5)
        cluster.over.touch()
        story.begins("the session is over")
        story.until(lambda: _is_complete(lake, day, second.run), "the second run has ended")
        [gap] = missing_minutes(day, read_ledgers(lake, day).ledgers, datetime.now(UTC))
        story.until(lambda: day_state(lake, day) == "final", "the day is final", 400)
        story.until(lambda: _balances(cluster)[0] == "SUCCEEDED", "ledger_balances holds")
        assert "FAILED" in _balances(cluster)
        assert not _is_complete(lake, day, first.run)
        coverage = _rows(lake, BAR_COVERAGE, day)
        disconnected, connected, repaired = (
            sum(row[name] for row in coverage) for name in ("lost_disconnected", "lost_connected", "repaired_minutes")
        )
        bars, expected = _bars(_rows(lake, NORMALIZED_BARS, day)), _bars(market.day_bars(day).to_pylist())
        story.tells(
            f"{clock(gap[0])} to {clock(gap[1])} was missing: {repaired} bars repaired, {len(bars)} bars in all, "
            f"{len(expected)} expected"
        )
        assert repaired == disconnected + connected > 0
        assert bars == expected
        assert set(exchange.still_open) <= {machine.address}, "never two streams"


def _balances(cluster: Cluster) -> list[str]:
    return cluster.ui.check_history(NORMALIZED_BARS.name, "ledger_balances")


@pytest.mark.timeout(900)
def test_a_standby_takes_over_from_a_lost_machine_which_stands_by_itself_when_it_is_back(
    tmp_path: Path, s3: SeaweedFS, say: Callable[[str], None]
) -> None:
    with playing(lambda variables: Pair(tmp_path, s3, variables), say) as (day, pair, story):
        lake, exchange = pair.lake, story.exchange
        first = story.collects(None, "one of two machines collects")
        lost = story.machine_of(first)
        [other] = [machine for machine in pair.workers if machine is not lost]
        story.until(lambda: _runs(other), "the other stands by")
        time.sleep(15)  # it has seen the lease
        assert story.holder() == first.run
        renewed = until(lambda: read_lease(lake), "there is a lease")
        until(lambda: read_lease(lake) != renewed, "it is renewed once more", pause=0.2)

        story.begins("the collecting machine is lost right after a renewal")
        lost.lose()
        story.until(lambda: story.holder() in _runs(other), "the standby has the lease")
        story.collects(first, "its bars arrive")
        story.begins("the lost machine is back")
        pair.restart(lost)
        story.until(lambda: _is_complete(lake, day, first.run), "what it had received is published", 400)
        story.until(lambda: len(_runs(lost)) == 1 and first.run not in _runs(lost), "it stands by")
        story.goes_on(20)
        assert story.holder() in _runs(other)
        assert len(exchange.served) == 2
        pair.over.touch()
        story.until(lambda: not _runs(lost) and not _runs(other), "both have ended")
        story.ends(day)
        assert set(exchange.still_open) <= {lost.address}, "never two streams"


@pytest.fixture
def volume(network: None, tmp_path: Path) -> Iterator[Volume]:
    if not shutil.which("glusterd"):
        pytest.skip("needs glusterd: apt-get install glusterfs-server")
    volume = Volume(tmp_path / "volume")
    volume.start()
    yield volume
    volume.stop()


@pytest.mark.timeout(900)
def test_a_standby_publishes_the_journal_of_a_lost_machine_from_the_volume_that_both_mount(
    tmp_path: Path, s3: SeaweedFS, volume: Volume, say: Callable[[str], None]
) -> None:
    with playing(lambda variables: Pair(tmp_path, s3, variables, volume), say) as (day, pair, story):
        lake, exchange = pair.lake, story.exchange
        first = story.collects(None, "one of two machines collects")
        [lost] = [machine for machine in pair.workers if first.machine.startswith(machine.name)]
        story.until(lambda: len(list(volume.files.glob("*/journal.json"))) == 2, "the other stands by")
        time.sleep(15)  # it has seen the lease

        story.begins("the collecting machine is lost, and does not come back")
        lost.lose()
        second = story.collects(first, "the standby collects")
        story.until(lambda: _is_complete(lake, day, first.run), "it has published what the lost machine had received")
        assert set(exchange.still_open) <= {lost.address}
        pair.over.touch()
        story.until(lambda: _is_complete(lake, day, second.run), "it has ended")
        story.ends(day)


def _runs(machine: Machine) -> list[str]:
    """The runs that have a journal there: those at work, those that stand by, and lost ones."""
    return [path.parent.name for path in (machine.folder / "journal").glob("*/journal.json")]


def _is_complete(lake: Lake, day: date, run: str) -> bool:
    return any(ledger.complete for ledger in read_ledgers(lake, day).ledgers if ledger.run == run)


def _rows(lake: Lake, dataset: Dataset, day: date) -> list[dict[str, Any]]:
    made = made_day(lake, dataset.name, day)
    assert made is not None
    return list(made.to_pylist())


def _bars(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """By ticker and start, in Unix ms."""
    names = ("open", "high", "low", "close", "volume")
    starts = (row.get("start_ms") or int(row["timestamp"].timestamp()) * 1000 for row in rows)
    return {(row["ticker"], start): [row[name] for name in names] for row, start in zip(rows, starts, strict=True)}
