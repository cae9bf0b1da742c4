"""Journals as lost runs leave them, and publishing them as the next start does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from polygon_pipeline.collector.journal import Journal, JournalHeader, RecordType, leftovers
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import Ledger, decode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.bars import DAY, JsonObject
from polygon_pipeline_tests.support.waiting import until


def journal_header(
    run: str = "run-001", lake_uri: str = "file:///lake", *, write_objects: bool = True, feed: str = "polygon"
) -> JournalHeader:
    """Of a run of DAY that begins now."""
    return JournalHeader(run, DAY, lake_uri, feed, datetime.now(UTC), write_objects, True)


def frame_of(*bars: JsonObject) -> bytes:
    return json.dumps(bars).encode()


def finished_journal(
    root: Path, lake: Lake, frames: Sequence[bytes], run: str = "run-001", feed: str = "polygon"
) -> Path:
    """The folder that a run leaves that ended without warning after its last sync."""
    journal = Journal(root, journal_header(run, lake.uri, feed=feed))
    for payload in frames:
        journal.append(RecordType.FRAME, payload)
    journal.close()
    journal.release()
    return journal.folder


def publish_leftovers(lake: Lake, root: Path) -> None:
    for journal in leftovers(root):
        publisher = Publisher(lake, journal, journal.header)
        publish(publisher)
        publisher.put_ledger(complete=True)
        journal.discard()


def publish(publisher: Publisher) -> None:
    """All there is now."""
    while publisher.step():
        pass


def read_ledger(lake: Lake, run: str = "run-001") -> Ledger:
    """A run's ledger of DAY."""
    return decode_ledger(lake.get(layout.ledger_key(DAY, run)) or b"")


def wait_until_synced(journal: Journal) -> None:
    """All that was appended to a journal that is still in its first segment."""
    until(lambda: journal.end_of(1)[0] == journal.path(1).stat().st_size, "the journal is synced", pause=0.001)
