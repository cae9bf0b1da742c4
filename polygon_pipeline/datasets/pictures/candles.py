"""The day's most traded tickers as candlesticks with their volume, gaps shaded.

Belongs here: the candles, and how they look. Does not belong here: what is drawn with (canvas).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from polygon_pipeline.datasets.pictures.canvas import (
    DOWN,
    FAINT_GRID,
    FAINT_INK,
    SMALL,
    TITLE,
    UP,
    VOLUME,
    Canvas,
    DayAxis,
    Span,
    short,
)
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.datasets.wording import change as as_change
from polygon_pipeline.datasets.wording import number

_TICKERS = 12
_MINUTES = 10  # of a candle: five pixels
_COLUMNS = 2
_LEFT, _TOP, _BETWEEN, _PANEL_WIDTH = 20, 52, 62, 466
_NAME, _PRICES, _VOLUMES, _PANEL = 20, 104, 30, 182

_CANDLES = f"""
    WITH bars AS (
        SELECT *, (epoch_ms(timestamp) - $begin_ms) // 60000 // {_MINUTES} AS place
        FROM normalized WHERE isfinite(open) AND isfinite(high) AND isfinite(low) AND isfinite(close) AND volume >= 0
    ), most AS (
        SELECT ticker, sum(volume) AS traded FROM bars GROUP BY ticker ORDER BY traded DESC, ticker LIMIT {_TICKERS}
    )
    SELECT ticker, place, arg_min(open, timestamp), max(high), min(low), arg_max(close, timestamp), sum(volume)
    FROM bars JOIN most USING (ticker)
    GROUP BY ticker, traded, place ORDER BY traded DESC, ticker, place
"""
_CHANGES = """
    SELECT ticker, arg_max(close, timestamp) / nullif(arg_min(open, timestamp), 0) - 1
    FROM normalized WHERE session = 'regular' GROUP BY ticker
"""


class _Candle(NamedTuple):
    place: int  # in the session, from 0
    open: float
    high: float
    low: float
    close: float
    volume: float


def draw(day: date, normalized: Path, gaps: Sequence[Span], space: Path | DuckSession) -> bytes:
    """A PNG. normalized: the day's file; gaps: first and last minute of each. space: as in DuckSession.

    Raises ValueError for a day that is no trading day.
    """
    axes = [DayAxis.of(day, _LEFT + column * (_PANEL_WIDTH + _BETWEEN), _PANEL_WIDTH) for column in range(_COLUMNS)]
    candles: dict[str, list[_Candle]] = defaultdict(list)
    with DuckSession(space) as reading:
        reading.view("normalized", normalized)
        for ticker, *values in reading.rows(_CANDLES, {"begin_ms": axes[0].begin_ms}):
            candles[ticker].append(_Candle(*values))
        changes = dict(reading.rows(_CHANGES))
    rows = math.ceil(len(candles) / _COLUMNS)
    canvas = Canvas(_TOP + rows * _PANEL + 4)
    canvas.text(8, 6, f"{day:%A}, {day}: the most traded tickers", TITLE)
    explained = f"candles of {_MINUTES} minutes, New York time; the change is of the regular hours"
    canvas.text(8, 29, explained + ("; shaded: no collector was connected" if gaps else ""), SMALL, "la", FAINT_INK)
    for place, (ticker, found) in enumerate(candles.items()):
        top = _TOP + place // _COLUMNS * _PANEL
        _panel(canvas, axes[place % _COLUMNS], top, ticker, changes.get(ticker), found, gaps)
    return canvas.png()


def _panel(
    canvas: Canvas,
    axis: DayAxis,
    top: int,
    ticker: str,
    change: float | None,
    candles: Sequence[_Candle],
    gaps: Sequence[Span],
) -> None:
    prices, volumes = top + _NAME, top + _NAME + _PRICES + 4
    bottom = volumes + _VOLUMES
    right = axis.left + axis.width
    axis.background(canvas, prices, bottom, gaps)
    name = canvas.text(axis.left, top + 2, ticker[:11])
    written = "" if change is None else as_change(change)
    tone = UP if change is not None and change > 0 else DOWN if change else FAINT_INK
    canvas.text(axis.left + name + 10, top + 2, f"{number(candles[-1].close)}  {written}", colour=tone)
    canvas.text(right, top + 3, f"{short(sum(c.volume for c in candles))} shares", SMALL, "ra", FAINT_INK)
    highest, lowest = max(c.high for c in candles), min(c.low for c in candles)
    reach = (highest - lowest) or 1.0
    most = max(c.volume for c in candles) or 1.0

    def height(price: float) -> float:
        return prices + 4 + (highest - price) / reach * (_PRICES - 8)

    for price in (highest, (highest + lowest) / 2, lowest):
        canvas.line([(axis.left, height(price)), (right, height(price))], FAINT_GRID)
        canvas.text(right + 3, height(price), number(price), SMALL - 1, "lm", FAINT_INK)
    wide = axis.at(_MINUTES) - axis.left
    for candle in candles:
        middle = axis.at((candle.place + 0.5) * _MINUTES)
        left, end = middle - wide / 2 + 1, middle + wide / 2 - 1
        canvas.box(left, bottom - candle.volume / most * _VOLUMES, end, bottom, VOLUME)
        tone = UP if candle.close >= candle.open else DOWN
        canvas.line([(middle, height(candle.high)), (middle, height(candle.low))], tone)
        upper, lower = sorted((height(candle.open), height(candle.close)))
        canvas.box(left, upper, end, lower, tone)
    axis.hours(canvas, bottom + 3, every=2)
