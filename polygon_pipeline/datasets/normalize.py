"""A day's bars as they arrived become one typed row per ticker and window: the latest revision.

Belongs here: that row, in SQL, and how archives are read, damaged ones too. Does not belong here: where the inputs come
from (datasets.inputs), what a field of the vendor means (polygon), and merging the vendor's history (datasets.merge).

Everything reads local files and writes one local Parquet file. The same input gives the same bytes: rows are sorted.

How archives are read. Nearly every frame is an array of events whose fields have the types that the vendor documents;
DuckDB reads those five times as fast as Python does.
1. All archives at once, by the statement that writes the rows, if nothing else must be known of them first.
2. Where something must be (which bars they have), or where that fails, into the table `arrivals`: all at once,
3. or else one by one,
4. or else, for the one file that DuckDB cannot read, line by line with the decoder that read the frames when they were
   received. A bare object, a repeated key or a damaged line thus costs speed, and at most its own line.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from enum import Enum, auto
from itertools import islice
from pathlib import Path
from typing import Any

from polygon_pipeline.datasets import merge
from polygon_pipeline.datasets.merge import Merge
from polygon_pipeline.datasets.session import THREADS, UNREADABLE, DuckSession
from polygon_pipeline.lake import archive
from polygon_pipeline.market.bars import EARLIEST, LATEST, PRICE_LIMIT, SHARES_LIMIT, Channel
from polygon_pipeline.market.calendar import day_bounds_ms, session
from polygon_pipeline.market.hours import filed_by_night_from
from polygon_pipeline.polygon.messages import Arrival, decode_frame
from polygon_pipeline.polygon.sql import ARRIVAL_COLUMNS, EVENT_CHANNEL, EVENT_START_MS, EVENTS_TYPE

_OF_DAY = "{start_ms} >= $first_ms AND {start_ms} < $after_ms"

# The bounds of market.bars, and that nothing is missing, for relations with a bar's columns. Whether a number is finite
# is asked apart: the statistics of a Parquet file leave NaN out, and DuckDB believes them.
_BOUNDED = " AND ".join(
    [
        *(
            f"coalesce(isfinite({name}) AND abs({name}) < {PRICE_LIMIT}, false)"
            for name in ("open", "high", "low", "close")
        ),
        f"coalesce(isfinite(volume) AND abs(volume) < {SHARES_LIMIT}, false)",
        f"coalesce(isfinite(vwap) AND abs(vwap) < {PRICE_LIMIT}, true)",
    ]
)

# An archive that holds what its decoder refuses is read by that decoder, which says what it leaves out.
_IN_ARCHIVES = f"""
    SELECT * REPLACE (
        CASE
            WHEN {_BOUNDED} AND coalesce(abs(day_open) < {PRICE_LIMIT}, true)
                AND received_at >= TIMESTAMPTZ '{EARLIEST}' AND received_at < TIMESTAMPTZ '{LATEST}' THEN ticker
            ELSE error('a bar is out of bounds')
        END AS ticker
    )
    FROM (
        SELECT {ARRIVAL_COLUMNS}, received_at, position
        FROM (
            SELECT received_at, refused, unnest(frame) AS e, generate_subscripts(frame, 1) - 1 AS position
            FROM {archive.read_frames_sql(EVENTS_TYPE)}
        )
        WHERE {EVENT_CHANNEL} = $channel
            AND {_OF_DAY.format(start_ms=EVENT_START_MS)}
            AND (refused IS NULL OR NOT list_contains(refused, position))
    )
"""

# position: the event's place in its frame, because a frame may hold two revisions of a bar.
_ARRIVALS = """
    CREATE TEMP TABLE arrivals (
        ticker VARCHAR, start_ms BIGINT, open DOUBLE, high DOUBLE, low DOUBLE, close DOUBLE, volume DOUBLE,
        vwap DOUBLE, day_open DOUBLE, day_volume DOUBLE, day_vwap DOUBLE, average_trade_size DOUBLE,
        otc BOOLEAN, received_at TIMESTAMPTZ, position INTEGER
    )
"""

# The part of the day that a start is in; parts_of() has the parameters.
SESSION = """
    CASE
        WHEN {start_ms} < $pre_ms THEN 'overnight' WHEN {start_ms} < $open_ms THEN 'pre'
        WHEN {start_ms} < $close_ms THEN 'regular' ELSE 'post'
    END
