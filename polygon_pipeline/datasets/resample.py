"""What is made of a day's minute bars alone: resampled bars and daily bars, all from one scan.

Belongs here: their rows, in SQL. Does not belong here: their columns and intervals (datasets.catalog).

Sums are exact decimals, because adding floats in whatever order threads finish gives different last digits: the same
input gives the same bytes.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.day_state import DayState
from polygon_pipeline.datasets.normalize import SESSION, parts_of
from polygon_pipeline.datasets.session import DuckSession

_FIVE_MINUTES_US = 300_000_000

# One scan of the minutes for all that is made of them. Five minutes divide every other interval and every part of the
# day, so a bucket lies in one part only. The buckets are grouped by a number, as time_bucket takes twice as long.
_BUCKETS = f"""
    CREATE TEMP TABLE buckets AS
    SELECT
        * EXCLUDE (bucket, unpriced_shares),
        make_timestamptz(bucket * {_FIVE_MINUTES_US}) AS timestamp,
        shares - coalesce(unpriced_shares, 0) AS priced_shares,
        {SESSION.format(start_ms=f"(bucket * {_FIVE_MINUTES_US // 1000})")} AS session
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

_VWAP = "CAST(sum(turnover) {where} AS DOUBLE) / nullif(CAST(sum(priced_shares) {where} AS DOUBLE), 0)"

_RESAMPLE = f"""
    SELECT
        ticker,
        time_bucket(INTERVAL '{{minutes}} minutes', timestamp) AS timestamp,
        arg_min(open, first_bar) AS open,
        max(high) AS high,
        min(low) AS low,
        arg_max(close, first_bar) AS close,
        CAST(sum(shares) AS DOUBLE) AS volume,
        {_VWAP.format(where="")} AS vwap,
        CAST(sum(bar_count) AS BIGINT) AS bar_count,
        arg_min(session, first_bar) AS session
    FROM buckets
    GROUP BY ticker, time_bucket(INTERVAL '{{minutes}} minutes', timestamp)
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
        {_SHARES_OF.format(part="overnight")} AS overnight_volume,
        {_SHARES_OF.format(part="pre")} AS pre_market_volume,
        {_SHARES_OF.format(part="post")} AS after_hours_volume,
        CAST(coalesce(sum(bar_count) {_REGULAR}, 0) AS BIGINT) AS bar_count,
        min(first_bar) {_REGULAR} AS first_bar,
        max(last_bar) {_REGULAR} AS last_bar,
        any_value(official_open) AS official_open,
        any_value(official_close) AS official_close,
        CASE WHEN any_value(official_close) IS NOT NULL THEN 'vendor_daily' END AS official_close_source,
        $day_state AS day_state
    FROM buckets LEFT JOIN (
        SELECT ticker, arg_max(day_open, timestamp) FILTER (WHERE day_open IS NOT NULL) AS official_open
        FROM normalized
        GROUP BY ticker
    ) USING (ticker) LEFT JOIN vendor_day USING (ticker)
    GROUP BY ticker
    ORDER BY ticker
"""


class Resampling(DuckSession):
    """One day's normalized minute bars (a Parquet file), scanned once for all that is made of them.

    A context manager. space: as in DuckSession. day_state: what the daily bars say of the day. vendor_day: its
    reference_daily_bars, None where there are none yet. Raises NoBars for a day that is no trading day.
    """

    def __init__(
        self,
        day: date,
        normalized: Path,
        space: Path | DuckSession,
        day_state: str = DayState.PARTIAL,
        vendor_day: Path | None = None,
    ) -> None:
        super().__init__(space)
        self._daily = {"day": day, "day_state": str(day_state)}
        self.view("normalized", normalized)
        self.view("reference_daily", vendor_day or normalized)
        closes = "SELECT ticker, close AS official_close FROM reference_daily"
        self.rows(f"CREATE TEMP VIEW vendor_day AS {closes} WHERE {vendor_day is not None}")
        self.rows(_BUCKETS, parts_of(day))

    def write(self, dataset: Dataset, target: Path) -> None:
        """Writes a resampled dataset or the daily bars, sorted by ticker and time."""
        if dataset.interval_minutes is None:
            self.copy(_DAILY, target, self._daily)
        else:
            self.copy(_RESAMPLE.format(minutes=dataset.interval_minutes), target)
