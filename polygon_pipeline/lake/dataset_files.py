"""The datasets' files: one Parquet file per day, Hive style, so that every reader of Parquet takes them as they are;
of a listing, one per day on which it was fetched.

Belongs here: storing and fetching those files. Does not belong here: their rows and columns (datasets).
"""

from __future__ import annotations

from datetime import date
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
    target = folder / f"{name}-{day}.parquet"
    if not _fetch(lake, layout.dataset_key(name, day), target):
        raise MissingDataset(f"{name} has no data of {day} in {lake.uri}. Materialize that partition first.")
    return target


def put_listing(lake: Lake, name: str, fetched: date, file: Path) -> str:
    """Stores what was fetched on a day (UTC) in one atomic write, in the place of what that day had; returns its
    URL."""
    key = layout.listing_key(name, fetched)
    lake.put(key, file)
    return lake.url(key)


def fetch_listing_file(lake: Lake, name: str, fetched: date, folder: Path) -> Path | None:
    """Fetches what a day (UTC) has of a listing into a local folder; None where nothing was fetched on it."""
    target = folder / f"{name}-fetched-{fetched}.parquet"
    return target if _fetch(lake, layout.listing_key(name, fetched), target) else None


def _fetch(lake: Lake, key: str, target: Path) -> bool:
    """Whether there is such an object, and then the file is its content."""
    try:
        chunks = obstore.get(lake.store, key)
    except NOT_FOUND:
        return False
    with target.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
    return True
