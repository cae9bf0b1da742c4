"""The vendor's own history of a day: rows made from a flat file or from REST answers, and what a file says of itself.

Belongs here: those rows, in SQL. Does not belong here: fetching (datasets.reference_sources, polygon), and what is made
of the rows (datasets.merge, datasets.coverage).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path

import duckdb
import msgspec

from polygon_pipeline.datasets.catalog import REFERENCE_BARS, Dataset
from polygon_pipeline.datasets.quality import schema_errors
from polygon_pipeline.datasets.session import INVALID, DuckSession
from polygon_pipeline.lake.archive import unpacked
from polygon_pipeline.market.calendar import day_bounds_ms
from polygon_pipeline.polygon.flat_files import FLAT_FILE_COLUMNS, FlatFileKind
from polygon_pipeline.polygon.rest import DayAnswer, Page
from polygon_pipeline.polygon.sql import FLAT_FILE_START_MS, HISTORY_BAR_COLUMNS, HISTORY_BARS_TYPE

# A bar without these is no bar: better no reference than one that says less than it seems to. In one CASE, because
# the parts of a condition are evaluated in any order.
_IF_WHOLE = """
    CASE
        WHEN ticker IS NULL OR start_ms IS NULL OR open IS NULL OR high IS NULL OR low IS NULL OR close IS NULL
            OR volume IS NULL THEN error('a bar of ' || coalesce(ticker, 'no ticker') || ' lacks a value')
        ELSE {wanted}
    END
