"""The life of run processes: signals to them, runs whose process is lost, processes that Dagster no longer manages.

Belongs here: what a process or Dagster's instance must be asked. Does not belong here: who asks (collect, sensors), and
when a collector counts as lost (collector.launching, collector.lease).

Dagster's default launcher starts a process per run and never looks at it again: a run whose process is killed stays
STARTED for ever. The other launchers have health checks of their own.
"""

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import dagster as dg

from polygon_pipeline.collector.launching import why_lost
from polygon_pipeline.collector.lease import Holding, Watch, read_lease, this_machine
from polygon_pipeline.lake.store import Lake

STOPPED_TAG = "polygon_pipeline/stopped_by"
TERMINATED_BY_HAND = "terminate"
LOST = "death"
# Of a lost run: the last renewal of its lease, so that its successor need not watch the lease for itself.
LAST_RENEWAL_TAG = "polygon_pipeline/last_renewal"
# A run that waits while another machine collects has no lease, and is not lost for that.
STANDBY_TAG = "polygon_pipeline/standby"

# A run in one of these states has a process, or is about to get or to end one.
_MANAGED = {dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING}
_LOOK_AT_RUN_SECONDS = 5.0
_RETRY_SECONDS = 2.0

# How far the wall clock was ahead of the one that never steps when this process began.
_AHEAD = time.time() - time.monotonic()

