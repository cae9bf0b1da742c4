"""A whole collector with faulty storage: what it received is stored, and the connection is not affected."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline.collector import collector as collector_module
from polygon_pipeline.collector.collector import Collector, Progress
from polygon_pipeline.collector.journal import Journal, RecordType, leftovers
from polygon_pipeline.collector.lease import read_lease
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.bars import Channel, iso_seconds
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import DAY, OPENING, JsonObject, plain_bar
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3, lake_behind
from polygon_pipeline_tests.support.feeds import feed_event
from polygon_pipeline_tests.support.files import stats
from polygon_pipeline_tests.support.journals import journal_header, read_ledger
from polygon_pipeline_tests.support.s3_server import S3Address, SeaweedFS, strict_s3
from polygon_pipeline_tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.fault("faults of the storage")]

_REVISIONS = 3


def _bar(ticker: str, tick: int, **fields: Any) -> Event:
    """A bar whose price says when it was sent, and which three ticks revise. All are of one day."""
    start_ms = OPENING + 60_000 * (tick // _REVISIONS % 300)
    return feed_event(OPENING + tick * 1000, plain_bar(ticker, start_ms, tick + 1, **fields))


def _feed(tickers: int, ticks: int) -> list[Event]:
    return [_bar(f"T{number:03d}", tick) for tick in range(ticks) for number in range(tickers)]


def _direct(lake: Lake, seaweedfs: SeaweedFS) -> Lake:
    """The same lake without the proxy, to look at it."""
    return open_lake(lake.uri, seaweedfs.access)


class _Run:
    """A collector on a thread of its own, and what it says."""

    def __init__(self, lake: Lake, exchange: Exchange, folder: Path, **changes: Any) -> None:
        self.journal_dir = folder / "journal"
        self.lake = lake
        self.exchange = exchange
        self.said: list[str] = []
        self.progress: list[Progress] = []
        self.error: BaseException | None = None
        log = logging.Logger("collector")
        log.addHandler(_Listener(self.said))
        collector = Collector(lake, plan(exchange.url, self.journal_dir, **changes), log)
        self._over_since: float | None = None

        def run() -> None:
            try:
                collector.run(self._ending, self.progress.append)
            except BaseException as error:  # noqa: BLE001 finish() raises it where it can be seen
                self.error = error

        self._thread = threading.Thread(target=run, name="collector", daemon=True)
        self._thread.start()

    def _ending(self) -> str | None:
        """Some time after the feed's end, so that everything sent has been read."""
        if not self.exchange.finished.is_set():
            return None
        self._over_since = self._over_since or time.monotonic()
        return "the feed is over" if time.monotonic() > self._over_since + 1.5 else None

    def finish(self) -> Progress:
        self._thread.join(240)
        assert not self._thread.is_alive(), self.said
        if self.error:
            raise self.error
        return self.progress[-1]

    def backlog(self) -> int:
        """The size of the journal's segments on disk."""
        return _backlog(self.journal_dir)


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def _backlog(journal_dir: Path) -> int:
    """In bytes."""
    return sum(stat.st_size for stat in stats(journal_dir, "*/*.segment").values())


def _bars(lake: Lake) -> list[JsonObject]:
    """The archive's, revisions included."""
    frames = (json.loads(line.content) for line in archived_lines(lake, DAY) if line.is_frame)
    return [event for frame in frames for event in frame if event["ev"] == "AM"]


