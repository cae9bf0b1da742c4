"""Publication in Dagster: the sensor that looks for the vendor's flat files and asks for those that are news.

Belongs here: what of a file is known, listing the files, and run requests. Does not belong here: when to look and what
is news (datasets.publication), and fetching (defs.reference).
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta

import dagster as dg
import msgspec

from polygon_pipeline import access
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.publication import Evidence, days_looked_at, news, pause
from polygon_pipeline.datasets.reference_sources import OF_KIND
from polygon_pipeline.datasets.wording import date_and_clock
from polygon_pipeline.defs.partitions import Project, latest_materialization
from polygon_pipeline.defs.reference import history_requests, reference_job
from polygon_pipeline.defs.resources import PolygonResource
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable
from polygon_pipeline.polygon.flat_files import FlatFileKind, published_files
from polygon_pipeline.settings import ConfigurationError

# A file whose run failed; no run under way takes so long.
_ASKED_AGAIN_AFTER = timedelta(days=1)


class Cursor(msgspec.Struct):
    """looked_at: when the files were last listed. asked: by dataset and day, the ETag last asked for, and when.
    evidence: of all time."""

    looked_at: datetime | None = None
    asked: dict[str, tuple[str, datetime]] = msgspec.field(default_factory=dict)
    evidence: Evidence = msgspec.field(default_factory=Evidence)


@dg.sensor(
    job=reference_job,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=300,
    description="Looks for the vendor's flat files from a session's end on, weekends included, and for replaced ones; "
    "asks for those that are new. Each look is a listing, and fetches nothing.",
)
def publication_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource
) -> dg.SensorResult | dg.SkipReason:
    try:
        wanted = polygon.settings()
        store = access.flat_files(wanted)
    except ConfigurationError as error:  # market_session_sensor's tick is red for it
        return dg.SkipReason(str(error))
    if store is None:
        return dg.SkipReason("no flat files are set (POLYGON_FLAT_FILES_KEY_ID), so there is none to look for")
    now, project, cursor = datetime.now(UTC), Project.from_environment(), _cursor(context.cursor)
    evidence = cursor.evidence.sentence(wanted.flat_files_replaced_days)
    days = [day for day in days_looked_at(now, wanted.flat_files_replaced_days) if project.is_partition(day)]
    known = {kind: _known(context.instance, OF_KIND[kind], days) for kind in FlatFileKind}
    next_look = cursor.looked_at and cursor.looked_at + min(pause(of_kind, now) for of_kind in known.values())
    if next_look and now < next_look:
        return dg.SkipReason(f"the next look is at {date_and_clock(next_look)}; {evidence}")
    cursor.looked_at = now
    try:
        found = [
            new for kind in FlatFileKind for new in news(kind, published_files(store, days, kind), known[kind], now)
        ]
    except (HistoryRefused, HistoryUnavailable) as error:
        return dg.SensorResult(skip_reason=str(error), cursor=_encoded(cursor))
    wanted_of: dict[date, list[Dataset]] = {}
    for new in found:
        dataset = OF_KIND[new.kind]
        key = f"{dataset.name} {new.day}"
        etag, asked_at = cursor.asked.get(key, ("", now))
        if etag == new.etag and now - asked_at < _ASKED_AGAIN_AFTER:
            continue
        if etag != new.etag and new.replaced_after is not None:
            cursor.evidence.add(new.replaced_after)
        context.log.info(f"{key}: {'replaced' if new.replaced_after else 'published'}")
        cursor.asked[key] = new.etag, now
        wanted_of.setdefault(new.day, []).append(dataset)
    kept = {f"{dataset.name} {day}" for dataset in OF_KIND.values() for day in days}
    cursor.asked = {key: asked for key, asked in cursor.asked.items() if key in kept}
    requests = history_requests(wanted_of, f"published by {now:%Y-%m-%dT%H:%M:%S}")
    said = None if requests else f"no new file among those of {len(days)} days; {evidence}"
    return dg.SensorResult(run_requests=requests, skip_reason=said, cursor=_encoded(cursor))


def _cursor(text: str | None) -> Cursor:
    """Where the last tick ended; the beginning where that cannot be read, as after an update."""
    try:
        return msgspec.json.decode(text or "{}", type=Cursor)
    except ValueError:
        return Cursor()


def _encoded(cursor: Cursor) -> str:
    return msgspec.json.encode(cursor).decode()


def _known(instance: dg.DagsterInstance, dataset: Dataset, days: Sequence[date]) -> dict[date, str | None]:
    """The ETag of each day's file that we have, "" where it came by REST, None where there is nothing."""
    found: dict[date, str | None] = {}
    for day in days:
        latest = latest_materialization(instance, dataset.name, day.isoformat())
        if latest is None or latest.asset_materialization is None:
            found[day] = None
            continue
        etag = latest.asset_materialization.metadata.get("etag")
        found[day] = "" if etag is None or etag.value == "none" else str(etag.value)
    return found
