"""A dataset's day on the lake: one file under its key, and its absence has a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import MissingDataset, fetch_dataset, put_dataset
from polygon_pipeline.lake.store import Lake


def test_a_days_file_is_stored_under_its_key_and_fetched_as_it_was(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"first")
    key = layout.dataset_key("bars_5m", "2026-01-26")
    assert put_dataset(lake, "bars_5m", "2026-01-26", tmp_path / "made") == lake.url(key)
    assert fetch_dataset(lake, "bars_5m", "2026-01-26", tmp_path).read_bytes() == b"first"
    (tmp_path / "made").write_bytes(b"second")
    put_dataset(lake, "bars_5m", "2026-01-26", tmp_path / "made")
    assert fetch_dataset(lake, "bars_5m", "2026-01-26", tmp_path).read_bytes() == b"second"
    assert lake.keys("") == [key]


def test_a_day_that_was_not_made_is_named(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match=r"bars_5m.*2026-01-26"):
        fetch_dataset(lake, "bars_5m", "2026-01-26", tmp_path)
    assert list(tmp_path.glob("*.parquet")) == []
