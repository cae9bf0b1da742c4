"""The vendor's history on a lake, as it was fetched before.

Belongs here: filling a lake with whole days of the synthetic market. Does not belong here: single bars (bars) and their
local files (day_files).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from polygon_pipeline.datasets.catalog import REFERENCE_BARS
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import day_bounds_ms
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.support.bars import reference_row
from polygon_pipeline_tests.support.day_files import reference_file


def put_history(lake: Lake, days: Sequence[date], folder: Path) -> None:
    """Three tickers' minutes of these days. folder: for a file."""
    market = SyntheticMarket(WATCH_LIST[:3])
    for day in days:
        rows = [
            reference_row(
                row["ticker"],
                row["start_ms"],
                **{name: row[name] for name in ("open", "high", "low", "close", "volume", "vwap")},
            )
            for row in market.day_bars(day).to_pylist()
        ]
        until_ms = day_bounds_ms(day)[1]
        file = reference_file(folder / "reference.parquet", rows, list(WATCH_LIST[:3]), until_ms)
        put_dataset(lake, REFERENCE_BARS.name, day.isoformat(), file)
