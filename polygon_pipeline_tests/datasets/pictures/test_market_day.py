"""The picture of what the market did."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.pictures import market_day
from polygon_pipeline.datasets.pictures.canvas import DOWN, UP, VOLUME
from polygon_pipeline_tests.support.bars import DAY, at, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file


def draw(folder: Path, changes: Mapping[str, float | None], volumes: Mapping[int, float]) -> Image.Image:
    """changes: of each ticker, None for one without regular hours. volumes: by minute of the session."""
    rows = [
        {"ticker": ticker, "date": DAY, "open": None if change is None else 100.0, "close": 100 + 100 * (change or 0)}
        for ticker, change in changes.items()
    ]
    daily = dataset_file(folder / "daily.parquet", rows, catalog.DAILY_BARS)
    minutes = [normalized_row("SPY", at(4, 0) + 60_000 * minute, volume=shares) for minute, shares in volumes.items()]
    bars = dataset_file(folder / "bars.parquet", minutes)
    png = market_day.draw(DAY, daily, bars, folder)
    assert len(png) < 50_000
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width <= 1_070
    return picture


def width(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """How many columns of the picture have the colour."""
    return len(columns(picture, colour))


def columns(picture: Image.Image, colour: tuple[int, int, int]) -> set[int]:
    return {x for x in range(picture.width) for y in range(62, picture.height) if picture.getpixel((x, y)) == colour}


def test_the_furthest_change_has_the_longest_bar(tmp_path: Path) -> None:
    picture = draw(tmp_path, {"UP": 0.01, "DOWN": -0.02, "NONE": None}, {0: 1.0})
    assert 2 * width(picture, UP) - 1 == width(picture, DOWN) > 100


def test_ten_tickers_each_way_are_shown(tmp_path: Path) -> None:
    def height(tickers: int) -> int:
        return draw(tmp_path, {f"T{n}": n / 1000 for n in range(-tickers, tickers)}, {0: 1.0}).height

    assert height(8) < height(10) == height(30)


def test_half_hours_without_a_trade_have_no_column(tmp_path: Path) -> None:
    one = columns(draw(tmp_path, {}, {29: 5.0}), VOLUME)
    both = columns(draw(tmp_path, {}, {29: 5.0, 930: 2.0}), VOLUME)
    assert len(both) == 2 * len(one)
    assert max(both) < 1_040, "the last half hour ends with the session"
