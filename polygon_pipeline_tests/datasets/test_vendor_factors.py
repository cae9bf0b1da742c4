"""Our ratios against the vendor's factors, as a fetch of splits or dividends and the lake have them."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline.datasets.catalog import DAILY_BARS, DIVIDENDS, SPLITS, Listing
from polygon_pipeline.datasets.vendor_factors import Comparison, compare
from polygon_pipeline.lake.dataset_files import put_dataset, put_listing
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.simulator.corporate_actions import Actions, Dividend, Split
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.bars import Row
from polygon_pipeline_tests.support.day_files import dataset_file

BEFORE, DAY, TODAY = date(2026, 1, 23), date(2026, 1, 26), date(2026, 1, 30)
ACTIONS = Actions(
    [Split("AAPL", BEFORE, 1, 2), Split("AAPL", DAY, 1, 4)], [Dividend("AAPL", BEFORE, 1.0), Dividend("AAPL", DAY, 0.5)]
)
MARKET = SyntheticMarket(["AAPL"], actions=ACTIONS)


def listed(listing: Listing, **changes: Any) -> list[Row]:
    """What the simulated vendor lists, with some fields of the last event changed."""
    rows = MARKET.listings().splits() if listing == SPLITS else MARKET.listings().dividends()
    read = [
        {name: date.fromisoformat(value) if name.endswith("_date") else value for name, value in row.items()}
        for row in rows
    ]
    return [*read[:-1], read[-1] | changes]


def compared(lake: Lake, folder: Path, listing: Listing, rows: list[Row]) -> Comparison:
    (folder / "compared").mkdir()
    return compare(lake, listing, dataset_file(folder / "fetched.parquet", rows, listing), folder / "compared", TODAY)  # type: ignore[arg-type]


def put_closes(lake: Lake, folder: Path) -> None:
    """The daily bars before both ex-dates, and the splits of an earlier fetch."""
    for day, ex_date in ((date(2026, 1, 22), BEFORE), (BEFORE, DAY)):
        row = {"ticker": "AAPL", "date": day, "close": MARKET.close_before("AAPL", ex_date)}
        put_dataset(lake, DAILY_BARS.name, day.isoformat(), dataset_file(folder / "day.parquet", [row], DAILY_BARS))
    put_listing(lake, "splits", DAY, dataset_file(folder / "splits.parquet", listed(SPLITS), SPLITS))  # type: ignore[arg-type]


@pytest.mark.parametrize("listing", [SPLITS, DIVIDENDS], ids=["splits", "dividends"])
def test_the_simulated_vendors_factors_are_ours(listing: Listing, file_lake: Lake, tmp_path: Path) -> None:
    put_closes(file_lake, tmp_path)
    assert compared(file_lake, tmp_path, listing, listed(listing)) == Comparison((), (), ())


@pytest.mark.parametrize(
    ("listing", "ours", "theirs"),
    [(SPLITS, "0.250000", "0.200000"), (DIVIDENDS, "0.98", "0.200000")],
    ids=["splits", "dividends"],
)
def test_a_factor_that_differs_is_told_with_both_ratios(
    listing: Listing, ours: str, theirs: str, file_lake: Lake, tmp_path: Path
) -> None:
    put_closes(file_lake, tmp_path)
    found = compared(file_lake, tmp_path, listing, listed(listing, historical_adjustment_factor=0.2))
    sentence = found.differences[-1]
    assert "AAPL on 2026-01-26" in sentence
    assert ours in sentence
    assert theirs in sentence


@pytest.mark.parametrize("factor", [0.0, None])
def test_a_factor_of_no_use_is_told_and_is_no_difference(factor: float | None, file_lake: Lake, tmp_path: Path) -> None:
    found = compared(file_lake, tmp_path, SPLITS, listed(SPLITS, historical_adjustment_factor=factor))
    assert found.differences == ()
    assert found.unusable == (f"AAPL on 2026-01-26: the vendor's factor is {factor}",)


def test_a_record_without_a_ratio_is_told(file_lake: Lake, tmp_path: Path) -> None:
    found = compared(file_lake, tmp_path, SPLITS, listed(SPLITS, split_to=0.0, historical_adjustment_factor=0.0))
    assert len(found.left_out) == 1
    assert "AAPL on 2026-01-26 is left out" in found.left_out[0]


def test_a_dividend_before_the_lakes_first_day_is_not_compared(file_lake: Lake, tmp_path: Path) -> None:
    assert compared(file_lake, tmp_path, DIVIDENDS, listed(DIVIDENDS)) == Comparison((), (), ())
