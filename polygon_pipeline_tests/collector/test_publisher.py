"""The publisher alone: journals become archives, objects, a quarantine and a ledger, also at the second attempt."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError

from polygon_pipeline.collector.journal import leftovers
from polygon_pipeline.collector.publisher import KnownObjects, Publisher
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import STORE_ERRORS
from polygon_pipeline.lake.records import decode_record
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.archives import archived_lines, quarantined_entries
from polygon_pipeline_tests.support.bars import DAY, NOON, at, plain_bar, record_line
from polygon_pipeline_tests.support.documented_s3 import documented_s3
from polygon_pipeline_tests.support.journals import (
    finished_journal,
    frame_of,
    publish,
    publish_leftovers,
    read_ledger,
)
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.power import Power
from polygon_pipeline_tests.support.traps import Killed, Trap, armed


@pytest.mark.parametrize("order", [("run-001", "run-002"), ("run-002", "run-001")])
def test_the_most_recently_received_revision_wins_whichever_journal_is_published_first(
    order: tuple[str, str], tmp_path: Path, lake: Lake
) -> None:
    """As when a laptop comes back after a week in which another machine has collected, with newer bars."""
    frames = {"run-001": frame_of(plain_bar("SPY", NOON, 1)), "run-002": frame_of(plain_bar("SPY", NOON, 2))}
    for run, frame in frames.items():
        finished_journal(tmp_path / run, lake, [frame], run)
    for run in (*order, *order):
        publish_leftovers(lake, tmp_path / run)
    (key,) = lake.keys("raw-data")
    assert json.loads(lake.get(key) or b"")["bar_data"]["close"] == 2
    counts = [read_ledger(lake, run).account.days[DAY][Channel.MINUTE] for run in order]
    assert [(count.objects, count.revisions) for count in counts] == [(1, 0), (0, 1)]


def test_a_bar_with_the_longest_accepted_ticker_can_be_stored_in_a_file_lake(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    finished_journal(root, file_lake, [frame_of(plain_bar("\N{CHART WITH UPWARDS TREND}" * 64, NOON, 1))])
    publish_leftovers(file_lake, root)
    assert read_ledger(file_lake).account.events == 1


@pytest.mark.fault("S3: racing writes (409)")
def test_a_write_that_met_another_is_tried_again_until_the_latest_revision_is_stored(tmp_path: Path) -> None:
    with documented_s3() as s3:
        lake = s3.lake()
        for run, price in (("run-001", 1), ("run-002", 2)):
            finished_journal(tmp_path / run, lake, [frame_of(plain_bar("SPY", NOON, price))], run)
            s3.conflicts = 9  # more than obstore tries by itself
            publish_leftovers(lake, tmp_path / run)
            assert s3.conflicts == 0
        (key,) = lake.keys("raw-data")
        assert json.loads(lake.get(key) or b"")["bar_data"]["close"] == 2


def test_a_torn_end_is_quarantined_once_however_often_archiving_is_retried(tmp_path: Path, file_lake: Lake) -> None:
    root = tmp_path / "journal"
    path = finished_journal(root, file_lake, [frame_of(plain_bar("SPY", NOON, 1))]) / "000001.segment"
    path.write_bytes(path.read_bytes() + b"torn")
    (journal,) = leftovers(root)
    publisher = Publisher(file_lake, journal, journal.header)
    publisher.step()
    publisher.step()
    with armed(Trap("store", "before", 0), tmp_path), pytest.raises(GenericError):
        publisher.step()
    publish(publisher)
    assert len(list(quarantined_entries(file_lake, DAY))) == 1


def test_a_batch_whose_state_cannot_be_saved_is_published_again_and_counted_once(
    tmp_path: Path, file_lake: Lake
) -> None:
    root = tmp_path / "journal"
    frame = frame_of(plain_bar("SPY", NOON, 1))
    finished_journal(root, file_lake, [frame])
    (journal,) = leftovers(root)
    publisher = Publisher(file_lake, journal, journal.header)
    in_the_way = journal.folder / "state.new"  # as a full disk would be: the state cannot be written
    in_the_way.mkdir()
    with pytest.raises(STORE_ERRORS):  # which a collector tries again
        publisher.step()
    in_the_way.rmdir()
    publish(publisher)
    publisher.put_ledger(complete=True)
    assert [line.content for line in archived_lines(file_lake, DAY)] == [frame]
    count = read_ledger(file_lake).account.days[DAY][Channel.MINUTE]
    assert (count.bars, count.objects, count.revisions) == (1, 1, 0)


@given(st.sets(st.integers(0, 86_399), max_size=30), st.sets(st.integers(0, 86_399), max_size=30))
@settings(deadline=None)
def test_exactly_the_bars_that_are_on_the_lake_are_known(on_lake: set[int], asked: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lake = local_lake(Path(folder))
        for second in on_lake:
            lake.put(layout.raw_key(Channel.SECOND, DAY, "SPY", at(0, 0) + 1000 * second), b"{}")
        known = KnownObjects(lake)
        known.load({(Channel.SECOND, DAY)})
        added = {second for second in asked if second % 3 == 0}
        known.update({(Channel.SECOND, DAY, "SPY", at(0, 0) + 1000 * second) for second in added})
        for second in on_lake | asked:
            start_ms = at(0, 0) + 1000 * second
            assert ((Channel.SECOND, DAY, "SPY", start_ms) in known) is (second in on_lake | added)
            assert (Channel.MINUTE, DAY, "SPY", start_ms) not in known
            assert (Channel.SECOND, DAY, "QQQ", start_ms) not in known


def test_a_day_of_second_bars_is_known_in_less_than_a_byte_a_bar(file_lake: Lake) -> None:
    known = KnownObjects(file_lake)
    bars = [(Channel.SECOND, DAY, "SPY", at(4, 0) + 1000 * second) for second in range(57_600)]
    tracemalloc.start()
    try:
        for start in range(0, len(bars), 600):
            known.update(set(bars[start : start + 600]))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < len(bars)


@pytest.mark.parametrize(
    "existing",
    [
        b"",
        b"[" * 100_000,
        record_line("SPY", NOON, 1.0).replace(b"2026-01-26T18:31:00.123456+00:00", b"0001-01-01T00:00:00+05:00"),
        record_line("SPY", NOON, 1.0).replace(b"2026-01-26T18:31:00.123456+00:00", b"9999-12-31T23:59:59-05:00"),
    ],
    ids=["empty", "deep", "year 1", "year 9999"],
)
def test_an_object_of_another_writer_that_cannot_be_read_is_older_than_any_bar(
    tmp_path: Path, file_lake: Lake, existing: bytes
) -> None:
    key = layout.raw_key(Channel.MINUTE, DAY, "SPY", NOON)
    file_lake.put(key, existing)
    finished_journal(tmp_path / "journal", file_lake, [frame_of(plain_bar("SPY", NOON, 7))])
    publish_leftovers(file_lake, tmp_path / "journal")
    assert decode_record(file_lake.get(key) or b"").bar_data.close == 7


# Recovery


@pytest.mark.slow
@given(at=st.integers(0, 999), flip=st.integers(1, 255), steps=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_segment_damaged_before_or_during_its_recovery_never_stops_the_recovery(
    at: int, flip: int, steps: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lake, root = local_lake(Path(folder) / "lake"), Path(folder) / "journal"
        frames = [frame_of(plain_bar("SPY", NOON, price)) for price in range(1, 6)]
        path = finished_journal(root, lake, frames) / "000001.segment"
        (journal,) = leftovers(root)
        publisher = Publisher(lake, journal, journal.header, batch_bytes=150)
        for _ in range(steps):
            publisher.step()
        journal.release()
        content = bytearray(path.read_bytes())
        at %= len(content)
        content[at] ^= flip
        path.write_bytes(content)
        publish_leftovers(lake, root)
        assert leftovers(root) == []
        kept = [line.content for line in archived_lines(lake, DAY)]
        assert kept == frames[: at * len(frames) // len(content)]
        assert read_ledger(lake).account.torn_bytes == len(content) - len(kept) * len(content) // len(frames)


@pytest.mark.fault("power loss")
def test_after_a_power_loss_at_any_step_every_record_is_on_the_lake_or_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch)
    machine = tmp_path / "machine"
    machine.mkdir()
    lake, root = local_lake(machine / "data" / "lake"), machine / "var" / "journal"
    frames = [frame_of(plain_bar("SPY", NOON + minute * 60_000, minute)) for minute in range(3)]
    finished_journal(root, lake, [*frames, b"nothing"])
    (journal,) = leftovers(root)
    publisher = Publisher(lake, journal, journal.header, batch_bytes=1)
    moments = [tmp_path / "before"]
    power.lose(machine, moments[0])
    while publisher.step():
        moments.append(tmp_path / f"after-{len(moments)}")
        power.lose(machine, moments[-1])
    publisher.put_ledger(complete=True)
    journal.discard()
    moments.append(tmp_path / "at-the-end")
    power.lose(machine, moments[-1])
    for left in moments:
        lake = local_lake(left / "data" / "lake")
        publish_leftovers(lake, left / "var" / "journal")
        records = [json.loads(lake.get(key) or b"") for key in lake.keys("raw-data")]
        assert [record["bar_data"]["close"] for record in records] == [0, 1, 2], left.name
        assert [line.content for line in archived_lines(lake, DAY)] == frames, left.name
        assert len(list(quarantined_entries(lake, DAY))) == 1, left.name
        ledger = read_ledger(lake)
        assert (ledger.complete, ledger.imbalance, ledger.account.bars) == (True, [], 3), left.name


def test_a_kill_at_any_moment_of_removing_a_published_journal_changes_no_ledger_and_leaves_no_files(
    tmp_path: Path, file_lake: Lake
) -> None:
    root = tmp_path / "journal"
    moments, trap = 0, Trap("file", "kill before", 0)
    while not moments or trap.struck:
        run = f"run-{moments:03d}"
        trap = Trap("file", "kill before", moments)
        finished_journal(root, file_lake, [frame_of(plain_bar("SPY", NOON, 1))], run)
        (journal,) = leftovers(root)
        publisher = Publisher(file_lake, journal, journal.header)
        publish(publisher)
        publisher.put_ledger(complete=True)
        before = read_ledger(file_lake, run)
        assert before.account.bars == 1
        try:
            with armed(trap, root):
                journal.discard()
        except Killed:
            journal.release()
        publish_leftovers(file_lake, root)
        assert read_ledger(file_lake, run) == before
        assert list(root.iterdir()) == []
        moments += 1
    assert moments > 3
