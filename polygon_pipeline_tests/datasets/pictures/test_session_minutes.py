"""The picture of how a session was collected."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import pytest
from PIL import Image

from polygon_pipeline.datasets.pictures import session_minutes
from polygon_pipeline.datasets.pictures.canvas import GAP, NIGHT, Span
from polygon_pipeline_tests.support.bars import DAY, Row, at, moment, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file
from polygon_pipeline_tests.support.nights import first_night

LEFT, TOP = 46, 68


def draw(folder: Path, rows: Sequence[Row], gaps: Sequence[Span] = (), in_real_time: bool = True) -> Image.Image:
    png = session_minutes.draw(DAY, dataset_file(folder / "bars.parquet", rows), gaps, in_real_time, folder)
    assert len(png) < 50_000
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width <= 1_070
    return picture


def bar(ticker: str, minute: int, **fields: object) -> Row:
    """A bar that came a second after its end. minute: of the session."""
    start = at(4, 0) + 60_000 * minute
    return normalized_row(ticker, start, **{"received_at": moment(start) + timedelta(seconds=61), **fields})


def height(picture: Image.Image, minute: int) -> int:
    """How many pixels of a minute's column are a bar's, and not the background's."""
    found = [picture.getpixel((LEFT + minute, y)) for y in range(TOP + 1, TOP + 190)]
    return len(found) - max(map(found.count, [(246, 247, 249), (255, 255, 255)]))


def test_a_minute_with_twice_the_bars_is_twice_as_high(tmp_path: Path) -> None:
    picture = draw(tmp_path, [bar("SPY", 10), bar("QQQ", 10), bar("SPY", 20)])
    assert height(picture, 10) == 189
    assert abs(height(picture, 20) - 95) <= 1
    assert height(picture, 30) == 0


def test_a_session_with_a_night_begins_on_the_evening_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_night(monkeypatch, DAY)
    gap = (moment(at(23, 0, date(2026, 1, 25))), moment(at(23, 59, date(2026, 1, 25))))
    picture = draw(tmp_path, [bar("SPY", 10 - 420)], [gap])
    minute = 960 / 1380  # in pixels
    assert picture.getpixel((LEFT + round(10 * minute), TOP + 100)) == (74, 128, 189), "a bar"
    begin, end = (LEFT + round(minutes * minute) for minutes in (120, 180))
    assert {picture.getpixel((x, TOP + 50)) for x in range(begin + 2, end - 2)} == {GAP}
    assert GAP not in {picture.getpixel((x, TOP + 50)) for x in range(end + 2, LEFT + 960)}
    assert picture.getpixel((end + 20, TOP + 50)) == NIGHT


def test_bars_of_the_history_have_another_colour(tmp_path: Path) -> None:
    picture = draw(tmp_path, [bar("SPY", 10), bar("SPY", 20, revisions=0, source="rest")])
    stream, history = (picture.getpixel((LEFT + minute, TOP + 100)) for minute in (10, 20))
    assert stream != history


def test_a_gap_is_shaded(tmp_path: Path) -> None:
    picture = draw(tmp_path, [bar("SPY", 10)], [(moment(at(10, 15)), moment(at(10, 15)))])
    assert [picture.getpixel((LEFT + minute, TOP + 9)) == GAP for minute in (373, 374, 375, 376, 377)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_the_lag_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    with_lag = draw(tmp_path, [bar("SPY", 10)])
    without = draw(tmp_path, [bar("SPY", 10)], in_real_time=False)
    only_history = draw(tmp_path, [bar("SPY", 10, revisions=0, source="rest")])
    assert with_lag.height > without.height == only_history.height
