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
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import duckdb
import msgspec

from polygon_pipeline.market import merge
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import day_bounds_ms, session
from polygon_pipeline.market.merge import Merge

if TYPE_CHECKING:
    import pyarrow as pa

# Leaves room for Python and Arrow below 2 GB; beyond it DuckDB uses the disk.
_MEMORY_LIMIT = "1GB"
_THREADS = 2

_PARQUET = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, ROW_GROUP_SIZE 122880"

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

_SESSION = "CASE WHEN {start_ms} < $open_ms THEN 'pre' WHEN {start_ms} < $close_ms THEN 'regular' ELSE 'post' END"

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

_FIVE_MINUTES_US = 300_000_000

# One scan of the minutes for all that is made of them. Five minutes divide every other interval and every part of the
# day, so a bucket lies in one part only. The buckets are grouped by a number, as time_bucket takes twice as long.
_BUCKETS = f"""
    CREATE TEMP TABLE buckets AS
    SELECT
        * EXCLUDE (bucket, unpriced_shares),
        make_timestamptz(bucket * {_FIVE_MINUTES_US}) AS timestamp,
        shares - coalesce(unpriced_shares, 0) AS priced_shares,
        {_SESSION.format(start_ms=f"(bucket * {_FIVE_MINUTES_US // 1000})")} AS session
    FROM (
        SELECT
            ticker,
            epoch_us(timestamp) // {_FIVE_MINUTES_US} AS bucket,
            arg_min(open, timestamp) AS open,
            max(high) AS high,
            min(low) AS low,
            arg_max(close, timestamp) AS close,
            sum(CAST(volume AS DECIMAL(38, 6))) AS shares,
            sum(CAST(vwap * volume AS DECIMAL(38, 10))) AS turnover,
            sum(CAST(volume AS DECIMAL(38, 6))) FILTER (WHERE vwap IS NULL) AS unpriced_shares,
            count(*) AS bar_count,
            min(timestamp) AS first_bar,
            max(timestamp) AS last_bar
        FROM normalized
        GROUP BY ticker, bucket
    )
    ORDER BY ticker, bucket
"""

_BARS_5M = """
    SELECT
        ticker, timestamp, open, high, low, close, CAST(shares AS DOUBLE) AS volume,
        CAST(turnover AS DOUBLE) / nullif(CAST(priced_shares AS DOUBLE), 0) AS vwap, bar_count, session
    FROM buckets
"""

_VWAP = "CAST(sum(turnover) {where} AS DOUBLE) / nullif(CAST(sum(priced_shares) {where} AS DOUBLE), 0)"

_RESAMPLE = f"""
    SELECT
        ticker,
        time_bucket(INTERVAL '{{interval}}', timestamp) AS timestamp,
        arg_min(open, first_bar) AS open,
        max(high) AS high,
        min(low) AS low,
        arg_max(close, first_bar) AS close,
        CAST(sum(shares) AS DOUBLE) AS volume,
        {_VWAP.format(where="")} AS vwap,
        CAST(sum(bar_count) AS BIGINT) AS bar_count,
        arg_min(session, first_bar) AS session
    FROM buckets
    GROUP BY ticker, time_bucket(INTERVAL '{{interval}}', timestamp)
    ORDER BY ticker, timestamp
"""

_SHARES_OF = "coalesce(CAST(sum(shares) FILTER (WHERE session = '{part}') AS DOUBLE), 0)"
_REGULAR = "FILTER (WHERE session = 'regular')"
_DAILY = f"""
    SELECT
        ticker,
        $day AS date,
        arg_min(open, first_bar) {_REGULAR} AS open,
        max(high) {_REGULAR} AS high,
        min(low) {_REGULAR} AS low,
        arg_max(close, first_bar) {_REGULAR} AS close,
        {_SHARES_OF.format(part="regular")} AS volume,
        {_VWAP.format(where=_REGULAR)} AS vwap,
        {_SHARES_OF.format(part="pre")} AS pre_market_volume,
        {_SHARES_OF.format(part="post")} AS after_hours_volume,
        CAST(coalesce(sum(bar_count) {_REGULAR}, 0) AS BIGINT) AS bar_count,
        min(first_bar) {_REGULAR} AS first_bar,
        max(last_bar) {_REGULAR} AS last_bar,
        any_value(official_open) AS official_open
    FROM buckets LEFT JOIN (
        SELECT ticker, arg_max(day_open, timestamp) FILTER (WHERE day_open IS NOT NULL) AS official_open
        FROM normalized
        GROUP BY ticker
    ) USING (ticker)
    GROUP BY ticker
    ORDER BY ticker
"""


_DERIVED = {
    "bars_5m": _BARS_5M,
    "bars_15m": _RESAMPLE.format(interval="15 minutes"),
    "bars_1h": _RESAMPLE.format(interval="1 hour"),
    "daily_bars": _DAILY,
}

# What DuckDB says of a damaged file; running out of memory or disk is not among them.
_UNREADABLE = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.IOException)


class NoBars(Exception):
    """There is nothing to make a dataset of."""


