"""One run of the collector: the stream writes the journal, the publisher reads it, and the main thread watches.

Belongs here: the threads, what ends a run and how, retrying the store, and telling the caller how it goes. Does not
belong here: Dagster, and the three parts themselves (polygon.stream, collector.journal, collector.publisher).
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from polygon_pipeline.collector.account import Account
from polygon_pipeline.collector.journal import (
    Journal,
    JournalError,
    JournalHeader,
    Kind,
    LeftoverJournal,
    leftovers,
)
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.store import STORE_ERRORS, Lake, brief, permanent_fault
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind, Stream

T = TypeVar("T")

# After this long without progress at the end of a run, what is left waits in the journal for the next start.
DRAIN_SECONDS = 60.0
# How often the publisher looks for new records: bars come in bursts, and a burst is one batch.
_LINGER_SECONDS = 0.2

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What a run is to collect and where it is to go. topics: such as `AM.SPY`; times in seconds."""

    run: str
    session_date: date
    feed: str
    url: str
    key: str = field(repr=False)
    topics: Sequence[str]
    journal_dir: Path
    write_objects: bool = True
    write_frames: bool = True
    checkpoint_seconds: float = 300.0


@dataclass(frozen=True)
class Progress:
    """How a run stands. Counts are of what is published, since the run's start; times in seconds.

    dates: the session dates that got bars since the last checkpoint. unpublished_seconds: the age of the oldest
    record that waits on disk, 0.0 when none does.
    """

    account: Account
    dates: frozenset[date]
    tickers: int
    elapsed_seconds: float
    backlog_bytes: int
    unpublished_seconds: float
    store_fault: str | None


