"""One run of the collector: the stream writes the journal, the publisher reads it, and the main thread watches.

Belongs here: the threads, what ends a run and how, retrying the store, and reporting how it goes. Does not belong
here: Dagster, and the three parts themselves (polygon.stream, collector.journal, collector.publisher).

A run goes through four phases (Phase), each entered by one thread and awaited by others:

1. ADMISSION. `publish` opens the lake and takes the lease, before the vendor sees a connection: a second one would
   evict the first. A lake that is down is not waited for: the journal takes what comes, and admission follows.
2. COLLECTING, entered by `publish`. `stream` appends frames to the journal; `publish` recovers the journals of lost
   runs and then publishes this one's; `lease` renews; `main` asks whether to end, checks for failures and reports.
3. DRAINING, entered by `main` when the stream has ended and the journal is closed. `publish` publishes the rest for as
   long as that makes progress.
4. FINISHED, entered by `publish` or, where it gave up, by `main`. `lease` stops renewing, and the lease is released.

Five threads: main, stream, publish, lease, and the journal's own for syncing. A failure in any of them ends the run by
way of `main`, which raises it after draining. The relay, where there is one, has a sixth, whose failure ends the relay
alone.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import msgspec

from polygon_pipeline.collector.accounting import archived, lateness_summary
from polygon_pipeline.collector.journal import (
    Journal,
    JournalError,
    JournalHeader,
    LeftoverJournal,
    RecordType,
    leftovers,
)
from polygon_pipeline.collector.lease import RENEW_SECONDS, CollectorStatus, Holding, Lease, live_run
from polygon_pipeline.collector.publisher import Publisher
from polygon_pipeline.collector.recovery import Recovered, belongs, recover
from polygon_pipeline.collector.relay import Relay, RelayAccess
from polygon_pipeline.lake.archive import ArchivedEvent
from polygon_pipeline.lake.errors import STORE_ERRORS, brief, permanent_error
from polygon_pipeline.lake.ledger import Account, TimeBase, Watermark, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.lake.watermark import watermarks
from polygon_pipeline.market import hours
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon.stream import Backoff, ConnectionEvent, EventKind, Stream

T = TypeVar("T")
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

# After this long without progress at the end of a run, what is left waits in the journal for the next start.
DRAIN_SECONDS = 60.0
# How often the publisher looks for new records: bars come in bursts, and a burst is one batch.
_LINGER_SECONDS = 0.2

# Who waits so long for the next connection was evicted or refused: somebody should look.
_ALARMING_SECONDS = 60.0

_POLL_SECONDS = 0.5

# The stream ends within 12 s of a stop, unless the system's resolver of names hangs: then the run ends without it.
_STREAM_END_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """What a run is to collect and where it is to go.

    run: a name that sorts by time. owner: who to ask about the run (Dagster's run id). topics: such as `AM.SPY`.
    quiet_limit: how many seconds a subscribed connection may bring no frame, now; None for any time. time_base: which
    time says what a connection covered (lake.ledger). standby: whether the run waits while another collects, and takes
    over when that one is gone; it connects with the lease only, also where the lake is down. was_lost: as in
    Lease.acquire. relay: where the stream is shared; None for nowhere.
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
    time_base: TimeBase = "processing"
    standby: bool = False
    was_lost: Callable[[Holding], bool] = lambda _: False
    relay: RelayAccess | None = None


@dataclass(frozen=True)
class Progress:
    """How a run stands. Counts are of what is published, since the run's start; times in seconds.

    dates: the session dates that got bars since the last checkpoint. backlog_frames, backlog_bytes: what waits on disk;
    unpublished_seconds: the age of the oldest of it, 0.0 when nothing waits. disk_only_seconds: the age of the oldest
    frame that is not in the archive yet, which would be lost with this disk. store_faults: how often the lake did not
    take a write that was tried again. lease_seconds: how long ago the lease was taken or renewed; None before.
    watermarks: of what is published, by channel.
    """

    account: Account
    dates: frozenset[date]
    tickers: int
    gaps: int
    connected: bool
    evicted: bool
    elapsed_seconds: float
    backlog_frames: int
    backlog_bytes: int
    unpublished_seconds: float
    disk_only_seconds: float
    store_fault: str | None
    store_faults: int
    lease_seconds: float | None
    journal_free_bytes: int
    watermarks: Mapping[Channel, Watermark] = field(default_factory=dict)


class Phase(IntEnum):
    """How far a run has come; the module's docstring says who enters each."""

    ADMISSION = 1
    COLLECTING = 2
    DRAINING = 3
    FINISHED = 4


class Collector:
    """Collects by a plan. Connection changes and faults go to `log`, always on the thread that calls run()."""

    def __init__(self, lake: Lake, plan: Plan, log: Log, backoff: Backoff | None = None) -> None:
        self._lake = lake
        self._plan = plan
        self._log = log
        self._backoff = backoff
        self._run: _Run | None = None

    def progress(self) -> Progress | None:
        """How the run stands now, for any thread; None where none has begun."""
        return self._run.progress() if self._run else None

    def run(self, ending: Callable[[], str | None], on_checkpoint: Callable[[Progress], None]) -> str:
        """Collects until `ending` (asked twice a second) gives a reason, then drains, and returns the reason.

        on_checkpoint is called every checkpoint_seconds, when the frames received until then are on the lake, and
        once at the end. Raises LakeError or StreamRefused where trying again cannot help, LeaseHeld or LeaseLost when
        another collector is at work, and JournalError when the journal cannot be written; what was received until
        then is drained all the same.
        """
        with _rare_garbage_collection():
            self._run = _Run(self._lake, self._plan, self._log, self._backoff, on_checkpoint)
            return self._run.run(ending)


class _Run:
    """One run of a collector; it exists from the moment its journal does."""

    def __init__(
        self,
        lake: Lake,
        plan: Plan,
        log: Log,
        backoff: Backoff | None,
        on_checkpoint: Callable[[Progress], None],
    ) -> None:
        self._lake = lake
        self._plan = plan
        self._log = log
        self._on_checkpoint = on_checkpoint
        self._started = time.monotonic()
        self._phase = Phase.ADMISSION
        self._phase_changed = threading.Condition()
        self._leftovers = leftovers(plan.journal_dir)
        header = JournalHeader(
            run=plan.run,
            session_date=plan.session_date,
            lake_uri=lake.uri,
            feed=plan.feed,
            started_at=datetime.now(UTC),
            write_objects=plan.write_objects,
            write_frames=plan.write_frames,
            topics=tuple(plan.topics),
            time_base=plan.time_base,
        )
        self._journal = Journal(plan.journal_dir, header)
        for leftover in self._leftovers:
            self._journal.continue_after(leftover.last_received_at())
        self._publisher = Publisher(lake, self._journal, header)
        self._lease = Lease(lake, plan.run, plan.owner)
        self._stop_stream = threading.Event()
        self._stream = Stream(
            plan.url,
            plan.key,
            plan.topics,
            on_frames=lambda frames: self._journal.append(RecordType.FRAME, *frames),
            on_event=self._note_connection,
            stop=self._stop_stream,
            backoff=backoff,
            quiet_limit=plan.quiet_limit,
            may_return=self._may_return,
        )
        self._connected = False
        self._evicted = False
        self._yielding = False
        self._is_standing_by = False
        self._messages: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()  # for `main` to log
        self._failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()  # for `main` to raise
        self._recovered: queue.SimpleQueue[Recovered] = queue.SimpleQueue()  # of lost runs, for `main` to report
        self._relay = plan.relay and Relay(
            plan.relay,
            self._journal,
            header,
            lake,
            lateness=lambda: self._publisher.account.lateness,
            heard=lambda: self._stream.heard,
            tell=self._messages.put,
        )
        self._store_fault: str | None = None
        self._store_faults = 0
        self._drain_deadline = math.inf
        self._reported: dict[date, int] = {}
        self._outside_hours = 0

    def run(self, ending: Callable[[], str | None]) -> str:
        """On the thread `main`."""
        if self._relay:
            self._relay.start()
        publishing = self._thread("publish", self._publish)
        receiving: threading.Thread | None = None
        failure: BaseException | None = None
        try:
            reason = self._wait_for_admission(ending)
            if reason is None:
                receiving = self._thread("stream", self._stream.run)
                reason = self._collect(ending)
        except BaseException as error:  # noqa: BLE001 whatever ends the run, what it received is drained first
            reason, failure = f"failed: {brief(error)}", error
        self._stop_stream.set()
        if receiving:
            receiving.join(_STREAM_END_SECONDS)
        self._drain(reason, publishing, received=receiving is not None)
        if failure is None and not self._failures.empty():  # while it ended
            failure = self._failures.get()
        if failure:
            raise failure
        self._report_recovered()
        self._checkpoint()
        return reason

    # On the thread `main`

    def _wait_for_admission(self, ending: Callable[[], str | None]) -> str | None:
        """Waits for the lake and the lease. Returns a reason where the run is to end already."""
        while self._phase is Phase.ADMISSION and (self._store_fault is None or self._plan.standby):
            self._log_messages()
            self._report_recovered()
            if not self._failures.empty():
                raise self._failures.get()
            if reason := ending():
                return reason
            self._wait_for(Phase.COLLECTING, _POLL_SECONDS)
        return None

    def _collect(self, ending: Callable[[], str | None]) -> str:
        next_checkpoint = time.monotonic() + self._plan.checkpoint_seconds
        reported = 0
        while True:
            self._log_messages()
            if not self._failures.empty():
                raise self._failures.get()
            if reason := ending():
                return reason
            if time.monotonic() >= next_checkpoint:
                next_checkpoint = time.monotonic() + self._plan.checkpoint_seconds
                self._journal.rotate()
            if self._publisher.segments_published > reported:
                reported = self._publisher.segments_published
                self._checkpoint()
            self._report_recovered()
            time.sleep(_POLL_SECONDS)

    def _drain(self, reason: str, publishing: threading.Thread, received: bool) -> None:
        """Publishes the rest, as long as that makes progress; what is left waits for the next start."""
        with contextlib.suppress(JournalError):  # close() raises it too
            self._journal.append(RecordType.EVENT, msgspec.json.encode(ArchivedEvent("ended", reason)))
        try:
            self._journal.close()
        except JournalError as error:
            self._failures.put(error)
        if self._relay:
            self._relay.stop()
        self._drain_deadline = time.monotonic() + DRAIN_SECONDS
        self._enter(Phase.DRAINING)
        publishing.join()
        self._enter(Phase.FINISHED)
        self._log_messages()
        if received and self._journal.numbers():
            self._log.error(
                f"{self._backlog_bytes()} bytes could not be published and wait in {self._journal.folder}; the next "
                f"start on this machine publishes them. The lake's last fault: {self._store_fault}"
            )
            self._journal.release()
        else:
            self._journal.discard()

    def _checkpoint(self) -> None:
        """Reports to the caller how it stands, and which dates got bars since the last report."""
        progress = self.progress()
        days = progress.account.days
        bars = {day: sum(count.bars for count in channels.values()) for day, channels in days.items()}
        dates = frozenset(day for day, count in bars.items() if count != self._reported.get(day))
        self._reported = bars
        if outside := progress.account.outside_hours - self._outside_hours:
            self._outside_hours += outside
            self._log.warning(
                f"{outside} bars start outside the hours of trading; each is kept under its trade date. If the market "
                f"trades at night by now, set {hours.VARIABLE}."
            )
        self._on_checkpoint(replace(progress, dates=dates))

    def _report_recovered(self) -> None:
        """Reports the days of lost runs, which are on the lake now."""
        while not self._recovered.empty():
            lost = self._recovered.get()
            account = lost.account
            self._on_checkpoint(
                replace(self.progress(), account=account, tickers=lost.tickers, dates=frozenset(account.days))
            )

    def _log_messages(self) -> None:
        while not self._messages.empty():
            self._log.log(*self._messages.get())

    # On the thread `stream`

    def _note_connection(self, event: ConnectionEvent) -> None:
        self._journal.append(RecordType.EVENT, msgspec.json.encode(archived(event)))
        if event.kind in (EventKind.SUBSCRIBED, EventKind.DISCONNECTED, EventKind.REFUSED):
            self._connected = event.kind is EventKind.SUBSCRIBED
            self._evicted = (self._evicted or event.evicted) and not self._connected
        routine = event.kind in (EventKind.CONNECTED, EventKind.SUBSCRIBED) or self._stop_stream.is_set()
        retry = "" if event.retry_seconds is None else f"; next attempt in {event.retry_seconds:.1f} s"
        level = logging.ERROR if (event.retry_seconds or 0) > _ALARMING_SECONDS else logging.WARNING
        self._messages.put((logging.INFO if routine else level, f"{event.kind}: {event.detail}{retry}"))

    def _may_return(self) -> bool:
        """Whether to connect again after an eviction: without the lease, the other may be the one that has it now."""
        if self._lease.is_confirmed:
            self._yielding = False
        elif not self._yielding:
            self._yielding = True
            self._messages.put(
                (
                    logging.ERROR,
                    "another connection took over while the lease cannot be confirmed; the stream waits until the lake "
                    "says whose turn it is",
                )
            )
        return self._lease.is_confirmed

    # On the thread `publish`

    def _publish(self) -> None:
        try:
            self._persist(lambda: self._lake.claim(self._plan.feed))
            # Whose journal is locked here has no process any more, so its lease need not run out.
            ended = {journal.header.run for journal in self._leftovers}
            plan = self._plan
            self._persist(lambda: self._lease.acquire(self._wait_for_lease, ended, plan.standby, plan.was_lost))
            self._persist(self._continue_after_earlier_runs)
            # From here on the lake knows of the run, even if its machine is lost before anything is published.
            self._persist(lambda: self._publisher.put_ledger(complete=False))
            self._enter(Phase.COLLECTING)
            renewing = self._thread("lease", self._renew)
            # Lost runs first: their bars are older, and so revisions reach the lake in the order they came.
            self._recover_leftovers()
            # The lock of a machine that shares this volume and is gone may last longer than its lease.
            look_again = time.monotonic() + self._plan.checkpoint_seconds
            while True:
                last_round = self._phase is Phase.DRAINING
                if self._persist(self._publisher.step):
                    continue
                if last_round:
                    break
                if time.monotonic() >= look_again:
                    look_again = time.monotonic() + self._plan.checkpoint_seconds
                    self._leftovers = leftovers(self._plan.journal_dir)
                    self._recover_leftovers()
                self._journal.wait(*self._publisher.position, _POLL_SECONDS)
                time.sleep(_LINGER_SECONDS)
            complete = not self._journal.numbers()
            self._persist(lambda: self._publisher.put_ledger(complete))
            self._enter(Phase.FINISHED)
            renewing.join()
            self._persist(self._lease.release)
        except _GivenUp:  # _drain says what is left
            with contextlib.suppress(*STORE_ERRORS):
                self._lease.release()
        finally:
            for journal in self._leftovers:
                journal.release()

    def _continue_after_earlier_runs(self) -> None:
        """Their frames are older than this run's, whatever the clocks said. They are over: this run has the lease."""
        for ledger in read_ledgers(self._lake, self._plan.session_date).ledgers:
            self._journal.continue_after(ledger.account.last_received_at)

    def _recover_leftovers(self) -> None:
        while self._leftovers:
            self._recover(self._leftovers[0])
            self._leftovers.pop(0)

    def _recover(self, journal: LeftoverJournal) -> None:
        """Publishes what a lost run left, and completes its ledger."""
        header = journal.header
        if not belongs(header, self._lake, self._plan.feed):
            self._messages.put(
                (
                    logging.WARNING,
                    f"The journal {journal.folder} belongs to the {header.feed} lake {header.lake_uri}; it stays until "
                    "a collector runs with that LAKE_URI.",
                )
            )
            journal.release()
            return
        if self._persist(lambda: live_run(self._lake)) == header.run:
            journal.release()  # it collects elsewhere, so its lock does not hold on this volume
            return
        found = recover(self._lake, journal, self._plan.run, self._persist)
        self._recovered.put(found)
        text = f"recovered {found.waited_bytes} bytes and {found.account.bars} bars in all of run {header.run}"
        self._messages.put((logging.WARNING, text))

    def _persist(self, work: Callable[[], T]) -> T:
        """Does work until the store takes it, with backoff and jitter, for as long as the run lives."""
        pause = 0.5
        while True:
            try:
                result = work()
            except STORE_ERRORS as error:
                fault = str(permanent_error(error, self._lake.uri) or brief(error))
                if self._store_fault is None:
                    self._messages.put((logging.ERROR, f"the lake does not take writes, trying on: {fault}"))
                self._store_fault = fault
                self._store_faults += 1
                if time.monotonic() > self._drain_deadline:
                    raise _GivenUp from error
                time.sleep(pause)
                pause = min(pause * random.uniform(1.5, 2.5), 30)
                continue
            if self._store_fault is not None:
                self._messages.put((logging.INFO, "the lake takes writes again"))
                self._store_fault = None
            if self._phase is Phase.DRAINING:
                self._drain_deadline = time.monotonic() + DRAIN_SECONDS
            return result

    def _wait_for_lease(self, seconds: float) -> None:
        if self._plan.standby and not self._is_standing_by:
            self._is_standing_by = True
            self._messages.put(
                (logging.INFO, f"standby: another collects into {self._lake.uri}; waiting for its lease")
            )
            if self._lake.is_s3:  # what lies on this disk need not wait that long; a local lake has one writer
                self._recover_leftovers()
        if self._wait_for(Phase.DRAINING, seconds):
            raise _GivenUp

    # On the thread `lease`

    def _renew(self) -> None:
        """Keeps the lease until the run is over. A store that is down does not end it; another holder does."""
        while not self._wait_for(Phase.FINISHED, RENEW_SECONDS):
            progress = self.progress()
            with contextlib.suppress(*STORE_ERRORS):  # `publish` reports them
                self._lease.renew(
                    CollectorStatus(
                        connected=progress.connected,
                        bars=progress.account.bars,
                        bars_per_second=round(progress.account.bars / progress.elapsed_seconds, 1),
                        last_bar=progress.account.last_received_at,
                        backlog_bytes=progress.backlog_bytes,
                        unpublished_seconds=round(progress.unpublished_seconds, 1),
                        disk_only_seconds=round(progress.disk_only_seconds, 1),
                        gaps=progress.gaps,
                        store_fault=progress.store_fault,
                        evicted=progress.evicted,
                        journal_free_bytes=progress.journal_free_bytes,
                        lag=progress.account.lags.summary(),
                        lateness=lateness_summary(progress.account),
                        watermarks=dict(progress.watermarks),
                    )
                )

    # On any thread

    def _enter(self, phase: Phase) -> None:
        """Phases only go forward: admission that comes while draining changes nothing."""
        with self._phase_changed:
            self._phase = max(self._phase, phase)
            self._phase_changed.notify_all()

    def _wait_for(self, phase: Phase, seconds: float) -> bool:
        """Whether the phase is reached, at the latest after so many seconds."""
        with self._phase_changed:
            return self._phase_changed.wait_for(lambda: self._phase >= phase, seconds)

    def progress(self) -> Progress:
        account = self._publisher.account
        backlog = self._backlog_bytes()
        now = datetime.now(UTC)
        oldest = (account.last_received_at or now) if backlog else now
        unarchived = self._journal.first_received(self._publisher.position[0])
        return Progress(
            account=account,
            dates=frozenset(),
            tickers=len(self._publisher.tickers),
            gaps=len(account.gaps(self._plan.time_base)),
            connected=self._connected,
            evicted=self._evicted,
            elapsed_seconds=time.monotonic() - self._started,
            backlog_frames=max(0, self._journal.frames - account.frames),
            backlog_bytes=backlog,
            unpublished_seconds=max(0.0, (now - oldest).total_seconds()),
            disk_only_seconds=0.0 if unarchived is None else time.monotonic() - unarchived,
            store_fault=self._store_fault,
            store_faults=self._store_faults,
            lease_seconds=self._lease.confirmed_seconds,
            journal_free_bytes=self._journal.free_bytes(),
            watermarks=watermarks(account, self._plan.topics, self._plan.time_base, self._plan.session_date),
        )

    def _backlog_bytes(self) -> int:
        return max(0, self._journal.backlog_bytes() - self._publisher.position[1])

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Starts a thread whose failure ends the run."""

        def guarded() -> None:
            try:
                target()
            except Exception as error:  # noqa: BLE001 handed to `main`, which raises it
                self._failures.put(error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread


@contextlib.contextmanager
def _rare_garbage_collection() -> Iterator[None]:
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
