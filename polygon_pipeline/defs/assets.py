"""The assets: what the lake holds, day by day, and what each is made of.

Belongs here: dependencies, automation and how each shows in the UI. Does not belong here: names, columns and
descriptions (datasets.catalog), what the rows are (the datasets' modules), and the reference (defs.reference).
"""

import contextlib
from base64 import b64encode
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import dagster as dg

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.coverage import Coverage, totals, worst_first
from polygon_pipeline.datasets.inputs import normalize_day
from polygon_pipeline.datasets.normalize import NoBars
from polygon_pipeline.datasets.pictures import MOST_TICKERS, heat_map
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake.dataset_files import MissingDataset, fetch_dataset
from polygon_pipeline.lake.ledger import connected_minutes, read_ledgers, subscribed_tickers
from polygon_pipeline.market.bars import Channel

# Datasets follow their inputs, of whatever day: `eager` alone would keep to the latest one, and a late recovery or
# the demo's past days must follow too.
_FOLLOW_BARS = dg.AutomationCondition.eager().without(dg.AutomationCondition.in_latest_time_window())

_HISTORY = dg.AssetSelection.assets(catalog.REFERENCE_BARS.name)

# Raw bars arrive while a run is making the day from what there was before. `eager` takes the end of that run for an
# answer to them, and the session's last bars would be left out; here only a later request answers them.
_RAW_UPDATED = dg.AutomationCondition.any_deps_updated().ignore(_HISTORY)
_RAW_UNANSWERED = (dg.AutomationCondition.newly_missing() | _RAW_UPDATED).since(
    (dg.AutomationCondition.newly_requested() & ~_RAW_UPDATED) | dg.AutomationCondition.initial_evaluation()
)
# The history of a day comes at once, so a run of a backfill that used it is an answer.
_HISTORY_UNANSWERED = (
    dg.AutomationCondition.any_deps_updated()
    .allow(_HISTORY)
    .since(
        dg.AutomationCondition.newly_requested()
        | dg.AutomationCondition.newly_updated()
        | dg.AutomationCondition.initial_evaluation()
    )
)
# Raw bars or the vendor's history suffice.
_FOLLOW_RAW_BARS = (
    (_RAW_UNANSWERED | _HISTORY_UNANSWERED)
    & ~dg.AutomationCondition.all_deps_match(dg.AutomationCondition.missing())
    & ~dg.AutomationCondition.in_progress()
)

# Coverage says what is known before the vendor's history is there, and more when it is.
_FOLLOW_BARS_BEFORE_HISTORY = _FOLLOW_BARS.replace(
    "any_deps_missing", dg.AutomationCondition.any_deps_missing().ignore(_HISTORY)
)

UNREADABLE_OBJECTS = "unreadable_objects"

_GROUPS = {Channel.MINUTE: "bars", Channel.SECOND: "second_bars"}
_KINDS = {"duckdb", "parquet"}

raw_assets = [
    dg.AssetSpec(
        dataset.name,
        description=dataset.description,
        partitions_def=trading_days,
        group_name=_GROUPS[dataset.channel],
        kinds={"websocket", "json"},
    )
    for dataset in catalog.RAW.values()
]


def _normalized_asset(dataset: Dataset) -> dg.AssetsDefinition:
    @dg.asset(
        name=dataset.name,
        description=dataset.description,
        deps=[needed.name for needed in dataset.inputs],
        partitions_def=trading_days,
        io_manager_key="parquet",
        automation_condition=_FOLLOW_RAW_BARS,
        group_name=_GROUPS[dataset.channel],
        kinds=_KINDS,
    )
    def normalized(context: dg.AssetExecutionContext, lake: LakeResource) -> Path:
        return _normalize(context, lake, dataset)

    return normalized


normalized_assets = [_normalized_asset(dataset) for dataset in catalog.NORMALIZED.values()]