"""

_NORMALIZED = """
    SELECT
        ticker,
        to_timestamp(start_ms / 1000) AS timestamp,
        open, high, low, close, volume, vwap, day_open, day_volume, day_vwap, average_trade_size, otc,
        CAST(NULL AS BIGINT) AS transactions,
        {session} AS session,
        revisions,
        received_at,
        'websocket' AS source
    FROM (SELECT *, count(*) OVER same_bar AS revisions FROM {arrivals}
          WINDOW same_bar AS (PARTITION BY ticker, start_ms)
          QUALIFY row_number() OVER (PARTITION BY ticker, start_ms ORDER BY received_at DESC, position DESC) = 1)
    ORDER BY ticker, start_ms
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Rows that Python hands to DuckDB at once.
_BATCH_ROWS = 50_000


class NoBars(Exception):
    """There is nothing to make a dataset of."""


class _Arrivals(Enum):
    """Where the bars as they arrived are."""

    IN_ARCHIVES = auto()  # in files that nothing has been read of
    IN_TABLE = auto()  # in the table `arrivals`, with whatever else was added there


class Normalization(DuckSession):
    """One day and channel from raw to normalized. A context manager; add what there is, then write().

    space: as in DuckSession. unreadable: the files that could not be read, or only in part, each with the reason; it is
    complete after write(). Whatever is sound in them is used all the same.
    """

    def __init__(self, day: date, channel: Channel, space: Path | DuckSession) -> None:
        super().__init__(space)
        self._day = day
        self._channel = channel
        first_ms, after_ms = day_bounds_ms(day)
        self._bounds = {"first_ms": first_ms, "after_ms": after_ms}
        self._arrivals = _Arrivals.IN_ARCHIVES
        self._archives: list[Path] = []
        self._reference: Path | None = None
        self.unreadable: dict[Path, str] = {}

    def add_frames(self, files: Sequence[Path]) -> None:
        """Adds the bars in raw-frames files (.jsonl or .jsonl.zst)."""
        with ThreadPoolExecutor(THREADS) as pool:
            errors = list(pool.map(archive.decompression_error, files))
        damaged = [file for file, error in zip(files, errors, strict=True) if error]
        self._archives += [file for file in files if file not in damaged]
        if self._arrivals is _Arrivals.IN_TABLE or damaged:
            self._read_archives()
        for file in damaged:  # DuckDB takes the end of a cut archive for its end, and says nothing
            self._insert_decoded(file)

    def uncovered(self, bars: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Of these (ticker, start in Unix ms), the ones that no added frame has."""
        wanted = set(bars)
        if not wanted:
            return []
        self._read_archives()
        return sorted(wanted.difference(self.rows("SELECT DISTINCT ticker, start_ms FROM arrivals")))

    def add_bars(self, bars: Iterable[tuple[Arrival, datetime]]) -> int:
        """Adds bars, each with the time (aware) it arrived, where no added frame has it as late; returns how many."""
        self._read_archives()
        latest = "SELECT ticker, start_ms, epoch_us(max(received_at)) FROM arrivals GROUP BY ALL"
        known = {(ticker, start_ms): at_us for ticker, start_ms, at_us in self.rows(latest)}
        later = [
            (*bar, at, 0)
            for bar, at in bars
            if (at - _EPOCH) // timedelta(microseconds=1) > known.get((bar.ticker, bar.start_ms), -math.inf)
        ]
        self._insert(later)
        return len(later)

    def add_reference(self, file: Path) -> None:
        """Adds the vendor's history of the day (a reference file); write() then merges it in. Minutes only."""
        if self._channel is not Channel.MINUTE:
            raise ValueError(f"the reference is of minute bars, and this is channel {self._channel}")
        self._reference = file

    def write(self, target: Path) -> Merge:
        """Writes every bar's latest revision or its reference, sorted by ticker and time. Raises NoBars without any."""
        parts = parts_of(self._day)
        if self._arrivals is _Arrivals.IN_ARCHIVES and self._archives:
            # Everything in one statement, without a table between: a third less time, and less memory.
            with contextlib.suppress(*UNREADABLE):
                return self._write(f"({_IN_ARCHIVES})", target, parts, self._archive_parameters(self._archives))
        self._read_archives()
        return self._write("arrivals", target, parts, {})

    def _write(self, arrivals: str, target: Path, parts: Mapping[str, object], archives: Mapping[str, object]) -> Merge:
        """parts, archives: the parameters of SESSION and of _IN_ARCHIVES."""
        stream = _NORMALIZED.format(arrivals=arrivals, session=SESSION.format(start_ms="start_ms"))
        if self._reference is None:
            rows, merged = self.copy(stream, target, {**parts, **archives}), Merge()
        else:
            self.rows(f"CREATE OR REPLACE TEMP TABLE stream AS {stream}", {**parts, **archives})
            self._view_reference(self._reference)
            self.rows(merge.PAIRS)
            query = merge.MERGED.format(session=SESSION.format(start_ms="epoch_ms(timestamp)"))
            rows, merged = self.copy(query, target, parts), merge.count(self)
        if not rows:
            target.unlink()
            raise NoBars(f"there are no raw bars of {self._day}")
        return merged

    def _view_reference(self, file: Path) -> None:
        """Makes the reference's bars readable, without those that are out of bounds: these are in `unreadable`."""
        self.view("whole_reference", file)
        self.rows(f"CREATE OR REPLACE TEMP VIEW reference AS FROM whole_reference WHERE {_BOUNDED}")
        [(count, first)] = self.rows(
            f"SELECT count(*), min(ticker || ' at ' || timestamp) FROM whole_reference WHERE NOT ({_BOUNDED})"
        )
        if count:
            self.unreadable[file] = f"{count} bars are out of bounds and left out, such as {first}"

    def _read_archives(self) -> None:
        """Moves on to IN_TABLE: what was added so far is read into it."""
        if self._arrivals is _Arrivals.IN_ARCHIVES:
            self.rows(_ARRIVALS)
            self._arrivals = _Arrivals.IN_TABLE
        archives, self._archives = self._archives, []
        if archives and not self._insert_archives(archives):
            for file in archives:
                if not self._insert_archives([file]):
                    self._insert_decoded(file)

    def _insert_archives(self, files: Sequence[Path]) -> bool:
        """Whether DuckDB could read these archives; if not, nothing of them was added."""
        try:
            self.rows(f"INSERT INTO arrivals {_IN_ARCHIVES}", self._archive_parameters(files))
        except UNREADABLE:
            return False
        return True

    def _insert_decoded(self, file: Path) -> None:
        """Reads an archive line by line, as far as it can be read."""
        errors: list[str] = []
        self._insert(self._decoded(archive.read_frames(file, errors.append), errors.append))
        if errors:
            self.unreadable[file] = errors[0] + (f"; and {len(errors) - 1} more" if len(errors) > 1 else "")

    def _decoded(
        self, frames: Iterable[archive.ArchivedFrame], on_error: Callable[[str], object]
    ) -> Iterator[tuple[Any, ...]]:
        """The bars in frames, with the time they arrived and their place in the frame; on_error gets the refused."""
        for frame in frames:
            found = decode_frame(frame.accepted(), frame.received_at)
            for refusal in found.refused:
                on_error(f"an event received at {frame.received_at.isoformat()} is left out: {refusal.reason}")
            for position, bar in enumerate(found.arrivals(self._channel)):
                yield (*bar, frame.received_at, position)

    def _insert(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Adds those rows to the table `arrivals` that are of the day, some at a time."""
        import pyarrow as pa

        names = [*Arrival._fields, "received_at", "position"]
        remaining = iter(rows)
        while batch := list(islice(remaining, _BATCH_ROWS)):
            columns = [pa.array(column) for column in zip(*batch, strict=True)]
            self.connection.register("batch", pa.table(columns, names))
            self.rows(f"INSERT INTO arrivals FROM batch WHERE {_OF_DAY.format(start_ms='start_ms')}", self._bounds)
            self.connection.unregister("batch")

    def _archive_parameters(self, files: Sequence[Path]) -> dict[str, object]:
        return {"files": [str(file) for file in files], "channel": str(self._channel), **self._bounds}


def parts_of(day: date) -> dict[str, int]:
    """The parameters of SESSION. Raises NoBars for a day that is no trading day."""
    found = session(day)
    if found is None:
        raise NoBars(f"{day} is not a trading day")
    moments = {"pre_ms": found.pre_open, "open_ms": found.open, "close_ms": found.close}
    parts = {name: int(moment.timestamp()) * 1000 for name, moment in moments.items()}
    # Where dates are New York's, a bar before 04:00 is no bar of a night that belongs to the day.
    return parts if day >= filed_by_night_from() else parts | {"pre_ms": 0}
