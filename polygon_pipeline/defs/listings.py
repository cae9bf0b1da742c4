"""The vendor's listings in Dagster: the assets splits, dividends, tickers and ticker_events, and when they are fetched.

Belongs here: how a fetch shows in the UI, what a launch may name, and when the next one is due. Does not belong here:
fetching and keeping (datasets.listings).
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.catalog import DIVIDENDS, LISTINGS, SPLITS, TICKER_EVENTS, TICKERS, Listing
from polygon_pipeline.datasets.listings import Fetched, fetch_listing, keep
from polygon_pipeline.datasets.vendor_factors import compare
from polygon_pipeline.datasets.wording import count, number, plain
from polygon_pipeline.defs.describing import describing
from polygon_pipeline.defs.partitions import URGENT, Project
from polygon_pipeline.defs.presenting import markdown_table
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief, permanent_error
from polygon_pipeline.lake.layout import listing_key
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.settings import ConfigurationError, parse_tickers

JOB = "listings"
LISTINGS_TAG = "polygon_pipeline/listings"

# Before the pre-market of New York begins, so that a split of the day is known with its first bars.
DUE_AT = time(7, 30, tzinfo=UTC)
TRIES_A_DAY = 3

_ASKED_FOR = "asked_for"
_FETCHES_LOOKED_AT = 50
_NAMED = 20
_SHOWN_ROWS = 10
_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

# Written out and not a dg.Config, whose texts may also be {"env": NAME} at launch: the run would show that variable.
_CONFIG = {
    TICKERS.name: {
        "as_of": dg.Field(
            dg.Noneable([str]),
            is_required=False,
            description="Dates (YYYY-MM-DD) to ask the listing of, instead of today's in New York. Two requests a "
            "ticker and date up to 25 tickers, else some 60 a date.",
        )
    },
    TICKER_EVENTS.name: {
        "tickers": dg.Field(
            dg.Noneable([str]),
            is_required=False,
            description="Symbols to ask for, instead of the watch list; for the whole market they must be named. One "
            "request a ticker.",
        )
    },
}


def listing_assets(project: Project) -> list[dg.AssetsDefinition]:
    """The assets, and of the whole market's events those since the project's history begins."""
    return [_asset(listing, project.history_start) for listing in LISTINGS]


def _asset(listing: Listing, since: date) -> dg.AssetsDefinition:
    told = describing(listing)

    @dg.asset(
        name=listing.name,
        config_schema=_CONFIG.get(listing.name),
        pool="history",
        kinds={"python", "parquet"},
        check_specs=_check_specs(listing),
        description=told["description"],
        group_name=told["group_name"],
        owners=told["owners"],
        metadata=told["metadata"],
    )
    def fetch(
        context: dg.AssetExecutionContext, polygon: PolygonResource, lake: LakeResource
    ) -> Iterator[dg.MaterializeResult[None]]:
        config: dict[str, Any] = context.op_execution_context.op_config or {}
        metadata: dict[str, Any] = {}
        results: list[dg.AssetCheckResult] = []
        try:
            opened = lake.open()
            with polygon.history(opened) as sources:
                opened.claim(polygon.settings().feed)
                tickers = None if sources.tickers == ("*",) else sources.tickers
                if config.get("tickers"):
                    tickers = parse_tickers(config["tickers"])
                if listing == TICKER_EVENTS and tickers in (None, ("*",)):
                    raise ConfigurationError(
                        "POLYGON_TICKERS is *, and renames take a request a ticker: launch ticker_events with the "
                        "tickers that you want, in its configuration."
                    )
                for as_of in _dates(config.get("as_of")):
                    fetched = fetch_listing(listing, sources.rest, tickers, since, as_of)
                    for reason in fetched.refused[:_NAMED]:
                        context.log.warning(f"{listing.name}: {reason}")
                    file = keep(opened, fetched, lake.scratch())
                    metadata = _metadata(opened, fetched, file) | ({"as_of": str(as_of)} if listing == TICKERS else {})
                    if _check_specs(listing):
                        results = [_checked(opened, listing, file, lake.scratch(), as_of)]
        except (ConfigurationError, LakeError, HistoryRefused) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        except (HistoryUnavailable, NotYetPublished) as error:
            raise dg.Failure(str(error)) from error
        except STORE_ERRORS as error:
            refused = permanent_error(error, opened.uri, opened.bucket_region)
            raise dg.Failure(str(refused or f"{opened.uri} is away: {brief(error)}")) from error
        named = config.get("as_of") or config.get("tickers")
        yield dg.MaterializeResult(
            metadata=metadata | ({_ASKED_FOR: ", ".join(named)} if named else {}), check_results=results
        )

    return fetch


def _dates(texts: Sequence[str] | None) -> list[date]:
    """The dates to ask for; today's of New York where none is named."""
    try:
        found = [date.fromisoformat(text) for text in texts or ()]
    except ValueError as error:
        raise ConfigurationError(f"as_of must be dates such as 2026-01-26: {error}.") from error
    return found or [datetime.now(calendar.NEW_YORK).date()]


