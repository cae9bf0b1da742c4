"""The asset checks, each recorded for its trading day.

Belongs here: how rules show in Dagster. Does not belong here: the rules (datasets.quality, datasets.coverage,
lake.ledger).
"""

import warnings
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

import dagster as dg
from pydantic import Field

from polygon_pipeline.datasets import quality
from polygon_pipeline.datasets.catalog import BAR_COVERAGE, NORMALIZED, Dataset
from polygon_pipeline.datasets.coverage import below
from polygon_pipeline.defs.assets import UNREADABLE_OBJECTS
from polygon_pipeline.defs.partitions import latest_materialization, trading_days
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake.dataset_files import fetch_dataset
from polygon_pipeline.lake.ledger import reconcile

_NAMED = 20

_RULES = {
    "schema": "The file's columns and types are the documented ones.",
    **quality.ROW_RULES,
    "every_object_readable": "Every raw object of the day could be read.",
    "ledger_balances": "What the collector received is accounted for, and the objects it counted are on the lake.",
}


def _checks_of(dataset: Dataset) -> dg.AssetChecksDefinition:
    asset = dataset.name
    with warnings.catch_warnings():
        # Partitioned checks are a preview in Dagster 1.13; without them a check would not say of which day it is.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        specs = [
            dg.AssetCheckSpec(rule, asset=asset, description=text, partitions_def=trading_days)
            for rule, text in _RULES.items()
        ]

    @dg.multi_asset_check(name=f"{asset}_checks", specs=specs)
    def check_day(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> Iterator[dg.AssetCheckResult]:
        opened = lake.open()
        day = date.fromisoformat(context.partition_key)
        file = fetch_dataset(opened, asset, context.partition_key, lake.scratch())
        errors = quality.schema_errors(file, dataset)
        yield _result(asset, "schema", not errors, {"errors": errors})
        if errors:
            return  # the other rules read those columns
        for rule, verdict in quality.check_rows(file, day).items():
            yield _result(asset, rule, not verdict.broken, {"rows": verdict.broken, "examples": verdict.examples})
        unreadable = _unreadable(context, asset)
        yield _result(asset, "every_object_readable", not unreadable, {"objects": sorted(unreadable)})
        balance = reconcile(opened, day, dataset.channel)
        yield _result(asset, "ledger_balances", not balance.errors, balance._asdict())

    return check_day


def _result(asset: str, rule: str, passed: bool, metadata: Mapping[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(asset_key=asset, check_name=rule, passed=passed, metadata=metadata)


def _unreadable(context: dg.AssetCheckExecutionContext, asset: str) -> dict[str, str]:
    """The objects that the day's latest materialization could not read."""
    latest = latest_materialization(context.instance, asset, context.partition_key)
    metadata = latest.asset_materialization.metadata if latest and latest.asset_materialization else {}
    value = metadata[UNREADABLE_OBJECTS].value if UNREADABLE_OBJECTS in metadata else {}
    return value if isinstance(value, dict) else {}


class CoverageConfig(dg.Config):
    """What share of a ticker's traded minutes must be there, from the stream or by repair."""

    least_share: float = Field(default=0.99, ge=0, le=1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", dg.PreviewWarning)  # as above

    @dg.asset_check(
        asset=BAR_COVERAGE.name,
        partitions_def=trading_days,
        description="Every ticker has its share of the minutes in which it traded, as far as the history knows.",
    )
    def traded_minutes_are_there(
        context: dg.AssetCheckExecutionContext, config: CoverageConfig, lake: LakeResource
    ) -> dg.AssetCheckResult:
        file = fetch_dataset(lake.open(), BAR_COVERAGE.name, context.partition_key, lake.scratch())
        short = below(file, config.least_share)
        named = [f"{found.ticker}: {found.collected} of {found.traded} minutes" for found in short[:_NAMED]]
        return dg.AssetCheckResult(
            passed=not short,
            metadata={"tickers_below": len(short), "least_share": config.least_share, "worst": named},
        )


normalized_checks = [_checks_of(dataset) for dataset in NORMALIZED.values()]
