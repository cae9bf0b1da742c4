"""The journal alone: records on disk, damage, locks, and disks that are full."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from polygon_pipeline.collector import journal as journal_module
from polygon_pipeline.collector.journal import Journal, JournalError, RecordType, leftovers
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import DAY, NOON, plain_bar
from polygon_pipeline_tests.support.journals import finished_journal, frame_of, journal_header, publish

# Records


def test_records_have_strictly_increasing_times_and_come_back_in_order(tmp_path: Path, file_lake: Lake) -> None:
    journal = Journal(tmp_path, journal_header(lake_uri=file_lake.uri), segment_bytes=500)
    payloads = [b"%d" % number for number in range(200)]
    for payload in payloads:
        journal.append(RecordType.FRAME, payload)
    journal.close()
    records = [record for n in journal.numbers() for record in journal.read(n, 0, journal.end_of(n)[0])]
    assert len(journal.numbers()) > 5
    assert [record.payload for record in records] == payloads
    assert all(one.received_at < next_one.received_at for one, next_one in pairwise(records))
    journal.release()


@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_segment_damaged_at_any_byte_gives_back_every_record_before_the_damage(
    damage: str, tmp_path: Path, file_lake: Lake
) -> None:
    payloads = [b"one", b"", b"three" * 9, bytes(range(256))]
    path = finished_journal(tmp_path, file_lake, payloads) / "000001.segment"
    content = path.read_bytes()
    (journal,) = leftovers(tmp_path)
    ends = [record.end for record in journal.read(1, 0, len(content))]
    assert ends[-1] == len(content)
    for at in range(len(content)):
        damaged = content[:at] if damage == "cut" else content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        path.write_bytes(damaged)
        end, closed = journal.end_of(1)
        whole = sum(end <= at for end in ends)
        assert closed
        assert [record.payload for record in journal.read(1, 0, end)] == payloads[:whole]
        assert journal.torn_tail(1) == damaged[ends[whole - 1] if whole else 0 :]


# Locks


def test_a_journal_in_use_is_no_leftover(tmp_path: Path, file_lake: Lake) -> None:
    journal = Journal(tmp_path, journal_header(lake_uri=file_lake.uri))
    assert leftovers(tmp_path) == []
    journal.close()
    assert leftovers(tmp_path) == []
    journal.release()
    assert [left.header.run for left in leftovers(tmp_path)] == ["run-001"]


_TAKER = """
import sys
from pathlib import Path
from polygon_pipeline.collector.journal import leftovers
sys.stdin.readline()
mine = leftovers(Path(sys.argv[1]))
print(*(journal.header.run for journal in mine), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_two_processes_never_get_the_same_journal(tmp_path: Path, file_lake: Lake) -> None:
    runs = [f"run-{number:03d}" for number in range(12)]
    for run in runs:
        finished_journal(tmp_path, file_lake, [b"[]"], run)
    with contextlib.ExitStack() as stack:
        takers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _TAKER, str(tmp_path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(3)
        ]
        for taker in takers:
            assert taker.stdin
            taker.stdin.write("go\n")
            taker.stdin.flush()
        taken = [taker.stdout.readline().split() for taker in takers if taker.stdout]
        assert sorted(run for mine in taken for run in mine) == runs
        assert leftovers(tmp_path) == []
        for taker in takers:
            taker.kill()
            taker.wait()
    # A lock ends with its process, however that ended.
    assert [journal.header.run for journal in leftovers(tmp_path)] == runs


@pytest.mark.slow
def test_a_run_that_starts_while_another_ends_causes_no_error_in_either(tmp_path: Path, file_lake: Lake) -> None:
    over = threading.Event()
    failed: list[OSError] = []

    def start_again_and_again() -> None:
        while not over.is_set():
            try:
                for journal in leftovers(tmp_path):
                    journal.release()
            except OSError as error:
                failed.append(error)

    thread = threading.Thread(target=start_again_and_again)
    thread.start()
    for number in range(300):
        journal = Journal(tmp_path, journal_header(f"run-{number:03d}", file_lake.uri))
        journal.close()
        try:
            journal.discard()
        except OSError as error:
            failed.append(error)
    over.set()
    thread.join()
    assert failed == []


@pytest.mark.slow
def test_the_backlog_can_be_measured_while_segments_are_published(tmp_path: Path, file_lake: Lake) -> None:
    """The threads of the lease and of the run measure it, while the publisher's removes segments."""
    folder = finished_journal(tmp_path, file_lake, [b"[]"])
    (journal,) = leftovers(tmp_path)
    for number in range(1, 3000):
        (folder / f"{number:06d}.segment").write_bytes(b"x")

    def remove() -> None:
        for number in range(1, 3000):
            (folder / f"{number:06d}.segment").unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    while thread.is_alive():
        journal.backlog_bytes()
    thread.join()


# A full disk

_FILLER = """
import resource, sys
from datetime import UTC, date, datetime
from pathlib import Path
from polygon_pipeline.collector.journal import Journal, JournalError, JournalHeader, RecordType

header = JournalHeader("run-001", date(2026, 1, 26), sys.argv[2], "polygon", datetime.now(UTC), True, True)
journal = Journal(Path(sys.argv[1]), header)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
taken = 0
try:
    while True:
        journal.append(RecordType.FRAME, b"x" * 700)
        taken += 1
except JournalError as error:
    print(taken, error)
try:
    journal.append(RecordType.FRAME, b"y")
except JournalError:
    print("still refused")
"""


def test_a_journal_that_cannot_grow_fails_and_keeps_every_record_it_accepted(tmp_path: Path, file_lake: Lake) -> None:
    command = [sys.executable, "-c", _FILLER, str(tmp_path), file_lake.uri]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    taken, _, sentence = said[0].partition(" ")
    assert "cannot be written" in sentence
    assert "Free some space" in sentence
    assert said[1] == "still refused"
    (journal,) = leftovers(tmp_path)
    end, closed = journal.end_of(1)
    assert closed
    assert [record.payload for record in journal.read(1, 0, end)] == [b"x" * 700] * int(taken)
    assert int(taken) == 10_000 // 717
    assert journal.torn_tail(1) == b""


@pytest.mark.fault("a full disk")
def test_a_nearly_full_disk_fails_the_journal_while_its_records_can_still_be_published(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "journal"
    header = journal_header(lake_uri=file_lake.uri)
    journal = Journal(root, header)
    monkeypatch.setattr(journal_module, "MIN_FREE_BYTES", 2**62)
    frame = frame_of(plain_bar("SPY", NOON, 1))
    journal.append(RecordType.FRAME, frame)
    journal.wait(1, 0, 60)
    with pytest.raises(JournalError, match="free some space"):
        journal.append(RecordType.FRAME, frame)
    with pytest.raises(JournalError, match="MiB left"):
        journal.close()
    publisher = Publisher(file_lake, journal, header)
    publish(publisher)
    assert [line.content for line in archived_lines(file_lake, DAY)] == [frame]
    journal.discard()


# Syncing that fails


def test_whatever_goes_wrong_while_syncing_fails_the_journal(
    tmp_path: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise AttributeError("module 'os' has no attribute 'fdatasync'")

    journal = Journal(tmp_path / "journal", journal_header(lake_uri=file_lake.uri))
    monkeypatch.setattr(journal_module, "sync_file", fail)
    journal.append(RecordType.FRAME, b"[]")
    with pytest.raises(JournalError, match=r"cannot be synced: AttributeError.*Check that disk"):
        journal.close()
    with pytest.raises(JournalError, match="cannot be synced"):
        journal.append(RecordType.FRAME, b"[]")
    journal.release()
