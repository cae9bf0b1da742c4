"""The one way a dataset's day gets on the lake, and what its materialization shows.

Belongs here: storing a day's file, and the metadata that every dataset has. Does not belong here: what only one dataset
says of itself (assets, reference), keys and files (lake.dataset_files), and columns (datasets.catalog).
"""

import re
from pathlib import Path
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.description import Description, describe
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.layout import dataset_key
from polygon_pipeline.lake.store import Lake


def column_schema(dataset: Dataset) -> dict[str, dg.TableSchema]:
    """Shows a dataset's columns, as metadata of the asset: in every event it would be most of what Dagster keeps."""
    columns = [dg.TableColumn(column.name, column.type, column.description) for column in dataset.columns]
    return {"dagster/column_schema": dg.TableSchema(columns)} if columns else {}


def write_day(lake: Lake, name: str, day: str, file: Path, may_be_empty: bool = False) -> dict[str, Any]:
    """Stores a day's Parquet file; returns the metadata. Raises dg.Failure for an empty one: no data is a failure."""
    metadata = day_metadata(lake, name, day, file)
    if not (may_be_empty or metadata["dagster/row_count"]):
        raise dg.Failure(f"{name} of {day} would be empty; nothing was written.", allow_retries=False)
    put_dataset(lake, name, day, file)
    return metadata


def day_metadata(lake: Lake, name: str, day: str, file: Path) -> dict[str, Any]:
    """What a materialization of a day shows. file: the day's, local."""
    found = describe(file)
    bars = {"first_bar": found.first, "last_bar": found.last, "preview": dg.MetadataValue.md(_preview(found))}
    return {
        "dagster/row_count": found.rows,
        "tickers": found.tickers,
        "bytes": file.stat().st_size,
        "uri": dg.MetadataValue.text(lake.url(dataset_key(name, day))),
        **(bars if found.rows else {}),
    }


def _plain(text: str) -> str:
    """Text as Markdown shows it as it is: a ticker comes from the feed, and may be a link or the end of a row."""
    return re.sub(r"([!-,/:-@\[-`{-~]|(?<=www)\.)", r"\\\1", " ".join(text.split()), flags=re.IGNORECASE)


def _preview(found: Description) -> str:
    """The sample as a Markdown table."""
    cells = [
        [f"{value:,.4f}" if isinstance(value, float) else _plain(str(value)) for value in row] for row in found.sample
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (found.columns, ["---"] * len(found.columns), *cells))
