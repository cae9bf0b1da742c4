"""Journals of lost runs, published where no stream is opened: by a drain, a standby, or a collector at work."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from polygon_pipeline.collector.collector import Collector, Progress
from polygon_pipeline.collector.journal import Journal, RecordType, leftovers
from polygon_pipeline.collector.lease import Lease, LeaseHeld, read_lease
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.collector.recovery import Recovered, drain, waiting
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import STORE_ERRORS
from polygon_pipeline.lake.ledger import reconcile
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import DAY, NOON, plain_bar
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3, lake_behind
from polygon_pipeline_tests.support.journals import (
    finished_journal,
    frame_of,
    journal_header,
    publish,
    read_ledger,
    wait_until_synced,
)
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_LOG = logging.getLogger("test")


def _drained(lake: Lake, root: Path) -> list[Recovered]:
    return list(drain(lake, "polygon", root, "drain"))


def test_a_machine_that_comes_back_publishes_its_journal_beside_a_live_collector_and_the_account_is_right(
    tmp_path: Path, s3_lake: Lake
) -> None:
    old, here = tmp_path / "old", tmp_path / "here"
    finished_journal(old, s3_lake, [frame_of(plain_bar("SPY", NOON, 1), plain_bar("QQQ", NOON, 1))])
    held = msgspec.json.encode(holding("run-002"))
    s3_lake.put(layout.LEASE_KEY, held)
    journal = Journal(here, journal_header("run-002", s3_lake.uri))
    live = Publisher(s3_lake, journal, journal_header("run-002", s3_lake.uri))

    def receive(close: int, *tickers: str) -> None:
        journal.append(RecordType.FRAME, frame_of(*(plain_bar(ticker, NOON, close) for ticker in tickers)))
        wait_until_synced(journal)
        publish(live)

    receive(2, "SPY")  # before the other has published its revision
    [found] = _drained(s3_lake, old)
    receive(3, "QQQ")  # after it: this run listed the day's objects before
    journal.close()
    publish(live)
    live.put_ledger(complete=True)
    assert (found.header.run, found.account.bars, found.tickers) == ("run-001", 2, 2)
    assert list(old.iterdir()) == []
    assert waiting(old, s3_lake, "polygon") == []
    assert s3_lake.get(layout.LEASE_KEY) == held
    assert read_ledger(s3_lake).complete
    assert read_ledger(s3_lake).account.ended_by == "died; its journal was published by drain"
    closes = {key.split("/")[2]: json.loads(s3_lake.get(key) or b"")["bar_data"]["close"] for key in _objects(s3_lake)}
    assert closes == {"SPY": 2, "QQQ": 3}
    assert len([line for line in archived_lines(s3_lake, DAY) if line.is_frame]) == 3
    balance = reconcile(s3_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.unfinished, balance.bars) == ([], [], 4)
    assert (balance.objects_counted, balance.objects_on_lake) == (2, 2)
    journal.discard()


def _objects(lake: Lake) -> list[str]:
    return lake.keys("raw-data")


def test_a_journal_of_another_lake_and_one_whose_run_holds_the_lease_are_left_alone(
    tmp_path: Path, s3_lake: Lake
) -> None:
    """The second where the locks of a volume do not reach other machines."""
    finished_journal(tmp_path / "journal", local_lake(tmp_path / "another"), [b"[]"])
    finished_journal(tmp_path / "journal", s3_lake, [b"[]"], "run-002")
    s3_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding("run-002")))
    assert waiting(tmp_path / "journal", s3_lake, "polygon") == []
    assert _drained(s3_lake, tmp_path / "journal") == []
    s3_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding("run-002", expires_in=-timedelta(hours=1))))
    assert waiting(tmp_path / "journal", s3_lake, "polygon") == ["run-002"]
    assert [found.header.run for found in _drained(s3_lake, tmp_path / "journal")] == ["run-002"]
    (left,) = leftovers(tmp_path / "journal")
    assert left.header.run == "run-001"
    left.release()


def test_a_local_lake_whose_collector_is_at_work_is_not_written_to(tmp_path: Path, file_lake: Lake) -> None:
    """It knows no conditional update."""
    finished_journal(tmp_path, file_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    at_work = Lease(file_lake, "run-002", "owner")
    at_work.acquire()
    with pytest.raises(LeaseHeld, match="run run-002"):
        _drained(file_lake, tmp_path)
    assert waiting(tmp_path, file_lake, "polygon") == ["run-001"]
    at_work.release()
    assert [found.account.bars for found in _drained(file_lake, tmp_path)] == [1]
    lease = read_lease(file_lake)
    assert lease
    assert lease.released


@pytest.mark.fault("faults of the storage")
def test_a_drain_that_the_store_cut_short_leaves_the_rest_to_the_next(tmp_path: Path, seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake = lake_behind(proxy, seaweedfs)
        for run in ("run-001", "run-002"):
            finished_journal(tmp_path, lake, [frame_of(plain_bar(run[-3:], NOON, 1))], run)
        proxy.order(Fault.FORBIDDEN, 1, "PUT", layout.ledger_key(DAY, "run-001"))
        with pytest.raises(STORE_ERRORS):
            _drained(lake, tmp_path)
        assert [found.header.run for found in _drained(lake, tmp_path)] == ["run-001", "run-002"]
        assert len(_objects(lake)) == 2


def test_a_collector_at_work_publishes_a_journal_whose_lock_is_let_go_later(tmp_path: Path, file_lake: Lake) -> None:
    """As that of a machine which shares the volume, and whose locks the file server has kept for a while."""
    finished_journal(tmp_path, file_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    (locked,) = leftovers(tmp_path)
    held, recovered = [locked], list[Progress]()

    def ending() -> str | None:
        if held:
            held.pop().release()
        return "it is there" if recovered else None

    with Exchange([], speed=0) as exchange:
        collector = Collector(file_lake, plan(exchange.url, tmp_path, run="run-002", checkpoint_seconds=0.1), _LOG)
        collector.run(ending, lambda progress: recovered.append(progress) if progress.account.bars else None)
    assert read_ledger(file_lake).complete


def test_a_standby_publishes_what_lies_on_its_disk_while_it_waits_and_connects_to_nothing(
    tmp_path: Path, s3_lake: Lake
) -> None:
    finished_journal(tmp_path, s3_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    held = msgspec.json.encode(holding("run-002"))
    s3_lake.put(layout.LEASE_KEY, held)
    recovered: list[Progress] = []
    wanted = plan("ws://127.0.0.1:1", tmp_path, run="run-003", standby=True)

    def ending() -> str | None:
        return "the session is over" if recovered else None

    assert Collector(s3_lake, wanted, _LOG).run(ending, recovered.append) == "the session is over"
    assert read_ledger(s3_lake).complete
    assert [progress.account.bars for progress in recovered] == [1, 0]
    assert s3_lake.get(layout.LEASE_KEY) == held
    assert list(tmp_path.iterdir()) == []
