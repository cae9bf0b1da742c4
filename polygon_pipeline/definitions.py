"""Assembly only: the assets and jobs that the settings ask for, with what is put into `defs`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import dagster as dg
from dagster_aws.s3 import S3Resource

from polygon_pipeline import defs as project_defs
from polygon_pipeline.datasets.catalog import FOLLOWING, REFERENCES
from polygon_pipeline.defs import following, in_force
from polygon_pipeline.defs.assets import dataset_assets
from polygon_pipeline.defs.io_manager import ParquetIOManager
from polygon_pipeline.defs.listings import listing_assets
from polygon_pipeline.defs.partitions import Project

# What is used of Dagster's betas and previews is held by the pins of its version. Ignored for good and not while this
# is built, because Dagster resolves jobs and sensors later.
warnings.simplefilter("ignore", dg.BetaWarning)
warnings.simplefilter("ignore", dg.PreviewWarning)
# Its runs have as many days as those of the history, the fewer of its assets' two numbers, and that is meant.
warnings.filterwarnings("ignore", "Asset job catch_up materializes assets with varying BackfillPolicies")


def build_defs(project: Project | None = None, resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """The project's definitions. project: by the environment. resources: replacements and more, by key."""
    project = project or Project.from_environment()
    chosen = {
        "polygon": in_force.polygon_resource(os.environ)(),
        "lake": in_force.lake_resource(os.environ)(s3=S3Resource()),
        **(resources or {}),
    }
    return dg.Definitions.merge(
        dg.load_definitions_from_package_module(project_defs),
        dg.Definitions(
            assets=[*dataset_assets(project), *listing_assets(project)],
            jobs=_jobs(project),
            resources={"parquet": ParquetIOManager(lake=chosen["lake"]), **chosen},
            # A step in a process of its own would import everything again, some 2 s each.
            executor=dg.in_process_executor,
        ),
    )


def _jobs(project: Project) -> list[dg.UnresolvedAssetJobDefinition]:
    datasets = [dataset.name for dataset in FOLLOWING if dataset.channel in project.channels]
    return [
        dg.define_asset_job(
            following.JOB,
            selection=datasets,
            description="Makes datasets of trading days. Started by datasets_follow_sensor, or by hand.",
        ),
        # A schedule's runs are all of one job.
        dg.define_asset_job(
            "catch_up",
            selection=[*(dataset.name for dataset in REFERENCES), *datasets],
            description="Makes what is missing or out of date. Started by catch_up_schedule.",
        ),
    ]


defs = build_defs()