class OutOfCore:
    """Work on a DuckDB connection of its own, which ends with the `with` block.

    folder: an empty local folder for what does not fit into memory.
    """

    def __init__(self, folder: Path) -> None:
        self._connection = connect(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()


class Normalization(OutOfCore):
    """One day and channel from raw to normalized. A context manager; add what there is, then write().

    folder: an empty local folder for what does not fit into memory. unreadable: the files that could not be read, or
    only in part, each with the reason; it is complete after write(). Whatever is sound in them is used all the same.
    """

    def __init__(self, day: date, channel: Channel, folder: Path) -> None:
        super().__init__(folder)
        self._day = day
        self._channel = channel
        first_ms, after_ms = day_bounds_ms(day)
        self._bounds = {"first_ms": first_ms, "after_ms": after_ms}
        self._waiting: list[Path] = []  # frames not read yet
        self._has_arrivals = False
        self._has_reference = False
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

    def add_reference(self, file: Path) -> None:
        """Adds the vendor's history of the day (a reference_bars file); write() then merges it in. Minutes only."""
        if self._channel is not Channel.MINUTE:
            raise ValueError(f"the reference is of minute bars, and this is channel {self._channel}")
        self._connection.read_parquet(str(file)).create_view("reference")
        self._has_reference = True

    def write(self, target: Path) -> Merge:
        """Writes every bar's latest revision or its reference, sorted by ticker and time. Raises NoBars without any."""
        parts = _regular_hours(self._day)
        if not self._has_arrivals and self._waiting:
            # Everything in one statement, without a table between: a third less time, and less memory.
            with contextlib.suppress(*_UNREADABLE):
                return self._write(f"({_PLAIN_FRAMES})", target, parts, self._frames(self._waiting))
        self._read_waiting()
        return self._write("arrivals", target, parts, {})

    def _write(self, arrivals: str, target: Path, parts: Mapping[str, object], frames: Mapping[str, object]) -> Merge:
        """parts and frames: the parameters of the session and of the arrivals."""
        stream = _NORMALIZED.format(arrivals=arrivals, session=_SESSION.format(start_ms="start_ms"))
        if self._has_reference:
            self._connection.execute(f"CREATE OR REPLACE TEMP TABLE stream AS {stream}", {**parts, **frames})
            self._connection.execute(merge.JOIN)
            merged = merge.MERGED.format(session=_SESSION.format(start_ms="epoch_ms(timestamp)"))
            rows = copy(self._connection, merged, target, parts)
        else:
            rows = copy(self._connection, stream, target, {**parts, **frames})
        if not rows:
            target.unlink()
            raise NoBars(f"there are no raw bars of {self._day}")
        return merge.count(self._connection) if self._has_reference else Merge()

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


def unpacked(file: Path) -> Iterator[bytes]:
    """A file's content, compressed or not, piece by piece. Raises OSError where an archive is damaged or cut short."""
    import pyarrow as pa

    with pa.input_stream(file, compression="detect") as content:
        while chunk := content.read(1 << 20):
            yield chunk


def _decompression_fault(file: Path) -> str | None:
    try:
        for _ in unpacked(file):
            pass
    except OSError as error:
        return str(error)
    return None


class Derivation(OutOfCore):
    """One day's normalized minute bars (a table or a Parquet file), scanned once for all that is made of them.

    A context manager. folder: an empty local folder for what does not fit into memory. Raises NoBars for a day that
    is no trading day.
    """

    def __init__(self, day: date, normalized: pa.Table | Path, folder: Path) -> None:
        super().__init__(folder)
        self._day = day
        if isinstance(normalized, Path):
            self._connection.read_parquet(str(normalized)).create_view("normalized")
        else:
            self._connection.register("normalized", normalized)
        self._connection.execute(_BUCKETS, _regular_hours(day))

    def write(self, name: str, target: Path) -> None:
        """Writes bars_5m, bars_15m, bars_1h or daily_bars, sorted by ticker and time."""
        copy(self._connection, _DERIVED[name], target, {"day": self._day} if name == "daily_bars" else None)


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


def _regular_hours(day: date) -> dict[str, int]:
    """The parameters of _SESSION. Raises NoBars for a day that is no trading day."""
    found = session(day)
    if found is None:
        raise NoBars(f"{day} is not a trading day")
    return {"open_ms": int(found.open.timestamp()) * 1000, "close_ms": int(found.close.timestamp()) * 1000}


def connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """DuckDB in memory, out of core in the folder, with UTC for its time zone."""
    connection = duckdb.connect(
        config={"memory_limit": _MEMORY_LIMIT, "temp_directory": str(folder / "spill"), "threads": _THREADS}
    )
    connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
    return connection


def copy(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    target: Path,
    parameters: Mapping[str, object] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a query's rows to a local Parquet file; returns how many. metadata: the file's own key-value metadata."""
    options = _PARQUET
    if metadata:
        options += f", KV_METADATA {{{', '.join(f'{key}: {_quoted(value)}' for key, value in metadata.items())}}}"
    [(rows,)] = connection.execute(f"COPY ({query}) TO {_quoted(str(target))} ({options})", parameters or {}).fetchall()
    return int(rows)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
