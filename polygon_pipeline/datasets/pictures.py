"""A day's coverage as a picture: tickers by time of day, one pixel per minute.

Belongs here: how the states look. Does not belong here: what they are (datasets.coverage).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from polygon_pipeline.datasets.coverage import State
from polygon_pipeline.market.calendar import NEW_YORK, session

if TYPE_CHECKING:
    import pyarrow as pa

MOST_TICKERS = 40

# Told apart by the colour-blind too: what is there is blue and pink, what was lost amber, red or black, the rest grey.
_COLOURS = {
    State.COLLECTED: ("collected", (74, 128, 189)),
    State.CORRECTED: ("corrected", (240, 90, 205)),
    State.REPAIRED: ("repaired", (244, 172, 40)),
    State.FROM_HISTORY: ("from history", (150, 200, 190)),
    State.NOT_COLLECTED: ("not collected", (190, 160, 220)),
    State.LOST_DISCONNECTED: ("lost while disconnected", (214, 39, 40)),
    State.LOST_CONNECTED: ("lost while connected", (50, 0, 10)),
    State.NO_TRADE: ("no trade", (232, 235, 238)),
    State.UNKNOWN: ("no trade or lost: unknown", (160, 160, 160)),
}
_TEXT, _GRID, _PAPER = (40, 40, 40), (90, 90, 90), (255, 255, 255)
_ROW, _BAR, _TOP, _SIDE, _FONT = 14, 11, 56, 88, 12


def heat_map(day: date, states: pa.Table, tickers: Sequence[str]) -> bytes:
    """A PNG with one row per ticker, in the order given, and one column per minute of the session; some 1060 wide.

    states: of coverage.minute_states, with these tickers among its own. Raises ValueError for more than MOST_TICKERS
    or for a day that is no trading day.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    found = session(day)
    if found is None or len(tickers) > MOST_TICKERS:
        raise ValueError(f"{day} with {len(tickers)} tickers: a trading day with {MOST_TICKERS} or fewer can be drawn")
    width = int((found.post_close - found.pre_open).total_seconds()) // 60
    place = {ticker: row for row, ticker in enumerate(tickers)}
    cells = np.full((len(tickers), width, 3), _PAPER, dtype=np.uint8)
    names, minutes, kinds = (states.column(name).to_pylist() for name in ("ticker", "minute", "state"))
    for ticker, minute, state in zip(names, minutes, kinds, strict=True):
        if ticker in place:
            cells[place[ticker], minute] = _COLOURS[State(state)][1]

    bottom = _TOP + _ROW * len(tickers)
    image = Image.new("RGB", (_SIDE + width + 24, bottom + 24), _PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT)
    pen.text((_SIDE, 6), f"Minute bars of {day:%A}, {day}, New York time", _TEXT, ImageFont.load_default(_FONT + 3))
    left = _SIDE
    for label, colour in _COLOURS.values():
        pen.rectangle((left, 33, left + 10, 43), colour, _GRID)
        pen.text((left + 15, 31), label, _TEXT, font)
        left += 15 + int(pen.textlength(label, font)) + 18
    for row, ticker in enumerate(tickers):
        top = _TOP + _ROW * row
        band = np.repeat(cells[row : row + 1], _BAR, axis=0)
        image.paste(Image.fromarray(band), (_SIDE, top + 1))
        pen.text((_SIDE - 6, top), ticker[:11], _TEXT, font, anchor="ra")
    for minute in range(0, width + 1, 60):
        at = _SIDE + minute
        pen.line((at, bottom, at, bottom + 4), _GRID)
        hour = found.pre_open.astimezone(NEW_YORK).hour + minute // 60
        pen.text((at, bottom + 6), f"{hour:02d}:00", _TEXT, font, anchor="ma")
    for moment in (found.open, found.close):
        at = _SIDE + int((moment - found.pre_open).total_seconds()) // 60
        pen.line((at, _TOP - 4, at, bottom), _GRID)
    palette = Image.new("P", (1, 1))  # of our own, because a computed one shifts the colours
    greys = [(level, level, level) for level in range(0, 256, 15)]
    palette.putpalette([part for colour in [*(colour for _, colour in _COLOURS.values()), *greys] for part in colour])
    content = io.BytesIO()
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    return content.getvalue()
