"""Assembly only: which definitions and resources make up the code location."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg
from dagster_aws.s3 import S3Resource

from polygon_pipeline.defs import assets, history, schedules, sensors
from polygon_pipeline.defs.checks import bar_checks
from polygon_pipeline.defs.collect import collect_aggregates_job
from polygon_pipeline.defs.foreign import foreign_raw_data_sensor
from polygon_pipeline.defs.io_manager import ParquetIOManager
from polygon_pipeline.defs.resources import LakeResource, PolygonResource


def build_defs(resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """The project's definitions. resources: replacements, by key (polygon, lake, s3, parquet)."""
    s3 = S3Resource()
    lake = LakeResource(s3=s3)
    return dg.Definitions(
        assets=[
            assets.raw_bars,
            assets.raw_second_bars,
            history.reference_bars,
            assets.normalized_bars,
            assets.normalized_second_bars,
            assets.derived_bars,
            assets.bar_coverage,
        ],
        asset_checks=bar_checks,
        jobs=[collect_aggregates_job, schedules.daily_datasets_job, schedules.catch_up_job, history.reference_job],
        sensors=[
            sensors.market_session_sensor,
            sensors.datasets_follow_sensor,
            history.repair_sensor,
            foreign_raw_data_sensor,
        ],
        schedules=[schedules.after_close_schedule, schedules.reference_schedule, schedules.catch_up_schedule],
        resources={
            "s3": s3,
            "lake": lake,
            "polygon": PolygonResource(),
            "parquet": ParquetIOManager(lake=lake),
            **(resources or {}),
        },
        # A step in a process of its own would import everything again, some 2 s each; a day's work is one step.
        executor=dg.in_process_executor,
    )


defs = build_defs()