def _assert_all_is_stored(lake: Lake, run: _Run, feed: list[Event]) -> str:
    """Every bar that was sent is archived once, its object is the latest revision, and the account says the same."""
    assert run.exchange.sent == len(feed)
    sent = [json.loads(event.payload) for event in feed]
    archived = _bars(lake)
    assert sorted((bar["sym"], bar["c"]) for bar in archived) == sorted((bar["sym"], bar["c"]) for bar in sent)
    latest = {f"{layout.raw_prefix(Channel.MINUTE, DAY)}{b['sym']}/{iso_seconds(b['s'])}.json": b["c"] for b in sent}
    content: dict[str, bytes] = {}
    lake.get_many(lake.keys("raw-data"), content.__setitem__)
    assert {key: json.loads(record)["bar_data"]["close"] for key, record in content.items()} == latest
    ledger = read_ledger(lake)
    count = ledger.account.days[DAY][Channel.MINUTE]
    assert ledger.complete
    assert ledger.imbalance == []
    assert (count.bars, count.objects) == (len(sent), len(latest))
    assert leftovers(run.journal_dir) == []
    assert list(run.journal_dir.iterdir()) == []
    assert len(ledger.account.connections) == 1
    assert ledger.gaps == []
    assert not [line for line in run.said if line.startswith("disconnected") and "stopped" not in line]
    return f"{len(sent):,} bars, {len(latest):,} objects, 0 lost, 0 doubled, 0 disconnects"


def test_a_mix_of_every_fault_loses_no_bar_and_no_connection(
    seaweedfs: SeaweedFS, tmp_path: Path, say: Callable[[str], None]
) -> None:
    rates = {Fault.DELAY: 0.03, Fault.SLOW_DOWN: 0.02, Fault.INTERNAL_ERROR: 0.02}
    rates |= {Fault.RESET: 0.02, Fault.LOST_RESPONSE: 0.02, Fault.FORBIDDEN: 0.005}
    rates |= {Fault.EXPIRED: 0.005, Fault.SKEWED: 0.005}
    feed = _feed(tickers=30, ticks=60)
    with FaultyS3(seaweedfs.endpoint_url, seed=5) as proxy, Exchange(feed, speed=10) as exchange:
        lake = lake_behind(proxy, seaweedfs)
        run = _Run(lake, exchange, tmp_path)
        until(lambda: exchange.sent, "bars are sent")
        proxy.rates = rates
        for path in ("raw-data", "raw-frames", "ledger", "raw-data"):
            proxy.order(Fault.LOST_RESPONSE, 2, "PUT", path)
            proxy.order(Fault.RESET, 1, "PUT", path)
        proxy.order(Fault.SLOW_DOWN, 3, "PUT", "raw-frames")
        run.finish()
        assert proxy.orders_left == 0
    account = _assert_all_is_stored(_direct(lake, seaweedfs), run, feed)
    assert set(proxy.counts) == set(Fault)
    faults = ", ".join(f"{count} × {fault}" for fault, count in sorted(proxy.counts.items()))
    say(f"storage faults: {proxy.requests:,} requests, {faults}: {account}")


def test_credentials_refused_at_the_start_end_the_run_before_it_connects_to_the_vendor(
    seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    with FaultyS3(seaweedfs.endpoint_url, {Fault.FORBIDDEN: 1.0}) as proxy, Exchange(_feed(1, 9), speed=0) as exchange:
        run = _Run(lake_behind(proxy, seaweedfs), exchange, tmp_path)
        with pytest.raises(LakeError, match=r"refuses these credentials\. Check AWS_"):
            run.finish()
        assert exchange.sent == 0
        assert list(run.journal_dir.iterdir()) == []


def test_a_missing_bucket_ends_the_run_before_it_connects_to_the_vendor(tmp_path: Path, seaweedfs: SeaweedFS) -> None:
    # SeaweedFS makes a bucket that an administrator writes to; this server answers as S3 does.
    with strict_s3() as url, Exchange(_feed(1, 9), speed=0) as exchange:
        lake = open_lake("s3://nowhere/lake", lambda: S3Access(seaweedfs.address.session(), url))
        run = _Run(lake, exchange, tmp_path)
        with pytest.raises(LakeError, match=r"nowhere/lake does not exist\. Create the bucket"):
            run.finish()
        assert exchange.sent == 0


def test_credentials_that_expire_and_are_renewed_during_a_session_lose_nothing(
    seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    feed = _feed(tickers=10, ticks=50)
    with FaultyS3(seaweedfs.endpoint_url) as proxy, Exchange(feed, speed=10) as exchange:
        lake = lake_behind(proxy, seaweedfs)
        run = _Run(lake, exchange, tmp_path)
        until(lambda: run.progress, "the first checkpoint")
        proxy.rates = {Fault.EXPIRED: 1.0}
        until(lambda: [line for line in run.said if "The provided token has expired" in line], "the refusal is logged")
        until(lambda: proxy.counts[Fault.EXPIRED] >= 3, "it was refused three times")
        proxy.rates = {}
        run.finish()
    assert "the lake takes writes again" in run.said
    _assert_all_is_stored(_direct(lake, seaweedfs), run, feed)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.EXPIRED, Fault.SKEWED])
