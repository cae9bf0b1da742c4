"""The lake for people: one line gives bars, days, a universe or their coverage, from S3 or a local folder.

    from polygon_pipeline import read

    read.bars("AAPL", "2026-01-01", "2026-03-01", every="5m", adjusted="splits", to="pandas")
    read.connect().sql("SELECT ticker, close FROM daily_bars WHERE date = '2026-01-26'")

The lake is the environment's (LAKE_URI, AWS_*), as for the rest of the project; reading needs no key of the vendor.
Only the days and columns asked for are read. Dates are trade dates, as `date` or YYYY-MM-DD, both ends included. Each
function gives a pyarrow Table, or with `to="pandas"` or `to="polars"` a data frame of theirs.

Belongs here: finding the lake, its datasets as views, and these functions. Does not belong here: how prices are
adjusted (datasets.adjustment), and how files of S3 are read (lake.ranged_files).
"""

from __future__ import annotations

import inspect
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote, urlsplit

import duckdb

from polygon_pipeline import access, settings
from polygon_pipeline.datasets import adjustment, catalog
from polygon_pipeline.datasets.adjustment import Adjusted
from polygon_pipeline.datasets.catalog import Column, Dataset, Listing
from polygon_pipeline.datasets.listings import ASKED_FOR
from polygon_pipeline.datasets.session import UNREADABLE, quoted
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import STORE_ERRORS, brief, permanent_error
from polygon_pipeline.lake.ranged_files import SCHEME, RangedFiles
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market import calendar

if TYPE_CHECKING:
    import pyarrow as pa

Every = Literal["1s", "1m", "5m", "15m", "30m", "1h"]
To = Literal["arrow", "pandas", "polars"]
Day = date | str

_BARS: dict[str, Dataset] = {
    "1s": catalog.NORMALIZED_SECOND_BARS,
    "1m": catalog.NORMALIZED_BARS,
    "5m": catalog.BARS_5M,
    "15m": catalog.BARS_15M,
    "30m": catalog.BARS_30M,
    "1h": catalog.BARS_1H,
}
_BAR_COLUMNS = ("ticker", "date", "timestamp", "open", "high", "low", "close", "volume", "vwap", "session")

# S3 answers in tens of milliseconds: as many files are asked for side by side. A local disk needs no more than cores.
_THREADS_ON_S3 = 32

# So many tickers are named in an error.
_NAMED = 5

# A dividend's ratio needs the close before it, which is looked for on so many days of the lake.
_DAYS_BEFORE = 5

_TYPES = {
    "string": "VARCHAR",
    "double": "DOUBLE",
    "int64": "BIGINT",
    "bool": "BOOLEAN",
    "date": "DATE",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
}

_FILL = (
    "`make dev` fills one; a day of the vendor's history is made with `dagster asset materialize -m "
    "polygon_pipeline.definitions --select reference_bars,normalized_bars,daily_bars --partition YYYY-MM-DD`"
)


class ReadError(Exception):
    """What was asked for cannot be read; the text says why, and what to do."""


