"""The transformations, in DuckDB SQL: raw to normalized, normalized to 5m/15m/1h and to daily. Out of core.

Belongs here: what the datasets' rows are, as one statement each. Does not belong here: where inputs come from and
outputs go (lake), and what the columns mean (market.schemas).

Everything reads local files and writes one local Parquet file. The same input gives the same bytes: rows are sorted,
and sums are exact decimals, because adding floats in whatever order threads finish gives different last digits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import duckdb
import msgspec

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import day_bounds_ms, session

if TYPE_CHECKING:
    import pyarrow as pa

RESAMPLINGS = {"bars_5m": "5 minutes", "bars_15m": "15 minutes", "bars_1h": "1 hour"}

# Leaves room for Python and Arrow below 2 GB; beyond it DuckDB uses the disk.
_MEMORY_LIMIT = "1GB"
_THREADS = 2

_PARQUET = "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)"

# The vendor's fields that a row is made of. Whether an event is acceptable was decided when it was received.
_EVENT = {
    "ev": "VARCHAR",
    "sym": "VARCHAR",
    "s": "BIGINT",
    "o": "DOUBLE",
    "h": "DOUBLE",
    "l": "DOUBLE",
    "c": "DOUBLE",
    "v": "DOUBLE",
    "dv": "VARCHAR",
    "vw": "DOUBLE",
    "op": "DOUBLE",
    "av": "DOUBLE",
    "dav": "VARCHAR",
    "a": "DOUBLE",
    "z": "DOUBLE",
    "otc": "BOOLEAN",
}
_EVENT_STRUCT = f"STRUCT({', '.join(f'{name} {kind}' for name, kind in _EVENT.items())})"
_EVENT_JSON = msgspec.json.encode(_EVENT).decode()

_FRAMES = """
    SELECT
        e.sym AS ticker, e.s AS start_ms, coalesce(e.o, nullif(e.op, 0)) AS open, e.h AS high, e.l AS low,
        e.c AS close, coalesce(CAST(e.dv AS DOUBLE), e.v) AS volume, e.vw AS vwap, nullif(e.op, 0) AS day_open,
        coalesce(TRY_CAST(e.dav AS DOUBLE), e.av) AS day_volume, e.a AS day_vwap, e.z AS average_trade_size,
        coalesce(e.otc, false) AS otc, received_at, position
    FROM (
        SELECT received_at, refused, unnest(events) AS e, generate_subscripts(events, 1) - 1 AS position
        FROM (
            SELECT received_at, refused, {events} AS events
            FROM read_json(
                $files,
                format = 'newline_delimited',
                columns = {{received_at: 'TIMESTAMPTZ', frame: '{frame}', refused: 'INTEGER[]'}},
                ignore_errors = $ignore_errors
            )
        )
    )
    WHERE e.ev = $channel
        AND e.s >= $first_ms AND e.s < $after_ms
        AND (refused IS NULL OR NOT list_contains(refused, position))
"""

# Nearly every frame is an array whose events have these fields with these types, if at all: that is read in half the
# time. DuckDB refuses anything else, such as a bare object.
_PLAIN_FRAMES = _FRAMES.format(frame=f"{_EVENT_STRUCT}[]", events="frame")

# from_json gives null for what is absent or of another type, so events of other kinds do no harm.
_ANY_FRAMES = _FRAMES.format(
    frame="JSON",
    events=f"""CASE json_type(frame)
                WHEN 'ARRAY' THEN from_json(frame, '[{_EVENT_JSON}]')
                WHEN 'OBJECT' THEN [from_json(frame, '{_EVENT_JSON}')]
            END""",
)

_READ_RECORDS = """
    INSERT INTO arrivals
    SELECT
        ticker, epoch_ms(timestamp), bar_data.open, bar_data.high, bar_data.low, bar_data.close, bar_data.volume,
        bar_data.vwap, NULL, NULL, NULL, NULL, NULL, collected_at, 0
    FROM read_json(
        $files,
        format = 'newline_delimited',
        columns = {
            ticker: 'VARCHAR', timestamp: 'TIMESTAMPTZ', collected_at: 'TIMESTAMPTZ',
            bar_data: 'STRUCT(open DOUBLE, high DOUBLE, low DOUBLE, close DOUBLE, volume DOUBLE, vwap DOUBLE)'
        }
    )
    WHERE epoch_ms(timestamp) >= $first_ms AND epoch_ms(timestamp) < $after_ms
"""

_NORMALIZED = """
    SELECT
        ticker,
        to_timestamp(start_ms / 1000) AS timestamp,
        open, high, low, close, volume, vwap, day_open, day_volume, day_vwap, average_trade_size, otc,
        CAST(NULL AS BIGINT) AS transactions,
        CASE WHEN start_ms < $open_ms THEN 'pre' WHEN start_ms < $close_ms THEN 'regular' ELSE 'post' END AS session,
        revisions,
        received_at,
        'websocket' AS source
    FROM (SELECT *, count(*) OVER same_bar AS revisions FROM {arrivals}
          WINDOW same_bar AS (PARTITION BY ticker, start_ms)
          QUALIFY row_number() OVER (PARTITION BY ticker, start_ms ORDER BY received_at DESC, position DESC) = 1)
    ORDER BY ticker, start_ms
