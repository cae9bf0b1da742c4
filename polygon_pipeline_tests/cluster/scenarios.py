"""What a cluster goes through. `make cluster` runs it, as root; `make test` does not find it by its name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import pytest

from polygon_pipeline.collector.lease import Holding, read_lease
from polygon_pipeline.datasets.catalog import DAILY_BARS, FOLLOWING
from polygon_pipeline.lake.ledger import read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, trading_days
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.cluster.cluster import COLLECTOR, Cluster, Pair
from polygon_pipeline_tests.cluster.machines import EXCHANGE, S3, Machine
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.history import put_history
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.made_days import day_state
from polygon_pipeline_tests.support.materializing import materialize
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

S = TypeVar("S", Cluster, Pair)

_DATASETS = [dataset.name for dataset in FOLLOWING if dataset.channel is Channel.MINUTE and not dataset.required]
SPEED = 48.0  # a session takes 20 minutes
VARIABLES = {
    "POLYGON_API_KEY": "simulator",
    "POLYGON_TICKERS": ",".join(WATCH_LIST),
    "FAST_DEMO_SESSIONS": "1",
    "FAST_DEMO_SPEED": "1",
    "FAST_DEMO_CHECKPOINT": "5",
    "FAST_DEMO_DRAIN": "10",
    "FAST_DEMO_SENSORS": "15",
}


class WatchedExchange(Exchange):
    """It knows of each stream that was open when the next one began whose it was, by the machine's address."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.still_open: list[str] = []

    def _register(self, connection: Any) -> None:
        self.still_open += [other.socket.remote_address[0] for other in self._connections]
        super()._register(connection)


@contextlib.contextmanager
def playing(make: Callable[[dict[str, str]], S], say: Callable[[str], None]) -> Iterator[tuple[date, S, Story]]:
    """The last complete session, played to machines, and their story. make: of the environment of their processes."""
    [day] = completed_sessions(datetime.now(UTC), 1)
    feed = SyntheticFeed(SyntheticMarket(WATCH_LIST), day, [Channel.MINUTE])
    with WatchedExchange(feed, speed=SPEED, key="simulator", host=EXCHANGE, record=True) as exchange:
        machines = make({**VARIABLES, "CLUSTER_EXCHANGE": exchange.url})
        try:
            machines.start()
            yield day, machines, Story(machines, exchange, say)
        finally:
            machines.close()


@pytest.mark.timeout(1800)
def test_a_session_survives_whatever_happens_to_the_cluster(
    tmp_path: Path, s3: SeaweedFS, say: Callable[[str], None]
) -> None:
    with playing(lambda variables: Cluster(tmp_path, s3, variables, days_per_run=5), say) as (day, cluster, story):
        exchange = story.exchange
        first = story.collects(None, "the sensor starts a collector")
        assert cluster.ui.statuses("collect_aggregates") == ["STARTED"]

        story.begins("its worker is killed")
        machine = story.machine_of(first)
        machine.kill(COLLECTOR)
        cluster.start_workers(machine, datasets=False)
        second = story.collects(first, "the next attempt collects")

        story.begins("its whole machine is lost")
        lost = story.machine_of(second)
        lost.lose()
        third = story.collects(second, "the other machine collects")
        assert story.machine_of(third) is not lost
        # A machine that is lost ends nothing: the vendor's server finds out by itself.
        assert set(exchange.still_open) <= {lost.address}
        exchange.still_open.clear()
        cluster.restart(lost)

        story.begins("its worker is told to end, as systemd and Docker do it")
        machine = story.machine_of(third)
        machine.end(COLLECTOR)
        story.until(lambda: not machine.processes(COLLECTOR), "it has published everything, and ended")
        [ledger] = [ledger for ledger in read_ledgers(cluster.lake, day)[0] if ledger.run == third.run]
        assert ledger.complete
        assert not ledger.imbalance
        third = story.collects(third, "the other machine collects")
        assert "CANCELED" in cluster.ui.statuses("collect_aggregates")
        cluster.start_workers(machine, datasets=False)

        story.begins("Redis is away for 45 s")
        cluster.redis.stop()
        story.goes_on(45)
        cluster.redis.start()
        story.goes_on(45)
        assert story.holder() == third.run

        story.begins("PostgreSQL is away for 30 s")
        cluster.postgres.stop()
        story.goes_on(30)
        cluster.postgres.start()
        story.goes_on(30)
        assert story.holder() == third.run

        story.begins("its machine is cut off from S3 alone")
        machine = story.machine_of(third)
        machine.cut_off(S3)
        fourth = story.collects(third, "the other machine collects", 300)
        assert story.machine_of(fourth) is not machine
        machine.join(S3)

        story.begins("it is terminated by hand")
        run = cluster.ui.runs()[0]
        assert run["status"] == "STARTED"
        cluster.ui.terminate(run["runId"])
        story.until(lambda: cluster.ui.runs()[0]["status"] == "CANCELED", "it is canceled")
        time.sleep(40)
        assert cluster.ui.runs()[0]["runId"] == run["runId"], "it stays ended"

        story.begins("it is launched again where the journals are, on one machine after the other")
        for machine in cluster.workers:
            for other in cluster.workers:
                if other is not machine:
                    other.kill(COLLECTOR)
            cluster.ui.launch("collect_aggregates")
            before = story.last
            story.collects(before, f"{machine.address} collects")
            run = cluster.ui.runs()[0]
            cluster.ui.terminate(run["runId"])
            story.until(lambda: cluster.ui.runs()[0]["status"] == "CANCELED", "it is canceled")
            for other in cluster.workers:
                if other is not machine:
                    cluster.start_workers(other, datasets=False)
        cluster.over.touch()
        story.until(lambda: day_state(cluster.lake, day) == "final", "the day is final", 400)
        story.ends(day)
        assert exchange.still_open == [], "never two streams"