class Collector:
    """Collects by a plan. Connection changes and faults are told to `log`, always on the thread that calls run()."""

    def __init__(self, lake: Lake, plan: Plan, log: logging.Logger) -> None:
        self._lake = lake
        self._plan = plan
        self._log = log
        self._started = time.monotonic()
        self._stop_stream = threading.Event()
        self._messages: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._draining = threading.Event()
        self._drain_deadline = math.inf
        self._store_fault: str | None = None
        self._reported: dict[date, int] = {}

    def run(self, ending: Callable[[], str | None], on_checkpoint: Callable[[Progress], None]) -> Progress:
        """Collects until `ending` (asked twice a second) gives a reason, then drains, and returns the last progress.

        on_checkpoint is called every checkpoint_seconds, when the frames received until then are on the lake, and
        once at the end. Raises LakeError or StreamRefused where trying again cannot help, and JournalError when the
        journal cannot be written; what was received until then is drained all the same.
        """
        plan = self._plan
        self._lake.claim(plan.feed)
        left = leftovers(plan.journal_dir)
        header = JournalHeader(
            run=plan.run,
            session_date=plan.session_date,
            lake_uri=self._lake.uri,
            feed=plan.feed,
            started_at=datetime.now(UTC),
            write_objects=plan.write_objects,
            write_frames=plan.write_frames,
        )
        self._journal = Journal(plan.journal_dir, header)
        self._publisher = Publisher(self._lake, self._journal, header)
        stream = self._thread("stream", self._receive)
        publishing = self._thread("publish", lambda: self._publish(left))
        failure: BaseException | None = None
        try:
            reason = self._watch(ending, on_checkpoint)
        except BaseException as error:  # noqa: BLE001 whatever ends the run, what it received is drained first
            reason, failure = f"failed: {brief(error)}", error
        self._stop_stream.set()
        stream.join()
        self._drain(reason, publishing)
        if failure:
            raise failure
        progress = self._progress()
        on_checkpoint(progress)
        return progress

    def _watch(self, ending: Callable[[], str | None], on_checkpoint: Callable[[Progress], None]) -> str:
        next_checkpoint = time.monotonic() + self._plan.checkpoint_seconds
        reported = 0
        while True:
            self._tell()
            if not self._failures.empty():
                raise self._failures.get()
            if reason := ending():
                return reason
            if time.monotonic() >= next_checkpoint:
                next_checkpoint = time.monotonic() + self._plan.checkpoint_seconds
                self._journal.rotate()
            if self._publisher.segments_published > reported:
                reported = self._publisher.segments_published
                on_checkpoint(self._progress())
            time.sleep(_POLL_SECONDS)

    def _drain(self, reason: str, publishing: threading.Thread) -> None:
        """Publishes the rest, as long as that makes progress; what is left waits for the next start."""
        with contextlib.suppress(JournalError):  # raised where it happened: this only ends what can be ended
            self._journal.append(Kind.EVENT, msgspec.json.encode(ConnectionEvent(EventKind.ENDED, reason)))
        with contextlib.suppress(JournalError):
            self._journal.close()
        self._drain_deadline = time.monotonic() + DRAIN_SECONDS
        self._draining.set()
        publishing.join()
        self._tell()
        if self._journal.numbers():
            self._log.error(
                f"{self._backlog_bytes()} bytes could not be published and wait in {self._journal.folder}; the next "
                f"start on this machine publishes them. The lake's last fault: {self._store_fault}"
            )
            self._journal.release()
        else:
            self._journal.discard()

    def _receive(self) -> None:
        Stream(
            self._plan.url,
            self._plan.key,
            self._plan.topics,
            on_frame=lambda payload: self._journal.append(Kind.FRAME, payload),
            on_event=self._note_connection,
            stop=self._stop_stream,
        ).run()

    def _note_connection(self, event: ConnectionEvent) -> None:
        self._journal.append(Kind.EVENT, msgspec.json.encode(event))
        routine = event.kind in (EventKind.CONNECTED, EventKind.SUBSCRIBED)
        retry = "" if event.retry_seconds is None else f"; next attempt in {event.retry_seconds:.1f} s"
        self._messages.put((logging.INFO if routine else logging.WARNING, f"{event.kind}: {event.detail}{retry}"))

    def _publish(self, left: Sequence[LeftoverJournal]) -> None:
        try:
            # Dead runs first: their bars are older, and so revisions reach the lake in the order they came.
            for journal in left:
                self._recover(journal)
            while True:
                last_round = self._draining.is_set()
                if self._persist(self._publisher.step):
                    continue
                if last_round:
                    break
                self._journal.wait(*self._publisher.position, _POLL_SECONDS)
                time.sleep(_LINGER_SECONDS)
            self._persist(lambda: self._publisher.put_ledger(complete=True))
        except _GivenUp:
            pass  # _drain says what is left

    def _recover(self, journal: LeftoverJournal) -> None:
        """Publishes what a dead run left, and completes its ledger."""
        header = journal.header
        if (header.lake_uri, header.feed) != (self._lake.uri, self._plan.feed):
            self._messages.put(
                (
                    logging.WARNING,
                    f"The journal {journal.folder} belongs to the {header.feed} lake {header.lake_uri}; it stays until "
                    "a collector runs with that LAKE_URI.",
                )
            )
            journal.release()
            return
        publisher = Publisher(self._lake, journal, header)
        waiting = journal.backlog_bytes()
        while self._persist(publisher.step):
            pass
        if not publisher.account.ended_by:
            publisher.account.ended_by = f"died; its journal was published by {self._plan.run}"
        self._persist(lambda: publisher.put_ledger(complete=True))
        journal.discard()
        self._messages.put(
            (logging.WARNING, f"recovered {waiting} bytes and {publisher.account.bars} bars in all of run {header.run}")
        )

    def _persist(self, work: Callable[[], T]) -> T:
        """Does work until the store takes it, with backoff and jitter, for as long as the run lives."""
        pause = 0.5
        while True:
            try:
                result = work()
            except STORE_ERRORS as error:
                fault = str(permanent_fault(error, self._lake.uri) or brief(error))
                if self._store_fault is None:
                    self._messages.put((logging.ERROR, f"the lake does not take writes, trying on: {fault}"))
                self._store_fault = fault
                if time.monotonic() > self._drain_deadline:
                    raise _GivenUp from error
                time.sleep(pause)
                pause = min(pause * random.uniform(1.5, 2.5), 30)
                continue
            if self._store_fault is not None:
                self._messages.put((logging.INFO, "the lake takes writes again"))
                self._store_fault = None
            if self._draining.is_set():
                self._drain_deadline = time.monotonic() + DRAIN_SECONDS
            return result

    def _progress(self) -> Progress:
        account = self._publisher.account
        bars = {day: sum(count.bars for count in channels.values()) for day, channels in account.days.items()}
        dates = frozenset(day for day, count in bars.items() if count != self._reported.get(day))
        self._reported = bars
        backlog = self._backlog_bytes()
        oldest = (account.last_received_at or datetime.now(UTC)) if backlog else datetime.now(UTC)
        return Progress(
            account=account,
            dates=dates,
            tickers=len(self._publisher.tickers),
            elapsed_seconds=time.monotonic() - self._started,
            backlog_bytes=backlog,
            unpublished_seconds=max(0.0, (datetime.now(UTC) - oldest).total_seconds()),
            store_fault=self._store_fault,
        )

    def _backlog_bytes(self) -> int:
        return max(0, self._journal.backlog_bytes() - self._publisher.position[1])

    def _tell(self) -> None:
        while not self._messages.empty():
            self._log.log(*self._messages.get())

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Starts a thread whose failure ends the run."""

        def guarded() -> None:
            try:
                target()
            except Exception as error:  # noqa: BLE001 handed to the main thread, which raises it
                self._failures.put(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread


class _GivenUp(Exception):
    """The store did not come back before the end of the run."""
