"""The collector's sensors: one starts it, one finds lost runs, one publishes what they left.

Belongs here: shells around pure decisions (collector.launching, demo). Does not belong here: what the processes of runs
are asked (defs.supervision), and sensors of datasets (following, reference,
external).
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime

import dagster as dg

from polygon_pipeline import demo
from polygon_pipeline.collector.launching import Outcome, PastRun, Start, decide_live
from polygon_pipeline.collector.lease import Watch, read_lease
from polygon_pipeline.collector.recovery import waiting
from polygon_pipeline.collector.telling import live_status
from polygon_pipeline.defs.collect import FAILED_FOR_GOOD_TAG, FEED_TAG, SESSION_DATE_TAG, collect_aggregates_job
from polygon_pipeline.defs.draining import drain_journals
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.defs.supervision import (
    LOST,
    STOPPED_TAG,
    TERMINATED_BY_HAND,
    fail_killed_runs,
    fail_lost_collectors,
)
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief
from polygon_pipeline.market.calendar import trade_date_at

ATTEMPT_TAG = "polygon_pipeline/attempt"
_LOADED_AT = datetime.now(UTC)
# What this process has seen of the lease: a new process takes a lease's duration longer to find a lost run.
_WATCH = Watch()

_ACTIVE = {
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
}
# Dagster's, with the reason for which a run failed by itself, and the reasons that are its process's end.
_FAILURE_REASON_TAG = "dagster/failure_reason"
_OF_NO_STEP = (None, "UNEXPECTED_TERMINATION", "RUN_WORKER_RESTART")

# More than a day of attempts at the longest pause would fill; older ones change no decision.
_RUNS_LOOKED_AT = 200


@dg.sensor(
    job=collect_aggregates_job,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=15,
    description="Starts one collector per session, and the next attempt when one failed. Without a key: the demo.",
)
def market_session_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource, lake: LakeResource
) -> dg.RunRequest | dg.SkipReason:
    wanted = polygon.settings()  # what cannot work fails the tick, in red and with its sentence
    decide = demo.decide if wanted.is_demo else decide_live
    runs = _past_runs(context.instance, wanted.feed)
    decision = decide(datetime.now(UTC), _LOADED_AT, runs)
    if not isinstance(decision, Start):
        at_work = any(run.outcome is Outcome.ACTIVE for run in runs)
        return dg.SkipReason(f"{decision.reason}: {_live_status(lake)}" if at_work else decision.reason)
    day = decision.session_date.isoformat()
    return dg.RunRequest(
        # A run key is remembered for ever, whatever became of its run: so the attempt is part of it.
        run_key=f"{wanted.feed}-{day}-{decision.attempt}",
        run_config={"ops": {"collect_aggregates": {"config": {"session_date": day}}}},
        tags={SESSION_DATE_TAG: day, FEED_TAG: wanted.feed, ATTEMPT_TAG: str(decision.attempt)},
    )


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=20,  # each tick leaves 1.5 kB; a lost collector's successor waits for one
    description="Reports runs failed whose process is lost, so that the next attempt can start.",
)
def lost_runs_sensor(context: dg.SensorEvaluationContext, lake: LakeResource) -> dg.SkipReason:
    job = collect_aggregates_job.name
    failed = fail_killed_runs(context.instance, but=job, log=context.log)
    try:
        failed += fail_lost_collectors(context.instance, job, lake.open(), _WATCH, context.log)
    except (*STORE_ERRORS, LakeError) as error:
        return dg.SkipReason(f"the lease cannot be read, so no collector counts as lost: {brief(error)}")
    return dg.SkipReason(
        f"runs reported failed because their process is lost: {failed}" if failed else "no run is lost"
    )


@dg.sensor(
    job=drain_journals,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=120,
    description="Publishes what lost runs left on this disk, where no collector is at work that would do it.",
)
def leftover_journals_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource, lake: LakeResource
) -> dg.RunRequest | dg.SkipReason:
    wanted, now = polygon.settings(), datetime.now(UTC)
    if not any(wanted.journal_dir.glob("*/journal.json")):
        return dg.SkipReason("nothing is left on this disk")
    runs = _past_runs(context.instance, wanted.feed)
    decide = demo.decide if wanted.is_demo else decide_live
    if any(run.outcome is Outcome.ACTIVE for run in runs) or isinstance(decide(now, _LOADED_AT, runs), Start):
        return dg.SkipReason("a collector is at work or about to start, and publishes what is left here")
    if context.instance.get_runs(dg.RunsFilter(job_name=drain_journals.name, statuses=list(_ACTIVE)), limit=1):
        return dg.SkipReason("what is left on this disk is being published")
    try:
        left = waiting(wanted.journal_dir, lake.open(), wanted.feed)
    except (*STORE_ERRORS, LakeError) as error:
        return dg.SkipReason(f"the lake is away, and what is left on this disk waits: {brief(error)}")
    if not left:
        return dg.SkipReason("what is on this disk is of another lake, or of the run that holds this lake's lease")
    # A run that failed, because the store went away again, is asked for again.
    return dg.RunRequest(run_key=f"{left[0]} and {len(left) - 1} more, {now:%Y-%m-%dT%H:}{now.minute // 10}0")


def _live_status(lake: LakeResource) -> str:
    """What the lease says of the collector at work; a lake that is away fails no tick."""
    try:
        return live_status(read_lease(lake.open()), datetime.now(UTC))
    except (*STORE_ERRORS, LakeError) as error:
        return f"its lease cannot be read ({brief(error)})"


def _past_runs(instance: dg.DagsterInstance, feed: str) -> Sequence[PastRun]:
    """The feed's collector runs, newest first; a run launched by hand has no tags until it has begun."""
    records = instance.get_run_records(dg.RunsFilter(job_name=collect_aggregates_job.name), limit=_RUNS_LOOKED_AT)
    runs = []
    for record in records:
        tags, active = record.dagster_run.tags, record.dagster_run.status in _ACTIVE
        if not active and (tags.get(FEED_TAG) != feed or SESSION_DATE_TAG not in tags):
            continue
        ended = None if record.end_time is None else datetime.fromtimestamp(record.end_time, UTC)
        day = (
            date.fromisoformat(tags[SESSION_DATE_TAG])
            if SESSION_DATE_TAG in tags
            else trade_date_at(record.create_timestamp)
        )
        runs.append(PastRun(day, _outcome(record), ended, int(tags.get(ATTEMPT_TAG, 0))))
    return runs


def _outcome(record: dg.RunRecord) -> Outcome:
    run = record.dagster_run
    if run.status in _ACTIVE:
        return Outcome.ACTIVE
    if run.status is dg.DagsterRunStatus.SUCCESS:
        return Outcome.SUCCEEDED
    never_began = run.status is dg.DagsterRunStatus.CANCELED and record.start_time is None  # canceled in the queue
    if never_began or run.tags.get(STOPPED_TAG) == TERMINATED_BY_HAND:
        return Outcome.STOPPED
    if run.status is dg.DagsterRunStatus.CANCELED or run.tags.get(STOPPED_TAG) == LOST or _lost_its_process(record):
        return Outcome.INTERRUPTED
    return Outcome.FAILED_FOR_GOOD if FAILED_FOR_GOOD_TAG in run.tags else Outcome.FAILED


def _lost_its_process(record: dg.RunRecord) -> bool:
    """Whether Dagster's run monitoring failed a run that had begun: a run that fails by itself has a reason."""
    return record.start_time is not None and record.dagster_run.tags.get(_FAILURE_REASON_TAG) in _OF_NO_STEP
