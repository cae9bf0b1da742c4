"""A whole run of the collector against an exchange without faults. With faults: test_chaos and test_storage_faults."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from polygon_pipeline.collector import journal
from polygon_pipeline.collector.collector import Collector, Progress
from polygon_pipeline.collector.journal import JournalError, leftovers
from polygon_pipeline.collector.lease import Lease, read_lease
from polygon_pipeline.datasets.inputs import fetch_raw, normalize_day
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon.stream import Backoff
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import DAY, NOON, at, plain_bar
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.day_files import read
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.journals import finished_journal, frame_of, publish_leftovers, read_ledger
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.scripted import Script, scripted, status

_LOG = logging.getLogger("test")


@pytest.mark.slow
def test_a_run_publishes_all_it_received_and_then_leaves_no_journal_and_no_lease(
    tmp_path: Path, file_lake: Lake
) -> None:
    feed = [event(ticker, minute) for minute in range(3) for ticker in ("SPY", "BRK.B")]
    progress: list[Progress] = []
    with Exchange(feed, speed=0) as exchange:

        def ending() -> str | None:
            received = progress and progress[-1].account.bars == len(feed)
            return "all of it is there" if received else None

        wanted = plan(exchange.url, tmp_path / "journal", checkpoint_seconds=0.2)
        assert Collector(file_lake, wanted, _LOG).run(ending, progress.append) == "all of it is there"
    archived = [bar for line in archived_lines(file_lake, DAY) if line.is_frame for bar in json.loads(line.content)]
    sent = [json.loads(bar.payload) for bar in feed]
    assert [bar for bar in archived if bar["ev"] == "AM"] == sent
    assert file_lake.keys("raw-data") == sorted(
        layout.raw_key(Channel.MINUTE, DAY, bar["sym"], bar["s"]) for bar in sent
    )
    ledger = read_ledger(file_lake)
    assert (ledger.complete, ledger.imbalance, ledger.gaps) == (True, [], [])
    assert ledger.account.bars == len(feed)
    frames, measured = ledger.account.frames, ledger.lag
    assert (measured.to_synced.count, measured.to_archive.count) == (frames, frames)
    assert measured.to_object.count == len(feed)
    assert measured.to_synced.p50 <= measured.to_archive.p50
    assert (progress[-1].backlog_bytes, progress[-1].store_fault) == (0, None)
    assert list((tmp_path / "journal").iterdir()) == []
    lease = read_lease(file_lake)
    assert lease
    assert lease.released


@pytest.mark.parametrize("other", ["lake", "feed"])
def test_a_leftover_of_another_lake_or_feed_is_left_alone_and_logged(
    other: str, tmp_path: Path, file_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    another = local_lake(tmp_path / "another")
    root, frame = tmp_path / "journal", frame_of(plain_bar("SPY", NOON, 1))
    if other == "lake":
        finished_journal(root, another, [frame])
    else:
        finished_journal(root, file_lake, [frame], feed="simulated")
    finished_journal(root, file_lake, [frame], "run-002")
    with Exchange([], speed=0) as exchange:
        collector = Collector(file_lake, plan(exchange.url, root, run="run-003"), _LOG)
        assert collector.run(lambda: "enough", lambda _: None) == "enough"
    assert [path.name for path in root.iterdir()] == ["run-001"]
    assert "belongs to the" in caplog.text
    (left,) = leftovers(root)  # it is not locked any more
    left.release()
    assert file_lake.get(layout.ledger_key(DAY, "run-001")) is None
    assert read_ledger(file_lake, "run-002").complete
    assert another.keys("") == []
    if other == "lake":
        publish_leftovers(another, root)
        assert [line.content for line in archived_lines(another, DAY)] == [frame]


def test_what_a_lost_run_left_is_reported_once_it_is_on_the_lake(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    finished_journal(root, file_lake, [frame_of(plain_bar("SPY", NOON, 1), plain_bar("QQQ", NOON, 1))])
    progress: list[Progress] = []
    with Exchange([], speed=0) as exchange:
        collector = Collector(file_lake, plan(exchange.url, root, run="run-002"), _LOG)
        collector.run(lambda: "enough", progress.append)
    recovered, own = progress
    assert (recovered.account.bars, recovered.dates) == (2, frozenset({DAY}))
    assert (own.account.bars, own.dates) == (0, frozenset())


def test_bars_outside_the_hours_are_kept_and_a_warning_says_so(
    tmp_path: Path, file_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    feed = [Event(at(21, 31), Channel.MINUTE, "SPY", json.dumps(plain_bar("SPY", at(21, 30), 1)).encode())]
    with Exchange(feed, speed=0) as exchange, caplog.at_level(logging.WARNING):
        wanted = plan(exchange.url, tmp_path / "journal")
        Collector(file_lake, wanted, _LOG).run(lambda: "sent" if exchange.finished.is_set() else None, lambda _: None)
    assert file_lake.keys("raw-data") == [layout.raw_key(Channel.MINUTE, DAY, "SPY", at(21, 30))]
    assert "1 bars start outside the hours of trading" in caplog.text
    assert "set POLYGON_NIGHT_SESSION_FROM" in caplog.text


def test_a_run_whose_last_records_cannot_be_synced_does_not_end_as_a_success(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = False

    def sync(_descriptor: int) -> None:
        if failing:
            raise OSError("input/output error")

    def ending() -> str:
        nonlocal failing
        failing = True
        return "enough"

    monkeypatch.setattr(journal, "sync_file", sync)
    with Exchange([], speed=0) as exchange, pytest.raises(JournalError, match="input/output error"):
        Collector(file_lake, plan(exchange.url, tmp_path / "journal"), _LOG).run(ending, lambda _: None)


@pytest.mark.slow
def test_a_run_that_is_evicted_while_its_lease_cannot_be_confirmed_waits_and_says_so(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when S3 cannot be reached from here, and another machine has taken over."""
    reachable = False
    monkeypatch.setattr(Lease, "is_confirmed", property(lambda _: reachable))
    monkeypatch.setattr(Backoff, "next_delay", lambda *_, **__: 0.0)

    def script(client: Script) -> None:
        client.begin()
        if client.number == 1:
            client.say(status("max_connections", "another connection"))
        else:
            client.wait_until_the_client_goes()

    def ending() -> str | None:
        nonlocal reachable
        if "whose turn it is" in caplog.text:
            reachable = True
        return "enough" if caplog.text.count("subscribed: ") == 2 else None

    with caplog.at_level(logging.INFO), scripted(script) as server:
        wanted = plan(server.url, tmp_path / "journal", topics=["AM.SPY"])
        try:
            Collector(file_lake, wanted, _LOG).run(ending, lambda _: None)
        finally:
            server.leaving.set()
    assert caplog.text.count("whose turn it is") == 1


