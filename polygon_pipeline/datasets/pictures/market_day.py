"""What the market did on a day: how far tickers moved, and when the shares were traded.

Belongs here: those figures, and how they look. Does not belong here: what is drawn with (canvas).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from polygon_pipeline.datasets.pictures.canvas import (
    DOWN,
    FAINT_INK,
    SMALL,
    TITLE,
    UP,
    VOLUME,
    Canvas,
    DayAxis,
    short,
)
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.datasets.wording import change as as_change

_EACH_WAY = 10
_MINUTES = 30

_TOP, _ROW, _LEAST_HEIGHT = 62, 20, 240
_ZERO, _REACH = 250, 130  # where no change is, and how far the largest reaches from there
_LEFT, _WIDTH = 500, 540

_CHANGES = f"""
    WITH changes AS (
        SELECT ticker, close / open - 1 AS change, volume FROM daily WHERE open > 0 AND isfinite(close)
    )
    SELECT ticker, change, (SELECT count(*) FROM changes) FROM changes
    QUALIFY row_number() OVER (ORDER BY change DESC, ticker) <= {_EACH_WAY}
        OR row_number() OVER (ORDER BY change, ticker) <= {_EACH_WAY}
    ORDER BY change DESC, ticker
"""
_SHARES = f"""
    SELECT ((epoch_ms(timestamp) - $begin_ms) // 60000 // {_MINUTES}) AS place, sum(volume)
    FROM normalized WHERE volume >= 0 GROUP BY place ORDER BY place
"""


def draw(day: date, daily: Path, normalized: Path, space: Path | DuckSession) -> bytes:
    """A PNG. daily, normalized: the day's files. space: as in DuckSession.

    Raises ValueError for a day that is no trading day.
    """
    axis = DayAxis.of(day, _LEFT, _WIDTH)
    with DuckSession(space) as reading:
        reading.view("daily", daily)
        reading.view("normalized", normalized)
        changes = reading.rows(_CHANGES)
        shares = dict(reading.rows(_SHARES, {"begin_ms": axis.begin_ms}))
    height = max(_LEAST_HEIGHT, _ROW * len(changes))
    canvas = Canvas(_TOP + height + 32)
    canvas.text(8, 6, f"{day:%A}, {day}: what the market did", TITLE)
    tickers = changes[0][2] if changes else 0
    some = (
        f"the {_EACH_WAY} furthest each way of {tickers:,} tickers"
        if tickers > len(changes)
        else f"all {tickers} tickers"
    )
    canvas.text(8, 34, f"Change in the regular hours, {some}")
    _changes(canvas, [(ticker, change) for ticker, change, _ in changes])
    canvas.text(_LEFT, 34, f"Share of the day's {short(sum(shares.values()))} shares by half hour, New York time")
    _shares(canvas, axis, shares, _TOP + height)
    return canvas.png()


def _changes(canvas: Canvas, changes: Sequence[tuple[str, float]]) -> None:
    furthest = max((abs(change) for _, change in changes), default=0.0) or 1.0
    for row, (ticker, change) in enumerate(changes):
        top = _TOP + _ROW * row
        end = _ZERO + change / furthest * _REACH
        left, right = sorted((_ZERO, end))
        canvas.box(left, top + 3, right, top + _ROW - 4, UP if change >= 0 else DOWN)
        canvas.text(8, top + 2, ticker[:11])
        if change >= 0:
            canvas.text(end + 5, top + 3, as_change(change), SMALL)
        else:
            canvas.text(end - 5, top + 3, as_change(change), SMALL, "ra")


def _shares(canvas: Canvas, axis: DayAxis, shares: dict[int, float], bottom: int) -> None:
    axis.background(canvas, _TOP, bottom, [])
    everything, most = sum(shares.values()) or 1.0, max(shares.values(), default=0.0) or 1.0
    for place, volume in shares.items():
        left, right = axis.at(place * _MINUTES) + 1, axis.at((place + 1) * _MINUTES) - 2
        top = bottom - volume / most * (bottom - _TOP - 20)
        canvas.box(left, top, right, bottom, VOLUME)
        if volume / everything >= 0.005:
            canvas.text((left + right) / 2, top - 3, f"{volume / everything * 100:.0f}", SMALL - 1, "mb")
    canvas.text(axis.left + 4, _TOP + 3, "percent", SMALL, "la", FAINT_INK)
    axis.hours(canvas, bottom + 4, every=2)
