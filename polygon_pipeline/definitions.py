"""Assembly only: what is put into `defs`, with the resources it needs, makes up the code location."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import dagster as dg
from dagster_aws.s3 import S3Resource

from polygon_pipeline import defs as project_defs
from polygon_pipeline.defs.io_manager import ParquetIOManager
from polygon_pipeline.defs.resources import LakeResource, PolygonResource


def build_defs(resources: Mapping[str, object] | None = None) -> dg.Definitions:
    """The project's definitions. resources: replacements, by key (polygon, lake, s3, parquet)."""
    s3 = S3Resource()
    lake = LakeResource(s3=s3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # the loader is one in 1.13; the pins hold its version
        return dg.load_definitions_from_package_module(
            project_defs,
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