class ReadWarning(UserWarning):
    """What was read lacks something that was asked for."""


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with each dataset of the lake as a view, in which nothing of the lake can be changed.

    Each view has the columns of the catalog and `date`, or `fetched` for what is kept by the day it was fetched on; a
    condition on it reads only those days. Datasets that the lake does not have yet are empty. Raises ReadError,
    LakeError and settings.ConfigurationError.
    """
    reader = _Reader(_open())
    present = reader.lake.folders("datasets/")
    _tell_simulated(reader.lake)
    if not present:
        raise ReadError(f"{reader.lake.uri} has no datasets yet: {_FILL}. LAKE_URI names another lake.")
    known = {dataset.name: dataset for dataset in (*catalog.DATASETS, *catalog.LISTINGS) if dataset.columns}
    for name in sorted({*known, *present}):
        reader.view(name, known.get(name), name in present)
    return reader.connection


def bars(
    ticker: str | Sequence[str],
    first: Day,
    last: Day | None = None,
    every: Every = "1m",
    adjusted: Adjusted = "none",
    as_of: Day | None = None,
    to: To = "arrow",
) -> Any:
    """Bars of a ticker, of several, or of all ("*"), sorted by ticker and time; timestamps are UTC.

    first, last: trade dates; last: the newest without one. every: an interval that the lake has a dataset of. adjusted:
    not at all, for splits, or for "all": splits and dividends. as_of: adjusted by what was known on that day and had
    happened by then, in that day's shares; today's without one.

    A day that the lake does not have is not in the result: coverage() says which. Warns (ReadWarning) of tickers
    without bars and of records that no price could be adjusted by. Raises ReadError where there is nothing to give.
    """
    if every not in _BARS:
        raise ReadError(
            f"every is {every!r}; the lake has bars of {', '.join(_BARS)}, and days: daily(). Other intervals are made "
            "of a shorter one, as by time_bucket in SQL."
        )
    return _adjusted_rows(_BARS[every], _BAR_COLUMNS, ticker, first, last, adjusted, as_of, to)


def daily(
    ticker: str | Sequence[str],
    first: Day,
    last: Day | None = None,
    adjusted: Adjusted = "none",
    as_of: Day | None = None,
    to: To = "arrow",
) -> Any:
    """Daily bars, with all columns of `daily_bars`; otherwise as bars()."""
    columns = [column.name for column in catalog.DAILY_BARS.columns]
    return _adjusted_rows(catalog.DAILY_BARS, columns, ticker, first, last, adjusted, as_of, to)


def universe(day: Day, to: To = "arrow") -> Any:
    """The tickers that were listed on a day, delisted ones since then included, as the vendor lists them.

    Of the listing as of that day or, where the lake has none, of the last one before it: `as_of` says which. Raises
    ReadError where the lake has neither.
    """
    wanted = _date("day", day)
    with _reading(to) as reader:
        columns = [column.name for column in catalog.TICKERS.columns]
        files = reader.fetches(catalog.TICKERS)
        if files:
            reader.relation("listings", catalog.TICKERS, list(files.values()))
            found = reader.table(
                f"""
                SELECT {", ".join(columns)}
                FROM listings
                WHERE as_of = (SELECT max(as_of) FROM listings WHERE as_of <= $day)
                QUALIFY fetched_at = max(fetched_at) OVER (PARTITION BY ticker) AND active
                ORDER BY ticker
                """,
                {"day": wanted},
            )
            if found.num_rows:
                return _converted(found, to)
        raise ReadError(
            f"{reader.lake.uri} has no listing of tickers as of {wanted} or a day before: materialize `tickers` with "
            f"as_of: ['{wanted}'] in its configuration. What traded then without it: daily('*', day, day)."
        )


def coverage(first: Day, last: Day | None = None, ticker: str = "*", to: To = "arrow") -> Any:
    """What the lake has of each trading day from first to last, of one ticker or of all ("*") together.

    is_stored: whether it has the day's bars at all; day_state: as in daily_bars; then, from bar_coverage, tickers, the
    minutes collected, traded, lost (repaired ones included) and repaired, and share: of the traded minutes those that
    the bars have, 0 to 1. Null where the lake has no bar_coverage of the day. last: today without one.
    """
    begin = _date("first", first)
    end = _today() if last is None else _date("last", last)
    with _reading(to) as reader:
        stored = reader.days(catalog.NORMALIZED_BARS, begin, end)
        for name, dataset in (("covered", catalog.BAR_COVERAGE), ("days", catalog.DAILY_BARS)):
            reader.relation(name, dataset, list(reader.days(dataset, begin, end).values()))
        chosen = "true" if ticker == "*" else f"ticker = {quoted(ticker)}"
        if ticker != "*" and not reader.table(f"SELECT 1 FROM covered WHERE {chosen} LIMIT 1").num_rows:
            raise ReadError(reader.no_rows(catalog.BAR_COVERAGE, "covered", [ticker]))
        found = reader.table(
            f"""
            SELECT date, date IN (SELECT unnest($stored::DATE[])) AS is_stored, * EXCLUDE (date)
            FROM (SELECT unnest($trading_days::DATE[]) AS date)
            LEFT JOIN (SELECT date, any_value(day_state) AS day_state FROM days GROUP BY date) USING (date)
            LEFT JOIN (
                SELECT
                    date,
                    count(*) AS tickers,
                    sum(collected_minutes)::BIGINT AS collected_minutes,
                    sum(traded_minutes)::BIGINT AS traded_minutes,
                    sum(lost_disconnected + lost_connected)::BIGINT AS lost_minutes,
                    sum(repaired_minutes)::BIGINT AS repaired_minutes,
                    sum(share * traded_minutes) / nullif(sum(traded_minutes) FILTER (WHERE share IS NOT NULL), 0)
                        AS share
                FROM covered
                WHERE {chosen}
                GROUP BY date
            ) USING (date)
            ORDER BY date
            """,
            {"stored": list(stored), "trading_days": calendar.trading_days(begin, end)},
        )
        return _converted(found, to)


def _adjusted_rows(
    dataset: Dataset,
    columns: Sequence[str],
    ticker: str | Sequence[str],
    first: Day,
    last: Day | None,
    adjusted: Adjusted,
    as_of: Day | None,
    to: To,
) -> Any:
    named = list(dict.fromkeys([ticker] if isinstance(ticker, str) else ticker))
    tickers = None if "*" in named else named
    begin = _date("first", first)
    end = date.max if last is None else _date("last", last)
    known = None if as_of is None else _date("as_of", as_of)
    if tickers == []:
        raise ReadError('ticker is empty; name at least one, or "*" for all.')
    if begin > end:
        raise ReadError(f"first is {begin}, after last, {end}.")
    if adjusted not in get_args(Adjusted):
        raise ReadError(f"adjusted is {adjusted!r}; it must be none, splits or all.")
    if known and adjusted == "none":
        raise ReadError('as_of says what prices are adjusted by: give adjusted="splits" or "all" with it.')
    with _reading(to) as reader:
        files = reader.days(dataset, begin, end)
        if not files:
            raise ReadError(reader.no_days(dataset, begin, end))
        reader.relation("stored", dataset, list(files.values()))
        if adjusted != "none":
            reader.make_factors(tickers, min(files), known, with_dividends=adjusted == "all")
        rows = f"(SELECT {', '.join(columns)} FROM stored WHERE {_is_among(tickers)})"
        order = ", ".join(column for column in ("ticker", "date", "timestamp") if column in columns)
        found = reader.table(f"{adjustment.adjusted_rows(rows, columns, adjusted)} ORDER BY {order}")
        if tickers is not None:
            _tell_missing(reader, dataset, tickers, set(found["ticker"].unique().to_pylist()))
        return _converted(found, to)


def _tell_missing(reader: _Reader, dataset: Dataset, tickers: Sequence[str], present: set[str]) -> None:
    if missing := [ticker for ticker in tickers if ticker not in present]:
        text = reader.no_rows(dataset, "stored", missing)
        if not present:
            raise ReadError(text)
        _warn(text)


class _Reader:
    """A lake and a DuckDB connection that can read its files."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        spill = Path(tempfile.gettempdir()) / f"polygon-pipeline-{time.time_ns()}"  # DuckDB makes it, and removes it
        self.connection = duckdb.connect(config={"temp_directory": str(spill)})
        self.connection.execute("SET TimeZone = 'UTC'")
        self.connection.execute("SET enable_progress_bar = false")
        self.remote: RangedFiles | None = None
        if lake.is_s3:
            self.remote = RangedFiles(lake)
            self.connection.register_filesystem(self.remote)
            self.connection.execute(f"SET threads = {_THREADS_ON_S3}")

    def table(self, query: str, parameters: dict[str, object] | None = None) -> pa.Table:
        return self.connection.sql(query, params=parameters or {}).to_arrow_table()

    def days(self, dataset: Dataset, first: date, last: date) -> dict[date, str]:
        """The days of a dataset that the lake has, in order, each with its file as DuckDB names it."""
        # Keys are in the order of days, so those before the first need not be listed.
        before = layout.dataset_key(dataset.name, (first - timedelta(days=1)).isoformat()) if first > date.min else None
        found = self._files(dataset.name, "date", before)
        return {day: file for day, file in found.items() if first <= day <= last}

    def fetches(self, listing: Listing, until: date = date.max) -> dict[date, str]:
        """The days of a listing's fetches up to a day, in order, each with its file as DuckDB names it."""
        return {day: file for day, file in self._files(listing.name, "fetched").items() if day <= until}

    def _files(self, name: str, partition: str, after: str | None = None) -> dict[date, str]:
        prefix = f"datasets/{name}/"
        keys = self.remote.keys(prefix, after) if self.remote else self.lake.keys(prefix)
        found = {}
        for key in keys:
            folder, _, file = key.removeprefix(prefix).partition("/")
            if file == "data.parquet" and folder.startswith(f"{partition}="):
                try:
                    found[date.fromisoformat(folder.removeprefix(f"{partition}="))] = self._path(key)
                except ValueError:
                    continue  # something else that lies there
        return found

    def _path(self, key: str) -> str:
        return f"{SCHEME}://{key}" if self.remote else str(self.lake.local_root / key)

    def relation(self, name: str, dataset: Dataset | Listing, files: Sequence[str]) -> None:
        """Makes these files of a dataset readable under a name, with the catalog's columns, whatever files they are."""
        partition = "fetched" if isinstance(dataset, Listing) else "date"
        select = _select(dataset.columns, partition, files) if files else _nothing(dataset.columns, partition)
        self.connection.execute(f'CREATE OR REPLACE TEMP VIEW "{name}" AS {select}')

    def view(self, name: str, dataset: Dataset | Listing | None, is_present: bool) -> None:
        """Makes all files of a dataset readable that there are when they are asked for. dataset: None for one's own."""
        partition = "fetched" if isinstance(dataset, Listing) else "date"
        pattern = self._path(f"datasets/{name}/{partition}=*/data.parquet")
        identifier = '"' + name.replace('"', '""') + '"'
        if is_present:
            own = f"SELECT * FROM read_parquet({quoted(pattern)}, hive_partitioning = true)"
            select = own if dataset is None else _select(dataset.columns, partition, [pattern])
            try:
                self.connection.execute(f"CREATE VIEW {identifier} AS {select}")
                return
            except duckdb.IOException as error:
                if "No files found" not in str(error):
                    raise
        if dataset is not None:
            self.connection.execute(f"CREATE VIEW {identifier} AS {_nothing(dataset.columns, partition)}")

    def make_factors(
        self, tickers: Sequence[str] | None, first: date, as_of: date | None, with_dividends: bool
    ) -> None:
        """Makes the table `factors` for prices from `first` on. as_of: as in bars()."""
        connection, until = self.connection, as_of or _today()
        for listing in (catalog.SPLITS, catalog.DIVIDENDS):
            files = []
            if with_dividends or listing == catalog.SPLITS:
                fetches = self.fetches(listing, as_of or date.max)
                if not fetches:
                    raise ReadError(self._no_fetch(listing, as_of))
                files = [fetches[max(fetches)]]
                self._require_asked(listing, files[0], tickers)
            self.relation("known", listing, files)
            connection.execute(f"CREATE TEMP TABLE {listing.name} AS SELECT * FROM known WHERE {_is_among(tickers)}")
        ex_dates = connection.execute(
            "SELECT DISTINCT ex_dividend_date AS date FROM dividends WHERE date > $first AND date <= $until",
            {"first": first, "until": until},
        ).fetchall()
        self.relation("days_before", catalog.DAILY_BARS, self._days_before([day for (day,) in ex_dates]))
        connection.execute(
            f"CREATE TEMP TABLE closes AS SELECT ticker, date, close FROM days_before WHERE {_is_among(tickers)}"
        )
        adjustment.make_factors(connection, until)
        for record in adjustment.skipped(connection, until, first):
            _warn(f"Prices are not adjusted for all that is known: {record}.")

    def _require_asked(self, listing: Listing, file: str, tickers: Sequence[str] | None) -> None:
        """Raises ReadError for tickers whose events were not asked for: raw prices would be given for adjusted ones."""
        found = self.connection.execute(
            "SELECT decode(value) FROM parquet_kv_metadata($file) WHERE decode(key) = $key",
            {"file": file, "key": ASKED_FOR},
        ).fetchone()
        asked_for = json.loads(found[0]) if found else None
        if asked_for is None:
            return
        rows = "SELECT DISTINCT ticker FROM stored" if tickers is None else "SELECT unnest($tickers) AS ticker"
        unknown = self.connection.execute(
            f"SELECT ticker FROM ({rows}) WHERE NOT list_contains($asked_for, ticker) ORDER BY ticker",
            {"asked_for": asked_for} | ({} if tickers is None else {"tickers": list(tickers)}),
        ).fetchall()
        if unknown:
            named = ", ".join(ticker for (ticker,) in unknown[:_NAMED]) + (" and more" if len(unknown) > _NAMED else "")
            raise ReadError(
                f"The {listing.name} of {named} were not asked for when {listing.name} was fetched last, so its prices "
                f"cannot be adjusted: materialize {listing.name} with it in POLYGON_TICKERS, or read without it."
            )

    def _days_before(self, ex_dates: Sequence[date]) -> list[str]:
        if not ex_dates:
            return []
        stored = self.days(catalog.DAILY_BARS, min(ex_dates) - timedelta(days=365), max(ex_dates))
        needed = {day for ex_date in ex_dates for day in [d for d in stored if d < ex_date][-_DAYS_BEFORE:]}
        return [stored[day] for day in sorted(needed)]

    def _no_fetch(self, listing: Listing, as_of: date | None) -> str:
        fetches = self.fetches(listing)
        if fetches:
            return (
                f"{self.lake.uri} has no {listing.name} from before {min(fetches)}, so what was known on {as_of} "
                "cannot be said. Leave as_of out to adjust by what is known now."
            )
        return f"{self.lake.uri} has no {listing.name}, which prices are adjusted by: materialize {listing.name}."

    def no_rows(self, dataset: Dataset, relation: str, tickers: Sequence[str]) -> str:
        """What is said where the days of a relation do not have these tickers."""
        present = [
            row[0] for row in self.connection.sql(f"SELECT DISTINCT ticker FROM {relation} ORDER BY 1").fetchall()
        ]
        more = f" and {len(present) - _NAMED:,} more" if present[_NAMED:] else ""
        hint = ""
        if any(ticker != ticker.upper() for ticker in tickers):
            hint = " Tickers are in the vendor's case: most are in capitals."
        return (
            f"{dataset.name} of these days has no {', '.join(tickers)}, in {self.lake.uri}: it has "
            f"{', '.join(present[:_NAMED]) or 'none'}{more}.{hint}"
        )

    def no_days(self, dataset: Dataset, first: date, last: date) -> str:
        every = self.days(dataset, date.min, date.max)
        if not every:
            return f"{self.lake.uri} has no {dataset.name} yet: {_FILL}. LAKE_URI names another lake."
        span = f"on {first}" if first == last else f"from {first} on" if last == date.max else f"from {first} to {last}"
        closed = "" if calendar.trading_days(first, last) else " No session is then."
        return (
            f"{dataset.name} has no day {span}, in {self.lake.uri}: it has {len(every)} from {min(every)} to "
            f"{max(every)}.{closed}"
        )


