"""The candlesticks of a day's most traded tickers."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from polygon_pipeline.datasets.pictures import candles
from polygon_pipeline.datasets.pictures.canvas import DOWN, GAP, UP, Span
from polygon_pipeline_tests.support.bars import DAY, Row, at, moment, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file


def draw(folder: Path, rows: Sequence[Row], gaps: Sequence[Span] = ()) -> Image.Image:
    png = candles.draw(DAY, dataset_file(folder / "bars.parquet", rows), gaps, folder)
    assert len(png) < 50_000
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width <= 1_070
    return picture


def pixels(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(count for count, found in picture.getcolors(1 << 24) or [] if found == colour)


def bar(ticker: str, minute: int, open_: float, close: float, volume: float = 100.0) -> Row:
    """minute: of the session, from 0 at 04:00."""
    high, low = max(open_, close), min(open_, close)
    start = at(4, 0) + 60_000 * minute
    return normalized_row(ticker, start, open=open_, high=high, low=low, close=close, volume=volume)


def test_a_rising_candle_has_another_colour_than_a_falling_one(tmp_path: Path) -> None:
    rising, falling = draw(tmp_path, [bar("SPY", 0, 10, 20)]), draw(tmp_path, [bar("SPY", 0, 20, 10)])
    assert pixels(rising, UP) > 100 > pixels(rising, DOWN) == 0
    assert pixels(falling, DOWN) > 100 > pixels(falling, UP) == 0


def test_ten_minutes_are_one_candle(tmp_path: Path) -> None:
    """The minutes fall, then rise above where they began."""
    picture = draw(tmp_path, [bar("SPY", 0, 20, 10), bar("SPY", 9, 10, 30)])
    assert (pixels(picture, UP) > 100, pixels(picture, DOWN)) == (True, 0)
    assert pixels(draw(tmp_path, [bar("SPY", 0, 20, 10), bar("SPY", 10, 10, 30)]), DOWN) > 100


def test_a_gap_of_one_minute_can_be_seen(tmp_path: Path) -> None:
    span = (moment(at(10, 15)), moment(at(10, 15)))
    assert pixels(draw(tmp_path, [bar("SPY", 0, 10, 20)]), GAP) == 0
    assert pixels(draw(tmp_path, [bar("SPY", 0, 10, 20)], [span]), GAP) > 3 * 120


def test_twelve_tickers_are_drawn_however_many_there_are(tmp_path: Path) -> None:
    def height(tickers: int) -> int:
        return draw(tmp_path, [bar(f"T{n}", 0, 10, 20) for n in range(tickers)]).height

    assert height(2) < height(3) < height(12) == height(30)


def test_the_most_traded_are_drawn(tmp_path: Path) -> None:
    """Only they rise."""
    rows = [bar(f"T{n:02d}", 0, 20, 10, volume=1.0) for n in range(12)]
    assert pixels(draw(tmp_path, rows + [bar(f"U{n:02d}", 0, 10, 20, 99.0) for n in range(12)]), DOWN) == 0


def test_a_price_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    good = bar("SPY", 0, 10, 20)
    odd = [{**bar("SPY", 20, 10, 20), "high": math.nan}, {**bar("QQQ", 20, 10, 20), "close": None}]
    assert draw(tmp_path, [*odd, good]).tobytes() == draw(tmp_path, [good]).tobytes()


def test_a_whole_wild_day_is_small(tmp_path: Path) -> None:
    dice = random.Random(1)
    rows = [
        bar(f"T{n}", minute, dice.uniform(1, 99), dice.uniform(1, 99), dice.uniform(1, 1e6))
        for n in range(12)
        for minute in range(0, 960, 5)
    ]
    draw(tmp_path, rows)
