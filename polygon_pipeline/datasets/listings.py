"""The vendor's listings: what is fetched of splits, dividends, tickers and their renames, and how a fetch is kept.

Belongs here: which tickers and days are asked for, a listing's rows as a table, and what of a day's file a later fetch
of that day replaces. Does not belong here: the requests (polygon.corporate_actions), and adjusting prices.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from polygon_pipeline.datasets.catalog import DIVIDENDS, SPLITS, TICKERS, Listing
from polygon_pipeline.lake.dataset_files import fetch_listing_file, put_listing
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.polygon import corporate_actions
from polygon_pipeline.polygon.corporate_actions import Found
from polygon_pipeline.polygon.errors import HistoryUnavailable
from polygon_pipeline.polygon.rest import RestHistory

if TYPE_CHECKING:
    import pyarrow as pa


# In the metadata of a file of splits or dividends: the tickers that were asked for, as a JSON array; null for all. Of
# another ticker the file says nothing.
ASKED_FOR = "asked_for"


@dataclass(frozen=True)
class Fetched:
    """A listing as it was found. replaced: the values of its key of which this is everything; None where it has none.

    refused: what was left out and why, for people.
    """

    listing: Listing
    table: pa.Table
    fetched_at: datetime
    replaced: tuple[Any, ...] | None
    refused: tuple[str, ...]
    requests: int


def fetch_listing(
    listing: Listing, rest: RestHistory, tickers: Sequence[str] | None, since: date, as_of: date
) -> Fetched:
    """Asks the vendor. tickers: None for the whole market, of which ticker_events cannot be asked for.

    since: of the whole market's events, from when on. as_of: of `tickers`, the date that is asked for. Raises as
    RestHistory.
    """
    found: Found[Any]
    constant: dict[str, Any] = {}
    replaced: tuple[Any, ...] | None = None
    if listing == SPLITS:
        found = corporate_actions.splits(rest, tickers, since)
    elif listing == DIVIDENDS:
        found = corporate_actions.dividends(rest, tickers, since)
    elif listing == TICKERS:
        found = corporate_actions.tickers(rest, tickers, as_of)
        if not found.rows:
            # An empty file would say that there was no market.
            raise HistoryUnavailable(
                f"The vendor lists none of the tickers as of {as_of}. Check POLYGON_TICKERS, and how far back the plan "
                "reaches."
            )
        constant, replaced = {"as_of": as_of}, (as_of,)
    else:
        if tickers is None:
            raise ValueError("renames are asked for by ticker")
        found = corporate_actions.ticker_events(rest, tickers)
        replaced = tuple(tickers)
    table = _table(listing, found.rows, constant | {"fetched_at": found.fetched_at})
    if not listing.key:
        asked_for = None if tickers is None else sorted(tickers)
        table = table.replace_schema_metadata({ASKED_FOR: json.dumps(asked_for)})
    return Fetched(listing, table, found.fetched_at, replaced, tuple(found.refused), found.requests)


def keep(lake: Lake, fetched: Fetched, folder: Path) -> Path:
    """Stores a listing under the UTC date of its fetch; returns the local file. What that day's file has of other
    values of the key stays; everything else of the day is replaced."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    listing, table, day = fetched.listing, fetched.table, fetched.fetched_at.date()
    if listing.key and (before := fetch_listing_file(lake, listing.name, day, folder)):
        known = pq.read_table(before, partitioning=None)
        replaced = pa.array(fetched.replaced, known.schema.field(listing.key).type)
        others = known.filter(pc.invert(pc.is_in(known[listing.key], replaced)))
        table = _sorted(listing, pa.concat_tables([others.cast(table.schema), table]))
    file = folder / f"{listing.name}.parquet"
    pq.write_table(table, file, compression="zstd")
    put_listing(lake, listing.name, day, file)
    return file


def _table(listing: Listing, rows: Sequence[msgspec.Struct], constant: dict[str, Any]) -> pa.Table:
    import pyarrow as pa

    schema = listing.schema()
    columns = {
        name: [constant[name]] * len(rows) if name in constant else [_utc(getattr(row, name)) for row in rows]
        for name in schema.names
    }
    return _sorted(listing, pa.table(columns, schema))


def _sorted(listing: Listing, table: pa.Table) -> pa.Table:
    """By key and ticker, for whoever reads one, and then by every other column, so that the same rows give the same
    file."""
    names = dict.fromkeys(filter(None, (listing.key, "ticker", *table.column_names)))
    return table.sort_by([(name, "ascending") for name in names if name != "fetched_at"])


def _utc(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
