"""The schedules. When they ask for nothing, they say why.

Belongs here: when and for which days. Does not belong here: what is out of date (datasets.staleness).
"""

from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from polygon_pipeline.datasets.catalog import DATASETS, FOLLOWING, RAW, REFERENCE_BARS
from polygon_pipeline.datasets.staleness import reference_is_due, stale_datasets
from polygon_pipeline.defs.partitions import latest_materialization
from polygon_pipeline.defs.reference import reference_job
from polygon_pipeline.market import calendar

# Two weeks: what failed unnoticed is made once the cause is gone. Older days are a backfill.
CATCH_UP_DAYS = 10

# Published files are replaced within days, if at all.
REPLACED_DAYS = 5

_FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}

daily_datasets_job = dg.define_asset_job(
    "daily_datasets",
    selection=[dataset.name for dataset in FOLLOWING],
    description="Makes all datasets of a trading day from its raw bars.",
)

# A schedule's runs are all of one job.
catch_up_job = dg.define_asset_job(
    "catch_up",
    selection=[REFERENCE_BARS.name, *(dataset.name for dataset in FOLLOWING)],
    description="Makes what is missing or out of date of a trading day. Started by catch_up_schedule.",
)


@dg.schedule(
    job=daily_datasets_job,
    cron_schedule="30 20 * * *",  # the collector ends at 20:20, after the last revisions
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Makes the day's datasets once more when everything is in.",
)
def after_close_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    day = _new_york_date(context)
    if calendar.session(day) is None:
        return dg.SkipReason(_closed(day))
    key = day.isoformat()
    names = [
        dataset.name
        for channel, raw in RAW.items()
        if key in context.instance.get_materialized_partitions(dg.AssetKey(raw.name))
        for dataset in FOLLOWING
        if dataset.channel is channel
    ]
    if not names:
        return dg.SkipReason(f"no raw bars of {day} were collected")
    return dg.RunRequest(run_key=key, partition_key=key, asset_selection=[dg.AssetKey(name) for name in names])


@dg.schedule(
    job=reference_job,
    cron_schedule="30 11 * * *",  # a day's flat file is published by about 11:00 of the next
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Fetches the vendor's bars of the last trading day, and of those before it whose files were replaced; "
    "their datasets follow.",
)
def reference_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    today = _new_york_date(context)
    if calendar.session(today) is None:
        return dg.SkipReason(f"{_closed(today)}, 11:30 New York time")
    days = calendar.trading_days(today - timedelta(days=21), today - timedelta(days=1))[-REPLACED_DAYS:]
    first, last = days[0].isoformat(), days[-1].isoformat()
    # One run for all: a file that is as it was costs one request, and REST answers hold fifty days anyway.
    return dg.RunRequest(
        run_key=last, tags={"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    )


@dg.schedule(
    job=catch_up_job,
    cron_schedule="0 2 * * *",
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description=f"Makes what is missing, or older than what it is made of, of the last {CATCH_UP_DAYS} trading days.",
)
def catch_up_schedule(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    now = context.scheduled_execution_time
    days = calendar.completed_sessions(now, CATCH_UP_DAYS)
    busy = _days_being_made(context.instance, days)
    requests = []
    for day in days:
        if day in busy:
            continue
        made = _latest_materializations(context.instance, day)
        reference = made.get(REFERENCE_BARS.name)
        made_at = None if reference is None else datetime.fromtimestamp(reference.timestamp, UTC)
        if reference_is_due(day, made_at, now):
            # A run of its own, and nothing waits for it: a plan without history gets its datasets all the same. What
            # follows from the reference is made by the sensor, or the next night.
            requests.append(_request("reference", day, now, [REFERENCE_BARS.name]))
        if stale := stale_datasets({name: record.storage_id for name, record in made.items()}):
            requests.append(_request("datasets", day, now, [dataset.name for dataset in stale]))
    left_alone = f"; left alone, as runs of them are not finished: {', '.join(map(str, busy))}" if busy else ""
    looked_at = f"looked at {len(days)} trading days, {days[0]} to {days[-1]}"
    if not requests:
        return dg.SkipReason(
            f"{looked_at}: nothing that can be made is missing or older than what it is made of{left_alone}"
        )
    context.log.info(f"{looked_at}: {len(requests)} runs asked for{left_alone}")
    return requests


def _request(what: str, day: date, now: datetime, names: Collection[str]) -> dg.RunRequest:
    return dg.RunRequest(
        # A run key is remembered for ever, whatever became of its run: the next night may ask again.
        run_key=f"{what} {day} asked {now:%Y-%m-%d}",
        partition_key=day.isoformat(),
        asset_selection=[dg.AssetKey(name) for name in names],
    )


def _latest_materializations(instance: dg.DagsterInstance, day: date) -> dict[str, dg.EventLogRecord]:
    names = [dataset.name for dataset in DATASETS]
    latest = {name: latest_materialization(instance, name, day.isoformat()) for name in names}
    return {name: record for name, record in latest.items() if record}


def _days_being_made(instance: dg.DagsterInstance, days: Collection[date]) -> list[date]:
    """Those of the days that a run is to make which has not ended; a backfill's run may make a range of days."""
    unfinished = [status for status in dg.DagsterRunStatus if status not in _FINISHED]
    spans = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=unfinished)):
        tags = record.dagster_run.tags
        only = tags.get("dagster/partition", "")
        first = tags.get("dagster/asset_partition_range_start", only)
        last = tags.get("dagster/asset_partition_range_end", only)
        spans.append((first, last))
    return [day for day in days if any(first <= day.isoformat() <= last for first, last in spans)]


def _new_york_date(context: dg.ScheduleEvaluationContext) -> date:
    return context.scheduled_execution_time.astimezone(calendar.NEW_YORK).date()


def _closed(day: date) -> str:
    following = calendar.trading_days(day, day + timedelta(days=14))[0]
    return f"{day} is not a trading day; the next is {following}"
