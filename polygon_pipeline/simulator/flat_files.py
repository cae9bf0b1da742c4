"""The vendor's flat files: a day's minute bars or day bars of the whole market as one gzip CSV, and where they are.

Belongs here: writing such files for a simulated market. Does not belong here: reading them. Writer and reader share no
code, so that a misunderstanding of the format is noticed.
"""

from __future__ import annotations

import gzip
import io
from datetime import date, datetime, time

import obstore
import pyarrow as pa
import pyarrow.compute as pc
from obstore.store import ObjectStore
from pyarrow import csv

from polygon_pipeline.market import calendar

_COLUMNS = ["ticker", "volume", "open", "close", "high", "low", "window_start", "transactions"]


def flat_file(day_bars: pa.Table) -> bytes:
    """The flat file of these bars (SyntheticMarket.day_bars), sorted by ticker, then time.

    The same bars always give the same bytes.
    """
    bars = day_bars.sort_by([("ticker", "ascending"), ("start_ms", "ascending")])
    bars = bars.append_column("window_start", pc.multiply(bars["start_ms"], 1_000_000)).select(_COLUMNS)
    content = io.BytesIO()
    options = csv.WriteOptions(quoting_style="none", quoting_header="none", batch_size=65_536)
    # The fastest compression level: a day of the whole market is about 100 MB.
    with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1, mtime=0) as file:
        csv.write_csv(bars, file, options)
    return content.getvalue()


def daily_flat_file(daily: pa.Table, day: date) -> bytes:
    """The flat file of a day's bars (daily.daily_bars), whose window starts at New York's midnight."""
    midnight_ms = int(datetime.combine(day, time(), calendar.NEW_YORK).timestamp()) * 1000
    starts = pa.repeat(pa.scalar(midnight_ms, pa.int64()), daily.num_rows)
    return flat_file(daily.set_column(daily.column_names.index("start_ms"), "start_ms", starts))


def flat_file_key(day: date, folder: str = "minute_aggs_v1") -> str:
    """`us_stocks_sip/minute_aggs_v1/2026/01/2026-01-26.csv.gz`"""
    return f"us_stocks_sip/{folder}/{day:%Y/%m}/{day.isoformat()}.csv.gz"


def publish(store: ObjectStore, day: date, content: bytes, folder: str = "minute_aggs_v1") -> None:
    """Put the day's file under the vendor's key, replacing an earlier version. folder: that, or day_aggs_v1."""
    obstore.put(store, flat_file_key(day, folder), content)
