"""The one way a dataset's day gets on the lake, and what its materialization shows.

Belongs here: storing a day's file, and the metadata that every dataset has. Does not belong here: what only one dataset
says of itself (assets, reference), keys and files (lake.dataset_files), and what an asset says before anything is made
(describing).
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.description import Description, describe
from polygon_pipeline.datasets.wording import date_and_clock, number, plain
from polygon_pipeline.defs.presenting import markdown_table
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.layout import dataset_key
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import clock

# So many columns are seen at once in the page.
_FITTING = 9


def write_day(
    lake: Lake, name: str, day: str, file: Path, may_be_empty: bool = False, preview: bool = True
) -> dict[str, Any]:
    """Stores a day's Parquet file; returns the metadata. Raises dg.Failure for an empty one: no data is a failure."""
    metadata = day_metadata(lake, name, day, file, preview)
    if not (may_be_empty or metadata["dagster/row_count"]):
        raise dg.Failure(f"{name} of {day} would be empty; nothing was written.", allow_retries=False)
    put_dataset(lake, name, day, file)
    return metadata


def day_metadata(lake: Lake, name: str, day: str, file: Path, preview: bool = True) -> dict[str, Any]:
    """What a materialization of a day shows. file: the day's, local."""
    found = describe(file)
    ends = {"first_bar": found.first, "last_bar": found.last}
    return {
        "dagster/row_count": found.rows,
        "dagster/partition_row_count": found.rows,
        "tickers": found.tickers,
        "dagster/size_bytes": file.stat().st_size,
        "dagster/uri": lake.url(dataset_key(name, day)),
        **{name: date_and_clock(moment) for name, moment in ends.items() if moment},
        **({"preview": _preview(found)} if preview and found.rows else {}),
    }


def _preview(found: Description) -> dg.MarkdownMetadataValue:
    """The sample as a Markdown table, its times in New York.

    Of many columns those are left out that say the same of every ticker: the UI cuts what is too wide.
    """
    names = [
        f"{name} (New York)" if any(isinstance(row[place], datetime) for row in found.sample) else name
        for place, name in enumerate(found.columns)
    ]
    columns = dict(zip(names, zip(*found.sample, strict=True), strict=True))
    if len(columns) > _FITTING and len(found.sample) > 1:
        columns = {name: values for name, values in columns.items() if len(set(values)) > 1}
    return markdown_table(
        [dict(zip(columns, map(_cell, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    )


def _cell(value: object) -> str:
    match value:
        case datetime():
            return clock(value, seconds=True).removesuffix(":00")
        case None | float():
            return number(value)
        case int() if not isinstance(value, bool):
            return f"{value:,}"
    return plain(str(value))
