"""The picture of a day's coverage."""

from __future__ import annotations

import io
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from polygon_pipeline.datasets.pictures import MOST_TICKERS, heat_map
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY
from polygon_pipeline_tests.support.planned_day import PlannedDay, online


def test_the_picture_has_one_pixel_per_minute_and_one_colour_per_state(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("SPY", 1): "corrected", ("SPY", 2): "repaired", ("QQQ", 9): "collected"}
    day = PlannedDay(tmp_path, bars, [("SPY", m) for m in range(5)], until=9, connected=online((0, 3)))
    png = heat_map(DAY, day.states(), ["SPY", "QQQ"])
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    spy, qqq = ([picture.getpixel((88 + minute, 56 + 14 * row + 6)) for minute in range(960)] for row in (0, 1))
    colours = [spy[0], spy[1], spy[2], spy[3], spy[4], spy[5], spy[20]]
    assert len(set(colours)) == 7
    assert qqq[:9] == [spy[5]] * 9, "no trade"
    assert qqq[9:11] == [spy[0], spy[20]], "collected, then unknown"


def test_the_picture_of_a_full_day_is_small_and_too_many_tickers_are_refused(tmp_path: Path) -> None:
    names = [f"T{n}" for n in range(MOST_TICKERS)]
    bars = {
        (name, minute): "collected" for row, name in enumerate(names) for minute in range(row % 7, 960, 2 + row % 5)
    }
    states = PlannedDay(tmp_path, bars, [], until=500).states()
    assert len(heat_map(DAY, states, names)) < 60_000
    with pytest.raises(ValueError, match="41 tickers"):
        heat_map(DAY, states, [*names, "MORE"])


def test_a_half_days_picture_is_narrower_and_a_closed_day_has_none(tmp_path: Path) -> None:
    states = PlannedDay(tmp_path, {("SPY", 0): "collected"}, []).states().slice(0, 780)
    whole = Image.open(io.BytesIO(heat_map(DAY, states, ["SPY"])))
    half = Image.open(io.BytesIO(heat_map(HALF_DAY, states, ["SPY"])))
    assert whole.width - half.width == 180
    assert whole.height == half.height
    with pytest.raises(ValueError, match="2026-01-25 with 1 tickers"):
        heat_map(date(2026, 1, 25), states, ["SPY"])
