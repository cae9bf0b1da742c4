"""The assets: what the lake holds, day by day, and what each is made of.

Belongs here: names, dependencies, automation and how each shows in the UI. Does not belong here: what the rows are
(market.transform) or how raw data is read (lake.raw).
"""

import contextlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import dagster as dg

from polygon_pipeline.defs.history import reference_bars
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.market.bars import Channel

# Datasets follow their inputs, of whatever day: `eager` alone would keep to the latest one, and a late recovery or
# the demo's past days must follow too.
_FOLLOW_BARS = dg.AutomationCondition.eager().without(dg.AutomationCondition.in_latest_time_window())

_HISTORY = dg.AssetSelection.assets("reference_bars")

# Raw bars arrive while a run is making the day from what there was before. `eager` takes the end of that run for an
# answer to them, and the session's last bars would be left out; here only a later request answers them.
_RAW_UPDATED = dg.AutomationCondition.any_deps_updated().ignore(_HISTORY)
_RAW_UNANSWERED = (dg.AutomationCondition.newly_missing() | _RAW_UPDATED).since(
    (dg.AutomationCondition.newly_requested() & ~_RAW_UPDATED) | dg.AutomationCondition.initial_evaluation()
)
# The history of a day comes at once, so a run of a backfill that had it is an answer.
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

raw_bars = dg.AssetSpec(
    "raw_bars",
    description="Minute bars as received (channel AM), in raw-frames and raw-data. The job `collect_aggregates` fills "
    "it all day and reports here; it cannot be materialized by hand.",
    partitions_def=trading_days,
    group_name="bars",
    kinds={"websocket", "json"},
)

raw_second_bars = dg.AssetSpec(
    "raw_second_bars",
    description="Second bars as received (channel A), in raw-frames and raw-data-second. The job "
    "`collect_aggregates` fills it where POLYGON_CHANNELS has A; it cannot be materialized by hand.",
    partitions_def=trading_days,
    group_name="second_bars",
    kinds={"websocket", "json"},
)


@dg.asset(
    deps=[raw_bars, reference_bars],
    partitions_def=trading_days,
    io_manager_key="parquet",
    automation_condition=_FOLLOW_RAW_BARS,
    group_name="bars",
    kinds={"duckdb", "parquet"},
)
def normalized_bars(context: dg.AssetExecutionContext, lake: LakeResource) -> Path:
    """Typed minute bars, the best of stream and vendor's history: one row a ticker and minute, the latest word."""
    return _normalize(context, lake, Channel.MINUTE)


@dg.asset(
    deps=[raw_second_bars],
    partitions_def=trading_days,
    io_manager_key="parquet",
    automation_condition=_FOLLOW_RAW_BARS,
    group_name="second_bars",
    kinds={"duckdb", "parquet"},
)
def normalized_second_bars(context: dg.AssetExecutionContext, lake: LakeResource) -> Path:
    """Typed second bars: one row a ticker and second, the latest revision, sorted by ticker and time."""
    return _normalize(context, lake, Channel.SECOND)


@dg.multi_asset(
    outs={
        name: dg.AssetOut(
            description=description,
            io_manager_key="parquet",
            is_required=False,
            automation_condition=_FOLLOW_BARS,
            group_name="bars",
            kinds={"duckdb", "parquet"},
        )
        for name, description in {
            "bars_5m": "Five-minute bars, aligned to the clock.",
            "bars_15m": "Fifteen-minute bars, aligned to the clock.",
            "bars_1h": "Hourly bars, aligned to the clock.",
            "daily_bars": "A row a ticker: regular-hours OHLCV and VWAP, extended-hours volume, official open.",
        }.items()
    },
    partitions_def=trading_days,
    can_subset=True,
)
def derived_bars(
    context: dg.AssetExecutionContext, lake: LakeResource, normalized_bars: Path
) -> Iterator[dg.Output[Path]]:
    """One step for all four, so that a day is fetched and scanned once."""
    from polygon_pipeline.market.transform import Derivation

    folder = lake.scratch()
    with Derivation(date.fromisoformat(context.partition_key), normalized_bars, folder) as derivation:
        for name in sorted(context.op_execution_context.selected_output_names):
            target = folder / f"{name}.parquet"
            derivation.write(name, target)
            yield dg.Output(target, output_name=name)


@dg.asset(
    deps=[reference_bars],
    partitions_def=trading_days,
    io_manager_key="parquet",
    automation_condition=_FOLLOW_BARS_BEFORE_HISTORY,
    group_name="bars",
    kinds={"duckdb", "parquet"},
)
def bar_coverage(context: dg.AssetExecutionContext, lake: LakeResource, normalized_bars: Path) -> Path:
    """A row a ticker: minutes expected, collected, traded, lost, repaired, corrected and late. With a picture."""
    from base64 import b64encode

    from polygon_pipeline.collector.account import connected_minutes, subscribed_tickers
    from polygon_pipeline.collector.history import read_ledgers
    from polygon_pipeline.lake.datasets import MissingDataset, fetch_dataset
    from polygon_pipeline.market import coverage
    from polygon_pipeline.market.picture import MOST_TICKERS, heat_map

    day = date.fromisoformat(context.partition_key)
    opened, folder = lake.open(), lake.scratch()
    reference: Path | None = None
    with contextlib.suppress(MissingDataset):
        reference = fetch_dataset(opened, "reference_bars", context.partition_key, folder)
    ledgers = read_ledgers(opened, day)
    connected, subscribed = connected_minutes(ledgers), subscribed_tickers(ledgers)
    target = folder / "coverage.parquet"
    coverage.cover(day, normalized_bars, reference, connected, target, folder, subscribed)
    shown = coverage.worst_first(target, MOST_TICKERS)
    states = coverage.minute_states(day, normalized_bars, reference, connected, folder, subscribed, shown)
    picture = b64encode(heat_map(day, states, shown)).decode()
    context.add_output_metadata(
        {
            "picture": dg.MetadataValue.md(f"![coverage of {day}](data:image/png;base64,{picture})"),
            "history": "known" if reference else "not there yet: a minute without a bar is no trade or lost, unknown",
            **coverage.totals(target),
        }
    )
    return target


def _normalize(context: dg.AssetExecutionContext, lake: LakeResource, channel: Channel) -> Path:
    from polygon_pipeline.lake.raw import normalize_day
    from polygon_pipeline.market.transform import NoBars

    folder = lake.scratch()
    target = folder / "normalized.parquet"
    opened = lake.open()
    try:
        raw = normalize_day(opened, date.fromisoformat(context.partition_key), channel, target, folder)
    except NoBars as error:
        raise dg.Failure(
            f"{error} (channel {channel}) in {opened.uri}. Collect that day or materialize its reference_bars first.",
            allow_retries=False,
        ) from error
    for key, fault in raw.unreadable.items():
        context.log.warning(f"{opened.url(key)} could not be read: {fault}")
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
