"""Our ratios of splits and dividends against the vendor's cumulative factors: where they differ, or say nothing.

Belongs here: what of the lake a comparison needs. Does not belong here: the ratios and how they are compared
(datasets.adjustment), and fetching listings (datasets.listings).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from polygon_pipeline.datasets import adjustment
from polygon_pipeline.datasets.catalog import DAILY_BARS, DIVIDENDS, SPLITS, Listing
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import MissingDataset, fetch_dataset, fetch_listing_file
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar

# A dividend's ratio needs the day before it. Whoever looks every day has seen the older ones.
_DAYS_OF_DIVIDENDS = 30
# From a session to the one before it.
_DAYS_BEFORE = 7

_NO_CLOSE = "no close is known before it"


@dataclass(frozen=True)
class Comparison:
    """Each a sentence. differences: ratios that are not the vendor's. unusable: the vendor's factors that are 0 or
    null. left_out: records that no price is adjusted by."""

    differences: tuple[str, ...]
    unusable: tuple[str, ...]
    left_out: tuple[str, ...]


def compare(lake: Lake, listing: Listing, file: Path, folder: Path, today: date) -> Comparison:
    """Compares a fetch of splits or dividends. file: the fetch, local. folder: an empty local folder. today: of New
    York. Raises the store's errors."""
    files = {listing.name: file}
    if listing == DIVIDENDS and (splits := _last_fetch(lake, SPLITS, folder)):
        files[SPLITS.name] = splits
    closes = _closes(lake, file, folder, today) if listing == DIVIDENDS else []
    with DuckSession() as session:
        for known in (SPLITS, DIVIDENDS):
            if known.name in files:
                session.view(known.name, files[known.name])
            else:
                session.connection.register(known.name, known.schema().empty_table())
        session.connection.register("no_days", DAILY_BARS.schema().empty_table())
        days = " UNION ALL ".join(f"SELECT ticker, date, close FROM closes_{number}" for number in range(len(closes)))
        for number, of_day in enumerate(closes):
            session.view(f"closes_{number}", of_day)
        session.rows(f"CREATE TEMP VIEW closes AS {days or 'SELECT ticker, date, close FROM no_days'}")
        kind = "split" if listing == SPLITS else "dividend"
        found = [other for other in adjustment.differences(session.connection, today) if other.kind == kind]
        left_out = [other for other in adjustment.skipped(session.connection, today) if other.kind == kind]
    return Comparison(
        tuple(_difference(other) for other in found if other.theirs),
        tuple(
            f"{other.ticker} on {other.date}: the vendor's factor is {other.theirs}"
            for other in found
            if not other.theirs
        ),
        tuple(str(other) for other in left_out if other.problem != _NO_CLOSE),
    )


def _difference(found: adjustment.Difference) -> str:
    ours = "no ratio, as the record is left out" if found.ours is None else f"{found.ours:.6f}"
    return f"{found.ticker} on {found.date}: ours is {ours}, and the vendor's {found.theirs:.6f}"


def _last_fetch(lake: Lake, listing: Listing, folder: Path) -> Path | None:
    days = [layout.parse_listing_key(key) for key in lake.keys(layout.listing_prefix(listing.name))]
    last = max((day for day in days if day), default=None)
    return fetch_listing_file(lake, listing.name, last, folder) if last else None


def _closes(lake: Lake, dividends: Path, folder: Path, today: date) -> list[Path]:
    """The daily bars before the ex-dates of the last month, as far as the lake has them."""
    first = today - timedelta(days=_DAYS_OF_DIVIDENDS)
    with DuckSession() as session:
        session.view("dividends", dividends)
        query = "SELECT DISTINCT ex_dividend_date FROM dividends WHERE ex_dividend_date BETWEEN $first AND $today"
        ex_dates = [day for (day,) in session.rows(query, {"first": first, "today": today})]
    return list(_files(lake, sorted({day for ex_date in ex_dates for day in _days_before(ex_date)}), folder))


def _days_before(day: date) -> list[date]:
    """The sessions before a day, of which the lake may lack some."""
    return calendar.trading_days(day - timedelta(days=_DAYS_BEFORE), day - timedelta(days=1))


def _files(lake: Lake, days: Iterable[date], folder: Path) -> Iterable[Path]:
    for day in days:
        try:
            yield fetch_dataset(lake, DAILY_BARS.name, day.isoformat(), folder)
        except MissingDataset:
            continue
