"""A dataset's day on the lake: one file under its key, and its absence has a name."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import (
    MissingDataset,
    fetch_dataset,
    fetch_listing_file,
    put_dataset,
    put_listing,
)
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


def test_what_was_fetched_on_a_day_is_kept_beside_other_days(file_lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"first")
    days = [date(2026, 1, 26), date(2026, 1, 27)]
    for day in days:
        assert put_listing(file_lake, "splits", day, tmp_path / "made") == file_lake.url(
            layout.listing_key("splits", day)
        )
        (tmp_path / "made").write_bytes(b"second")
    files = [fetch_listing_file(file_lake, "splits", day, tmp_path) for day in days]
    assert [file and file.read_bytes() for file in files] == [b"first", b"second"]
    assert fetch_listing_file(file_lake, "splits", date(2026, 1, 28), tmp_path) is None


def test_a_day_that_was_not_made_is_named(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match=r"bars_5m.*2026-01-26"):
        fetch_dataset(lake, "bars_5m", "2026-01-26", tmp_path)
    assert list(tmp_path.glob("*.parquet")) == []