@pytest.mark.timeout(600)
def test_a_collector_that_is_terminated_while_redis_is_away_ends_and_stays_ended(
    tmp_path: Path, s3: SeaweedFS, say: Callable[[str], None]
) -> None:
    with playing(lambda variables: Cluster(tmp_path, s3, variables, days_per_run=5), say) as (_, cluster, story):
        story.collects(None, "the sensor starts a collector")
        [run] = cluster.ui.runs()
        cluster.redis.stop()
        story.begins("it is terminated by hand while Redis is away")
        with contextlib.suppress(OSError):  # the page says that the broker is away
            cluster.ui.terminate(run["runId"])
        story.until(lambda: cluster.ui.runs()[0]["status"] == "CANCELED", "it is canceled")
        cluster.redis.start()
        time.sleep(40)
        assert [found["runId"] for found in cluster.ui.runs()] == [run["runId"]], "it stays ended"


@pytest.mark.timeout(1200)
def test_a_backfill_over_two_machines_of_which_one_is_lost_makes_what_one_machine_makes(
    tmp_path: Path, s3: SeaweedFS, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    days = trading_days(date(2026, 1, 5), date(2026, 2, 17))
    assert len(days) == 30
    began = time.monotonic()
    with ExitStack() as ending:
        start = {**VARIABLES, "POLYGON_HISTORY_START": "2026-01-02", "CLUSTER_EXCHANGE": f"ws://{EXCHANGE}:1/stocks"}
        cluster = Cluster(tmp_path, s3, start, days_per_run=3)
        ending.callback(cluster.close)
        cluster.over.touch()  # nothing is collected
        put_history(cluster.lake, days, tmp_path)
        cluster.start()
        began = time.monotonic()
        asked = cluster.ui.backfill(_DATASETS, days)
        until(lambda: len(_made(cluster.lake)) >= 15, "half of the days are made", 400, 0.5)
        lost = until(lambda: _at_work(cluster), "a machine is at work", 60, 0.2)
        at = len(_made(cluster.lake))
        lost.lose()
        until(lambda: cluster.ui.backfill_status(asked) != "REQUESTED", "the backfill ends", 600, 1)
        seconds = time.monotonic() - began
        assert cluster.ui.backfill_status(asked) == "COMPLETED_SUCCESS"
        statuses = cluster.ui.statuses("__ASSET_JOB")
        found = _files(cluster.lake)
    alone = local_lake(tmp_path / "alone")
    put_history(alone, days, tmp_path)
    monkeypatch.setenv("LAKE_URI", alone.uri)
    monkeypatch.setenv("POLYGON_TICKERS", ",".join(WATCH_LIST[:3]))
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(instance, _DATASETS, str(days[0]), str(days[-1]))
    expected = _files(alone)
    assert len(expected) == len(days) * (len(_DATASETS) + 1)
    assert found.keys() == expected.keys()
    differing = [key for key in expected if found[key] != expected[key]]
    text = (
        f"a backfill of {len(days)} days over two machines, one lost after {at}: {seconds:.0f} s, "
        f"{statuses.count('FAILURE')} lost and tried again, {len(expected)} files, {len(differing)} differ"
    )
    print(text, flush=True)
    say(text)
    assert differing == []


def _made(lake: Lake) -> list[str]:
    return lake.keys(f"datasets/{DAILY_BARS.name}/")


def _at_work(cluster: Cluster) -> Machine | None:
    """A machine with a run of the backfill: one that has something in its scratch folders."""
    busy = [machine for machine in cluster.workers if list(machine.folder.glob("tmp/polygon_pipeline-scratch-*/run/*"))]
    return busy[0] if busy else None


def _files(lake: Lake) -> dict[str, bytes]:
    return {key: lake.get(key) or b"" for key in lake.keys("datasets/")}


def holder_after(last: Holding | None, lake: Lake) -> Holding | None:
    """Who has the lease, and is not who had it last."""
    lease = read_lease(lake)
    if lease is None or lease.released or (last and lease.run == last.run):
        return None
    return lease


class Story:
    """What happens, with the seconds that it took."""

    def __init__(self, cluster: Cluster | Pair, exchange: WatchedExchange, say: Callable[[str], None]) -> None:
        self._cluster = cluster
        self.exchange = exchange
        self._say = say
        self._began = time.monotonic()
        self._streams = 0  # which the collectors before had
        self.last: Holding | None = None

    def begins(self, what: str) -> None:
        self._began = time.monotonic()
        self.tells(what)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 180) -> None:
        until(condition, what, seconds, 0.5)
        self.tells(f"{what}, after {time.monotonic() - self._began:.0f} s")

    def collects(self, after: Holding | None, what: str, seconds: float = 240) -> Holding:
        """Waits until another run than this holds the lease and its bars arrive; then it has a while to collect."""

        def other() -> Holding | None:
            streams = self.exchange.served[self._streams :]
            return holder_after(after, self._cluster.lake) if any(served.acknowledged for served in streams) else None

        found = until(other, what, seconds, 0.5)
        self.tells(f"{what}, after {time.monotonic() - self._began:.0f} s")
        self._streams = len(self.exchange.served)
        self.last = found
        self.goes_on(15)
        return found

    def goes_on(self, seconds: float) -> None:
        """For so long bars arrive, on the same connection."""
        connections, sent = len(self.exchange.served), self.exchange.sent
        time.sleep(seconds)
        assert len(self.exchange.served) == connections
        assert self.exchange.sent > sent

    def holder(self) -> str | None:
        lease = read_lease(self._cluster.lake)
        return lease.run if lease else None

    def machine_of(self, lease: Holding) -> Machine:
        """Where a run's journal is."""
        [found] = [machine for machine in self._cluster.workers if (machine.folder / "journal" / lease.run).exists()]
        return found

    def ends(self, day: date) -> None:
        """The account: what the exchange knows that a client has received, and what the lake has."""
        lake = self._cluster.lake
        ledgers, unreadable, _ = read_ledgers(lake, day)
        assert not unreadable
        archived = {bytes(line.content) for line in archived_lines(lake, day) if line.is_frame}
        received = [frame for served in self.exchange.served for frame in served.frames[: served.acknowledged]]
        lost = [frame for frame in received if frame.payload not in archived]
        self.tells(
            f"{len(ledgers)} runs, {len(self.exchange.served)} streams, "
            f"{sum(len(frame.bars) for frame in received)} bars received, "
            f"{sum(len(frame.bars) for frame in lost)} lost, {day_state(lake, day)}"
        )
        for ledger in ledgers:
            self.tells(
                f"ledger {ledger.run}: complete {ledger.complete}, {ledger.account.bars} bars {ledger.imbalance}"
            )
        assert lost == []
        assert all(ledger.complete and not ledger.imbalance for ledger in ledgers)

    def tells(self, text: str) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)
        self._say(text)
