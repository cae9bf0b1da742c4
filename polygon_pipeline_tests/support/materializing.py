"""Running the project's assets in this process."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any

import dagster as dg

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.market.bars import Channel

# Every day there ever was, and everything that can be collected.
PROJECT = Project(date(2003, 9, 10), tuple(Channel))


def materialize(
    instance: dg.DagsterInstance, names: Iterable[str], first: str, last: str | None = None, fails: bool = False
) -> dg.ExecuteInProcessResult:
    """Makes a day of these assets, or all days from first to last in one run. fails: whether an error is the result."""
    job = build_defs(PROJECT).resolve_implicit_global_asset_job_def()
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last or first}
    return job.execute_in_process(
        asset_selection=[dg.AssetKey(name) for name in names],
        instance=instance,
        raise_on_error=not fails,
        **({"partition_key": first} if last is None else {"tags": tags}),
    )


def latest_metadata(instance: dg.DagsterInstance, name: str, day: str) -> dict[str, Any]:
    """What the last materialization of the day shows."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), asset_partitions=[day])
    [record] = instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization
    return {key: value.value for key, value in record.asset_materialization.metadata.items()}
