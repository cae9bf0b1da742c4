"""The assets: what the lake holds, day by day, and what each is made of.

Belongs here: dependencies, runs of many days and how a day shows in the UI. Does not belong here: names, columns and
descriptions (datasets.catalog), what the rows are and in which order they are made (datasets), checks (defs.checks),
and the reference (defs.reference).

All datasets of a channel are made in one step, so that a day is fetched and scanned once. Each is reported for its day
as soon as it is stored; a run that is cut or partly fails has made what it reported.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from polygon_pipeline.collector.lease import live_run
from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.making import FailedDay, MadeDataset, current_status, make_days
from polygon_pipeline.datasets.staleness import AS_OF
from polygon_pipeline.datasets.wording import clock
from polygon_pipeline.defs import checks, report_page
from polygon_pipeline.defs.describing import describing
from polygon_pipeline.defs.partitions import Project, days_of, latest_ids, latest_materialization, made_days
from polygon_pipeline.defs.presenting import table
from polygon_pipeline.defs.reference import reference_assets
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.defs.writer import write_day
from polygon_pipeline.lake.dataset_files import fetch_dataset
from polygon_pipeline.lake.errors import STORE_ERRORS, brief, permanent_error
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel

_STEPS = {Channel.MINUTE: "bars_datasets", Channel.SECOND: "second_bars_datasets"}

# A store that is away is waited for, an hour and a half at the most; then the night is.
_STORE_TRIES = 90
_STORE_PAUSE_SECONDS = 60

# A check that is run by itself looks at so many of the last days.
_CHECKED_DAYS = 5
_NAMED_DAYS = 10
# A backfill draws no pictures: hundreds are not looked at, and Dagster keeps each twice.
_DRAWN_DAYS = 5
_NAMED_DIFFERENCES = 10
_VALUES = ("open", "high", "low", "close", "volume", "vwap")


class MakingConfig(dg.Config):
    """How the datasets are checked."""

    least_share: float = Field(
        default=checks.LEAST_SHARE, ge=0, le=1, description="Of a ticker's traded minutes, those that must be there"
    )


def dataset_assets(project: Project) -> list[dg.AssetSpec | dg.AssetsDefinition]:
    """The assets of the channels that are collected."""
    return [
        *reference_assets(project),
        *(_raw_asset(project, catalog.RAW[channel]) for channel in project.channels),
        *(_channel_assets(project, channel) for channel in project.channels),
    ]


def _raw_asset(project: Project, dataset: Dataset) -> dg.AssetSpec:
    return dg.AssetSpec(
        dataset.name, partitions_def=project.trading_days, kinds={"python", "json"}, **describing(dataset)
    )


def _channel_assets(project: Project, channel: Channel) -> dg.AssetsDefinition:
    datasets = [dataset for dataset in catalog.FOLLOWING if dataset.channel is channel]

    @dg.multi_asset(
        name=_STEPS[channel],
        specs=[
            dg.AssetSpec(
                dataset.name,
                deps=[needed.name for needed in dataset.inputs],
                partitions_def=project.trading_days,
                kinds={"duckdb", "parquet"},
                skippable=True,
                **describing(dataset, project.is_simulated),
            )
            for dataset in datasets
        ],
        check_specs=checks.specs(datasets),
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=project.days_per_run),
        pool="datasets",  # one run at a time: a day takes both cores, and the collector keeps its place
    )
    def make(
        context: dg.AssetExecutionContext, config: MakingConfig, lake: LakeResource
    ) -> Iterator[dg.AssetCheckResult]:
        opened = lake.open()
        names = {key.to_user_string() for key in context.selected_asset_keys}
        wanted = [dataset for dataset in datasets if dataset.name in names]
        results: dict[date, list[checks.DayResult]] = {}
        errors: dict[date, str] = {}
        try:
            if wanted:
                _make(context, opened, lake, wanted, config.least_share, results, errors)
            else:
                _check_again(context, opened, lake, config.least_share, results)
        except STORE_ERRORS as error:
            if refused := permanent_error(error, opened.uri, opened.bucket_region):
                raise dg.Failure(str(refused), allow_retries=False) from None
            # Nothing else asks for these days before the night, and no other run could do better.
            context.log.warning(f"{opened.uri} is away and is waited for: {brief(error)}")
            raise dg.RetryRequested(max_retries=_STORE_TRIES, seconds_to_wait=_STORE_PAUSE_SECONDS) from error
        yield from checks.as_check_results(results, context.selected_asset_check_keys)
        if errors:
            raise dg.Failure(_failure(errors), allow_retries=False)

    return make


def _make(
    context: dg.AssetExecutionContext,
    opened: Lake,
    lake: LakeResource,
    wanted: Sequence[Dataset],
    least_share: float,
    results: dict[date, list[checks.DayResult]],
    errors: dict[date, str],
) -> None:
    """Makes the run's days, with each day's checks in results and why it could not be made in errors."""
    as_of: dict[date, int] = {}
    roots = {root.name for dataset in wanted for root in catalog.roots(dataset)}
    tries = _tries(context.instance, context.run.root_run_id) | ({context.run_id} if context.retry_number else set())

    def wanted_of(day: date) -> Sequence[Dataset]:
        ids = latest_ids(context.instance, roots, {day.isoformat()}).get(day.isoformat(), {})
        as_of[day] = max(ids.values(), default=0)
        return _not_made_before(context.instance, tries, day, wanted)

    days = days_of(context.run.tags)
    draw = len(days) <= _DRAWN_DAYS
    for made in make_days(opened, days, wanted_of, lake.scratch(), datetime.now(UTC), lambda: live_run(opened), draw):
        if isinstance(made, FailedDay):
            errors[made.day] = _error_text(made, opened, wanted)
            context.log.error(f"{made.day}: {errors[made.day]}")
            continue
        of_dataset = list(checks.check_day(opened, made, least_share))
        results.setdefault(made.day, []).extend(of_dataset)
        metadata = write_day(
            opened,
            made.dataset.name,
            made.day.isoformat(),
            made.file,
            may_be_empty=made.dataset == catalog.DAILY_DIFFERENCES,  # a day may agree
            preview=not made.report,
        )
        shown = _metadata(made, results[made.day] if made.report else of_dataset)
        context.log_event(
            dg.AssetMaterialization(
                made.dataset.name,
                partition=made.day.isoformat(),
                description=report_page.headline(made.status, made.report) if made.report else None,
                metadata=shown | metadata | shown | {AS_OF: as_of[made.day]},  # what is said of the day comes first
            )
        )


def _tries(instance: dg.DagsterInstance, root: str | None) -> set[str]:
    """The runs that tried what a run tries again, by the id of the first; none where it is the first."""
    if root is None:
        return set()
    records = instance.get_run_records(dg.RunsFilter(tags={"dagster/root_run_id": root}))
    return {root, *(record.dagster_run.run_id for record in records)}


def _not_made_before(
    instance: dg.DagsterInstance, tries: set[str], day: date, wanted: Sequence[Dataset]
) -> Sequence[Dataset]:
    """What is left to make of a day where an earlier try of this run was cut: that goes on where it was."""
    if not tries:
        return wanted
    left = []
    for dataset in wanted:
        latest = latest_materialization(instance, dataset.name, day.isoformat())
        if latest is None or latest.run_id not in tries:
            left.append(dataset)
    return left


def _check_again(
    context: dg.AssetExecutionContext,
    opened: Lake,
    lake: LakeResource,
    least_share: float,
    results: dict[date, list[checks.DayResult]],
) -> None:
    """Checks what is on the lake: the run's days, or the last ones where the run has none."""
    folder, now, live = lake.scratch(), datetime.now(UTC), live_run(opened)
    for name in sorted({key.asset_key.to_user_string() for key in context.selected_asset_check_keys}):
        dataset = catalog.find(name)
        asked = [day.isoformat() for day in days_of(context.run.tags)]
        for day in asked or sorted(made_days(context.instance, name))[-_CHECKED_DAYS:]:
            latest = latest_materialization(context.instance, name, day)
            known = latest.asset_materialization.metadata if latest and latest.asset_materialization else {}
            made = MadeDataset(
                date.fromisoformat(day),
                dataset,
                fetch_dataset(opened, name, day, folder),
                current_status(opened, date.fromisoformat(day), folder, now, live),
                {key: value.value for key, value in known.items()},
            )
            results.setdefault(made.day, []).extend(checks.check_day(opened, made, least_share))


