"""Datasets follow their inputs: the sensor that asks for the days whose inputs changed, and the runs it asks for.

Belongs here: what was last made, which runs are under way, and run requests. Does not belong here: which datasets are
out of date (datasets.staleness), and the nightly look at all days (defs.schedules).
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import msgspec

from polygon_pipeline.datasets.catalog import DAILY_BARS, FOLLOWING, NORMALIZED, Dataset, roots
from polygon_pipeline.datasets.staleness import AS_OF, group_days, stale_datasets
from polygon_pipeline.defs.describing import CHANNEL_TAG
from polygon_pipeline.defs.partitions import (
    URGENT,
    Project,
    day_tags,
    days_of,
    latest_ids,
    latest_materialization,
    spans,
)
from polygon_pipeline.defs.reference import DAYS_PER_RUN
from polygon_pipeline.market.calendar import current_or_next_session
from polygon_pipeline.market.revisions import collected_after

JOB = "datasets"

_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

# While a session runs its datasets are made so often: each run leaves some 460 kB in Dagster's storage, so that a live
# day's 49 come to 23 MB, beside 16 MB of ticks. (With a night they are 70 and 32 MB.)
LIVE_PAUSE = timedelta(minutes=20)

# A tick's work is bounded, whatever was reported: some 2 ms a day and asset.
_EVENTS_PER_TICK = 2000
_DAYS_PER_TICK = 200
_RUNS_PER_TICK = 4


class Cursor(msgspec.Struct):
    """Where the sensor goes on. after: by input, the last event that was looked at; days: those whose inputs have
    changed since they were last asked for."""

    after: dict[str, int] = msgspec.field(default_factory=dict)
    days: set[date] = msgspec.field(default_factory=set)


@dg.sensor(
    job_name=JOB,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
    description="Makes the datasets of a day again whenever their inputs have changed.",
)
def datasets_follow_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    project = Project.from_environment()
    cursor = _cursor(context.cursor)
    _read_news(context.instance, project, cursor)
    busy = days_under_way(context.instance) | _just_made(context.instance, datetime.now(UTC))
    looked_at = sorted(cursor.days - busy, reverse=True)[:_DAYS_PER_TICK]
    stale = stale_days(context.instance, project, looked_at)
    requests = requests_for(stale, f"event {max(cursor.after.values(), default=0)}")[:_RUNS_PER_TICK]
    asked = {day for request in requests for day in days_of(request.tags)}
    # A day that is asked for is looked at again when its inputs change again, and by catch_up_schedule.
    cursor.days -= {day for day in looked_at if day in asked or day not in stale}
    waiting = f"; {len(cursor.days)} days wait" if cursor.days else ""
    return dg.SensorResult(
        run_requests=requests,
        cursor=msgspec.json.encode(cursor).decode(),
        skip_reason=None if requests else f"no dataset is out of date that could be made now{waiting}",
    )


def _just_made(instance: dg.DagsterInstance, now: datetime) -> set[date]:
    """The session under way, where its datasets were made within LIVE_PAUSE: its bars change at every checkpoint."""
    found = current_or_next_session(now - collected_after())
    if now < found.begin:
        return set()  # none is collected
    today = found.date
    latest = [latest_materialization(instance, dataset.name, today.isoformat()) for dataset in NORMALIZED.values()]
    newest = max((record.timestamp for record in latest if record), default=0.0)
    return {today} if now.timestamp() - newest < LIVE_PAUSE.total_seconds() else set()


def stale_days(
    instance: dg.DagsterInstance, project: Project, days: Iterable[date] | None = None
) -> dict[date, list[Dataset]]:
    """The datasets that are out of date, by day; of these days, or of all that ever had an input."""
    keys = None if days is None else {day.isoformat() for day in days}
    if keys is not None and not keys:
        return {}
    datasets = _datasets(project)
    names = {dataset.name for dataset in (*datasets, *_roots(datasets))}
    found: dict[date, list[Dataset]] = {}
    for key, made in latest_ids(instance, names, keys).items():
        day = date.fromisoformat(key)
        if not project.is_partition(day):
            continue
        as_of = {} if keys is None else _as_of(instance, datasets, made, key)
        if stale := stale_datasets(datasets, made, as_of):
            found[day] = stale
    return found


def days_under_way(instance: dg.DagsterInstance) -> set[date]:
    """The days that a run is to make which has not ended."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED))
    return {day for record in records for day in days_of(record.dagster_run.tags)}


def requests_for(stale: Mapping[date, Sequence[Dataset]], key: str) -> list[dg.RunRequest]:
    """One run for days that follow each other and need the same datasets; the newest days first."""
    newest = max(stale, default=None)
    requests: list[tuple[date, dg.RunRequest]] = []
    for datasets, days in group_days(stale):
        for channel in {dataset.channel for dataset in datasets}:
            names = [dataset.name for dataset in datasets if dataset.channel is channel]
            for span in spans(days, DAYS_PER_RUN):
                request = dg.RunRequest(
                    run_key=f"{span[0]} to {span[-1]}, {channel} of {len(names)} datasets, {key}",
                    asset_selection=[dg.AssetKey(name) for name in names],
                    tags=day_tags(span) | {CHANNEL_TAG: str(channel)} | (URGENT if span[-1] == newest else {}),
                )
                requests.append((span[-1], request))
    return [request for _, request in sorted(requests, key=lambda found: found[0], reverse=True)]


def _read_news(instance: dg.DagsterInstance, project: Project, cursor: Cursor) -> None:
    """Moves the cursor over what was reported of the inputs."""
    for root in _roots(_datasets(project)):
        after = cursor.after.get(root.name, 0)
        of_root = dg.AssetRecordsFilter(asset_key=dg.AssetKey(root.name), after_storage_id=after)
        for record in instance.fetch_materializations(of_root, limit=_EVENTS_PER_TICK, ascending=True).records:
            if record.partition_key:
                cursor.days.add(date.fromisoformat(record.partition_key))
            cursor.after[root.name] = record.storage_id


def _as_of(
    instance: dg.DagsterInstance, datasets: Sequence[Dataset], made: Mapping[str, int], day: str
) -> dict[str, int]:
    """What a day's normalized bars and daily bars knew of their inputs; what is made of them was made in the same
    step."""
    found: dict[str, int] = {}
    for dataset in (*NORMALIZED.values(), DAILY_BARS):
        if dataset not in datasets or dataset.name not in made:
            continue
        latest = latest_materialization(instance, dataset.name, day)
        value = latest.asset_materialization.metadata.get(AS_OF) if latest and latest.asset_materialization else None
        if value is not None and isinstance(value.value, int):
            found[dataset.name] = value.value
    return found


def _datasets(project: Project) -> list[Dataset]:
    return [dataset for dataset in FOLLOWING if dataset.channel in project.channels]


def _roots(datasets: Iterable[Dataset]) -> list[Dataset]:
    return sorted(set().union(*(roots(dataset) for dataset in datasets)), key=lambda dataset: dataset.name)


def _cursor(text: str | None) -> Cursor:
    """Where the last tick ended; the beginning where that cannot be read, as after an update."""
    try:
        return msgspec.json.decode(text or "{}", type=Cursor)
    except ValueError:
        return Cursor()
