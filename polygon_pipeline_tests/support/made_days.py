"""What a lake has of the days that were made, read without the code that made them."""

from __future__ import annotations

from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq

from polygon_pipeline.datasets.catalog import DAILY_BARS
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake


def made_day(lake: Lake, name: str, day: date) -> pa.Table | None:
    """A dataset's day; None while it is not made."""
    content = lake.get(layout.dataset_key(name, day.isoformat()))
    return None if content is None else pq.read_table(pa.BufferReader(content))


def day_state(lake: Lake, day: date) -> str | None:
    """What the daily bars say of a day; None while there are none."""
    made = made_day(lake, DAILY_BARS.name, day)
    return None if made is None else str(made["day_state"][0].as_py())