def test_collecting_starts_although_the_lake_is_down_or_refuses_what_may_pass(
    fault: Fault, seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    feed = _feed(tickers=10, ticks=40)
    with FaultyS3(seaweedfs.endpoint_url, {fault: 1.0}) as proxy, Exchange(feed, speed=10) as exchange:
        lake = lake_behind(proxy, seaweedfs)
        run = _Run(lake, exchange, tmp_path)
        until(lambda: run.backlog() > 5000, "bars wait in the journal")
        assert _direct(lake, seaweedfs).keys("") == []
        proxy.rates = {}
        run.finish()
    _assert_all_is_stored(_direct(lake, seaweedfs), run, feed)


def test_the_lease_and_the_progress_show_the_backlog_while_the_lake_accepts_no_bars(
    seaweedfs: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], None]
) -> None:
    monkeypatch.setattr(collector_module, "RENEW_SECONDS", 0.2)
    feed = _feed(tickers=10, ticks=70)
    with FaultyS3(seaweedfs.endpoint_url) as proxy, Exchange(feed, speed=10) as exchange:
        lake = lake_behind(proxy, seaweedfs)
        run = _Run(lake, exchange, tmp_path)
        until(lambda: run.progress, "the first checkpoint")
        proxy.only, proxy.rates = "raw-", {Fault.FORBIDDEN: 1.0}
        seen = []

        def shown() -> bool:
            holding = read_lease(lake)
            assert holding
            seen.append(holding.status)
            return bool(holding.status.store_fault) and holding.status.backlog_bytes > 5000

        until(shown, "the lease shows the fault and the backlog")
        assert seen[-1].connected
        assert seen[-1].unpublished_seconds > 0
        assert "refuses these credentials" in (seen[-1].store_fault or "")
        proxy.rates = {}
        until(
            lambda: (holding := read_lease(lake)) and holding.status.store_fault is None,
            "the lease shows no fault any more",
        )
        last = run.finish()
    assert (last.backlog_bytes, round(last.unpublished_seconds), last.store_fault) == (0, 0, None)
    released = read_lease(_direct(lake, seaweedfs))
    assert released
    assert released.released
    _assert_all_is_stored(_direct(lake, seaweedfs), run, feed)
    say(f"blocked lake: the lease showed {seen[-1].backlog_bytes:,} bytes waiting, then none")


# An outage, with a feed that is fast enough to fill any buffer

_TICKERS = 50
_FILLER = "x" * 1000  # the vendor may add fields; here it makes megabytes of few bars


def _fast_feed() -> Iterator[Event]:
    for tick in itertools.count():
        for number in range(_TICKERS):
            yield _bar(f"T{number:03d}", tick, filler=_FILLER)


def _collect_frames(uri: str, address: S3Address, url: str, folder: Path, over: Any, counts: Any) -> None:
    """The child: a collector of frames alone, until the day is over."""
    lake = open_lake(uri, address.access)
    collector = Collector(lake, plan(url, folder, write_objects=False), logging.Logger("collector"))
    collector.run(lambda: "over" if over.is_set() else None, lambda p: counts.put((p.account.bars, p.backlog_bytes)))


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the collector is gone")


