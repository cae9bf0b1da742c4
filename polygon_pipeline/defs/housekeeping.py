"""Keeps what Dagster stores small: a schedule that clears old runs.

Belongs here: what of an old run may go. Does not belong here: how long ticks are kept (deploy/*/dagster.yaml).

A materialization is kept as long as it is the last of its day, because the partitions' status is made of these: a run
that holds one keeps its events. Of every other run all goes, and of every run its compute logs.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from polygon_pipeline.defs.partitions import latest_materialization

KEPT_DAYS = 14

# Clearing a run takes some 20 ms.
_RUNS_PER_NIGHT = 2000

_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_CLEARED = "polygon_pipeline/logs_cleared"


@dg.op
def clear_old_runs(context: dg.OpExecutionContext) -> None:
    """Clears runs that ended more than KEPT_DAYS days ago."""
    before = datetime.now(UTC) - timedelta(days=KEPT_DAYS)
    filters = dg.RunsFilter(statuses=_FINISHED, updated_before=before)
    records = context.instance.get_run_records(filters, limit=_RUNS_PER_NIGHT, ascending=True)
    deleted = cleared = 0
    for record in records:
        run = record.dagster_run
        if not _holds_a_last_materialization(context.instance, run.run_id):
            context.instance.compute_log_manager.delete_logs(prefix=[run.run_id])
            context.instance.delete_run(run.run_id)
            deleted += 1
        elif _CLEARED not in run.tags:
            context.instance.compute_log_manager.delete_logs(prefix=[run.run_id])
            context.instance.add_run_tags(run.run_id, {_CLEARED: "yes"})
            cleared += 1
    context.log.info(
        f"of {len(records)} runs that ended before {before:%Y-%m-%d}: {deleted} deleted, {cleared} cleared"
    )


def _holds_a_last_materialization(instance: dg.DagsterInstance, run_id: str) -> bool:
    return any(
        (latest := latest_materialization(instance, asset, day)) is not None and latest.run_id == run_id
        for asset, day in _materialized(instance, run_id)
    )


def _materialized(instance: dg.DagsterInstance, run_id: str) -> Sequence[tuple[str, str | None]]:
    """The assets and days that a run materialized."""
    found: dict[tuple[str, str | None], None] = {}
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        event = entry.dagster_event
        if event and event.asset_key:
            found[event.asset_key.to_user_string(), event.partition] = None
    return list(found)


@dg.job(description=f"Clears runs that ended more than {KEPT_DAYS} days ago. Started by housekeeping_schedule.")
def housekeeping() -> None:
    clear_old_runs()


@dg.schedule(
    job=housekeeping,
    cron_schedule="0 3 * * *",
    execution_timezone="America/New_York",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description=f"Clears runs that ended more than {KEPT_DAYS} days ago, so that Dagster's storage stays small.",
)
def housekeeping_schedule() -> dg.RunRequest:
    return dg.RunRequest()