"""

_FROM_FLAT_FILE = f"""
    SELECT
        ticker, to_timestamp(start_ms // 1000) AS timestamp, open, high, low, close, volume,
        CAST(NULL AS DOUBLE) AS vwap, transactions, $received_at AS received_at, 'flat_file' AS source
    FROM (
        SELECT *, {FLAT_FILE_START_MS} AS start_ms
        FROM read_csv($file, auto_detect = false, header = true, columns = $columns)
    )
    WHERE {_IF_WHOLE.format(wanted="start_ms >= $first_ms AND start_ms < $after_ms")}
    ORDER BY ticker, start_ms
"""

# Of two bars of a ticker's day the one with more volume knows more; there should be none.
_ONE_A_TICKER = """
    QUALIFY row_number() OVER (
        PARTITION BY ticker ORDER BY volume DESC, transactions DESC, start_ms, open, high, low, close
    ) = 1
    ORDER BY ticker
"""

_FINITE = "CASE WHEN isfinite({0}) THEN {0} ELSE error('a bar of ' || ticker || ' has an infinite {0}') END AS {0}"

_DAYS_FROM_FLAT_FILE = f"""
    SELECT
        ticker, $day AS date, {", ".join(_FINITE.format(name) for name in ("open", "high", "low", "close", "volume"))},
        CAST(NULL AS DOUBLE) AS vwap, transactions, CAST(NULL AS BOOLEAN) AS otc, $received_at AS received_at,
        'flat_file' AS source
    FROM (
        SELECT *, {FLAT_FILE_START_MS} AS start_ms
        FROM read_csv($file, auto_detect = false, header = true, columns = $columns)
    )
    WHERE {_IF_WHOLE.format(wanted="start_ms >= $first_ms AND start_ms < $after_ms")}
    {_ONE_A_TICKER}
"""

# `t` is the end of the window here, which may be midnight.
_DAYS_FROM_ANSWER = f"""
    SELECT
        ticker, $day AS date, open, high, low, close, volume, vwap, transactions, otc, $received_at AS received_at,
        'rest' AS source
    FROM answer
    WHERE start_ms > $first_ms AND start_ms <= $after_ms
    {_ONE_A_TICKER}
"""

_FLAT_FILE_ROWS = {FlatFileKind.MINUTES: _FROM_FLAT_FILE, FlatFileKind.DAYS: _DAYS_FROM_FLAT_FILE}

# The lines that page_line() makes.
_READ_PAGES = f"""
    CREATE TEMP TABLE pages AS
    SELECT ticker, fetched_at, bar, {HISTORY_BAR_COLUMNS}
    FROM (
        SELECT ticker, fetched_at, unnest(bars) AS bar
        FROM read_json(
            $files,
            format = 'newline_delimited',
            columns = {{ticker: 'VARCHAR', fetched_at: 'TIMESTAMPTZ', bars: '{HISTORY_BARS_TYPE}'}}
        )
    )
    WHERE {_IF_WHOLE.format(wanted="list_contains($tickers::VARCHAR[], ticker)")}
"""

# Of two pages with the same bar the later fetched wins; the values decide only between pages of the same microsecond.
_FROM_PAGES = """
    SELECT
        ticker, to_timestamp(start_ms / 1000) AS timestamp, open, high, low, close, volume, vwap, transactions,
        fetched_at AS received_at, 'rest' AS source
    FROM pages
    WHERE start_ms >= $first_ms AND start_ms < least($after_ms, $until_ms)
    QUALIFY row_number() OVER (PARTITION BY ticker, start_ms ORDER BY fetched_at DESC, bar DESC) = 1
    ORDER BY ticker, start_ms
"""


class UnreadableReference(Exception):
    """What was fetched cannot be made a reference of; fetching the same again cannot help."""


class ReferenceInfo(msgspec.Struct, frozen=True):
    """What a reference file knows, kept in its key-value metadata.

    source: rest or flat_file. tickers: those asked for, with or without bars; None for the whole market. until_ms:
    bars that start before this (Unix ms) are known. etag: the flat file's.
    """

    source: str
    tickers: tuple[str, ...] | None
    until_ms: int
    etag: str | None


def from_flat_file(
    day: date,
    file: Path,
    last_modified: datetime,
    etag: str | None,
    target: Path,
    folder: Path,
    kind: FlatFileKind = FlatFileKind.MINUTES,
) -> None:
    """Writes a day's reference_bars, or of day bars its reference_daily_bars, from the vendor's CSV (.csv.gz).

    folder: an empty local folder. Raises UnreadableReference if the file is damaged, has other columns than
    FLAT_FILE_COLUMNS, or no bar of the day.
    """
    if last_modified.tzinfo is None:
        raise ValueError(f"last_modified is {last_modified}, which has no time zone")
    first_ms, after_ms = day_bounds_ms(day)
    # Unpacked first: the checksum is verified, which DuckDB leaves out, and plain text is read by several threads.
    plain = folder / "flat-file.csv"
    with plain.open("wb") as content:
        for chunk in _unpacked(file):
            content.write(chunk)
    with plain.open(encoding="utf-8", errors="replace") as lines:
        columns = lines.readline(4096).strip().split(",")
    if columns != list(FLAT_FILE_COLUMNS):
        raise UnreadableReference(
            f"{file} has the columns {', '.join(columns)}, but {', '.join(FLAT_FILE_COLUMNS)} were expected"
        )
    parameters = {
        "file": str(plain),
        "columns": FLAT_FILE_COLUMNS,
        "received_at": last_modified,
        "first_ms": first_ms,
        "after_ms": after_ms,
        **({"day": day} if kind is FlatFileKind.DAYS else {}),
    }
    info = ReferenceInfo("flat_file", None, after_ms, etag)
    with DuckSession(folder) as session, _readable(str(file)):
        rows = session.copy(_FLAT_FILE_ROWS[kind], target, parameters, _metadata(info))
    plain.unlink()
    if not rows:
        raise UnreadableReference(f"{file} has no bar of {day}; is it another day's file?")


def from_day_answer(day: date, answer: DayAnswer, target: Path, folder: Path) -> None:
    """Writes a day's reference_daily_bars from the whole market's answer by REST.

    folder: an empty local folder. Raises UnreadableReference if none of its bars is of the day.
    """
    import pyarrow as pa

    names = ("ticker", "start_ms", "open", "high", "low", "close", "volume", "vwap", "transactions", "otc")
    types = ("string", "int64", *["float64"] * 6, "int64", "bool")
    columns = {
        name: pa.array([getattr(bar, name) for bar in answer.bars], kind)
        for name, kind in zip(names, types, strict=True)
    }
    first_ms, after_ms = day_bounds_ms(day)
    parameters = {"day": day, "received_at": answer.fetched_at, "first_ms": first_ms, "after_ms": after_ms}
    with DuckSession(folder) as session:
        session.connection.register("answer", pa.table(columns))
        info = ReferenceInfo("rest", None, after_ms, None)
        rows = session.copy(_DAYS_FROM_ANSWER, target, parameters, _metadata(info))
    if not rows:
        raise UnreadableReference(f"the vendor's answer for {day} has {len(answer.bars)} bars, and none is of that day")


def page_line(page: Page) -> bytes:
    """A REST answer as it waits on disk, one line of JSON.

    Its bars are written anew: DuckDB refuses more than the decoder does (a repeated key, the name of an unknown field
    that is not UTF-8), and would refuse all lines for it.
    """
    return msgspec.json.encode({"ticker": page.ticker, "fetched_at": page.fetched_at, "bars": page.bars}) + b"\n"


class Pages(DuckSession):
    """REST answers (lines of page_line, .jsonl or .jsonl.zst), read once for all their days.

    A context manager. tickers: those that were asked for, with or without bars; what else there is is left out.
    folder: an empty local folder for what does not fit into memory. Raises UnreadableReference if a file is damaged.
    """

    def __init__(self, files: Sequence[Path], tickers: Sequence[str], folder: Path) -> None:
        if not files:
            raise ValueError("there are no pages to make a reference from")
        for file in files:
            for _ in _unpacked(file):  # DuckDB takes the end of a cut archive for its end
                pass
        super().__init__(folder)
        self._tickers = tuple(sorted(tickers))
        with _readable(f"the {len(files)} files of pages"):
            self.rows(_READ_PAGES, {"files": [str(file) for file in files], "tickers": list(tickers)})

    def write(self, day: date, until_ms: int, target: Path) -> None:
        """Writes a day's reference.

        Bars that start at until_ms (Unix ms) or later are left out, since nothing is claimed to be known of them.
        Tickers may be without any bar, even all of them: they did not trade.
        """
        first_ms, after_ms = day_bounds_ms(day)
        info = ReferenceInfo("rest", self._tickers, until_ms, None)
        parameters = {"until_ms": until_ms, "first_ms": first_ms, "after_ms": after_ms}
        self.copy(_FROM_PAGES, target, parameters, _metadata(info))


def read_reference_info(file: Path, dataset: Dataset = REFERENCE_BARS) -> ReferenceInfo:
    """What a reference file says of itself. dataset: reference_bars or reference_daily_bars. Raises UnreadableReference
    if it is no such file."""
    import pyarrow.parquet as pq

    if errors := schema_errors(file, dataset):
        raise UnreadableReference(f"{file} is no reference file: {'; '.join(errors)}")
    content = (pq.read_metadata(file).metadata or {}).get(b"reference")
    if content is None:
        raise UnreadableReference(f"{file} has no key-value metadata `reference`; it is no reference file")
    try:
        return msgspec.json.decode(content, type=ReferenceInfo)
    except ValueError as error:
        raise UnreadableReference(f"{file} has key-value metadata `reference` that cannot be read: {error}") from error


def same_bars(old: Path, new: Path, dataset: Dataset = REFERENCE_BARS) -> bool:
    """Whether two reference files say the same, whenever they were received. A damaged one says nothing."""
    compared = ", ".join(column.name for column in dataset.columns if column.name != "received_at")

    def known(file: Path) -> ReferenceInfo:
        return msgspec.structs.replace(read_reference_info(file, dataset), etag=None)

    if known(old) != known(new):
        return False
    # Rows are unique, so with as many of them one direction is enough.
    query = f"""
        SELECT (SELECT count(*) FROM read_parquet($old)) = (SELECT count(*) FROM read_parquet($new)) AND NOT EXISTS (
            SELECT {compared} FROM read_parquet($old) EXCEPT SELECT {compared} FROM read_parquet($new)
        )
    """
    with DuckSession() as session, contextlib.suppress(duckdb.Error):
        [(same,)] = session.rows(query, {"old": str(old), "new": str(new)})
        return bool(same)
    return False


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except INVALID as error:
        raise UnreadableReference(f"{what} cannot be read: {error}") from error


def _metadata(info: ReferenceInfo) -> dict[str, str]:
    return {"reference": msgspec.json.encode(info).decode()}


def _unpacked(file: Path) -> Iterator[bytes]:
    try:
        yield from unpacked(file)
    except OSError as error:
        raise UnreadableReference(f"{file} is damaged: {error}") from error
