"""The sensors: one starts the collector, one lets datasets follow their inputs. Shells around pure decisions."""

import os
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime

import dagster as dg

from polygon_pipeline.collector.launching import Outcome, PastRun, Start, cause_of_death, decide_demo, decide_live
from polygon_pipeline.defs.collect import (
    DEATH,
    FAILED_FOR_GOOD_TAG,
    FEED_TAG,
    SESSION_DATE_TAG,
    STOPPED_TAG,
    TERMINATED_BY_HAND,
    collect_aggregates_job,
)
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.settings import ConfigurationError

ATTEMPT_TAG = "polygon_pipeline/attempt"
_LOADED_AT = datetime.now(UTC)

_ACTIVE = {
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
}
# More than a day of attempts at the longest pause would fill; older ones change no decision.
_RUNS_LOOKED_AT = 200


@dg.sensor(
    job=collect_aggregates_job,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=15,
    description="Starts one collector a session, and the next attempt when one died. Without a key: the demo.",
)
def market_session_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource, lake: LakeResource
) -> dg.RunRequest | dg.SkipReason:
    try:
        wanted = polygon.settings()
    except ConfigurationError as error:
        return dg.SkipReason(f"nothing is collected: {error}")
    _bury_the_dead(context, lake)
    _bury_killed_workers(context)
    decide = decide_demo if wanted.websocket_url is None else decide_live
    decision = decide(datetime.now(UTC), _LOADED_AT, _past_runs(context.instance, wanted.feed))
    if not isinstance(decision, Start):
        return dg.SkipReason(decision.reason)
    day = decision.session_date.isoformat()
    return dg.RunRequest(
        # A run key is remembered for ever, whatever became of its run: so the attempt is part of it.
        run_key=f"{wanted.feed}-{day}-{decision.attempt}",
        run_config={"ops": {"collect_aggregates": {"config": {"session_date": day}}}},
        tags={SESSION_DATE_TAG: day, FEED_TAG: wanted.feed, ATTEMPT_TAG: str(decision.attempt)},
    )


def _bury_the_dead(context: dg.SensorEvaluationContext, lake: LakeResource) -> None:
    """Reports runs failed whose process is gone: the default launcher would leave them started for ever."""
    from polygon_pipeline.collector.lease import read_lease
    from polygon_pipeline.lake.store import STORE_ERRORS, LakeError, brief

    job = collect_aggregates_job.name
    started = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    records = context.instance.get_run_records(dg.RunsFilter(job_name=job, statuses=started))
    if not records:
        return
    try:
        lease = read_lease(lake.open())
    except (*STORE_ERRORS, LakeError) as error:
        context.log.warning(f"the lease cannot be read, so nobody is taken for dead: {brief(error)}")
        return
    for record in records:
        run = record.dagster_run
        began = datetime.fromtimestamp(record.start_time, UTC) if record.start_time else record.create_timestamp
        if cause := cause_of_death(datetime.now(UTC), run.run_id, began, lease):
            message = f"The collector is gone: {cause}. What it received waits in its journal for the next attempt."
            context.log.warning(f"run {run.run_id}: {message}")
            context.instance.add_run_tags(run.run_id, {STOPPED_TAG: DEATH})
            context.instance.report_run_failed(run, message)


def _bury_killed_workers(context: dg.SensorEvaluationContext) -> None:
    """Reports runs of datasets failed whose process was killed. The default launcher would leave them started for ever,
    in the place of others; of its runs the process is known, and is on this machine. Dagster then tries them again
    (run_retries), and a backfill goes on where it was."""
    if type(context.instance.run_launcher).__name__ != "DefaultRunLauncher":
        return
    for record in context.instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        run = record.dagster_run
        if run.job_name == collect_aggregates_job.name:
            continue  # its lease tells
        pid = _process_of(context.instance, run.run_id)
        if pid and not _is_alive(pid, record.start_time or 0.0):
            context.log.warning(f"run {run.run_id}: its process {pid} is gone")
            context.instance.report_run_failed(run, f"The run's process {pid} is gone: it was killed, or the machine.")


def _process_of(instance: dg.DagsterInstance, run_id: str) -> int | None:
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        pid = event.engine_event_data.metadata.get("pid") if event else None
        if pid is not None and str(pid.value).isdigit():
            return int(str(pid.value))
    return None


def _is_alive(pid: int, run_started: float) -> bool:
    """Whether the process is there and is the run's: after a restart of the machine the id may be another's."""
    from polygon_pipeline.collector.lease import process_start

    ticks = process_start(pid)
    if not ticks:
        return ticks is not None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age < run_started + 1


def _past_runs(instance: dg.DagsterInstance, feed: str) -> Sequence[PastRun]:
    """The feed's collector runs, newest first; a run launched by hand has no tags until it has begun."""
    records = instance.get_run_records(dg.RunsFilter(job_name=collect_aggregates_job.name), limit=_RUNS_LOOKED_AT)
    runs = []
    for record in records:
        tags, active = record.dagster_run.tags, record.dagster_run.status in _ACTIVE
        if not active and (tags.get(FEED_TAG) != feed or SESSION_DATE_TAG not in tags):
            continue
        ended = None if record.end_time is None else datetime.fromtimestamp(record.end_time, UTC)
        day = date.fromisoformat(tags[SESSION_DATE_TAG]) if SESSION_DATE_TAG in tags else record.create_timestamp.date()
        runs.append(PastRun(day, _outcome(record.dagster_run), ended, int(tags.get(ATTEMPT_TAG, 0))))
    return runs


def _outcome(run: dg.DagsterRun) -> Outcome:
    if run.status in _ACTIVE:
        return Outcome.ACTIVE
    if run.status is dg.DagsterRunStatus.SUCCESS:
        return Outcome.SUCCEEDED
    if run.tags.get(STOPPED_TAG) == TERMINATED_BY_HAND:
        return Outcome.STOPPED
    if run.status is dg.DagsterRunStatus.CANCELED or run.tags.get(STOPPED_TAG) == DEATH:
        return Outcome.INTERRUPTED
    return Outcome.FAILED_FOR_GOOD if FAILED_FOR_GOOD_TAG in run.tags else Outcome.FAILED


# The sensor that Dagster would make by itself is off in a new instance.
datasets_follow_sensor = dg.AutomationConditionSensorDefinition(
    "datasets_follow_sensor",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=15,
    description="Makes the datasets of a day anew whenever their inputs have changed.",
)