_PROC = Path("/proc")
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

    That is when its run was ended from outside (it was taken for lost, say), when its end was asked for and no signal
    came (the launcher's broker was away), or when the process that launched it is gone. A run started on the command
    line may outlive its shell.
    """
    parent = os.getppid() if run.remote_job_origin else None
    looked = time.monotonic()
    was_canceling = False

    def is_orphan() -> bool:
        nonlocal looked, was_canceling
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
        if current is None or current.status not in _MANAGED:
            return True
        unanswered, was_canceling = was_canceling, current.status is dg.DagsterRunStatus.CANCELING
        return unanswered

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


def report_canceling(instance: dg.DagsterInstance, run_id: str, reason: str) -> dg.DagsterRun | None:
    """Lets the end of the step that follows end the run as canceled; without it Dagster would call it a failure.
    Returns the run as it is then.

    A run that is terminated by hand is to stay ended; one whose process only gets a signal goes on with the next start
    of Dagster.
    """
    note_termination(instance, run_id)
    run = instance.get_run_by_id(run_id)
    if run is not None and not run.is_finished and run.status is not dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceling(run, message=f"The collector ends: {reason}.")
        return instance.get_run_by_id(run_id)
    return run


def fail_lost_collectors(
    instance: dg.DagsterInstance, job_name: str, lake: Lake, watch: Watch, log: logging.Logger
) -> int:
    """Reports collector runs failed that are lost; returns how many. Raises the store's errors.

    By their process, where it is known, and otherwise by the lake's lease. watch: the one of the looks before.
    """
    started = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    records = instance.get_run_records(dg.RunsFilter(job_name=job_name, statuses=started))
    lease = read_lease(lake) if records else None
    failed = 0
    for record in records:
        run = record.dagster_run
        own = lease if lease is not None and lease.owner == run.run_id else None
        cause = why_lost(own, watch.unchanged(run.run_id, own))
        lives = _process_lives(instance, record)
        # Where the id is another process's by now, which is rare while a machine is up, the lease tells.
        if own and own.machine == this_machine() and not _is_alive(own.pid, math.inf):
            cause = f"its process {own.pid} is gone"
        elif lives:
            continue  # it may be without a lease because its store is away
        elif lives is None and own is None and STANDBY_TAG in run.tags:
            continue
        if cause:
            message = f"The collector is gone: {cause}. What it received waits in its journal for the next attempt."
            log.warning(f"run {run.run_id}: {message}")
            by_hand = run.status is dg.DagsterRunStatus.CANCELING
            seen = {LAST_RENEWAL_TAG: own.renewed_at.isoformat()} if own else {}
            instance.add_run_tags(run.run_id, {STOPPED_TAG: TERMINATED_BY_HAND if by_hand else LOST, **seen})
            instance.report_run_failed(run, message)
            failed += 1
    return failed


def was_lost(instance: dg.DagsterInstance, holding: Holding) -> bool:
    """Whether fail_lost_collectors() has ended the run that holds the lease, and the lease is as it was then."""
    try:
        run = instance.get_run_by_id(holding.owner)
    except Exception as error:  # noqa: BLE001 a storage that is away says nothing about the run
        _TERMINAL.warning(f"Dagster's storage is away, so it is not known whether run {holding.run} is lost: {error}")
        return False
    return run is not None and run.tags.get(LAST_RENEWAL_TAG) == holding.renewed_at.isoformat()


def launcher_elsewhere(instance: dg.DagsterInstance) -> str | None:
    """The launcher's class where it starts runs on other machines; None where they start on this one.

    As configured, because a launcher that is made may ask for what a run has no right to: EcsRunLauncher asks AWS.
    """
    configured = None if instance.is_ephemeral else instance.get_ref().run_launcher_data
    name = configured.class_name if configured else None
    return None if name == dg.DefaultRunLauncher.__name__ else name


def fail_killed_runs(instance: dg.DagsterInstance, but: str, log: logging.Logger) -> int:
    """Reports runs of the default launcher failed whose process was killed; returns how many. but: a job left alone.

    Their processes are known, and are on this machine. Dagster then tries the runs again (run_retries), and a backfill
    goes on where it was.
    """
    failed = 0
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        run = record.dagster_run
        if run.job_name == but:
            continue
        if _process_lives(instance, record) is False:
            log.warning(f"run {run.run_id}: its process is gone")
            instance.report_run_failed(run, "The run's process is gone: it was killed, or the machine.")
            failed += 1
    return failed


def _process_lives(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool | None:
    """Whether a run's process lives, where the default launcher started it, on this machine; None where another did."""
    if launcher_elsewhere(instance):
        return None
    pid = _process_of(instance, record.dagster_run.run_id)
    return None if pid is None else _is_alive(pid, record.start_time or 0.0)


def _process_of(instance: dg.DagsterInstance, run_id: str) -> int | None:
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if pid is not None and str(pid.value).isdigit():
            return int(str(pid.value))
    return None


def _is_alive(pid: int, run_started: float) -> bool:
    """Whether the process is there and is the run's: after a restart of the machine the id may be another's.

    run_started: Unix seconds, as the clock was then. A clock that was set forward since makes no process younger.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, as its age tells
        pass
    try:
        state, age = _from_proc(pid) if _PROC.exists() else _from_ps(pid)
    except (FileNotFoundError, ProcessLookupError):
        return not _PROC.exists()  # gone since; without ps there is only the id
    set_forward = max(0.0, time.time() - time.monotonic() - _AHEAD)
    return not state.startswith("Z") and time.time() - age - set_forward < run_started + 1


def _from_proc(pid: int) -> tuple[str, float]:
    """A process's state (Z: it ended, and waits for its parent to look) and its age in seconds."""
    state, *fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return state, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[18]) / os.sysconf("SC_CLK_TCK")


def _from_ps(pid: int) -> tuple[str, float]:
    """The same where there is no /proc, as on macOS. Raises ProcessLookupError, and FileNotFoundError without ps."""
    command = ["ps", "-o", "stat=", "-o", "etime=", "-p", str(pid)]
    fields = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if len(fields) != 2:
        raise ProcessLookupError(pid)
    state, elapsed = fields  # such as Ss and 1-02:03:04 (days, hours, minutes, seconds)
    days, _, clock = elapsed.rpartition("-")
    hours, minutes, seconds = [0, *map(int, clock.split(":"))][-3:]
    return state, ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
