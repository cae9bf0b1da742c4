"""The vendor's history in Dagster: the asset reference, and the sensor that asks for it after a gap.

Belongs here: how fetching shows in the UI, and when it is asked for. Does not belong here: fetching
(datasets.reference_sources) and what becomes of the bars (assets).
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.catalog import RAW_BARS, REFERENCE_BARS
from polygon_pipeline.datasets.reference_sources import SETTLED, FetchedDay, fetch_days
from polygon_pipeline.defs.partitions import latest_materialization, trading_days
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.defs.writer import day_metadata, write_day
from polygon_pipeline.lake.ledger import read_ledgers, repairable_gaps
from polygon_pipeline.lake.store import STORE_ERRORS, Lake, LakeError, brief
from polygon_pipeline.polygon.errors import HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import expected_at
from polygon_pipeline.settings import ConfigurationError

# As many days as one REST answer holds, so that a year of a ticker takes six requests and not 252. Flat files are a
# day each whatever the run's length, and 50 of the whole market take some five minutes.
_DAYS_PER_RUN = 50

_KNOWN_UNTIL = "known_until"

# Sessions whose gaps are looked at: a gap in the last minutes of a day settles after the day's end.
_SESSIONS_LOOKED_AT = 2


@dg.asset(
    name=REFERENCE_BARS.name,
    description=REFERENCE_BARS.description,
    partitions_def=trading_days,
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=_DAYS_PER_RUN),
    output_required=False,
    pool="history",
    group_name="bars",
    kinds={"rest", "parquet"},
)
def reference(
    context: dg.AssetExecutionContext, polygon: PolygonResource, lake: LakeResource
) -> Iterator[dg.MaterializeResult[None]]:
    days = [date.fromisoformat(key) for key in context.partition_keys]
    asked_by_schedule = "dagster/schedule_name" in context.run.tags
    news: dict[str, dict[str, Any]] = {}
    problems: list[Exception] = []
    try:
        with polygon.history() as sources:
            opened = lake.open()
            opened.claim(polygon.settings().feed)
            for result in fetch_days(opened, days, sources, lake.scratch(), datetime.now(UTC), context.log.info):
                if isinstance(result, FetchedDay):
                    metadata = _store(opened, result)
                    is_known = not result.is_new and _made_at(context.instance, result.day) >= expected_at(result.day)
                    if not (asked_by_schedule and is_known):  # who asks by hand or by a backfill waits for the answer
                        news[result.day.isoformat()] = metadata
                elif isinstance(result.problem, NotYetPublished):
                    when = result.problem.next_try
                    context.log.warning(
                        f"{result.day} is skipped: {result.problem}"
                        + (f" The next try is worth it from {when:%Y-%m-%d %H:%M} UTC on." if when else "")
                    )
                else:
                    context.log.error(f"{result.day}: {result.problem}")
                    problems.append(result.problem)
    except (ConfigurationError, LakeError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    if len(news) == len(days):
        for day, metadata in news.items():
            context.add_asset_metadata(metadata, partition_key=day)
        yield dg.MaterializeResult()  # it stands for all days of the run, and lets what follows in the same run begin
        return
    context.log.info(f"{len(news)} of {len(days)} days are new or changed")
    for day, metadata in news.items():
        context.log_event(dg.AssetMaterialization(REFERENCE_BARS.name, partition=day, metadata=metadata))
    if problems:
        passing = any(isinstance(problem, HistoryUnavailable) for problem in problems)
        raise dg.Failure(
            f"{len(problems)} of {len(days)} days could not be fetched; the first: {problems[0]}", allow_retries=passing
        )


def _store(lake: Lake, fetched: FetchedDay) -> dict[str, Any]:
    """Stores a day if it is new; returns what its materialization shows."""
    day, info = fetched.day.isoformat(), fetched.info
    # Tickers may be without any bar, and that is known then.
    metadata = (
        write_day(lake, REFERENCE_BARS.name, day, fetched.file, may_be_empty=True)
        if fetched.is_new
        else day_metadata(lake, REFERENCE_BARS.name, day, fetched.file)
    )
    return metadata | {
        "source": info.source,
        "tickers": "whole market" if info.tickers is None else len(info.tickers),
        _KNOWN_UNTIL: dg.MetadataValue.timestamp(info.until_ms / 1000),
        "changed": fetched.is_new,
        "etag": info.etag or "none",
    }


def _made_at(instance: dg.DagsterInstance, day: date) -> datetime:
    """When a day was last materialized."""
    latest = latest_materialization(instance, REFERENCE_BARS.name, day.isoformat())
    return datetime.fromtimestamp(latest.timestamp if latest else 0, UTC)


def _known_until_ms(instance: dg.DagsterInstance, day: date) -> int:
    """Up to where a day's bars are known, as its materialization says; the file itself may be 40 MB."""
    latest = latest_materialization(instance, REFERENCE_BARS.name, day.isoformat())
    found = latest.asset_materialization.metadata.get(_KNOWN_UNTIL) if latest and latest.asset_materialization else None
    return int(found.value * 1000) if isinstance(found, dg.TimestampMetadataValue) else 0


reference_job = dg.define_asset_job(
    "reference", selection=[reference], description="Fetches the vendor's own minute bars of trading days."
)


@dg.sensor(
    job=reference_job,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
    description="After a gap in the collection, asks for the vendor's history; the day's datasets then follow.",
)
def repair_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource, lake: LakeResource
) -> dg.SensorResult | dg.SkipReason:
    try:
        opened = lake.open()
        requests = []
        for day in _recent_sessions(context.instance):
            ledgers, unreadable = read_ledgers(opened, day)
            for key, reason in unreadable.items():
                context.log.warning(f"{opened.url(key)} cannot be read, its gaps are not known: {reason}")
            known_until_ms = _known_until_ms(context.instance, day)
            due = repairable_gaps(ledgers, known_until_ms, SETTLED, datetime.now(UTC))
            if due:
                last = max(gap.last_minute for gap in due if gap.last_minute)
                context.log.info(f"{day}: {len(due)} gaps to repair, the last up to {last:%H:%M} UTC")
                key = day.isoformat()
                requests.append(dg.RunRequest(run_key=f"{key}-{last.isoformat()}", partition_key=key))
    except (*STORE_ERRORS, LakeError, ConfigurationError) as error:
        return dg.SkipReason(f"the ledgers cannot be read: {brief(error)}")
    if not requests:
        return dg.SkipReason("no gap to repair that the vendor's history could fill by now")
    return dg.SensorResult(run_requests=requests)


def _recent_sessions(instance: dg.DagsterInstance) -> Sequence[date]:
    """The last trading days with raw bars; the demo's are days ago."""
    collected = sorted(instance.get_materialized_partitions(dg.AssetKey(RAW_BARS.name)))
    return [date.fromisoformat(key) for key in collected[-_SESSIONS_LOOKED_AT:]]
