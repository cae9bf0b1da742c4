"""The datasets' columns: names, types, units and meaning. What is written is held against these.

Belongs here: the schemas. Does not belong here: how rows are made (market.transform).
All timestamps are UTC; prices are US dollars, unadjusted; volumes are shares.
"""

from __future__ import annotations

import pyarrow as pa

_TIMESTAMP = pa.timestamp("us", tz="UTC")


def _schema(*columns: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"description": text}) for name, kind, text in columns])


_OHLCV = (
    ("open", pa.float64(), "First price"),
    ("high", pa.float64(), "Highest price"),
    ("low", pa.float64(), "Lowest price"),
    ("close", pa.float64(), "Last price"),
    ("volume", pa.float64(), "Shares traded, with fractions when the feed reports them"),
    ("vwap", pa.float64(), "Volume-weighted average price; the vendor's may lie outside low..high"),
)

NORMALIZED_BARS = _schema(
    ("ticker", pa.string(), "Symbol, in the vendor's spelling and case"),
    ("timestamp", _TIMESTAMP, "Start of the bar's window"),
    *_OHLCV,
    ("day_open", pa.float64(), "The day's official open; null before 09:30 and where the feed does not say"),
    ("day_volume", pa.float64(), "The day's volume so far; may differ slightly from the sum of bars"),
    ("day_vwap", pa.float64(), "The day's VWAP so far"),
    ("average_trade_size", pa.float64(), "Shares a trade in the window"),
    ("otc", pa.bool_(), "Whether the ticker trades over the counter; null where the source does not say"),
    ("transactions", pa.int64(), "Trades in the window; only the vendor's history has it, and only of its own state"),
    ("session", pa.string(), "pre, regular or post: the part of the trading day the window starts in"),
    ("revisions", pa.int64(), "How many times the stream brought the bar; 0 where only the vendor's history has it"),
    ("received_at", _TIMESTAMP, "When the kept word arrived: the stream's last revision or the history's"),
    ("source", pa.string(), "Whose word is kept: websocket, rest or flat_file"),
)

REFERENCE_BARS = _schema(
    ("ticker", pa.string(), "Symbol, in the vendor's spelling and case"),
    ("timestamp", _TIMESTAMP, "Start of the bar's minute"),
    *((name, kind, text if name != "vwap" else f"{text}; null from flat files") for name, kind, text in _OHLCV),
    ("transactions", pa.int64(), "Trades in the minute"),
    ("received_at", _TIMESTAMP, "When the page was fetched (REST) or the file last modified (flat file)"),
    ("source", pa.string(), "rest or flat_file"),
)

RESAMPLED_BARS = _schema(
    ("ticker", pa.string(), "Symbol"),
    ("timestamp", _TIMESTAMP, "Start of the bucket, aligned to the clock"),
    *_OHLCV,
    ("bar_count", pa.int64(), "Minute bars in the bucket"),
    ("session", pa.string(), "Part of the day the bucket's first bar is in; the 09:00 hour holds pre and regular"),
)

DAILY_BARS = _schema(
    ("ticker", pa.string(), "Symbol"),
    ("date", pa.date32(), "Session date, New York"),
    *((name, kind, f"{text}, regular hours only") for name, kind, text in _OHLCV),
    ("pre_market_volume", pa.float64(), "Shares traded before the regular open"),
    ("after_hours_volume", pa.float64(), "Shares traded after the regular close; the closing auction prints here"),
    ("bar_count", pa.int64(), "Regular-hours minute bars"),
    ("first_bar", _TIMESTAMP, "Start of the first regular-hours bar; null if there was none"),
    ("last_bar", _TIMESTAMP, "Start of the last regular-hours bar; null if there was none"),
    ("official_open", pa.float64(), "The day's official open as the feed reported it; null where it did not"),
)

BAR_COVERAGE = _schema(
    ("ticker", pa.string(), "Symbol"),
    ("date", pa.date32(), "Session date, New York"),
    ("expected_minutes", pa.int64(), "Minutes of the session by the calendar, pre-market to after hours"),
    ("regular_minutes", pa.int64(), "Of these, minutes of the regular session"),
    ("collected_minutes", pa.int64(), "Minutes whose bar the stream brought"),
    (
        "traded_minutes",
        pa.int64(),
        "Minutes the vendor's history has, as far as it reaches; null where it says nothing",
    ),
    (
        "lost_disconnected",
        pa.int64(),
        "Traded, not collected, while no collector was connected; repaired ones included",
    ),
    ("lost_connected", pa.int64(), "Traded, not collected, though a collector was connected; repaired ones included"),
    ("repaired_minutes", pa.int64(), "Lost ones that normalized_bars has from the vendor's history"),
    ("corrected_minutes", pa.int64(), "Collected ones whose values the vendor's history replaced"),
    ("late_minutes", pa.int64(), "Collected ones whose kept revision came more than a minute after the bar's end"),
    ("unexpected_minutes", pa.int64(), "Collected ones that the vendor's history lacks, as far as it reaches"),
    ("unknown_minutes", pa.int64(), "Minutes without a bar that no history reaches: no trade or lost, unknown"),
    ("longest_gap_minutes", pa.int64(), "Longest run of consecutive lost minutes, repaired ones included"),
    ("share", pa.float64(), "Of the traded minutes, those normalized_bars has, 0 to 1; null where none is known"),
)
