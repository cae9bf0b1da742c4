"""The vendor's history in Dagster: the asset reference, and the sensor that asks for it after a gap.

Belongs here: how fetching shows in the UI, and when it is asked for. Does not belong here: fetching
(datasets.reference_sources) and what becomes of the bars (assets).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from polygon_pipeline.collector.lease import live_run
from polygon_pipeline.datasets.catalog import RAW_BARS, REFERENCE_BARS, REFERENCE_DAILY_BARS, REFERENCES, Dataset
from polygon_pipeline.datasets.day_state import DayStatus, day_status
from polygon_pipeline.datasets.reference_sources import (
    DAYS_PER_REQUEST,
    FetchedDay,
    Sources,
    UnfetchedDay,
    fetch_daily_days,
    fetch_days,
)
from polygon_pipeline.datasets.staleness import PastRepair, group_days, next_repair, reference_is_due
from polygon_pipeline.datasets.wording import clock, count, date_and_clock, span
from polygon_pipeline.defs.describing import describing
from polygon_pipeline.defs.partitions import (
    URGENT,
    Project,
    day_tags,
    days_of,
    latest_materialization,
    made_days,
    spans,
)
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.defs.writer import day_metadata, write_day
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief
from polygon_pipeline.lake.ledger import read_ledgers, repairable_gaps
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import session
from polygon_pipeline.market.revisions import settled_after
from polygon_pipeline.polygon.errors import HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import expected_at
from polygon_pipeline.settings import ConfigurationError

# Two requests by REST of each ticker, so that a year of a ticker takes twelve requests and not 252. Flat files are a
# day each whatever the run's length, and 42 of the whole market take some five minutes.
DAYS_PER_RUN = 2 * DAYS_PER_REQUEST

_KNOWN_UNTIL = "known_until"

# Two weeks: a day that is not final by then is a backfill. An older one costs a request to the lake at every tick.
_SESSIONS_LOOKED_AT = 10
# More than a day of tries at the longest pause.
_REPAIRS_LOOKED_AT = 20

_Fetch = Callable[
    [Lake, Sequence[date], Sources, Path, datetime, Callable[[str], object]], Iterator[FetchedDay | UnfetchedDay]
]
_FETCHED_BY: dict[Dataset, _Fetch] = {REFERENCE_BARS: fetch_days, REFERENCE_DAILY_BARS: fetch_daily_days}

REPAIR_TAG = "polygon_pipeline/repair"


def reference_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The assets for these partitions: the vendor's minutes, and its days."""
    return [_reference_asset(project, dataset, fetch) for dataset, fetch in _FETCHED_BY.items()]


def _reference_asset(project: Project, dataset: Dataset, fetch: _Fetch) -> dg.AssetsDefinition:
    told = describing(dataset)

    @dg.asset(
        name=dataset.name,
        partitions_def=project.trading_days,
        backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=min(DAYS_PER_RUN, project.days_per_run)),
        output_required=False,
        # Flat files need not wait for each other as REST does, whose limit all runs keep together whatever their pool.
        pool="flat_files" if project.has_flat_files else "history",
        kinds={"python", "parquet"},
        description=told["description"],
        group_name=told["group_name"],
        owners=told["owners"],
        tags=told["tags"],
        metadata=told["metadata"],
    )
    def reference(
        context: dg.AssetExecutionContext, polygon: PolygonResource, lake: LakeResource
    ) -> Iterator[dg.MaterializeResult[None]]:
        days = days_of(context.run.tags)
        news: dict[str, dict[str, Any]] = {}
        problems: list[Exception] = []
        for result, metadata in _fetched(context, polygon, lake, days, dataset, fetch):
            if metadata is not None:
                news[result.day.isoformat()] = metadata
            elif isinstance(result, UnfetchedDay) and not isinstance(result.problem, NotYetPublished):
                problems.append(result.problem)
        if len(news) == len(days):
            for day, metadata in news.items():
                context.add_asset_metadata(metadata, partition_key=day)
            yield dg.MaterializeResult()  # it stands for all days, and lets what follows in the same run begin
            return
        context.log.info(f"{len(news)} of {len(days)} days are new or changed")
        for day, metadata in news.items():
            context.log_event(dg.AssetMaterialization(dataset.name, partition=day, metadata=metadata))
        if problems:
            passing = any(isinstance(problem, HistoryUnavailable) for problem in problems)
            raise dg.Failure(
                f"{len(problems)} of {len(days)} days could not be fetched; the first: {problems[0]}",
                allow_retries=passing,
            )

    return reference