@contextmanager
def _reading(to: To) -> Iterator[_Reader]:
    """A reader for one answer. What the store and DuckDB say is raised as ReadError or LakeError."""
    if to not in get_args(To):
        raise ReadError(f"to is {to!r}; it must be arrow, pandas or polars.")
    reader = _Reader(_open())
    try:
        _tell_simulated(reader.lake)
        yield reader
    except STORE_ERRORS as error:
        raise permanent_error(error, reader.lake.uri, reader.lake.bucket_region) or error from error
    except UNREADABLE as error:
        raise ReadError(f"{reader.lake.uri} cannot be read: {brief(error)}") from error
    except duckdb.Error as error:
        if reader.remote is None or (cause := reader.remote.error) is None:
            raise
        raise permanent_error(cause, reader.lake.uri, reader.lake.bucket_region) or cause from error
    finally:
        reader.connection.close()


def _open() -> Lake:
    """The environment's lake, or the demo's. Raises ReadError where it is a folder that is not there."""
    environment = access.environment()
    # An S3 lake may be read without the vendor's key, which only collecting needs.
    uri = environment.get("LAKE_URI") or settings.lake_uri(environment)
    if uri.startswith("file://") and not Path(unquote(urlsplit(uri).path)).is_dir():
        raise ReadError(f"There is no lake at {uri}. Set LAKE_URI to where one is; {_FILL}.")

    def s3() -> Any:
        import boto3

        return access.s3_access(boto3.Session())

    return open_lake(uri, s3)