@dg.multi_asset(
    outs={
        dataset.name: dg.AssetOut(
            description=dataset.description,
            io_manager_key="parquet",
            is_required=False,
            automation_condition=_FOLLOW_BARS,
            group_name=_GROUPS[dataset.channel],
            kinds=_KINDS,
        )
        for dataset in catalog.DERIVED
    },
    ins={"minutes": dg.AssetIn(catalog.NORMALIZED_BARS.name)},
    partitions_def=trading_days,
    can_subset=True,
)
def derived_bars(context: dg.AssetExecutionContext, lake: LakeResource, minutes: Path) -> Iterator[dg.Output[Path]]:
    """One step for all, so that a day is fetched and scanned once."""
    folder = lake.scratch()
    with Resampling(date.fromisoformat(context.partition_key), minutes, folder) as resampling:
        for name in sorted(context.op_execution_context.selected_output_names):
            target = folder / f"{name}.parquet"
            resampling.write(catalog.find(name), target)
            yield dg.Output(target, output_name=name)


@dg.asset(
    name=catalog.BAR_COVERAGE.name,
    description=catalog.BAR_COVERAGE.description,
    ins={"minutes": dg.AssetIn(catalog.NORMALIZED_BARS.name)},
    deps=[catalog.REFERENCE_BARS.name],
    partitions_def=trading_days,
    io_manager_key="parquet",
    automation_condition=_FOLLOW_BARS_BEFORE_HISTORY,
    group_name=_GROUPS[catalog.BAR_COVERAGE.channel],
    kinds=_KINDS,
)
def coverage(context: dg.AssetExecutionContext, lake: LakeResource, minutes: Path) -> Path:
    day = date.fromisoformat(context.partition_key)
    opened, folder = lake.open(), lake.scratch()
    reference: Path | None = None
    with contextlib.suppress(MissingDataset):
        reference = fetch_dataset(opened, catalog.REFERENCE_BARS.name, context.partition_key, folder)
    ledgers, unreadable = read_ledgers(opened, day)
    for key, reason in unreadable.items():
        context.log.warning(f"{opened.url(key)} cannot be read, its connections are not known: {reason}")
    target = folder / "coverage.parquet"
    with Coverage(day, minutes, reference, connected_minutes(ledgers), folder, subscribed_tickers(ledgers)) as covering:
        covering.write(target)
        shown = worst_first(target, MOST_TICKERS)
        picture = b64encode(heat_map(day, covering.minute_states(shown), shown)).decode()
    context.add_output_metadata(
        {
            "picture": dg.MetadataValue.md(f"![coverage of {day}](data:image/png;base64,{picture})"),
            "history": "known" if reference else "not there yet: a minute without a bar is no trade or lost, unknown",
            **totals(target),
        }
    )
    return target


def _normalize(context: dg.AssetExecutionContext, lake: LakeResource, dataset: Dataset) -> Path:
    folder = lake.scratch()
    target = folder / "normalized.parquet"
    opened = lake.open()
    try:
        raw = normalize_day(opened, date.fromisoformat(context.partition_key), dataset.channel, target, folder)
    except NoBars as error:
        raise dg.Failure(
            f"{error} (channel {dataset.channel}) in {opened.uri}. Collect that day or materialize its "
            f"{catalog.REFERENCE_BARS.name} first.",
            allow_retries=False,
        ) from error
    for key, reason in raw.unreadable.items():
        context.log.warning(f"{opened.url(key)} could not be read: {reason}")
    merge = raw.merge
    context.add_output_metadata(
        {
            "frame_files": raw.frame_files,
            "raw_objects_without_frames": raw.records,
            "history": raw.reference.source if raw.reference else "none yet",
            "bars_added_from_history": merge.added,
            "bars_differing_from_history": merge.differing,
            "bars_corrected_by_history": merge.corrected,
            "differences": dg.MetadataValue.json(list(merge.examples)),
            UNREADABLE_OBJECTS: dg.MetadataValue.json(dict(sorted(raw.unreadable.items())[:100])),
        }
    )
    return target
