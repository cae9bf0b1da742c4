"""Lags of a run: taken on the clock that never steps, once for each frame and bar, and of this process alone."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from polygon_pipeline.collector import journal as journal_module
from polygon_pipeline.collector.journal import Journal, RecordType, leftovers
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.lag import RESOLUTION, Lags, Percentiles
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.bars import NOON, plain_bar
from polygon_pipeline_tests.support.journals import (
    finished_journal,
    frame_of,
    journal_header,
    publish,
    publish_leftovers,
    read_ledger,
    wait_until_synced,
)
from polygon_pipeline_tests.support.leases import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that never steps."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The other one."""
    wall = Clock()
    wall.now = datetime(2026, 1, 26, 17, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time_ns", lambda: int(wall.now * 1_000_000) * 1000)
    return wall


def _is(found: Percentiles, count: int, seconds: float) -> bool:
    return found.count == count and all(
        seconds * 0.999 <= percentile <= seconds * RESOLUTION * 1.001
        for percentile in (found.p50, found.p99, found.p999)
    )


def _receive(journal: Journal, *frames: bytes) -> None:
    journal.append(RecordType.FRAME, *frames)
    wait_until_synced(journal)


@pytest.mark.parametrize("step", [0.0, 3600.0, -3600.0])
def test_each_way_is_measured_from_the_receipt_whatever_the_wall_clock_does(
    step: float, clock: Clock, wall: Clock, tmp_path: Path, file_lake: Lake
) -> None:
    header = journal_header(lake_uri=file_lake.uri)
    journal = Journal(tmp_path, header)
    publisher = Publisher(file_lake, journal, header)
    for ticker in ("SPY", "QQQ"):
        _receive(journal, frame_of(plain_bar(ticker, NOON, 1)))
        wall.now += step
    journal.append(RecordType.EVENT, b'{"kind":"connected","detail":""}')
    wait_until_synced(journal)
    clock.wait(2)
    while not publisher.account.lags.to_object.percentiles().count:
        publisher.step()
    journal.close()
    clock.wait(8)
    publish(publisher)
    publisher.put_ledger(complete=True)
    journal.release()
    lag = read_ledger(file_lake).lag
    assert lag.to_synced.count == 2
    assert _is(lag.to_object, 2, 2)
    assert _is(lag.to_archive, 2, 10)


def test_a_clock_that_creeps_behind_its_own_past_is_remembered_in_bounded_memory(
    clock: Clock, wall: Clock, tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_CLOCK_CHANGES", 10)
    journal = Journal(tmp_path, journal_header(lake_uri=file_lake.uri))
    wall.now -= 86_400  # records are a microsecond apart until it has caught up
    for _ in range(30):
        clock.wait(1)
        journal.append(RecordType.FRAME, b"[]")
    journal.close()
    came = [journal.received_on(record.received_at) for record in journal.read(1, 0, journal.end_of(1)[0])]
    journal.release()
    last = clock.now
    assert came[:20] == [None] * 20
    assert came[20:] == pytest.approx([last - 9 + number for number in range(10)], abs=0.002)


def test_a_recovered_journal_adds_no_lag_and_keeps_what_its_run_measured(
    clock: Clock, tmp_path: Path, file_lake: Lake
) -> None:
    root, header = tmp_path / "journal", journal_header(lake_uri=file_lake.uri)
    journal = Journal(root, header)
    publisher = Publisher(file_lake, journal, header)
    for ticker in ("SPY", "QQQ"):  # the second is not published
        _receive(journal, frame_of(plain_bar(ticker, NOON, 1)))
        if ticker == "SPY":
            publish(publisher)
    journal.close()
    journal.release()
    measured = publisher.account.lags.to_synced.percentiles().count
    clock.now = 1.0  # after the machine started again
    publish_leftovers(file_lake, root)
    ledger = read_ledger(file_lake)
    assert ledger.account.bars == 2
    assert 1 <= ledger.lag.to_synced.count <= measured
    assert ledger.lag.to_archive == Percentiles()


def test_a_journal_that_is_published_by_a_later_process_has_no_lags(tmp_path: Path, file_lake: Lake) -> None:
    finished_journal(tmp_path, file_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    (journal,) = leftovers(tmp_path)
    publisher = Publisher(file_lake, journal, journal.header)
    publish(publisher)
    journal.release()
    assert publisher.account.bars == 1
    assert publisher.account.lags == Lags()


def test_the_oldest_frame_that_would_be_lost_with_the_disk_is_known_until_its_segment_is_archived(
    clock: Clock, tmp_path: Path, file_lake: Lake
) -> None:
    journal = Journal(tmp_path, journal_header(lake_uri=file_lake.uri))
    publisher = Publisher(file_lake, journal, journal_header(lake_uri=file_lake.uri))
    journal.append(RecordType.EVENT, b'{"kind":"connected","detail":""}')

    def oldest() -> float | None:
        publish(publisher)
        return journal.first_received(publisher.position[0])

    assert oldest() is None
    for _ in range(2):
        clock.wait(10)
        _receive(journal, frame_of(plain_bar("SPY", NOON, 1)))
    assert oldest() == 1010, "its bars are objects, and its frames are archived nowhere"
    journal.rotate()
    clock.wait(10)
    journal.append(RecordType.FRAME, frame_of(plain_bar("SPY", NOON, 2)))
    assert journal.first_received(publisher.position[0]) == 1010
    journal.close()
    assert oldest() is None
    journal.discard()
