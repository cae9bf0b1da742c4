"""How a session was collected: bars per minute with gaps shaded, and how late they came.

Belongs here: those figures, and how they look. Does not belong here: what is drawn with (canvas).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from polygon_pipeline.datasets.pictures.canvas import (
    FAINT_GRID,
    FAINT_INK,
    SMALL,
    TITLE,
    Canvas,
    Colour,
    DayAxis,
    Span,
    short,
)
from polygon_pipeline.datasets.session import DuckSession

_LEFT, _WIDTH, _TOP, _BARS, _LAG = 46, 960, 68, 190, 120
_COLLECTED: Colour = (74, 128, 189)
_ADDED: Colour = (244, 172, 40)
_SLOWEST: Colour = (205, 208, 214)

_MINUTES = """
    SELECT
        ((epoch_ms(timestamp) - $begin_ms) // 60000) AS minute,
        count(*) FILTER (revisions > 0),
        count(*) FILTER (revisions = 0),
        quantile_cont(epoch_ms(received_at) - epoch_ms(timestamp) - 60000, [0.5, 0.99])
            FILTER (source = 'websocket' AND revisions = 1)
    FROM normalized GROUP BY minute ORDER BY minute
"""


def draw(day: date, normalized: Path, gaps: Sequence[Span], in_real_time: bool, space: Path | DuckSession) -> bytes:
    """A PNG. normalized: the day's file; gaps: first and last minute of each. in_real_time: whether bars came when they
    were made; else they have no lag. space: as in DuckSession.

    Raises ValueError for a day that is no trading day.
    """
    axis = DayAxis.of(day, _LEFT, _WIDTH)
    with DuckSession(space) as reading:
        reading.view("normalized", normalized)
        minutes = reading.rows(_MINUTES, {"begin_ms": axis.begin_ms})
    lags = {minute: (lag[0] / 1000, lag[1] / 1000) for minute, _, _, lag in minutes if lag} if in_real_time else {}
    bottom = _TOP + _BARS
    canvas = Canvas(bottom + 28 + (_LAG + 52 if lags else 0))
    canvas.text(8, 6, f"{day:%A}, {day}: the session as it was collected, New York time", TITLE)
    left = canvas.text(_LEFT, 29, "Bars per minute:") + _LEFT
    for label, colour in (("from the stream", _COLLECTED), ("added from the history", _ADDED)):
        canvas.box(left + 12, 32, left + 22, 42, colour)
        left += 28 + canvas.text(left + 27, 29, label)
    axis.background(canvas, _TOP, bottom, gaps)
    most = max((collected + added for _, collected, added, _ in minutes), default=0) or 1
    _scale(canvas, axis, _TOP, bottom, most, short(most))
    for minute, collected, added, _ in minutes:
        x, top = axis.at(minute), bottom - collected / most * _BARS
        if added:
            canvas.box(x, top - added / most * _BARS, x, top, _ADDED)
        if collected:
            canvas.box(x, top, x, bottom, _COLLECTED)
    axis.label_gaps(canvas, _TOP - 15, gaps)
    axis.hours(canvas, bottom + 5)
    if lags:
        _lag(canvas, axis, bottom + 52, gaps, lags)
    return canvas.png()


def _lag(canvas: Canvas, axis: DayAxis, top: int, gaps: Sequence[Span], lags: dict[int, tuple[float, float]]) -> None:
    bottom = top + _LAG
    axis.background(canvas, top, bottom, gaps)
    most = max(0.0, *(slowest for _, slowest in lags.values()))
    _scale(canvas, axis, top, bottom, most, f"{most:.1f} s")
    canvas.text(
        _LEFT, top - 22, "From a bar's end to its arrival: the median (blue) and 99 of 100 (grey) of each minute"
    )
    for minute, (middle, slowest) in lags.items():
        x, upper, lower = axis.at(minute), *(bottom - max(0.0, lag) / (most or 1.0) * _LAG for lag in (slowest, middle))
        canvas.box(x, upper, x, bottom, _SLOWEST)
        canvas.box(x, lower, x, lower + 1, _COLLECTED)
    axis.hours(canvas, bottom + 5)


def _scale(canvas: Canvas, axis: DayAxis, top: float, bottom: float, most: float, label: str) -> None:
    canvas.line([(axis.left, top), (axis.left + axis.width, top)], FAINT_GRID)
    canvas.text(axis.left - 5, top, label, SMALL, "rm", FAINT_INK)
    canvas.text(axis.left - 5, bottom, "0", SMALL, "rm", FAINT_INK)