def _check_specs(listing: Listing) -> list[dg.AssetCheckSpec]:
    if listing not in (SPLITS, DIVIDENDS):
        return []
    return [
        dg.AssetCheckSpec(
            "factors_agree",
            asset=listing.name,
            description="Each event's own ratio is what follows from the vendor's cumulative factors. Factors of 0 or "
            "null are told and left out; of dividends those of the last month are compared.",
        )
    ]


def _checked(lake: Lake, listing: Listing, file: Path, folder: Path, today: date) -> dg.AssetCheckResult:
    found = compare(lake, listing, file, folder, today)
    told = {
        "differences": found.differences,
        "factors_of_no_use": found.unusable,
        "records_left_out": found.left_out,
    }
    return dg.AssetCheckResult(
        check_name="factors_agree",
        passed=not found.differences,
        severity=dg.AssetCheckSeverity.WARN,
        description=", ".join(f"{len(sentences)} {name.replace('_', ' ')}" for name, sentences in told.items()),
        metadata={name: "; ".join(map(plain, sentences[:_NAMED])) or "none" for name, sentences in told.items()},
    )


def _metadata(lake: Lake, fetched: Fetched, file: Path) -> dict[str, Any]:
    """What a materialization shows. file: as it is stored."""
    name, table = fetched.listing.name, fetched.table
    preview = {"preview": _preview(fetched)} if table.num_rows else {}
    refused = {"first_left_out": "; ".join(map(plain, fetched.refused[:_NAMED]))} if fetched.refused else {}
    return {
        "dagster/row_count": table.num_rows,
        "dagster/size_bytes": file.stat().st_size,
        "dagster/uri": lake.url(listing_key(name, fetched.fetched_at.date())),
        "fetched_at": dg.MetadataValue.timestamp(fetched.fetched_at),
        "requests": fetched.requests,
        "left_out": len(fetched.refused),
        **refused,
        **preview,
    }


def _preview(fetched: Fetched) -> dg.MarkdownMetadataValue:
    """The newest rows, without what no one reads."""
    by = next(column.name for column in fetched.listing.columns if column.type == "date")
    names = [column.name for column in fetched.listing.columns if column.name not in ("id", "fetched_at")]
    rows = fetched.table.sort_by([(by, "descending")]).slice(0, _SHOWN_ROWS).select(names).to_pylist()
    shown = [name for name in names if any(row[name] is not None for row in rows)]
    return markdown_table([{name: _cell(row[name]) for name in shown} for row in rows])


def _cell(value: object) -> str:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return number(value)
    return plain(str(value))


listings_job = dg.define_asset_job(
    JOB,
    selection=[listing.name for listing in LISTINGS],
    description="Fetches the vendor's splits, dividends and tickers. Started by listings_schedule, or by hand.",
)


@dg.schedule(
    job=listings_job,
    cron_schedule="10 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description=f"Fetches splits, dividends, tickers and a watch list's renames once a day, from {DUE_AT:%H:%M} UTC "
    f"on; what fails is tried up to {TRIES_A_DAY} times a day.",
)
def listings_schedule(context: dg.ScheduleEvaluationContext, polygon: PolygonResource) -> dg.RunRequest | dg.SkipReason:
    now = context.scheduled_execution_time.astimezone(UTC)
    due_since = datetime.combine(now.date(), DUE_AT)
    if now < due_since:
        due_since -= timedelta(days=1)
    day = due_since.date().isoformat()
    try:
        is_whole_market = polygon.settings().is_whole_market
    except ConfigurationError as error:
        return dg.SkipReason(str(error))
    missing = [
        listing.name
        for listing in LISTINGS
        if not (listing == TICKER_EVENTS and is_whole_market) and not _is_fetched(context.instance, listing, due_since)
    ]
    if not missing:
        return dg.SkipReason(f"everything is fetched since {day}, {DUE_AT:%H:%M} UTC")
    tries = context.instance.get_run_records(dg.RunsFilter(tags={LISTINGS_TAG: day}), limit=TRIES_A_DAY)
    if any(record.dagster_run.status in _UNFINISHED for record in tries):
        return dg.SkipReason("a run that fetches them is not finished")
    if len(tries) == TRIES_A_DAY:
        return dg.SkipReason(f"{', '.join(missing)} failed {count(TRIES_A_DAY, 'time')} today; the runs say why")
    return dg.RunRequest(
        run_key=f"{day}-{len(tries) + 1}",
        asset_selection=[dg.AssetKey(name) for name in missing],
        tags={LISTINGS_TAG: day, **URGENT},
    )


def _is_fetched(instance: dg.DagsterInstance, listing: Listing, since: datetime) -> bool:
    """Whether the day's fetch is there; one of dates or tickers that a person named is none."""
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey(listing.name), after_timestamp=since.timestamp()), limit=_FETCHES_LOOKED_AT
    )
    return any(
        record.asset_materialization and _ASKED_FOR not in record.asset_materialization.metadata
        for record in found.records
    )