def _fetched(
    context: dg.AssetExecutionContext,
    polygon: PolygonResource,
    lake: LakeResource,
    days: Sequence[date],
    dataset: Dataset,
    fetch: _Fetch,
) -> Iterator[tuple[FetchedDay | UnfetchedDay, dict[str, Any] | None]]:
    """Fetches and stores days, each with the metadata to report, or None where there is nothing to report."""
    asked_by_schedule = "dagster/schedule_name" in context.run.tags
    try:
        opened = lake.open()
        with polygon.history(opened) as sources:
            opened.claim(polygon.settings().feed)
            for result in fetch(opened, days, sources, lake.scratch(), datetime.now(UTC), context.log.info):
                if isinstance(result, FetchedDay):
                    metadata = _store(opened, result, dataset)
                    made_at = _made_at(context.instance, dataset, result.day)
                    is_known = not result.is_new and made_at >= expected_at(result.day)
                    # Whoever asks by hand or by a backfill waits for the answer.
                    yield result, None if asked_by_schedule and is_known else metadata
                    continue
                if isinstance(result.problem, NotYetPublished):
                    when = result.problem.next_try
                    context.log.warning(
                        f"{result.day} is skipped: {result.problem}"
                        + (f" The next try is worth it from {date_and_clock(when)} on." if when else "")
                    )
                else:
                    context.log.error(f"{result.day}: {result.problem}")
                yield result, None
    except (ConfigurationError, LakeError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _store(lake: Lake, fetched: FetchedDay, dataset: Dataset) -> dict[str, Any]:
    """Stores a day if it is new; returns what its materialization shows."""
    day, info = fetched.day.isoformat(), fetched.info
    # Tickers may be without any minute, and that is known then.
    metadata = (
        write_day(lake, dataset.name, day, fetched.file, may_be_empty=dataset == REFERENCE_BARS)
        if fetched.is_new
        else day_metadata(lake, dataset.name, day, fetched.file)
    )
    return metadata | {
        "source": info.source,
        "tickers": "whole market" if info.tickers is None else len(info.tickers),
        _KNOWN_UNTIL: dg.MetadataValue.timestamp(info.until_ms / 1000),
        "changed": fetched.is_new,
        "etag": info.etag or "none",
        **_publication(fetched),
        **({"tickers_refused": dict([*fetched.refused.items()][:20])} if fetched.refused else {}),
    }


def _publication(fetched: FetchedDay) -> dict[str, float]:
    """How long after the session's end a new flat file came, which Dagster plots over the days."""
    found = session(fetched.day)
    if found is None or fetched.published_at is None:
        return {}
    after = fetched.published_at - found.post_close
    if fetched.is_replacement:
        return {"replaced_after_days": round(after / timedelta(days=1), 2)}
    return {"published_after_hours": round(after / timedelta(hours=1), 2)}


def reported_status(instance: dg.DagsterInstance, lake: Lake, day: date, now: datetime) -> DayStatus:
    """A day's state by its ledgers and by what was last reported of its history, which is not fetched for it. Raises
    the store's errors."""
    return day_status(day, read_ledgers(lake, day).ledgers, _known_until_ms(instance, day), now, live_run(lake))


def _made_at(instance: dg.DagsterInstance, dataset: Dataset, day: date) -> datetime:
    """When a day was last materialized."""
    latest = latest_materialization(instance, dataset.name, day.isoformat())
    return datetime.fromtimestamp(latest.timestamp if latest else 0, UTC)


def _known_until_ms(instance: dg.DagsterInstance, day: date) -> int:
    """Up to where a day's bars are known, as its materialization says; the file itself may be 40 MB."""
    latest = latest_materialization(instance, REFERENCE_BARS.name, day.isoformat())
    found = latest.asset_materialization.metadata.get(_KNOWN_UNTIL) if latest and latest.asset_materialization else None
    return int(found.value * 1000) if isinstance(found, dg.TimestampMetadataValue) else 0


reference_job = dg.define_asset_job(
    "reference",
    selection=[dataset.name for dataset in REFERENCES],
    description="Fetches the vendor's own minute bars and day bars of trading days.",
)


def history_requests(wanted: Mapping[date, Sequence[Dataset]], key: str) -> list[dg.RunRequest]:
    """One run for days that follow each other and lack the same. key: what tells the requests from earlier ones."""
    return [
        dg.RunRequest(
            run_key=f"history {' '.join(dataset.name for dataset in datasets)} {following[0]} {key}",
            asset_selection=[dg.AssetKey(dataset.name) for dataset in datasets],
            tags=day_tags(following),
        )
        for datasets, days in group_days(wanted)
        for following in spans(days, DAYS_PER_RUN)
    ]


@dg.sensor(
    job=reference_job,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=120,
    description="Asks for the vendor's history of a day after a gap, and once it is published; the datasets follow.",
)
def repair_sensor(context: dg.SensorEvaluationContext, lake: LakeResource) -> dg.SensorResult | dg.SkipReason:
    opened, now = lake.open(), datetime.now(UTC)
    try:
        requests, waiting = _repairs(context, opened, now)
    except STORE_ERRORS as error:  # a failed tick would keep 20 kB of it for a month
        return dg.SkipReason(f"the lake cannot be read, so no gap is known: {brief(error)}")
    if requests:
        return dg.SensorResult(run_requests=requests)
    later = f"; asked before and asked again: {', '.join(waiting)}" if waiting else ""
    return dg.SkipReason(f"no gap to repair and no day to complete that the vendor's history could fill by now{later}")


def _repairs(context: dg.SensorEvaluationContext, opened: Lake, now: datetime) -> tuple[list[dg.RunRequest], list[str]]:
    """The runs to ask for now, and the days that are asked for later, for people. Raises the store's errors."""
    requests: list[dg.RunRequest] = []
    waiting: list[str] = []
    live = live_run(opened)
    for day in _recent_sessions(context.instance):
        reason, wanted = _reason(context, opened, day, now, live)
        if reason is None:
            continue
        past = _past_repairs(context.instance, day)
        next_try = next_repair(past, now)
        if next_try > now:
            waiting.append(f"{day} from {clock(next_try)} on")
            continue
        context.log.info(f"{day}: {reason}")
        key = day.isoformat()
        requests.append(
            dg.RunRequest(
                run_key=f"{key}-{len(past) + 1}",
                partition_key=key,
                asset_selection=[dg.AssetKey(dataset.name) for dataset in wanted],
                tags={REPAIR_TAG: key, **URGENT},
            )
        )
    return requests, waiting


def _reason(
    context: dg.SensorEvaluationContext, lake: Lake, day: date, now: datetime, live: str | None
) -> tuple[str | None, Sequence[Dataset]]:
    """Why a day's history is to be asked for, or None if it is not; and what of it."""
    known_until_ms = _known_until_ms(context.instance, day)
    ledgers, unreadable, strays = read_ledgers(lake, day)
    for key, reason in unreadable.items():
        context.log.warning(f"{lake.url(key)} cannot be read, its gaps are not known: {reason}")
    if strays:
        context.log.info(f"{len(strays)} objects among the ledgers of {day} are no ledgers, such as {strays[0]}")
    if gaps := repairable_gaps(day, ledgers, known_until_ms, settled_after(), now, live):
        return f"{count(len(gaps), 'gap')} to repair, New York: {span(gaps[0][0], gaps[-1][1])}", [REFERENCE_BARS]
    status = day_status(day, ledgers, known_until_ms, now, live)
    missing = [
        *([REFERENCE_BARS] if reference_is_due(day, known_until_ms, now) else []),
        *([REFERENCE_DAILY_BARS] if reference_is_due(day, 0, now) and not _has_daily(context.instance, day) else []),
    ]
    if status.is_over and missing:
        return f"it is {status.state}, and its history is published", missing
    return None, ()


def _has_daily(instance: dg.DagsterInstance, day: date) -> bool:
    return latest_materialization(instance, REFERENCE_DAILY_BARS.name, day.isoformat()) is not None


def _past_repairs(instance: dg.DagsterInstance, day: date) -> list[PastRepair]:
    """The runs this sensor has asked for of a day, newest first."""
    records = instance.get_run_records(dg.RunsFilter(tags={REPAIR_TAG: day.isoformat()}), limit=_REPAIRS_LOOKED_AT)
    return [
        PastRepair(
            None if record.end_time is None else datetime.fromtimestamp(record.end_time, UTC),
            record.dagster_run.is_success,
        )
        for record in records
    ]


def _recent_sessions(instance: dg.DagsterInstance) -> Sequence[date]:
    """The last trading days with raw bars; the demo's are days ago."""
    return [date.fromisoformat(key) for key in sorted(made_days(instance, RAW_BARS.name))[-_SESSIONS_LOOKED_AT:]]
