"""Days whose every minute has a planned state, as the files that coverage is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa

from polygon_pipeline.datasets.coverage import LATE_SECONDS, Coverage
from polygon_pipeline_tests.support.bars import DAY, Row, at, moment, normalized_row, reference_row
from polygon_pipeline_tests.support.day_files import dataset_file, read, reference_file

MINUTE = timedelta(minutes=1)
Minute = tuple[str, int]
"""A ticker and a minute of the session, from 0 at 04:00."""


def start_ms(minute: int, day: date = DAY) -> int:
    return at(4, 0, day) + 60_000 * minute


def collected_row(ticker: str, minute: int, kind: str) -> Row:
    """A row of normalized_bars. kind: collected, late, corrected or repaired."""
    start = moment(start_ms(minute))
    delay = {
        "collected": MINUTE + timedelta(seconds=LATE_SECONDS),
        "late": MINUTE + timedelta(seconds=LATE_SECONDS + 1),
    }
    return normalized_row(
        ticker,
        start_ms(minute),
        revisions=0 if kind == "repaired" else 2,
        received_at=start + delay.get(kind, timedelta(days=1)),
        source="websocket" if kind in delay else "rest",
    )


def online(*minutes: tuple[int, int]) -> list[tuple[int, int]]:
    return [(start_ms(first), start_ms(last)) for first, last in minutes]


ALWAYS = online((0, 959))


class PlannedDay:
    """bars: the kind of each (collected_row), by ticker and minute. traded: None for no reference. until: the minute up
    to which the reference reaches. connected: of every run, first and last start in Unix ms."""

    def __init__(
        self,
        folder: Path,
        bars: dict[Minute, str],
        traded: Iterable[Minute] | None = None,
        *,
        tickers: Sequence[str] | None = None,
        until: int = 960,
        connected: Sequence[tuple[int, int]] = ALWAYS,
        subscribed: Sequence[str] | None = None,
        day: date = DAY,
        was_collected: bool = True,
        in_real_time: bool = True,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.was_collected, self.in_real_time = was_collected, in_real_time
        self.day, self.folder, self.connected, self.subscribed = day, folder, connected, subscribed
        self.normalized = folder / "normalized.parquet"
        dataset_file(self.normalized, (collected_row(*minute, kind) for minute, kind in sorted(bars.items())))
        self.reference = None
        if traded is not None:
            found = [reference_row(ticker, start_ms(minute)) for ticker, minute in traded]
            self.reference = reference_file(folder / "reference.parquet", found, tickers, start_ms(until))

    def file(self) -> Path:
        target = self.folder / "coverage.parquet"
        with self._coverage() as coverage:
            coverage.write(target)
        return target

    def rows(self) -> dict[str, Row]:
        return {row["ticker"]: row for row in read(self.file())}

    def states(self, tickers: Sequence[str] | None = None) -> pa.Table:
        with self._coverage() as coverage:
            return coverage.minute_states(tickers)

    def market(self) -> list[tuple[int, str, int]]:
        with self._coverage() as coverage:
            return coverage.market_states()

    def _coverage(self) -> Coverage:
        return Coverage(
            self.day,
            self.normalized,
            self.reference,
            self.connected,
            self.folder,
            self.subscribed,
            self.was_collected,
            self.in_real_time,
        )