@pytest.mark.parametrize("left", ["published", "in the journal"])
@pytest.mark.fault("clock steps")
def test_a_later_run_has_the_latest_revision_although_the_clock_stepped_back(
    left: str, tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, clock = tmp_path / "journal", time.time_ns
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time_ns", lambda: clock() + 600 * 10**9)
        finished_journal(root, file_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    if left == "published":
        publish_leftovers(file_lake, root)

    def script(client: Script) -> None:
        client.begin()
        client.say(plain_bar("SPY", NOON, 2))
        client.wait_until_the_client_goes()

    progress: list[Progress] = []
    with scripted(script) as server:
        wanted = plan(server.url, root, run="run-002", topics=["AM.SPY"], checkpoint_seconds=0.2)

        def ending() -> str | None:
            return "enough" if any(p.account.bars and p.account.frames > 1 for p in progress) else None

        try:
            Collector(file_lake, wanted, _LOG).run(ending, progress.append)
        finally:
            server.leaving.set()
    (key,) = file_lake.keys("raw-data")
    assert json.loads(file_lake.get(key) or b"")["bar_data"]["close"] == 2
    inputs = fetch_raw(file_lake, DAY, Channel.MINUTE, tmp_path)
    normalize_day(file_lake, inputs, tmp_path / "out.parquet", tmp_path)
    assert [row["close"] for row in read(tmp_path / "out.parquet")] == [2]
