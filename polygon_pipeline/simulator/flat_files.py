"""The vendor's flat files: a day's minute bars of the whole market as one gzip CSV, and where it publishes them.

Belongs here: writing such files for a simulated market. Does not belong here: reading them. Writer and reader share no
code, so that a misunderstanding of the format is noticed.
"""

from __future__ import annotations

import gzip
import io
from datetime import date

import obstore
import pyarrow as pa
import pyarrow.compute as pc
from obstore.store import ObjectStore
from pyarrow import csv

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


def flat_file_key(day: date) -> str:
    """`us_stocks_sip/minute_aggs_v1/2026/01/2026-01-26.csv.gz`"""
    return f"us_stocks_sip/minute_aggs_v1/{day:%Y/%m}/{day.isoformat()}.csv.gz"


def publish(store: ObjectStore, day: date, content: bytes) -> None:
    """Put the day's file under the vendor's key, replacing an earlier version."""
    obstore.put(store, flat_file_key(day), content)
