"""The datasets' files: one Parquet file per day, Hive style, so that every reader of Parquet takes them as they are.

Belongs here: storing and fetching those files. Does not belong here: their rows and columns (datasets).
"""

from __future__ import annotations

from pathlib import Path

import obstore

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import NOT_FOUND
from polygon_pipeline.lake.store import Lake


class MissingDataset(Exception):
    """A day of a dataset has not been made."""


def put_dataset(lake: Lake, name: str, day: str, file: Path) -> str:
    """Stores a day's Parquet file in one atomic write and returns its URL."""
    key = layout.dataset_key(name, day)
    lake.put(key, file)
    return lake.url(key)


def fetch_dataset(lake: Lake, name: str, day: str, folder: Path) -> Path:
    """Fetches a day's Parquet file into a local folder. Raises MissingDataset where there is none."""
    key = layout.dataset_key(name, day)
    target = folder / f"{name}-{day}.parquet"
    try:
        chunks = obstore.get(lake.store, key)
    except NOT_FOUND:
        raise MissingDataset(f"{name} has no data of {day} in {lake.uri}. Materialize that partition first.") from None
    with target.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
    return target
