"""REST answers that wait until all of their days are made, on the lake too: another run goes on where one was cut.

Belongs here: keeping the answers, and which of them are kept. Does not belong here: asking for them, and which are
still of use (reference_sources).

On the lake and not only on a disk, because the run that goes on may be on another machine. Nothing of it is deleted,
which the policy of a bucket may forbid: a part that is of no use any more is replaced by an empty one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import msgspec

from polygon_pipeline.datasets import reference
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.archive import unpacked_lines
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.polygon.rest import Page

if TYPE_CHECKING:
    import pyarrow as pa

# So much of the asking is lost with a machine: at a free plan's pace two or three tickers.
_KEEP_SECONDS = 30.0


class _Line(msgspec.Struct):
    """What is read of a line of reference.page_line."""

    ticker: str
    fetched_at: Annotated[datetime, msgspec.Meta(tz=True)]


class StagedAnswers:
    """The answers of one request for each ticker.

    days: those that are asked for. folder: an empty local folder. asked_at: by ticker, when the first page of a ticker
    all of whose pages are here was asked for. The store's errors pass through.
    """

    def __init__(self, lake: Lake, days: Sequence[date], folder: Path) -> None:
        self._lake = lake
        self._prefix = layout.staging_prefix(days[0], days[-1])
        self._folder = folder
        self.asked_at: dict[str, datetime] = {}
        self._unfinished: dict[str, list[Page]] = {}
        names = (f"{number:04d}.jsonl.zst" for number in count())
        self._names = (name for name in names if not (folder / name).exists())
        self._part: tuple[Path, pa.CompressedOutputStream] | None = None
        self._to_keep: list[Path] = []
        self._kept = time.monotonic()
        self._lock = threading.Lock()

    def resume(self, is_usable: Callable[[datetime], bool]) -> None:
        """Takes what an earlier run kept. is_usable: whether an answer of that time still is."""
        for key in _filled(self._lake, self._prefix):
            part = self._folder / key.rpartition("/")[2]
            part.write_bytes(self._lake.get(key) or b"")
            asked_at = _asked_at(part)
            if asked_at and all(map(is_usable, asked_at.values())):
                self.asked_at |= asked_at
            else:
                part.unlink()
                self._lake.put(key, b"")

    def add(self, page: Page) -> None:
        """Takes an answer; those of a ticker come in order. On any thread."""
        with self._lock:
            pages = self._unfinished.setdefault(page.ticker, [])
            pages.append(page)
            if not page.is_last:
                return
            if self._part is None:
                import pyarrow as pa

                path = self._folder / next(self._names)
                self._part = path, pa.CompressedOutputStream(str(path), "zstd")
            self._part[1].write(b"".join(map(reference.page_line, pages)))
            self.asked_at[page.ticker] = pages[0].fetched_at
            del self._unfinished[page.ticker]

    def keep(self, at_once: bool = False) -> None:
        """Puts on the lake what has come since, every 30 seconds or at once."""
        if not at_once and time.monotonic() - self._kept < _KEEP_SECONDS:
            return
        self._kept = time.monotonic()
        self._end_part()
        while self._to_keep:
            self._lake.put(f"{self._prefix}{self._to_keep[0].name}", self._to_keep[0])
            self._to_keep.pop(0)

    def files(self) -> list[Path]:
        """All answers, in files as reference.Pages reads them. Nothing is added afterwards."""
        self._end_part()
        return sorted(self._folder.iterdir())

    def clear(self) -> None:
        """Gives up what is kept on the lake."""
        for key in _filled(self._lake, self._prefix):
            self._lake.put(key, b"")

    def _end_part(self) -> None:
        with self._lock:
            if self._part is not None:
                path, stream = self._part
                stream.close()
                self._to_keep.append(path)
                self._part = None


@contextmanager
def answers_of(lake: Lake, days: Sequence[date], folder: Path) -> Iterator[StagedAnswers]:
    """The answers for these days, until the caller has stored all of them. folder: a local one.

    Where they cannot be read they are given up on the lake too, or they would be read again, and again in vain.
    """
    with TemporaryDirectory(dir=folder) as parts:
        answers = StagedAnswers(lake, days, Path(parts))
        try:
            yield answers
        except reference.UnreadableReference:
            answers.clear()
            raise
        answers.clear()


def sweep(lake: Lake, now: datetime, kept_for: timedelta) -> None:
    """Gives up what runs kept that were cut and never went on. now: aware."""
    for page in lake.pages(layout.STAGING_ROOT):
        for meta in page:
            if meta["size"] and now - meta["last_modified"] > kept_for:
                lake.put(meta["path"], b"")


def _filled(lake: Lake, prefix: str) -> list[str]:
    return sorted(meta["path"] for page in lake.pages(prefix) for meta in page if meta["size"])


def _asked_at(part: Path) -> dict[str, datetime]:
    """By ticker, when its first page was asked for; empty where the part is damaged."""
    found: dict[str, datetime] = {}
    decode = msgspec.json.Decoder(_Line).decode
    try:
        for line in map(decode, filter(None, unpacked_lines(part))):
            found.setdefault(line.ticker, line.fetched_at)
    except (OSError, ValueError, RecursionError):
        return {}
    return found