"""

_SUM_VOLUME = "CAST(sum(CAST(volume AS DECIMAL(38, 6))) {where} AS DOUBLE)"
_VWAP = """
    CAST(sum(CAST(vwap * volume AS DECIMAL(38, 10))) {where} AS DOUBLE)
        / nullif(CAST(sum(CAST(CASE WHEN vwap IS NOT NULL THEN volume END AS DECIMAL(38, 6))) {where} AS DOUBLE), 0)
"""

_RESAMPLE = f"""
    SELECT
        ticker,
        time_bucket(INTERVAL '{{interval}}', timestamp) AS timestamp,
        arg_min(open, normalized.timestamp) AS open,
        max(high) AS high,
        min(low) AS low,
        arg_max(close, normalized.timestamp) AS close,
        {_SUM_VOLUME.format(where="")} AS volume,
        {_VWAP.format(where="")} AS vwap,
        count(*) AS bar_count,
        arg_min(session, normalized.timestamp) AS session
    FROM normalized
    GROUP BY ticker, time_bucket(INTERVAL '{{interval}}', timestamp)
    ORDER BY ticker, timestamp
"""

_REGULAR = "FILTER (WHERE session = 'regular')"
_DAILY = f"""
    SELECT
        ticker,
        $day AS date,
        arg_min(open, timestamp) {_REGULAR} AS open,
        max(high) {_REGULAR} AS high,
        min(low) {_REGULAR} AS low,
        arg_max(close, timestamp) {_REGULAR} AS close,
        coalesce({_SUM_VOLUME.format(where=_REGULAR)}, 0) AS volume,
        {_VWAP.format(where=_REGULAR)} AS vwap,
        coalesce({_SUM_VOLUME.format(where="FILTER (WHERE session = 'pre')")}, 0) AS pre_market_volume,
        coalesce({_SUM_VOLUME.format(where="FILTER (WHERE session = 'post')")}, 0) AS after_hours_volume,
        count(*) {_REGULAR} AS bar_count,
        min(timestamp) {_REGULAR} AS first_bar,
        max(timestamp) {_REGULAR} AS last_bar,
        arg_max(day_open, timestamp) FILTER (WHERE day_open IS NOT NULL) AS official_open
    FROM normalized
    GROUP BY ticker
    ORDER BY ticker
