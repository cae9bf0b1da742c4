"""What an asset says of itself before anything is made: owner, tags, columns, source, and how fresh it should be.

Belongs here: that, for every dataset of the catalog. Does not belong here: what a day's materialization says (writer,
report_page), and descriptions and columns (datasets.catalog).
"""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

import polygon_pipeline
from polygon_pipeline.datasets.catalog import (
    BAR_COVERAGE,
    DAILY_BARS,
    DAILY_DIFFERENCES,
    DERIVED,
    LISTINGS,
    NORMALIZED,
    RAW,
    REFERENCES,
    SESSION_REPORT,
    Dataset,
    Listing,
)

# One group, because the UI opens one alone unfolded.
GROUP = "bars"

# Of assets, and of the runs that make them.
CHANNEL_TAG = "polygon_pipeline/channel"

# Whom Dagster's catalog shows; a project's own team goes here.
OWNER = "team:market-data"

# From a Friday's evening to the Tuesday after a long weekend three and a half days pass in which nothing is made, and
# before a holiday that falls on a Friday or after one on a Thursday somewhat more.
_LATE, _TOO_LATE = timedelta(days=4), timedelta(days=5)
_DAILY = (DAILY_BARS, BAR_COVERAGE, SESSION_REPORT)

_PACKAGE = Path(polygon_pipeline.__file__).parent
_MODULES: dict[Dataset | Listing, str] = {
    **dict.fromkeys(RAW.values(), "defs/collect.py"),
    **dict.fromkeys(NORMALIZED.values(), "datasets/normalize.py"),
    **dict.fromkeys(DERIVED, "datasets/resample.py"),
    **dict.fromkeys(REFERENCES, "datasets/reference.py"),
    DAILY_DIFFERENCES: "datasets/differences.py",
    BAR_COVERAGE: "datasets/coverage.py",
    SESSION_REPORT: "datasets/report.py",
    **dict.fromkeys(LISTINGS, "datasets/listings.py"),
}


def describing(dataset: Dataset | Listing, is_simulated: bool = False) -> dict[str, Any]:
    """Arguments of the dataset's asset. is_simulated: whether days end with the demo, and nothing is to be fresh."""
    policy = None
    if dataset in _DAILY and not is_simulated:
        policy = dg.FreshnessPolicy.time_window(fail_window=_TOO_LATE, warn_window=_LATE)
    return {
        "description": dataset.description,
        "group_name": GROUP,
        "owners": [OWNER],
        "tags": {CHANNEL_TAG: str(dataset.channel)} if isinstance(dataset, Dataset) else {},
        "metadata": {**_columns(dataset), "dagster/code_references": _source(dataset)},
        "freshness_policy": policy,
    }


def _columns(dataset: Dataset | Listing) -> dict[str, dg.TableSchema]:
    """A dataset's columns, as metadata of the asset: in every event it would be most of what Dagster keeps."""
    columns = [dg.TableColumn(column.name, column.type, column.description) for column in dataset.columns]
    return {"dagster/column_schema": dg.TableSchema(columns)} if columns else {}


def _source(dataset: Dataset | Listing) -> dg.CodeReferencesMetadataValue:
    """Where its rows are made, and in a checkout the README's section on what it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # the pins hold its version
        module = _MODULES.get(dataset, "datasets/catalog.py")
        places: list[dg.LocalFileCodeReference | dg.UrlCodeReference] = [
            dg.LocalFileCodeReference(file_path=str(_PACKAGE / module), label=module)
        ]
        readme = _PACKAGE.parent / "README.md"
        if readme.exists():
            places.append(dg.LocalFileCodeReference(file_path=str(readme), label="README.md, The lake"))
        return dg.CodeReferencesMetadataValue(code_references=places)
