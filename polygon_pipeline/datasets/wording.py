"""How values are written for a person: New York time with its name, rounded numbers, and text that stays text.

Belongs here: that, for every page and picture. Does not belong here: what a page or a picture shows.
"""

from __future__ import annotations

import re
from datetime import datetime

from polygon_pipeline.market import calendar
from polygon_pipeline.market.calendar import NEW_YORK


def plain(text: str) -> str:
    """Text as Markdown shows it as it is: a ticker comes from the feed, and may be a link or the end of a row."""
    return re.sub(r"([!-,/:-@\[-`{-~]|(?<=www)\.)", r"\\\1", " ".join(text.split()), flags=re.IGNORECASE)


def clock(moment: datetime) -> str:
    """`14:42 New York`, and `Sun 21:30 New York` in a night that begins on the evening before. moment: aware."""
    return f"{calendar.clock(moment)} New York"


def date_and_clock(moment: datetime) -> str:
    """`2026-01-26 14:42 New York`. moment: aware."""
    return f"{moment.astimezone(NEW_YORK):%Y-%m-%d %H:%M} New York"


def span(first: datetime, last: datetime) -> str:
    """`10:15 to 10:22`, in New York; the name of the place is the caller's to say. first, last: aware."""
    begin, end = calendar.clock(first), calendar.clock(last)
    return begin if begin == end else f"{begin} to {end}"


def count(number: float, one: str, many: str = "") -> str:
    """`1 bar`, `8,910 bars`. many: where it is not the word for one and an s."""
    return f"{number:,.0f} {one if number == 1 else many or one + 's'}"


def percent(share: float | None, digits: int = 2) -> str:
    """`99.98 %`, of 0.9998; what is nearly all or nearly nothing is `> 99.99 %` or `< 0.01 %`. A dash for None."""
    if share is None:
        return "–"
    shown, step = round(share * 100, digits), 10.0**-digits
    if shown == 0 < share:
        return f"< {step:.{digits}f} %"
    if share < 1 and shown == 100:
        return f"> {100 - step:.{digits}f} %"
    return f"{shown:.{digits}f} %"


def change(ratio: float | None) -> str:
    """`+1.59 %`, of 0.0159. A dash for None."""
    return "–" if ratio is None else f"{ratio * 100:+.2f} %"


def number(value: float | None) -> str:
    """Four digits after the point below one, two above, none from ten thousand on. A dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:,.{4 if 0 < size < 1 else 2 if size < 10_000 else 0}f}"
