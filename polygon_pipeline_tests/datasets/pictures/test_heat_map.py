"""The picture of a day's coverage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest
from PIL import Image

from polygon_pipeline.datasets.pictures.canvas import Span
from polygon_pipeline.datasets.pictures.heat_map import MOST_TICKERS, heat_map
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY, at, moment
from polygon_pipeline_tests.support.nights import first_night
from polygon_pipeline_tests.support.planned_day import Minute, PlannedDay, online

LEFT, TOP, ROW, HEADING = 88, 82, 28, 24
Pixels = list[tuple[int, ...]]


def draw(day: PlannedDay, tickers: Sequence[str], gaps: Sequence[Span] = ()) -> Image.Image:
    png = heat_map(day.day, day.states(), day.market(), tickers, gaps)
    assert len(png) < 50_000
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width <= 1_070
    return picture


def row(picture: Image.Image, number: int, headings: int) -> Pixels:
    """A row's minutes. number: from 0, the two of the whole market among them; headings: how many are above it."""
    y = TOP + HEADING * headings + ROW * number + ROW // 2
    return [picture.getpixel((LEFT + minute, y)) for minute in range(picture.width - LEFT - 20)]  # type: ignore[misc]


def spread(**minutes: Sequence[int]) -> dict[Minute, str]:
    """SPY's bars: the minutes of each kind."""
    return {("SPY", minute): kind for kind, found in minutes.items() for minute in found}


def test_the_picture_has_one_pixel_per_minute_and_one_colour_per_state(tmp_path: Path) -> None:
    bars = spread(collected=range(10), corrected=range(10, 20), repaired=range(20, 30))
    traded = [("SPY", minute) for minute in range(50)]
    day = PlannedDay(tmp_path, bars, traded, until=60, connected=online((0, 39)), subscribed=["QQQ", "SPY"])
    spy = row(draw(day, ["SPY", "QQQ"]), 2, 2)
    colours = [spy[minute] for minute in (5, 15, 25, 35, 45, 55, 65)]
    assert len(set(colours)) == 7, "collected, corrected, repaired, lost connected and not, no trade, unknown"
    assert len({*spy[1:9]}) == len({*spy[66:]} - {(105, 105, 105)}) == 1, "but for the lines of the regular hours"


def test_a_session_with_a_night_is_as_wide_and_a_column_shows_the_worse_of_two_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_night(monkeypatch, DAY)
    bars = spread(collected=[*range(20), 99], corrected=[100, *range(104, 112)])
    day = PlannedDay(tmp_path, bars, [minute for minute in bars if minute[0] == "SPY"], until=960)
    picture = draw(day, ["SPY"])
    spy = row(picture, 2, 2)
    assert len(spy) == 960

    def place(minute: int) -> int:
        return (420 + minute) * 960 // 1380  # the planned minutes begin at 04:00, after seven hours of night

    nothing, collected = spy[0], spy[place(5)]
    assert set(spy[: place(0) - 1]) == {nothing}
    assert set(spy[place(0) + 1 : place(19)]) == {collected} != {nothing}
    assert spy[place(99)] == spy[place(100)] == spy[place(108)] != collected, "corrected"


def test_tickers_are_in_groups_the_worst_first(tmp_path: Path) -> None:
    bars: dict[Minute, str] = {("GOOD", 0): "collected", ("MENDED", 0): "repaired", ("BAD", 9): "collected"}
    day = PlannedDay(tmp_path, bars, [("GOOD", 0), ("MENDED", 0), ("BAD", 0)])
    picture = draw(day, ["GOOD", "MENDED", "BAD"])
    first = [row(picture, number, number)[0] for number in (2, 3, 4)]
    legend = draw(day, ["GOOD"])
    assert len(set(first)) == 3
    assert first[2] == row(legend, 2, 2)[0], "the last is as it was collected"


def test_one_lost_minute_is_three_pixels_wide(tmp_path: Path) -> None:
    day = PlannedDay(tmp_path, spread(collected=[*range(100), *range(101, 200)]), [("SPY", m) for m in range(200)])
    spy = row(draw(day, ["SPY"]), 2, 2)
    assert spy[98] == spy[102] == spy[0]
    assert spy[99] == spy[100] == spy[101] != spy[0]


def test_the_whole_market_shows_what_most_have_and_the_worst(tmp_path: Path) -> None:
    bars: dict[Minute, str] = {(f"T{n}", 50): "collected" for n in range(3)}
    day = PlannedDay(tmp_path, bars, [(f"T{n}", 50) for n in range(4)])
    picture = draw(day, ["T0", "T3"])
    most, worst, lost, good = row(picture, 0, 1), row(picture, 1, 1), row(picture, 2, 2), row(picture, 3, 3)
    assert (most[50], worst[50]) == (good[50], lost[50])
    assert most[50] != worst[50]
    assert most[0] == good[0], "no trade"


def test_a_gap_is_marked_above_the_rows(tmp_path: Path) -> None:
    day = PlannedDay(tmp_path, spread(collected=[0]), [])
    picture = draw(day, ["SPY"], [(moment(at(10, 15)), moment(at(10, 15)))])
    marks = [x for x in range(picture.width) if picture.getpixel((x, TOP - 2)) != (255, 255, 255)]
    assert marks == [LEFT + 374, LEFT + 375, LEFT + 376]


def test_a_full_picture_is_small_and_too_many_tickers_are_refused(tmp_path: Path) -> None:
    names = [f"T{n}" for n in range(MOST_TICKERS)]
    bars = {
        (name, minute): "collected" for row, name in enumerate(names) for minute in range(row % 7, 960, 2 + row % 5)
    }
    day = PlannedDay(tmp_path, bars, [], until=500)
    draw(day, names)
    with pytest.raises(ValueError, match="41 tickers"):
        heat_map(DAY, day.states(), day.market(), [*names, "MORE"], [])


def test_a_half_days_picture_is_narrower_and_a_closed_day_has_none(tmp_path: Path) -> None:
    whole = PlannedDay(tmp_path, {("SPY", 0): "collected"}, [])
    half = PlannedDay(tmp_path / "half", {}, [], day=HALF_DAY, subscribed=["SPY"])
    assert draw(whole, ["SPY"]).width - draw(half, ["SPY"]).width == 180
    with pytest.raises(ValueError, match="2026-01-25 is not a trading day"):
        heat_map(date(2026, 1, 25), whole.states(), [], ["SPY"], [])