"""


# What DuckDB says of a damaged file; running out of memory or disk is not among them.
_UNREADABLE = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException)


class NoBars(Exception):
    """There is nothing to make a dataset of."""


class Normalization:
    """One day and channel from raw to normalized. A context manager; add what there is, then write().

    folder: an empty local folder for what does not fit into memory. unreadable: the files that could not be read, or
    only in part, each with the reason; it is complete after write(). Whatever is sound in them is used all the same.
    """

    def __init__(self, day: date, channel: Channel, folder: Path) -> None:
        self._day = day
        self._channel = channel
        self._connection = _connect(folder)
        first_ms, after_ms = day_bounds_ms(day)
        self._bounds = {"first_ms": first_ms, "after_ms": after_ms}
        self._waiting: list[Path] = []  # frames not read yet
        self._has_arrivals = False
        self.unreadable: dict[Path, str] = {}
        self._connection.execute(
            """
            CREATE TEMP TABLE arrivals (
                ticker VARCHAR, start_ms BIGINT, open DOUBLE, high DOUBLE, low DOUBLE, close DOUBLE, volume DOUBLE,
                vwap DOUBLE, day_open DOUBLE, day_volume DOUBLE, day_vwap DOUBLE, average_trade_size DOUBLE,
                otc BOOLEAN, received_at TIMESTAMPTZ, position INTEGER
            )
            """
        )

    def __enter__(self) -> Normalization:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()

    def add_frames(self, files: Sequence[Path]) -> None:
        """Adds the bars in raw-frames files (.jsonl or .jsonl.zst)."""
        with ThreadPoolExecutor(_THREADS) as pool:
            faults = list(pool.map(_decompression_fault, files))
        for file, fault in zip(files, faults, strict=True):
            if fault is None:
                self._waiting.append(file)
                continue
            # DuckDB takes the end of a cut archive for its end.
            self.unreadable[file] = fault
            with contextlib.suppress(*_UNREADABLE):
                self._insert(_ANY_FRAMES, [file], ignore_errors=True)

    def uncovered(self, bars: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Of these (ticker, start in Unix ms), the ones that no added frame has."""
        wanted = set(bars)
        if not wanted:
            return []
        self._read_waiting()
        return sorted(
            wanted.difference(self._connection.execute("SELECT DISTINCT ticker, start_ms FROM arrivals").fetchall())
        )

    def add_records(self, file: Path) -> None:
        """Adds raw-data records, one a line."""
        self._connection.execute(_READ_RECORDS, {"files": str(file), **self._bounds})
        self._has_arrivals = True

    def write(self, target: Path) -> None:
        """Writes the latest revision of every bar, sorted by ticker and time. Raises NoBars if there is none."""
        found = session(self._day)
        if found is None:
            raise NoBars(f"{self._day} is not a trading day")
        parts = {"open_ms": _ms(found.open), "close_ms": _ms(found.close)}
        if not self._has_arrivals and self._waiting:
            # Everything in one statement, without a table between: a third less time, and less memory.
            with contextlib.suppress(*_UNREADABLE):
                self._write(f"({_PLAIN_FRAMES})", target, parts | self._frames(self._waiting))
                return
        self._read_waiting()
        self._write("arrivals", target, parts)

    def _write(self, arrivals: str, target: Path, parameters: Mapping[str, object]) -> None:
        if not _copy(self._connection, _NORMALIZED.format(arrivals=arrivals), target, parameters):
            target.unlink()
            raise NoBars(f"there are no raw bars of {self._day}")

    def _read_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        with contextlib.suppress(*_UNREADABLE):
            self._insert(_PLAIN_FRAMES, waiting)
            return
        for file in waiting:
            self._read_frames(file)

    def _read_frames(self, file: Path) -> None:
        """Reads one file as it is best read."""
        with contextlib.suppress(*_UNREADABLE):
            self._insert(_PLAIN_FRAMES, [file])
            return
        try:
            self._insert(_ANY_FRAMES, [file])
        except _UNREADABLE as error:
            self.unreadable[file] = str(error).splitlines()[0]
            self._insert(_ANY_FRAMES, [file], ignore_errors=True)

    def _insert(self, query: str, files: Sequence[Path], ignore_errors: bool = False) -> None:
        self._connection.execute(f"INSERT INTO arrivals {query}", self._frames(files, ignore_errors))
        self._has_arrivals = True

    def _frames(self, files: Sequence[Path], ignore_errors: bool = False) -> dict[str, object]:
        """The parameters of a query of frames."""
        return {
            "files": [str(file) for file in files],
            "channel": str(self._channel),
            "ignore_errors": ignore_errors,
            **self._bounds,
        }


def _decompression_fault(file: Path) -> str | None:
    import pyarrow as pa

    try:
        with pa.input_stream(file, compression="detect") as content:
            while content.read(1 << 20):
                pass
    except OSError as error:
        return str(error)
    return None


def resample(name: str, normalized: pa.Table | Path, target: Path, folder: Path) -> None:
    """Writes bars_5m, bars_15m or bars_1h (RESAMPLINGS) of normalized minute bars."""
    with _reading(normalized, folder) as connection:
        _copy(connection, _RESAMPLE.format(interval=RESAMPLINGS[name]), target)


def daily(day: date, normalized: pa.Table | Path, target: Path, folder: Path) -> None:
    """Writes a row a ticker of one day's normalized minute bars."""
    with _reading(normalized, folder) as connection:
        _copy(connection, _DAILY, target, {"day": day})


class Description(NamedTuple):
    """What a Parquet file of bars holds. first, last: its first and last bar or date, as text."""

    rows: int
    tickers: int
    first: str
    last: str


def describe(file: Path) -> Description:
    """Raises duckdb.Error if the file is no Parquet file of bars."""
    with duckdb.connect() as connection:
        columns = [row[0] for row in connection.execute("DESCRIBE FROM read_parquet($1)", [str(file)]).fetchall()]
        when = "timestamp" if "timestamp" in columns else "date"
        row = connection.execute(
            f"SELECT count(*), count(DISTINCT ticker), CAST(min({when}) AS VARCHAR), CAST(max({when}) AS VARCHAR) "
            "FROM read_parquet($1)",
            [str(file)],
        ).fetchone()
    assert row is not None
    return Description(*row)


def _connect(folder: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        config={"memory_limit": _MEMORY_LIMIT, "temp_directory": str(folder / "spill"), "threads": _THREADS}
    )
    connection.execute("SET TimeZone = 'UTC'")
    return connection


@contextlib.contextmanager
def _reading(normalized: pa.Table | Path, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with _connect(folder) as connection:
        if isinstance(normalized, Path):
            connection.read_parquet(str(normalized)).create_view("normalized")
        else:
            connection.register("normalized", normalized)
        yield connection


def _copy(
    connection: duckdb.DuckDBPyConnection, query: str, target: Path, parameters: Mapping[str, object] | None = None
) -> int:
    """Writes a query's rows; returns how many there are."""
    path = str(target).replace("'", "''")
    [(rows,)] = connection.execute(f"COPY ({query}) TO '{path}' {_PARQUET}", parameters or {}).fetchall()
    return int(rows)


def _ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
