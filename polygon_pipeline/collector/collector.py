"""One run of the collector: the stream writes the journal, the publisher reads it, and the main thread watches.

Belongs here: the threads, what ends a run and how, retrying the store, and telling the caller how it goes. Does not
belong here: Dagster, and the three parts themselves (polygon.stream, collector.journal, collector.publisher).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from polygon_pipeline.collector.lease import RENEW_SECONDS, Lease, Status
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.lake.store import STORE_ERRORS, Lake, brief, permanent_fault
from polygon_pipeline.polygon.stream import Backoff, ConnectionEvent, EventKind, Stream

T = TypeVar("T")

# After this long without progress at the end of a run, what is left waits in the journal for the next start.
DRAIN_SECONDS = 60.0
# How often the publisher looks for new records: bars come in bursts, and a burst is one batch.
_LINGER_SECONDS = 0.2

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What a run is to collect and where it is to go.

    run: a name that sorts by time. owner: who to ask about the run (Dagster's run id). topics: such as `AM.SPY`.
    quiet_limit: how many seconds a subscribed connection may bring no frame, now; None for any time.
    """

    run: str
    owner: str
    session_date: date
    feed: str
    url: str
    key: str = field(repr=False)
    topics: Sequence[str]
    journal_dir: Path
    write_objects: bool = True
    write_frames: bool = True
    checkpoint_seconds: float = 300.0
    quiet_limit: Callable[[], float | None] = lambda: None


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

    def __init__(self, lake: Lake, plan: Plan, log: logging.Logger, backoff: Backoff | None = None) -> None:
        self._lake = lake
        self._plan = plan
        self._log = log
        self._backoff = backoff
        self._started = time.monotonic()
        self._stop_stream = threading.Event()
        self._messages: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._admitted = threading.Event()
        self._draining = threading.Event()
        self._finished = threading.Event()
        self._connected = False
        self._drain_deadline = math.inf
        self._store_fault: str | None = None
        self._reported: dict[date, int] = {}

    def run(self, ending: Callable[[], str | None], on_checkpoint: Callable[[Progress], None]) -> str:
        """Collects until `ending` (asked twice a second) gives a reason, then drains, and returns the reason.

        on_checkpoint is called every checkpoint_seconds, when the frames received until then are on the lake, and
        once at the end. Raises LakeError or StreamRefused where trying again cannot help, LeaseHeld or LeaseLost when
        another collector is at work, and JournalError when the journal cannot be written; what was received until
        then is drained all the same.
        """
        with _rarely_looking_for_cycles():
            return self._run(ending, on_checkpoint)

    def _run(self, ending: Callable[[], str | None], on_checkpoint: Callable[[Progress], None]) -> str:
        plan = self._plan
        left = leftovers(plan.journal_dir)
        header = JournalHeader(
            run=plan.run,
            session_date=plan.session_date,
            lake_uri=self._lake.uri,
            feed=plan.feed,
            started_at=datetime.now(UTC),
            write_objects=plan.write_objects,
            write_frames=plan.write_frames,
            topics=tuple(plan.topics),
        )
        self._journal = Journal(plan.journal_dir, header)
        self._publisher = Publisher(self._lake, self._journal, header)
        publishing = self._thread("publish", lambda: self._publish(left))
        stream: threading.Thread | None = None
        failure: BaseException | None = None
        try:
            reason = self._wait_for_admission(ending)
            if reason is None:
                stream = self._thread("stream", self._receive)
                reason = self._watch(ending, on_checkpoint)
        except BaseException as error:  # noqa: BLE001 whatever ends the run, what it received is drained first
            reason, failure = f"failed: {brief(error)}", error
        self._stop_stream.set()
        if stream:
            stream.join()
        self._drain(reason, publishing, received=stream is not None)
        if failure:
            raise failure
        self._checkpoint(on_checkpoint)
        return reason

    def _wait_for_admission(self, ending: Callable[[], str | None]) -> str | None:
        """Waits for the lake and the lease, before the vendor is told: a second connection would evict the first.

        A lake that is down is not waited for: the journal takes what comes, and admission follows. Returns a reason
        where the run is to end already.
        """
        while not self._admitted.is_set() and self._store_fault is None:
            if not self._failures.empty():
                raise self._failures.get()
            if reason := ending():
                return reason
            self._admitted.wait(_POLL_SECONDS)
        return None

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
                self._checkpoint(on_checkpoint)
            time.sleep(_POLL_SECONDS)

    def _drain(self, reason: str, publishing: threading.Thread, received: bool) -> None:
        """Publishes the rest, as long as that makes progress; what is left waits for the next start."""
        with contextlib.suppress(JournalError):  # raised where it happened: this only ends what can be ended
            self._journal.append(Kind.EVENT, msgspec.json.encode(ConnectionEvent(EventKind.ENDED, reason)))
        with contextlib.suppress(JournalError):
            self._journal.close()
        self._drain_deadline = time.monotonic() + DRAIN_SECONDS
        self._draining.set()
        publishing.join()
        self._finished.set()
        self._tell()
        if received and self._journal.numbers():
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
            on_frames=lambda frames: self._journal.append(Kind.FRAME, *frames),
            on_event=self._note_connection,
            stop=self._stop_stream,
            backoff=self._backoff,
            quiet_limit=self._plan.quiet_limit,
        ).run()

    def _note_connection(self, event: ConnectionEvent) -> None:
        self._journal.append(Kind.EVENT, msgspec.json.encode(event))
        if event.kind in (EventKind.SUBSCRIBED, EventKind.DISCONNECTED, EventKind.REFUSED):
            self._connected = event.kind is EventKind.SUBSCRIBED
        routine = event.kind in (EventKind.CONNECTED, EventKind.SUBSCRIBED) or self._stop_stream.is_set()
        retry = "" if event.retry_seconds is None else f"; next attempt in {event.retry_seconds:.1f} s"
        self._messages.put((logging.INFO if routine else logging.WARNING, f"{event.kind}: {event.detail}{retry}"))

    def _publish(self, left: list[LeftoverJournal]) -> None:
        lease = Lease(self._lake, self._plan.run, self._plan.owner)
        try:
            self._persist(lambda: self._lake.claim(self._plan.feed))
            self._persist(lambda: lease.acquire(self._wait_unless_draining))
            self._admitted.set()
            renewing = self._thread("lease", lambda: self._renew(lease))
            # Dead runs first: their bars are older, and so revisions reach the lake in the order they came.
            while left:
                self._recover(left[0])
                left.pop(0)
            while True:
                last_round = self._draining.is_set()
                if self._persist(self._publisher.step):
                    continue
                if last_round:
                    break
                self._journal.wait(*self._publisher.position, _POLL_SECONDS)
                time.sleep(_LINGER_SECONDS)
            complete = not self._journal.numbers()
            self._persist(lambda: self._publisher.put_ledger(complete))
            self._finished.set()
            renewing.join()
            self._persist(lease.release)
        except _GivenUp:  # _drain says what is left
            with contextlib.suppress(*STORE_ERRORS):
                lease.release()
        finally:
            for journal in left:
                journal.release()

    def _renew(self, lease: Lease) -> None:
        """Keeps the lease until the run is over. A store that is down does not end it; another holder does."""
        while not self._finished.wait(RENEW_SECONDS):
            progress = self._progress()
            with contextlib.suppress(*STORE_ERRORS):  # the publisher tells of them
                lease.renew(
                    Status(
                        connected=self._connected,
                        bars=progress.account.bars,
                        bars_per_second=round(progress.account.bars / progress.elapsed_seconds, 1),
                        last_bar=progress.account.last_received_at,
                        backlog_bytes=progress.backlog_bytes,
                        unpublished_seconds=round(progress.unpublished_seconds, 1),
                        gaps=len(progress.account.gaps(self._plan.feed)),
                        store_fault=progress.store_fault,
                    )
                )

    def _wait_unless_draining(self, seconds: float) -> None:
        if self._draining.wait(seconds):
            raise _GivenUp

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

    def _checkpoint(self, on_checkpoint: Callable[[Progress], None]) -> None:
        """Tells the caller how it stands, and which dates got bars since it was last told."""
        progress = self._progress()
        days = progress.account.days
        bars = {day: sum(count.bars for count in channels.values()) for day, channels in days.items()}
        dates = frozenset(day for day, count in bars.items() if count != self._reported.get(day))
        self._reported = bars
        on_checkpoint(replace(progress, dates=dates))

    def _progress(self) -> Progress:
        account = self._publisher.account
        backlog = self._backlog_bytes()
        now = datetime.now(UTC)
        oldest = (account.last_received_at or now) if backlog else now
        return Progress(
            account=account,
            dates=frozenset(),
            tickers=len(self._publisher.tickers),
            elapsed_seconds=time.monotonic() - self._started,
            backlog_bytes=backlog,
            unpublished_seconds=max(0.0, (now - oldest).total_seconds()),
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


@contextlib.contextmanager
def _rarely_looking_for_cycles() -> Iterator[None]:
    """While a collector runs, Python looks for cyclic garbage rarely, and only at what is new.

    A collector makes none. Among all the objects of all imports each look takes up to 100 ms, with every thread
    waiting, the socket's too; and decoding would provoke one every few thousand bars.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class _GivenUp(Exception):
    """The store did not come back before the end of the run."""
