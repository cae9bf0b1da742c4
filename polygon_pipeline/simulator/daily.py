"""The vendor's bar of a ticker's day, made of a simulated market's minutes as the vendor makes its own.

Belongs here: in what the vendor's day differs from the sum of regular-hours minutes, and differences on request. Does
not belong here: minutes (synthetic), and how a day is served (rest_server, flat_files).

As in the real market: the closing auction prints in the minute after the bell, and is the day's close, and its high or
low where it is beyond the others. A trade outside regular hours (Form T) sets no price of the day, but its shares count
in the day's volume and VWAP.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polygon_pipeline.market import calendar

DailyChanges = Mapping[tuple[str, date], Mapping[str, float] | None]
"""By ticker and day: the columns to change and their new values, or None to remove the bar."""


def daily_bars(minutes: pa.Table, session: calendar.Session, changes: DailyChanges | None = None) -> pa.Table:
    """One row per ticker with a trade in regular hours or in the closing auction, sorted by ticker.

    minutes: the day's, in the format of SyntheticMarket.day_bars, sorted by start_ms. Like that of the vendor's answers
    by REST, a row's start_ms is the end of regular hours.
    """
    open_ms, close_ms = (int(at.timestamp() * 1000) for at in (session.open, session.close))
    minutes = minutes.append_column("turnover", pc.multiply(minutes["vwap"], minutes["volume"]))
    first, close, after = np.searchsorted(minutes["start_ms"].to_numpy(), (open_ms, close_ms, close_ms + 1)).tolist()
    auction = minutes.slice(close, after - close)
    for name in ("high", "low", "close"):  # the auction is the first trade of its minute
        auction = auction.set_column(auction.column_names.index(name), name, auction["open"])
    priced = pa.concat_tables([minutes.slice(first, close - first), auction])
    # In one thread, because first and last depend on the order of the rows.
    prices = _gathered(priced, {"open": "first", "high": "max", "low": "min", "close": "last"})
    shares = _gathered(minutes, dict.fromkeys(("volume", "transactions", "turnover"), "sum"))
    shares = shares.set_column(shares.column_names.index("volume"), "volume", pc.round(shares["volume"], 6))
    days = prices.join(shares, "ticker").sort_by("ticker")
    days = days.append_column("vwap", pc.round(pc.divide(days["turnover"], days["volume"]), 4)).drop_columns("turnover")
    days = days.append_column("start_ms", pa.repeat(pa.scalar(close_ms, pa.int64()), days.num_rows))
    return _changed(days, session.date, changes or {})


def _gathered(bars: pa.Table, functions: Mapping[str, str]) -> pa.Table:
    found = bars.group_by("ticker", use_threads=False).aggregate(list(functions.items()))
    return found.rename_columns({f"{name}_{function}": name for name, function in functions.items()})


def _changed(days: pa.Table, day: date, changes: DailyChanges) -> pa.Table:
    of_day = {ticker: change for (ticker, changed), change in changes.items() if changed == day}
    rows = []
    for row in days.to_pylist() if of_day else ():
        change = of_day.get(row["ticker"], {})
        if change is not None:
            rows.append(row | change)
    return pa.Table.from_pylist(rows, days.schema) if of_day else days
