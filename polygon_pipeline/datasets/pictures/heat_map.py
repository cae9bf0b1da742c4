"""A day's coverage as a picture: tickers by time of day, one pixel per minute, and above them all tickers together.

Belongs here: how the states look. Does not belong here: what they are (datasets.coverage), and what is drawn with
(canvas).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING

from polygon_pipeline.datasets.coverage import State
from polygon_pipeline.datasets.pictures.canvas import (
    FAINT_INK,
    GRID,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    Canvas,
    Colour,
    DayAxis,
    Span,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Cells = npt.NDArray[np.uint8]

MOST_TICKERS = 40

# Told apart by the colour-blind too: what is there is blue and pink, what was lost amber, red or black, the rest pale.
# From the worst to what needs no look.
_STATES: dict[State, tuple[str, Colour]] = {
    State.LOST_CONNECTED: ("lost while connected", (50, 0, 10)),
    State.LOST_DISCONNECTED: ("lost while disconnected", (214, 39, 40)),
    State.NOT_COLLECTED: ("not collected", (190, 160, 220)),
    State.REPAIRED: ("repaired", (244, 172, 40)),
    State.CORRECTED: ("corrected", (240, 90, 205)),
    State.FROM_HISTORY: ("from history", (110, 185, 170)),
    State.COLLECTED: ("collected", (74, 128, 189)),
    State.UNKNOWN: ("no trade or lost: unknown", (160, 160, 160)),
    State.NO_TRADE: ("no trade", (232, 235, 238)),
}
_RANKS = {state: rank for rank, state in enumerate(_STATES)}
_WITHOUT_A_BAR = (State.NO_TRADE, State.UNKNOWN)
# One pixel among hundreds is not seen.
_WIDENED = (State.LOST_CONNECTED, State.LOST_DISCONNECTED, State.NOT_COLLECTED, State.REPAIRED)

# A ticker is in the first group whose states it has.
_GROUPS: dict[str, Iterable[State]] = {
    "Bars are missing": (State.LOST_CONNECTED, State.LOST_DISCONNECTED, State.NOT_COLLECTED),
    "Repaired: what was lost was added from the vendor's history": (State.REPAIRED,),
    "Corrected by the vendor's history": (State.CORRECTED,),
    "From the vendor's history: no collector was at work": (State.FROM_HISTORY,),
    "As it was collected": tuple(State),
}
_MOST_COLUMNS = 960
_LEFT, _TOP, _ROW, _BAND, _HEADING, _BOTTOM = 88, 82, 28, 22, 24, 24


def heat_map(
    day: date, states: pa.Table, market: Sequence[tuple[int, str, int]], tickers: Sequence[str], gaps: Sequence[Span]
) -> bytes:
    """A PNG with one row per ticker, in groups and else in the order given, and one column per minute of the session.

    A session with a night has more minutes than the UI has place: there some columns are two minutes, and show the
    worse of them.

    states: of coverage.minute_states, with these tickers among its own. market: of coverage.market_states. gaps: first
    and last minute of each. Raises ValueError for more than MOST_TICKERS or for a day that is no trading day.
    """
    if len(tickers) > MOST_TICKERS:
        raise ValueError(f"{len(tickers)} tickers: {MOST_TICKERS} or fewer can be drawn")
    axis = DayAxis.of(day, _LEFT, 0)
    axis = DayAxis.of(day, _LEFT, min(axis.minutes, _MOST_COLUMNS))
    rows: dict[str, dict[int, State]] = {ticker: {} for ticker in tickers}
    for ticker, minute, state in zip(*(states.column(name).to_pylist() for name in _COLUMNS), strict=True):
        if ticker in rows:
            rows[ticker][minute] = State(state)
    groups = [(f"All {_most(market):,} tickers together", _together(market)), *_grouped(rows)]
    bottom = _TOP + sum(_HEADING + _ROW * len(found) for _, found in groups)
    canvas = Canvas(bottom + _BOTTOM, _LEFT + axis.width + 20)
    canvas.text(8, 6, f"Minute bars of {day:%A}, {day}, New York time", TITLE)
    _legend(canvas)
    for begin, end in axis.gap_places(gaps):
        canvas.box(begin, _TOP - 4, end, _TOP, GRID)
    axis.label_gaps(canvas, _TOP - 20, gaps)
    top = _TOP
    for heading, found in groups:
        canvas.text(8, top + 5, heading, SMALL, colour=FAINT_INK)
        top += _HEADING
        for name, minutes in found.items():
            canvas.text(_LEFT - 6, top + 4, name[:11], TEXT, "ra")
            colours = [colour for _, colour in _STATES.values()]
            canvas.paste(_cells(minutes, axis), _LEFT, top + 2, colours)
            top += _ROW
    for moment in (axis.day.open, axis.day.close):
        canvas.line([(axis.place(moment), _TOP), (axis.place(moment), bottom)], GRID)
    axis.hours(canvas, bottom + 4)
    return canvas.png()


_COLUMNS = ("ticker", "minute", "state")


def _grouped(rows: Mapping[str, dict[int, State]]) -> list[tuple[str, dict[str, dict[int, State]]]]:
    found: dict[str, dict[str, dict[int, State]]] = {heading: {} for heading in _GROUPS}
    for ticker, minutes in rows.items():
        present = set(minutes.values())
        heading = next(heading for heading, of_group in _GROUPS.items() if not present or present & set(of_group))
        found[heading][ticker] = minutes
    return [(heading, of_group) for heading, of_group in found.items() if of_group]


def _together(market: Iterable[tuple[int, str, int]]) -> dict[str, dict[int, State]]:
    """Of each minute what most tickers have, of those with a bar or a loss, and the worst that any has."""
    counts: dict[int, Counter[State]] = defaultdict(Counter)
    for minute, state, tickers in market:
        counts[minute][State(state)] = tickers
    most = {
        minute: max(found, key=lambda state, found=found: (state not in _WITHOUT_A_BAR, found[state]))  # type: ignore[misc]
        for minute, found in counts.items()
    }
    return {"most": most, "the worst": {minute: min(found, key=_RANKS.__getitem__) for minute, found in counts.items()}}


def _most(market: Iterable[tuple[int, str, int]]) -> int:
    """How many tickers there are: every one has a state in each minute."""
    totals: Counter[int] = Counter()
    for minute, _, tickers in market:
        totals[minute] += tickers
    return max(totals.values(), default=0)


def _cells(minutes: Mapping[int, State], axis: DayAxis) -> Cells:
    """A row's pixels. What was lost is three wide at least, at the cost of its neighbours."""
    import numpy as np

    row = np.full((axis.width, 3), PAPER, dtype=np.uint8)
    for state in reversed(_STATES):
        wider = 1 if state in _WIDENED else 0
        for minute in (minute for minute, found in minutes.items() if found is state):
            column = minute * axis.width // axis.minutes
            row[max(0, column - wider) : column + wider + 1] = _STATES[state][1]
    return np.repeat(row[np.newaxis], _BAND, axis=0)


def _legend(canvas: Canvas) -> None:
    left = 8.0
    for label, colour in reversed(_STATES.values()):
        canvas.box(left, 36, left + 10, 46, colour, GRID)
        left += 15 + canvas.text(left + 15, 33, label, SMALL) + 16