def _watch_memory(pid: int, figures: list[float], over: Callable[[], bool], what: str) -> None:
    """Adds the collector's memory (MiB) to the figures, again and again, until that is over."""

    def look() -> bool:
        figures.append(_resident_mib(pid))
        return over()

    until(look, what)


def test_during_an_outage_of_the_lake_bars_wait_on_disk_not_in_memory_and_are_published_after_it(
    seaweedfs: SeaweedFS, tmp_path: Path, say: Callable[[str], None]
) -> None:
    lake = open_lake(f"s3://{seaweedfs.new_bucket()}/lake", seaweedfs.access)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["polygon_pipeline.collector.collector", "boto3"])
    over, counts = context.Event(), context.Queue()
    journal_dir = tmp_path / "journal"

    def backlog_mib() -> float:
        return _backlog(journal_dir) / 2**20

    with Exchange(_fast_feed(), speed=100) as exchange:
        arguments = (lake.uri, seaweedfs.address, exchange.url, journal_dir, over, counts)
        child = context.Process(target=_collect_frames, args=arguments, daemon=True)
        child.start()
        assert child.pid
        for _ in range(4):  # so that every buffer and library has its size
            counts.get(timeout=60)
        before: list[float] = []
        _watch_memory(child.pid, before, lambda: len(before) == 20, "its usual memory is known")
        seaweedfs.stop()
        try:
            during: list[float] = []
            _watch_memory(child.pid, during, lambda: backlog_mib() > 40, "a backlog has grown")
            peak_backlog = backlog_mib()
        finally:
            seaweedfs.start()
        after: list[float] = []
        _watch_memory(child.pid, after, lambda: backlog_mib() < 20, "the backlog is published")
        over.set()
        child.join(120)
        assert child.exitcode == 0
        bars_sent = exchange.sent
    ledger = read_ledger(lake)
    archived = [(bar["sym"], bar["c"]) for bar in _bars(lake)]
    assert len(archived) == len(set(archived)) == ledger.account.bars
    # The feed numbers its bars by their price: up to the moment of the stop, none is missing.
    assert set(archived) == set(itertools.islice(_numbers(), len(archived)))
    assert bars_sent >= len(archived)
    assert ledger.complete
    assert ledger.imbalance == []
    assert len(ledger.account.connections) == 1
    assert ledger.gaps == []
    assert list(journal_dir.iterdir()) == []
    assert max(during) - max(before) < peak_backlog / 2
    say(
        f"outage: {len(archived):,} bars, {peak_backlog:.0f} MiB waited on disk, 0 lost, 0 doubled, "
        f"0 disconnects; the collector's memory: {max(before):.0f} MiB before, at most {max(during):.0f} during, "
        f"{max(after):.0f} after"
    )


def _numbers() -> Iterator[tuple[str, int]]:
    for tick in itertools.count():
        for number in range(_TICKERS):
            yield f"T{number:03d}", tick + 1


def test_a_large_batch_is_published_although_one_request_in_a_hundred_fails(
    seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    with FaultyS3(seaweedfs.endpoint_url, seed=3) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        header = journal_header(lake_uri=lake.uri)
        journal = Journal(tmp_path, header)
        for start in range(0, 1500, 300):
            events = [_bar(f"T{number:04d}", 0).payload for number in range(start, start + 300)]
            journal.append(RecordType.FRAME, b"[" + b",".join(events) + b"]")
        journal.close()
        publisher = Publisher(lake, journal, header)
        publisher.step()
        proxy.rates = {Fault.RESET: 0.005, Fault.LOST_RESPONSE: 0.005}
        tries = 0
        while tries < 60:
            tries += 1
            try:
                publisher.step()
                break
            except STORE_ERRORS:
                continue
        journal.release()
        assert tries < 60
    assert len(_direct(lake, seaweedfs).keys("raw-data")) == 1500
