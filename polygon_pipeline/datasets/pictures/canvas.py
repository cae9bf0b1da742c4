"""What every picture is drawn with: a canvas that becomes a small PNG, and the axis of a trading day.

Belongs here: colours, text, lines, boxes, and where a moment lies. Does not belong here: what a picture shows (the
other modules of the package).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

from polygon_pipeline.datasets.wording import span
from polygon_pipeline.market.calendar import NEW_YORK, Session, session

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Colour = tuple[int, int, int]
Span = tuple[datetime, datetime]

WIDTH = 1_064
PAPER, INK, FAINT_INK, GRID, FAINT_GRID = (
    (255, 255, 255),
    (40, 40, 40),
    (115, 115, 115),
    (105, 105, 105),
    (225, 225, 225),
)
UP, DOWN, VOLUME = (33, 140, 116), (200, 60, 60), (150, 175, 205)
GAP = (255, 212, 190)
OUTSIDE = (246, 247, 249)  # behind pre-market and after hours
NIGHT = (234, 236, 242)

TITLE, TEXT, SMALL = 17, 13, 12
_LEAST_GAP = 3
_LABEL = 100  # the widest of a gap
_MINUTE = timedelta(minutes=1)


class Canvas:
    """An empty picture. Places are pixels from the top left; colours are few, so that the PNG has a palette."""

    def __init__(self, height: int, width: int = WIDTH) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (width, height), PAPER)
        self._pen = ImageDraw.Draw(self._image)
        self._colours: dict[Colour, None] = {}

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, edge: Colour | None = None
    ) -> None:
        """Right and bottom belong to it."""
        self._use(colour, edge)
        self._pen.rectangle((round(left), round(top), round(right), round(bottom)), colour, edge)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: int = 1) -> None:
        self._use(colour)
        self._pen.line([(round(x), round(y)) for x, y in points], colour, width)

    def text(self, x: float, y: float, text: str, size: int = TEXT, anchor: str = "la", colour: Colour = INK) -> float:
        """anchor: Pillow's, such as ra for the top right. Returns the text's width."""
        from PIL import ImageFont

        self._use(colour)
        font = ImageFont.load_default(size)
        self._pen.text((round(x), round(y)), text, colour, font, anchor=anchor)
        return float(self._pen.textlength(text, font))

    def paste(self, cells: npt.NDArray[np.uint8], left: int, top: int, colours: Sequence[Colour]) -> None:
        """Rows of pixels of these colours."""
        from PIL import Image

        self._use(*colours)
        self._image.paste(Image.fromarray(cells), (left, top))

    def png(self) -> bytes:
        from PIL import Image

        palette = Image.new("P", (1, 1))  # of our own, because a computed one shifts the colours
        greys = [(level, level, level) for level in range(0, 256, 15)]
        palette.putpalette([part for colour in [*self._colours, *greys] for part in colour])
        content = io.BytesIO()
        self._image.quantize(palette=palette, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
        return content.getvalue()

    def _use(self, *colours: Colour | None) -> None:
        self._colours.update((colour, None) for colour in colours if colour)


@dataclass(frozen=True)
class DayAxis:
    """A trading day's time from left to right: where its minutes lie. width: of the whole session, in pixels."""

    day: Session
    left: int
    width: int

    @classmethod
    def of(cls, day: date, left: int, width: int) -> DayAxis:
        """Raises ValueError for a day that is no trading day."""
        found = session(day)
        if found is None:
            raise ValueError(f"{day} is not a trading day")
        return cls(found, left, width)

    @property
    def begin_ms(self) -> int:
        return int(self.day.begin.timestamp()) * 1000

    @property
    def minutes(self) -> int:
        return self.day.minutes

    def at(self, minute: float) -> float:
        """minute: of the session, from 0 at its begin."""
        return self.left + minute * self.width / self.minutes

    def place(self, moment: datetime) -> float:
        return self.at((moment - self.day.begin) / _MINUTE)

    def background(self, canvas: Canvas, top: float, bottom: float, gaps: Sequence[Span]) -> None:
        """The night, and pre-market with after hours, in a shade each, gaps in another, the hours as lines."""
        right = self.left + self.width
        canvas.box(self.left, top, self.place(self.day.open) - 1, bottom, OUTSIDE)
        if self.day.night_open:
            canvas.box(self.left, top, self.place(self.day.pre_open) - 1, bottom, NIGHT)
        canvas.box(self.place(self.day.close), top, right, bottom, OUTSIDE)
        for begin, end in self.gap_places(gaps):
            canvas.box(begin, top, end, bottom, GAP)
        for minute in range(0, self.minutes + 1, 60):
            canvas.line([(self.at(minute), top), (self.at(minute), bottom)], FAINT_GRID)

    def gap_places(self, gaps: Sequence[Span]) -> list[tuple[float, float]]:
        """Where gaps begin and end, which is wide enough to be seen. gaps: first and last minute of each."""
        found = []
        for first, last in gaps:
            begin, end = self.place(first), self.place(last + _MINUTE) - 1
            missing = max(0.0, _LEAST_GAP - 1 - (end - begin))
            found.append((begin - missing / 2, end + missing / 2))
        return found

    def label_gaps(self, canvas: Canvas, top: float, gaps: Sequence[Span]) -> None:
        """When they were, where there is place for it. top: the labels' upper edge."""
        free = 0.0
        for (first, last), (begin, _) in zip(gaps, self.gap_places(gaps), strict=True):
            left = min(begin, self.left + self.width - _LABEL)
            if left >= free:
                free = left + canvas.text(left, top, f"gap {span(first, last)}", SMALL) + 8

    def hours(self, canvas: Canvas, top: float, every: int = 1) -> None:
        """The hours' labels. top: their upper edge. every: so many hours apart."""
        first = self.day.begin.astimezone(NEW_YORK).hour
        for hour in range(0, self.minutes // 60 + 1, every):
            canvas.text(self.at(60 * hour), top, f"{(first + hour) % 24:02d}:00", SMALL, "ma", FAINT_INK)


def short(number: float) -> str:
    """`1.2M`, `34k`, `812`: for a place that is too small for more."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