def _tell_simulated(lake: Lake) -> None:
    if lake.feed() == "simulated":
        _warn(f"{lake.uri} holds a simulated market, not the real one.")


def _warn(text: str) -> None:
    """Warns of the line that called this module."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_globals["__name__"] in (__name__, "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ReadWarning, stacklevel=level)


def _select(columns: Sequence[Column], partition: str, files: Sequence[str]) -> str:
    """The catalog's columns of these files, and the partition's day from their names.

    Files from before a column was added lack it, and those of other programs may have more: so DuckDB is told the
    columns. It opens no file to learn them then, and only those whose day a query asks for.
    """
    schema = ", ".join(
        f"'{column.name}': {{name: '{column.name}', type: '{_TYPES[column.type]}', default_value: NULL}}"
        for column in columns
        if column.name != partition
    )
    day = f"TRY_CAST(regexp_extract(filename, '{partition}=([^/]+)/[^/]+$', 1) AS DATE) AS {partition}"
    return (
        f"SELECT {', '.join(_in_order(columns, partition, day))} "
        f"FROM read_parquet([{', '.join(map(quoted, files))}], schema = MAP {{{schema}}})"
    )


def _nothing(columns: Sequence[Column], partition: str) -> str:
    types = {column.name: _TYPES[column.type] for column in columns} | {partition: "DATE"}
    return f"SELECT {', '.join(f'NULL::{type} AS {name}' for name, type in types.items())} WHERE false"


def _in_order(columns: Sequence[Column], partition: str, day: str) -> list[str]:
    names = [column.name for column in columns]
    return [day if name == partition else name for name in (names if partition in names else [*names, partition])]


def _is_among(tickers: Sequence[str] | None) -> str:
    return "true" if tickers is None else f"ticker IN ({', '.join(map(quoted, tickers))})"


def _converted(table: pa.Table, to: To) -> Any:
    if to == "pandas":
        return table.to_pandas(date_as_object=False)
    if to == "polars":
        try:
            import polars
        except ImportError:
            raise ReadError(
                'to="polars" needs the package polars, which is not installed: pip install polars.'
            ) from None
        return polars.from_arrow(table)
    return table


def _date(name: str, value: Day) -> date:
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            raise ReadError(f"{name} is {value!r}; it must be a date, YYYY-MM-DD.") from None
    return date(value.year, value.month, value.day)


def _today() -> date:
    return calendar.trade_date(time.time_ns() // 1_000_000)
