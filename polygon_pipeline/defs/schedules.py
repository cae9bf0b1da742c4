"""The schedules. When they ask for nothing, they say why.

Belongs here: when and for which days. Does not belong here: what is out of date (datasets.staleness), and asking for it
by day (defs.following).
"""

from datetime import datetime, timedelta

import dagster as dg

from polygon_pipeline.datasets.catalog import REFERENCES
from polygon_pipeline.datasets.staleness import reference_is_due
from polygon_pipeline.defs.following import days_under_way, requests_for, stale_days
from polygon_pipeline.defs.partitions import Project, day_tags, made_days
from polygon_pipeline.defs.reference import history_requests, reference_job
from polygon_pipeline.market import calendar

# Published files are replaced within days, if at all.
REPLACED_DAYS = 5

# Two weeks of history that could not be fetched by day; older days are a backfill.
CATCH_UP_DAYS = 10

# What one night asks for at the most: 2,000 days.
_RUNS_PER_NIGHT = 40


@dg.schedule(
    job=reference_job,
    cron_schedule="30 11 * * *",  # a day's flat file is published by about 11:00 of the next
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Fetches the vendor's bars of the last trading day, weekends included, and of those before it whose "
    "files were replaced; their datasets follow.",
)
def reference_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    today = context.scheduled_execution_time.astimezone(calendar.NEW_YORK).date()
    if calendar.session(today - timedelta(days=1)) is None:
        following = calendar.trading_days(today, today + timedelta(days=14))[0] + timedelta(days=1)
        return dg.SkipReason(f"yesterday was no trading day; the next look is on {following}, 11:30 New York time")
    days = calendar.trading_days(today - timedelta(days=21), today - timedelta(days=1))[-REPLACED_DAYS:]
    # One run for all: a file that is as it was costs one request, and REST answers hold fifty days anyway.
    return dg.RunRequest(run_key=days[-1].isoformat(), tags=day_tags(days))


@dg.schedule(
    job_name="catch_up",
    cron_schedule="0 2 * * *",
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Makes what is missing, or older than what it is made of, of all days; what failed by day is tried "
    f"again. Asks for the history of the last {CATCH_UP_DAYS} trading days where it is missing.",
)
def catch_up_schedule(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
    project, now = Project.from_environment(), context.scheduled_execution_time
    stale = stale_days(context.instance, project)
    busy = days_under_way(context.instance) & {*stale}
    night = f"{now:%Y-%m-%d}"
    requests = _history(context, project, now, night)
    requests += requests_for({day: found for day, found in stale.items() if day not in busy}, f"night {night}")
    left = f"; left alone, as runs of them are not finished: {', '.join(map(str, sorted(busy)))}" if busy else ""
    if not requests:
        return dg.SkipReason(f"nothing that can be made is missing or older than what it is made of{left}")
    context.log.info(f"{len(stale) - len(busy)} days are out of date{left}")
    return requests[:_RUNS_PER_NIGHT]


def _history(context: dg.ScheduleEvaluationContext, project: Project, now: datetime, night: str) -> list[dg.RunRequest]:
    """Requests for days without any history that is out by now. Nothing waits for them: what follows is made later."""
    known = {dataset: made_days(context.instance, dataset.name) for dataset in REFERENCES}
    missing = {
        day: [dataset for dataset in REFERENCES if day.isoformat() not in known[dataset]]
        for day in calendar.completed_sessions(now, CATCH_UP_DAYS)
        if project.is_partition(day) and reference_is_due(day, 0, now)
    }
    return history_requests(missing, f"asked {night}")
