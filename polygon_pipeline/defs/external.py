"""The sensor that notices raw data of other programs and reports it as raw bars, so that the datasets follow.

Belongs here: Dagster's side of it - the cursor, the reports, and what was reported before. Does not belong here:
looking at the lake and what counts as news (lake.external).
"""

from datetime import UTC, date, datetime

import dagster as dg
import msgspec

from polygon_pipeline.collector.lease import read_lease
from polygon_pipeline.datasets.catalog import RAW_BARS
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief
from polygon_pipeline.lake.external import Found, Position, Report, is_news, look
from polygon_pipeline.lake.ledger import objects_counted
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.settings import ConfigurationError

_RAW_BARS = dg.AssetKey(RAW_BARS.name)
_NAME = "external_raw_data_sensor"

# Among a day's last reports ours is looked for; if the collector made all of them, the day is reported once more.
_REPORTS_LOOKED_AT = 100


@dg.sensor(
    name=_NAME,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=120,
    description="Notices raw-data objects that another program wrote, and reports their days as raw bars.",
)
def external_raw_data_sensor(context: dg.SensorEvaluationContext, lake: LakeResource) -> dg.SensorResult:
    now = datetime.now(UTC)
    today = calendar.trade_date_at(now)
    position = _position(context.cursor)
    looked_at: list[date] = []
    reports: list[dg.AssetMaterialization] = []
    problem = ""
    try:
        opened = lake.open()
        reported = context.instance.get_materialized_partitions(_RAW_BARS)
        for found in look(opened, position, reported, today):
            looked_at.append(found.day)
            if report := _report(context, opened, found, now, today):
                reports.append(report)
    except (*STORE_ERRORS, LakeError, ConfigurationError) as error:
        problem = f"the lake cannot be read: {brief(error)}; "
    return dg.SensorResult(
        asset_events=reports,
        cursor=msgspec.json.encode(position).decode(),
        skip_reason=problem + _summary(looked_at, reports, position),
    )


def _report(
    context: dg.SensorEvaluationContext, lake: Lake, found: Found, now: datetime, today: date
) -> dg.AssetMaterialization | None:
    """The materialization to report of a day, or None where there is nothing to say of it."""
    day = found.day.isoformat()
    if found.strays:
        context.log.info(f"{found.strays} objects of {day} are no bars and left alone, such as {found.first_stray}")
    if not Project.from_environment().is_partition(found.day):
        context.log.warning(
            f"{day} is no trading day since POLYGON_HISTORY_START; its {found.objects} objects are left where they are"
        )
        return None
    if not is_news(found, _last_report(context.instance, day), now, today):
        return None
    # A collector at work is ahead of its ledger, and reports what comes in by itself. The lease is read before the
    # ledgers: once it is free, they are complete.
    if found.day == today and (lease := read_lease(lake)) and not lease.is_free(now):
        return None
    counted = objects_counted(lake, found.day, Channel.MINUTE)
    if found.objects <= counted:
        return None
    return dg.AssetMaterialization(
        _RAW_BARS,
        partition=day,
        metadata={
            "objects": found.objects,
            "objects_counted_by_ledgers": counted,
            "newest_object": str(found.newest),
            "reported_by": _NAME,
        },
    )


def _last_report(instance: dg.DagsterInstance, day: str) -> Report | None:
    """What this sensor last reported of a day. The event log keeps it, so that the cursor stays small."""
    of_day = dg.AssetRecordsFilter(asset_key=_RAW_BARS, asset_partitions=[day])
    for record in instance.fetch_materializations(of_day, limit=_REPORTS_LOOKED_AT).records:
        metadata = record.asset_materialization.metadata if record.asset_materialization else {}
        values = {name: value.value for name, value in metadata.items()}
        if values.get("reported_by") == _NAME:
            newest = datetime.fromisoformat(str(values["newest_object"]))
            return Report(int(str(values["objects"])), newest, datetime.fromtimestamp(record.timestamp, UTC))
    return None


def _position(cursor: str | None) -> Position:
    """Where the last tick ended; the beginning where that cannot be read, as after an update."""
    try:
        return msgspec.json.decode(cursor or "{}", type=Position)
    except msgspec.DecodeError:
        return Position()


def _summary(looked_at: list[date], reports: list[dg.AssetMaterialization], position: Position) -> str:
    days = ", ".join(str(report.partition) for report in reports) or "none"
    around = f"; the round over all days is at {position.all.day}" if position.all.day else ""
    return f"days looked at to their end: {len(looked_at)}; reported of them: {days}{around}"