def _metadata(made: MadeDataset, results: Sequence[checks.DayResult]) -> dict[str, Any]:
    summary = checks.summary(results) if results else ""
    found: dict[str, Any] = {"day_state": str(made.status.state), **({"checks": summary} if summary else {})}
    if made.report:
        found = report_page.metadata(made.day, made.status, made.report, summary) | found
    else:
        found["day_state_detail"] = made.status.detail
    if made.picture:
        content = b64encode(made.picture).decode()
        text = f"![{made.dataset.name} of {made.day}](data:image/png;base64,{content})"
        found["picture"] = dg.MetadataValue.md(text)
    for name, fact in made.facts.items():
        if name == "differences" and fact:
            found[name] = table([_difference_row(difference) for difference in fact[:_NAMED_DIFFERENCES]])
        elif fact not in ([], {}):
            found[name] = fact
    return found


def _difference_row(difference: Mapping[str, Any]) -> dict[str, str | int]:
    """A bar of the stream and of the vendor's history: what differs, and which was kept (datasets.merge)."""
    stream, history = difference["stream"], difference["reference"]
    differing = [
        name for name in _VALUES if stream[name] != history[name] and None not in (stream[name], history[name])
    ]
    return {
        "ticker": difference["ticker"],
        "time": clock(datetime.fromisoformat(difference["timestamp"])),
        "stream": ", ".join(f"{name} {stream[name]:,}" for name in differing),
        "history": ", ".join(f"{name} {history[name]:,}" for name in differing),
        "kept": "history" if difference["verdict"] == "corrected" else "stream",
    }


def _error_text(failed: FailedDay, opened: Lake, wanted: Sequence[Dataset]) -> str:
    return (
        f"{failed.error} (channel {wanted[0].channel}) in {opened.uri}. Collect that day or materialize its "
        f"{catalog.REFERENCE_BARS.name} first."
    )


def _failure(errors: dict[date, str]) -> str:
    first = next(iter(errors.values()))
    if len(errors) == 1:
        return first
    named = ", ".join(map(str, [*errors][:_NAMED_DAYS])) + (" and more" if len(errors) > _NAMED_DAYS else "")
    return f"{len(errors)} days could not be made, the others are: {named}. The first: {first}"
