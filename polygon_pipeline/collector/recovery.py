"""Publishes the journals that lost runs left on this disk, without a stream.

Belongs here: whose journal may be published here and now, and publishing it whole. Does not belong here: the journal's
lock and format (collector.journal), publishing step by step (collector.publisher), and who asks (collector.collector,
defs.draining).

This is safe beside a collector that is at work on another machine: archives and ledgers have the lost run's name, and
an object is put under a condition, so that the latest revision wins whoever comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from polygon_pipeline.collector.journal import JournalHeader, LeftoverJournal, leftovers
from polygon_pipeline.collector.lease import Lease, live_run
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.ledger import Account
from polygon_pipeline.lake.store import Lake


class Recovered(NamedTuple):
    """A lost run whose journal is on the lake now. waited_bytes: what its journal held."""

    header: JournalHeader
    account: Account
    tickers: int
    waited_bytes: int


def belongs(header: JournalHeader, lake: Lake, feed: str) -> bool:
    """Whether a journal is to be published in this lake; one of another lake or feed waits for its own."""
    return (header.lake_uri, header.feed) == (lake.uri, feed)


def waiting(root: Path, lake: Lake, feed: str) -> list[str]:
    """The runs whose journals lie below JOURNAL_DIR for this lake, locked or not, without the run that collects now."""
    found = []
    for path in sorted(root.glob("*/journal.json")):
        try:
            header = msgspec.json.decode(path.read_bytes(), type=JournalHeader)
        except (FileNotFoundError, ValueError):  # published meanwhile; or not ours
            continue
        if belongs(header, lake, feed):
            found.append(header.run)
    live = live_run(lake) if found else None
    return [run for run in found if run != live]


def recover(
    lake: Lake, journal: LeftoverJournal, by: str, persist: Callable[[Callable[[], object]], object]
) -> Recovered:
    """Publishes a lost run's journal, completes its ledger and removes the journal.

    by: who publishes it. persist: calls a piece of work until the store takes it, and returns its result.
    """
    publisher = Publisher(lake, journal, journal.header)
    waited = journal.backlog_bytes()
    while persist(publisher.step):
        pass
    if not publisher.account.ended_by:
        publisher.account.ended_by = f"died; its journal was published by {by}"
    persist(lambda: publisher.put_ledger(complete=True))
    journal.discard()
    return Recovered(journal.header, publisher.account, len(publisher.tickers), waited)


def drain(lake: Lake, feed: str, root: Path, by: str) -> Iterator[Recovered]:
    """Publishes every leftover journal below JOURNAL_DIR that belongs here, oldest first, and gives each.

    Journals that a process works on are left alone, and so is one whose run holds the lake's lease: its lock would be
    taken too if this volume's locks held. Raises the store's errors, and LeaseHeld where a collector is at work on a
    local lake.
    """
    found = leftovers(root)
    try:
        with _alone(lake, by):
            while found:
                journal = found[0]
                if not belongs(journal.header, lake, feed) or journal.header.run == live_run(lake):
                    found.pop(0).release()
                    continue
                recovered = recover(lake, journal, by, lambda work: work())
                found.pop(0)  # whoever asks for no more must not release it again
                yield recovered
    finally:
        for journal in found:
            journal.release()


@contextmanager
def _alone(lake: Lake, by: str) -> Iterator[None]:
    """A local store knows no conditional update, so that nobody else may put objects there meanwhile."""
    if lake.is_s3:
        yield
        return
    lease = Lease(lake, f"{datetime.now(UTC):%Y%m%dT%H%M%S}Z-{by}", by)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()
