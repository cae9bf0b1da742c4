"""The catalog: every dataset once, with what it is made of, its columns, and what it says of itself.

Belongs here: names, inputs, columns (types, units, meaning) and descriptions. Everything else asks the catalog: assets,
checks, schedules, previews and tests. Does not belong here: how rows are made (the dataset's own module).

All timestamps are UTC; prices are US dollars, unadjusted; volumes are shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polygon_pipeline.market.bars import Channel

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column. type: one of the names in `_arrow_types`."""

    name: str
    type: str
    description: str


@dataclass(frozen=True)
class Dataset:
    """One dataset, partitioned by trading day.

    inputs: the datasets it is made of; where some of them come from outside, one of these is enough. required: of
    these, the ones without which it cannot be made. columns: what its files are held against; none for what the
    collector keeps as raw JSON. interval_minutes: the width of a resampled bar.
    """

    name: str
    channel: Channel
    description: str
    inputs: tuple[Dataset, ...] = ()
    columns: tuple[Column, ...] = ()
    interval_minutes: int | None = None
    required: tuple[Dataset, ...] = ()

    def schema(self) -> pa.Schema:
        """The columns as Arrow has them, each with its description as metadata."""
        return _schema(self.columns)


@dataclass(frozen=True)
class Listing:
    """What the vendor knows of all days at once, kept as each day's fetch found it (layout.listing_key), so that what
    was known on a day can be asked for. Without partitions.

    key: the column that a fetch replaces by where a day has several; None where each fetch is everything.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    key: str | None = None

    def schema(self) -> pa.Schema:
        """The columns as Arrow has them, each with its description as metadata."""
        return _schema(self.columns)


def _schema(columns: Sequence[Column]) -> pa.Schema:
    import pyarrow as pa  # takes 0.2 s, which every process of every run would pay

    types = _arrow_types()
    return pa.schema([pa.field(c.name, types[c.type], metadata={"description": c.description}) for c in columns])


def _arrow_types() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {
        "string": pa.string(),
        "double": pa.float64(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "date": pa.date32(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }


_TICKER = Column("ticker", "string", "Symbol, in the vendor's spelling and case")
_DATE = Column("date", "date", "Trade date, New York")

_OHLCV = (
    Column("open", "double", "First price"),
    Column("high", "double", "Highest price"),
    Column("low", "double", "Lowest price"),
    Column("close", "double", "Last price"),
    Column("volume", "double", "Shares traded, with fractions when the feed reports them"),
    Column("vwap", "double", "Volume-weighted average price; the vendor's may lie outside low..high"),
)

RAW_BARS = Dataset(
    "raw_bars",
    Channel.MINUTE,
    "Minute bars as received (channel AM), in raw-frames and raw-data. The job `collect_aggregates` fills it all day "
    "and reports here; it cannot be materialized by hand.",
)

RAW_SECOND_BARS = Dataset(
    "raw_second_bars",
    Channel.SECOND,
    "Second bars as received (channel A), in raw-frames and raw-data-second. The job `collect_aggregates` fills it "
    "where POLYGON_CHANNELS has A; it cannot be materialized by hand.",
)

REFERENCE_BARS = Dataset(
    "reference_bars",
    Channel.MINUTE,
    "The vendor's own minute bars: flat files where there are credentials for them, else REST for the tickers. Days "
    "that the vendor does not have are not materialized. Neither are those that a schedule asked for and that were "
    "found final and unchanged: nothing needs to follow them.",
    columns=(
        _TICKER,
        Column("timestamp", "timestamp", "Start of the bar's minute"),
        *(replace(c, description=f"{c.description}; null from flat files") if c.name == "vwap" else c for c in _OHLCV),
        Column("transactions", "int64", "Trades in the minute"),
        Column("received_at", "timestamp", "When the page was fetched (REST) or the file last modified (flat file)"),
        Column("source", "string", "rest or flat_file"),
    ),
)

REFERENCE_DAILY_BARS = Dataset(
    "reference_daily_bars",
    Channel.MINUTE,
    "The vendor's own bar of each ticker's day, the whole market in one request: the day's flat file where there are "
    "credentials for it, else the grouped daily endpoint. A day that is not published yet is not materialized. Gives "
    "daily_bars its official_close, and daily_differences what ours is held against.",
    columns=(
        _TICKER,
        _DATE,
        Column("open", "double", "The day's open by the vendor"),
        Column("high", "double", "The day's high by the vendor, without trades outside regular hours"),
        Column("low", "double", "The day's low by the vendor, without trades outside regular hours"),
        Column("close", "double", "The day's close by the vendor: the closing auction's where there was one"),
        Column("volume", "double", "Shares of the day by the vendor, with extended hours where it counts them"),
        Column("vwap", "double", "The day's VWAP by the vendor; null from flat files"),
        Column("transactions", "int64", "Trades in the day"),
        Column("otc", "bool", "Whether the ticker trades over the counter; null from flat files"),
        Column("received_at", "timestamp", "When it was asked for (REST) or the file last modified (flat file)"),
        Column("source", "string", "rest or flat_file"),
    ),
)

_NORMALIZED = (
    _TICKER,
    Column("timestamp", "timestamp", "Start of the bar's window"),
    *_OHLCV,
    Column("day_open", "double", "The day's official open; null before 09:30 and where the feed does not say"),
    Column("day_volume", "double", "The day's volume so far; may differ slightly from the sum of bars"),
    Column("day_vwap", "double", "The day's VWAP so far"),
    Column("average_trade_size", "double", "Shares per trade in the window"),
    Column("otc", "bool", "Whether the ticker trades over the counter; null where the source does not say"),
    Column("transactions", "int64", "Trades in the window; only the vendor's history has it, and only for its values"),
    Column("session", "string", "overnight, pre, regular or post: the part of the trading day the window starts in"),
    Column("revisions", "int64", "How many times the stream sent the bar; 0 where only the vendor's history has it"),
    Column("received_at", "timestamp", "When the kept values arrived: the stream's last revision or the history's"),
    Column("source", "string", "Where the kept values come from: websocket, rest or flat_file"),
)

NORMALIZED_BARS = Dataset(
    "normalized_bars",
    Channel.MINUTE,
    "Typed minute bars from the stream and the vendor's history: one row per ticker and minute, the latest revision, "
    "sorted by ticker and time.",
    inputs=(RAW_BARS, REFERENCE_BARS),
    columns=_NORMALIZED,
)

NORMALIZED_SECOND_BARS = Dataset(
    "normalized_second_bars",
    Channel.SECOND,
    "Typed second bars: one row per ticker and second, the latest revision, sorted by ticker and time.",
    inputs=(RAW_SECOND_BARS,),
    columns=_NORMALIZED,
)


def _resampled(name: str, minutes: int, description: str) -> Dataset:
    """Minute bars gathered into wider ones. minutes: a multiple of 5, and a divisor of 60."""
    columns = (
        _TICKER,
        Column("timestamp", "timestamp", "Start of the bar's window, aligned to the clock"),
        *_OHLCV,
        Column("bar_count", "int64", "Minute bars in the window"),
        Column("session", "string", "Part of the day of the first minute bar; the 09:00 hour holds pre and regular"),
    )
    return Dataset(name, Channel.MINUTE, description, (NORMALIZED_BARS,), columns, minutes)


BARS_5M = _resampled("bars_5m", 5, "Five-minute bars, aligned to the clock.")
BARS_15M = _resampled("bars_15m", 15, "Fifteen-minute bars, aligned to the clock.")
BARS_30M = _resampled("bars_30m", 30, "Thirty-minute bars, aligned to the clock.")
BARS_1H = _resampled("bars_1h", 60, "Hourly bars, aligned to the clock.")

DAILY_BARS = Dataset(
    "daily_bars",
    Channel.MINUTE,
    "One row per ticker: regular-hours OHLCV and VWAP, extended-hours volume, official open and close.",
    inputs=(NORMALIZED_BARS, REFERENCE_DAILY_BARS),
    columns=(
        _TICKER,
        _DATE,
        *(replace(c, description=f"{c.description}, regular hours only") for c in _OHLCV),
        Column("overnight_volume", "double", "Shares traded before 04:00, since the evening before"),
        Column("pre_market_volume", "double", "Shares traded from 04:00 to the regular open"),
        Column("after_hours_volume", "double", "Shares traded after the regular close, the closing auction among them"),
        Column("bar_count", "int64", "Regular-hours minute bars"),
        Column("first_bar", "timestamp", "Start of the first regular-hours bar; null if there was none"),
        Column("last_bar", "timestamp", "Start of the last regular-hours bar; null if there was none"),
        Column("official_open", "double", "The day's official open as the feed reported it; null where it did not"),
        Column("official_close", "double", "The close of the vendor's own day bar; null where there is none yet"),
        Column("official_close_source", "string", "vendor_daily: reference_daily_bars; null without official_close"),
        Column("day_state", "string", "collecting, partial, complete or final: how much of the day this row knows"),
    ),
)

BAR_COVERAGE = Dataset(
    "bar_coverage",
    Channel.MINUTE,
    "One row per ticker: minutes expected, collected, traded, lost, not collected, repaired, corrected and late.",
    inputs=(NORMALIZED_BARS, REFERENCE_BARS),
    columns=(
        _TICKER,
        _DATE,
        Column(
            "expected_minutes",
            "int64",
            "Minutes of the session by the calendar, its night among them",
        ),
        Column("regular_minutes", "int64", "Of these, minutes of the regular session"),
        Column("collected_minutes", "int64", "Minutes whose bar the stream sent"),
        Column(
            "traded_minutes", "int64", "Minutes the vendor's history has, as far as it reaches; null where it has none"
        ),
        Column(
            "lost_disconnected", "int64", "Traded, not collected, while no collector was connected; with repaired ones"
        ),
        Column(
            "lost_connected", "int64", "Traded, not collected, though a collector was connected; with repaired ones"
        ),
        Column("not_collected_minutes", "int64", "Traded on a day when no collector was at work; from the history"),
        Column("repaired_minutes", "int64", "Lost ones that the bars have from the vendor's history"),
        Column("corrected_minutes", "int64", "Collected ones whose values the vendor's history replaced"),
        Column(
            "late_minutes",
            "int64",
            "Collected ones whose kept revision came over a minute after the bar's end; null where the feed played a "
            "past day",
        ),
        Column("unexpected_minutes", "int64", "Collected ones that the vendor's history lacks, as far as it reaches"),
        Column("unknown_minutes", "int64", "Minutes without a bar that no history reaches: no trade or lost, unknown"),
        Column("longest_gap_minutes", "int64", "Longest run of consecutive lost minutes, repaired ones included"),
        Column("share", "double", "Of the traded minutes, those that the bars have, 0 to 1; null where none is known"),
    ),
)

SESSION_REPORT = Dataset(
    "session_report",
    Channel.MINUTE,
    "The trading day at a glance, and the first place to look: a day under *Partitions* shows its state, gaps with "
    "what became of each, lag, checks, movers and volumes. The file has one row per ticker.",
    inputs=(NORMALIZED_BARS, REFERENCE_BARS),
    columns=(
        _TICKER,
        _DATE,
        Column("bars", "int64", "Minute bars of the whole session; 0 for a ticker that was asked for in vain"),
        Column("first_bar", "timestamp", "Start of the first bar"),
        Column("last_bar", "timestamp", "Start of the last bar"),
        Column("last_price", "double", "Close of the last bar"),
        Column("day_return", "double", "Regular hours: the last price over the first, minus 1; 0.01 is one percent"),
        Column("volume", "double", "Shares traded in the whole session"),
        Column("share_of_volume", "double", "Of the shares of all tickers, 0 to 1"),
        Column("missing_minutes", "int64", "Traded minutes that the bars lack, as far as the history knows"),
        Column("repaired_minutes", "int64", "Lost ones that the bars have from the vendor's history"),
        Column("corrected_minutes", "int64", "Collected ones whose values the vendor's history replaced"),
        Column("late_minutes", "int64", "As in bar_coverage"),
        Column("share", "double", "Of the traded minutes, those that the bars have, 0 to 1; null where none is known"),
        Column("day_state", "string", "collecting, partial, complete or final: how much of the day this row knows"),
    ),
)

DAILY_DIFFERENCES = Dataset(
    "daily_differences",
    Channel.MINUTE,
    "Where daily_bars and the vendor's own day differ: one row per ticker and field, with the reason where the day's "
    "minutes show it. A day that agrees everywhere has no rows. Made once reference_daily_bars has the day.",
    inputs=(NORMALIZED_BARS, DAILY_BARS, REFERENCE_BARS, REFERENCE_DAILY_BARS),
    required=(REFERENCE_DAILY_BARS,),
    columns=(
        _TICKER,
        _DATE,
        Column("field", "string", "open, high, low, close, volume or vwap"),
        Column("ours", "double", "The value of daily_bars; null where we have no regular-hours bar"),
        Column("theirs", "double", "The value of reference_daily_bars; null where the vendor has no bar of the day"),
        Column(
            "reason",
            "string",
            "official_open, closing_auction, extended_hours, missing_bars, corrected_bars, extra_bars, several of "
            "these joined by ` + `, or unexplained; only what gives the vendor's value exactly counts as shown",
        ),
    ),
)

_FETCHED_AT = Column("fetched_at", "timestamp", "When the vendor was asked")
_FACTOR = "The vendor's cumulative factor: what a price before the event is multiplied by, for this and all later ones"

SPLITS = Listing(
    "splits",
    "Splits as the vendor knew them on the day of each fetch, announced ones included: the watch list's, or for the "
    "whole market all since POLYGON_HISTORY_START. Prices are adjusted with them when they are read, never stored.",
    (
        Column("id", "string", "The vendor's identifier of the event"),
        _TICKER,
        Column("execution_date", "date", "The first day in new shares, from its pre-market on"),
        Column("adjustment_type", "string", "forward_split, reverse_split or stock_dividend"),
        Column("split_from", "double", "So many old shares become split_to new ones"),
        Column("split_to", "double", "New shares for split_from old ones"),
        Column("historical_adjustment_factor", "double", f"{_FACTOR}; 0 and null occur, and are of no use"),
        _FETCHED_AT,
    ),
)

DIVIDENDS = Listing(
    "dividends",
    "Dividends as the vendor knew them on the day of each fetch, announced ones included: the watch list's, or for the "
    "whole market all since POLYGON_HISTORY_START.",
    (
        Column("id", "string", "The vendor's identifier of the event"),
        _TICKER,
        Column("cash_amount", "double", "Paid per share of that time, in the currency"),
        Column("split_adjusted_cash_amount", "double", "The same per share of the day of the fetch"),
        Column("currency", "string", "Such as USD"),
        Column("declaration_date", "date", "When it was announced; null where unknown"),
        Column("ex_dividend_date", "date", "The first day on which a buyer does not get it"),
        Column("record_date", "date", "Whose holders get it; null where unknown"),
        Column("pay_date", "date", "When it is paid; null where unknown"),
        Column("frequency", "int64", "Times a year; 0 for once; null where unknown"),
        Column("distribution_type", "string", "recurring, special, supplemental, irregular or unknown"),
        Column("historical_adjustment_factor", "double", f"{_FACTOR}; 0 and null occur, and are of no use"),
        _FETCHED_AT,
    ),
)

TICKERS = Listing(
    "tickers",
    "The vendor's listing of stocks as of a date, with delisted ones: as of the day of each fetch, and as of past "
    "dates that a launch names. The watch list's, or the whole market's. One day's file may hold several dates.",
    (
        Column("as_of", "date", "The date the listing is of"),
        _TICKER,
        Column("name", "string", "Of the company or fund"),
        Column("market", "string", "stocks or otc"),
        Column("locale", "string", "us"),
        Column("primary_exchange", "string", "The exchange's code (MIC); null where unknown"),
        Column("type", "string", "Such as CS (common stock) or ETF; null where unknown"),
        Column("active", "bool", "Whether it was listed on that date"),
        Column("currency_name", "string", "Such as usd"),
        Column("cik", "string", "The SEC's number of the company; null where unknown"),
        Column("composite_figi", "string", "OpenFIGI's identifier, of all exchanges; null where unknown"),
        Column("share_class_figi", "string", "OpenFIGI's identifier of the share class; null where unknown"),
        Column("delisted_utc", "timestamp", "When it was delisted; null while it is listed and where unknown"),
        Column("last_updated_utc", "timestamp", "When the vendor changed the record"),
        _FETCHED_AT,
    ),
    key="as_of",
)

TICKER_EVENTS = Listing(
    "ticker_events",
    "The names that a company's shares had, each from its date on. One request a ticker: the watch list's, or for the "
    "whole market those that a launch names. Experimental at the vendor.",
    (
        Column("requested_ticker", "string", "The ticker that was asked for"),
        Column("name", "string", "Of the company or fund"),
        Column("composite_figi", "string", "OpenFIGI's identifier, of all exchanges; null where unknown"),
        Column("cik", "string", "The SEC's number of the company; null where unknown"),
        Column("date", "date", "When the event took effect"),
        Column("type", "string", "ticker_change"),
        Column("ticker", "string", "The ticker from that date on"),
        _FETCHED_AT,
    ),
    key="requested_ticker",
)

# Beside DATASETS, because nothing is made of them and no day is a part of them.
LISTINGS = (SPLITS, DIVIDENDS, TICKERS, TICKER_EVENTS)

# In the order in which they can be made: each after its inputs.
DATASETS = (
    RAW_BARS,
    RAW_SECOND_BARS,
    REFERENCE_BARS,
    REFERENCE_DAILY_BARS,
    NORMALIZED_BARS,
    NORMALIZED_SECOND_BARS,
    BARS_5M,
    BARS_15M,
    BARS_30M,
    BARS_1H,
    DAILY_BARS,
    DAILY_DIFFERENCES,
    BAR_COVERAGE,
    SESSION_REPORT,
)

# What the vendor says of a day, fetched and not made.
REFERENCES = (REFERENCE_BARS, REFERENCE_DAILY_BARS)

RAW = {dataset.channel: dataset for dataset in (RAW_BARS, RAW_SECOND_BARS)}
NORMALIZED = {dataset.channel: dataset for dataset in (NORMALIZED_BARS, NORMALIZED_SECOND_BARS)}

# Made from the minutes alone, all of a day in one scan (datasets.resample).
RESAMPLED = tuple(dataset for dataset in DATASETS if dataset.interval_minutes)
DERIVED = (*RESAMPLED, DAILY_BARS)

# What follows from other datasets, and so can be out of date.
FOLLOWING = tuple(dataset for dataset in DATASETS if dataset.inputs)


def roots(dataset: Dataset) -> set[Dataset]:
    """The datasets that it is made of in the end, which are made of no other."""
    return set().union(*(roots(needed) for needed in dataset.inputs)) if dataset.inputs else {dataset}


def find(name: str) -> Dataset:
    """Raises KeyError for a name that no dataset has."""
    return {dataset.name: dataset for dataset in DATASETS}[name]
