"""The life of run processes: signals to them, runs whose process is lost, processes that Dagster no longer manages.

Belongs here: what a process or Dagster's instance must be asked. Does not belong here: who asks (collect, sensors), and
when a collector counts as lost (collector.launching, collector.lease).

Dagster's default launcher starts a process per run and never looks at it again: a run whose process is killed stays
STARTED for ever. The other launchers have health checks of their own.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Self

import dagster as dg

from polygon_pipeline.collector.launching import why_lost
from polygon_pipeline.collector.lease import process_start, read_lease
from polygon_pipeline.lake.store import Lake

STOPPED_TAG = "polygon_pipeline/stopped_by"
TERMINATED_BY_HAND = "terminate"
LOST = "death"

# A run in one of these states has a process, or is about to get or to end one.
_MANAGED = {dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING}
_LOOK_AT_RUN_SECONDS = 5.0
_RETRY_SECONDS = 2.0

_TERMINAL = logging.getLogger(__name__)


class PatientLog(logging.LoggerAdapter[logging.Logger]):
    """Dagster's log for what must go on while Dagster's storage is away: then a line goes to the terminal alone."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            self.logger.log(level, msg, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 whatever Dagster's storage raises
            _TERMINAL.log(level, f"{msg} (Dagster's storage could not take this: {error})")


class Reports:
    """Materializations that are reported again until Dagster's storage has taken them.

    report: takes a partition's latest materialization; what is reported later of the same partition replaces it.
    """

    def __init__(self, log_event: Callable[[dg.AssetMaterialization], None]) -> None:
        self._log_event = log_event
        self._waiting: dict[tuple[str, str | None], dg.AssetMaterialization] = {}

    def add(self, event: dg.AssetMaterialization) -> None:
        self._waiting[event.asset_key.to_user_string(), event.partition] = event

    def send(self, patience_seconds: float = 0.0) -> None:
        """Reports what waits, and tries again for so long where Dagster's storage does not take it."""
        deadline = time.monotonic() + patience_seconds
        while self._waiting:
            try:
                for key, event in list(self._waiting.items()):
                    self._log_event(event)
                    del self._waiting[key]
            except Exception as error:  # noqa: BLE001 whatever Dagster's storage raises
                _TERMINAL.warning(f"Dagster's storage is away, its reports wait: {error}")
                if time.monotonic() >= deadline:
                    return
                time.sleep(_RETRY_SECONDS)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag and lets the second through; a context manager."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.received:
            raise dg.DagsterExecutionInterruptedError
        self.received = True


def orphan_watch(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Callable[[], bool]:
    """A function that says whether this process has become an orphan: it would go on beside its successor.

    That is when its run was ended from outside (it was taken for lost, say), or when the process that launched it is
    gone. A run started on the command line may outlive its shell.
    """
    parent = os.getppid() if run.remote_job_origin else None
    looked = time.monotonic()

    def is_orphan() -> bool:
        nonlocal looked
        if parent is not None and os.getppid() != parent:
            return True
        if time.monotonic() < looked + _LOOK_AT_RUN_SECONDS:
            return False
        looked = time.monotonic()
        try:
            current = instance.get_run_by_id(run.run_id)
        except Exception as error:  # noqa: BLE001 a storage that is away says nothing about the run
            _TERMINAL.warning(f"Dagster's storage is away, so the run's status is not known: {error}")
            return False
        return current is None or current.status not in _MANAGED

    return is_orphan


def note_termination(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tags a run that is being terminated by hand, because it is to stay ended.

    At once, and not when it has drained: run monitoring calls a run that takes long CANCELED, and then nothing but the
    tag tells it from one whose process got a signal. Where Dagster's storage is away, report_canceling() tags it.
    """
    try:
        run = instance.get_run_by_id(run_id)
        if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
            instance.add_run_tags(run_id, {STOPPED_TAG: TERMINATED_BY_HAND})
    except Exception as error:  # noqa: BLE001 whatever Dagster's storage raises
        _TERMINAL.warning(f"Dagster's storage is away, so the run's status is not known: {error}")


def report_canceling(instance: dg.DagsterInstance, run_id: str, reason: str) -> None:
    """Lets the interruption that follows end the run as canceled; without it Dagster would call it a failure.

    A run that is terminated by hand is to stay ended; one whose process only gets a signal goes on with the next start
    of Dagster.
    """
    note_termination(instance, run_id)
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished and run.status is not dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceling(run, message=f"The collector ends: {reason}.")


def fail_lost_collectors(instance: dg.DagsterInstance, job_name: str, lake: Lake, log: logging.Logger) -> int:
    """Reports collector runs failed that are lost, by the lake's lease; returns how many. Raises the store's errors."""
    started = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    records = instance.get_run_records(dg.RunsFilter(job_name=job_name, statuses=started))
    lease = read_lease(lake) if records else None
    failed = 0
    for record in records:
        run = record.dagster_run
        if _has_process(instance, record):
            continue  # it may be without a lease because its store is away
        began = datetime.fromtimestamp(record.start_time, UTC) if record.start_time else record.create_timestamp
        if cause := why_lost(datetime.now(UTC), run.run_id, began, lease):
            message = f"The collector is gone: {cause}. What it received waits in its journal for the next attempt."
            log.warning(f"run {run.run_id}: {message}")
            by_hand = run.status is dg.DagsterRunStatus.CANCELING
            instance.add_run_tags(run.run_id, {STOPPED_TAG: TERMINATED_BY_HAND if by_hand else LOST})
            instance.report_run_failed(run, message)
            failed += 1
    return failed


def fail_killed_runs(instance: dg.DagsterInstance, but: str, log: logging.Logger) -> int:
    """Reports runs of the default launcher failed whose process was killed; returns how many. but: a job left alone.

    Their processes are known, and are on this machine. Dagster then tries the runs again (run_retries), and a backfill
    goes on where it was.
    """
    if not isinstance(instance.run_launcher, dg.DefaultRunLauncher):
        return 0
    failed = 0
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        run = record.dagster_run
        if run.job_name == but:
            continue
        pid = _process_of(instance, run.run_id)
        if pid and not _is_alive(pid, record.start_time or 0.0):
            log.warning(f"run {run.run_id}: its process {pid} is gone")
            instance.report_run_failed(run, f"The run's process {pid} is gone: it was killed, or the machine.")
            failed += 1
    return failed


def _has_process(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    """Whether a run's process is known to live: the default launcher started it, on this machine."""
    if not isinstance(instance.run_launcher, dg.DefaultRunLauncher):
        return False
    pid = _process_of(instance, record.dagster_run.run_id)
    return pid is not None and _is_alive(pid, record.start_time or 0.0)


def _process_of(instance: dg.DagsterInstance, run_id: str) -> int | None:
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if pid is not None and str(pid.value).isdigit():
            return int(str(pid.value))
    return None


def _is_alive(pid: int, run_started: float) -> bool:
    """Whether the process is there and is the run's: after a restart of the machine the id may be another's."""
    ticks = process_start(pid)
    if not ticks:
        return ticks is not None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age < run_started + 1
