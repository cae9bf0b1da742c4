"""What a backfill will cost in requests, bytes, time and dollars, before it is begun.

Belongs here: the arithmetic, and what a unit of each costs. Does not belong here: fetching (reference_sources) and the
limits of one run.

The units are those of README ("History, repair and backfills", "What it costs on S3") and benchmarks/RESULTS.md, all
measured on two cores. The outcome is good to a factor of two, and meant for choosing between plans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from polygon_pipeline.datasets.catalog import FOLLOWING, REFERENCES
from polygon_pipeline.datasets.reference_sources import DAYS_PER_REQUEST, LONGEST_SECONDS
from polygon_pipeline.market.bars import Channel

# Amazon S3 Standard in us-east-1, November 2026.
DOLLARS_PER_THOUSAND_PUTS = 0.005
DOLLARS_PER_GIGABYTE_MONTH = 0.023

WHOLE_MARKET_TICKERS = 11_000
WHOLE_MARKET_BARS = 1_750_000  # a day
_BARS_PER_TICKER = 800  # a day, of one that is watched

_REST_BYTES_PER_TICKER_DAY = 60_000
_FLAT_FILE_BYTES = 33_000_000
_FLAT_FILE_SECONDS = 8.0
_BYTES_PER_SECOND = 10_000_000  # of a usual connection

# 252 days of 12 tickers took 144 s in three runs, and a day of the whole market takes 20 s.
_DATASETS_SECONDS = 0.42
_DATASETS_SECONDS_PER_BAR = (20 - _DATASETS_SECONDS) / WHOLE_MARKET_BARS
_RUN_SECONDS = 4.0
_DATASETS_DAYS_PER_RUN = 100  # settings.DAYS_PER_RUN, which this part does not know
_HISTORY_DAYS_PER_RUN = 2 * DAYS_PER_REQUEST

_BYTES_PER_ROW = 40
# The day's minutes in reference_bars and normalized_bars, and every 5, 15, 30 and 60 of them.
_ROWS_PER_BAR = 2 + 1 / 5 + 1 / 15 + 1 / 30 + 1 / 60
# A file is put once, and what it is made of is listed.
_PUTS_PER_FILE = 2
_FILES_PER_DAY = len(REFERENCES) + sum(dataset.channel is Channel.MINUTE for dataset in FOLLOWING)


@dataclass(frozen=True)
class BackfillCost:
    """requests: to the vendor. fetch_seconds, make_seconds: of fetching, and of making the datasets. puts: to the lake,
    lists counted as puts. is_refused: whether one run would take longer than any may."""

    days: int
    requests: int
    fetched_bytes: int
    fetch_seconds: float
    make_seconds: float
    stored_bytes: int
    puts: int
    is_refused: bool

    @property
    def dollars_once(self) -> float:
        return self.puts / 1000 * DOLLARS_PER_THOUSAND_PUTS

    @property
    def dollars_a_month(self) -> float:
        return self.stored_bytes / 1e9 * DOLLARS_PER_GIGABYTE_MONTH


def estimate(days: Sequence[date], tickers: int | None, by_flat_files: bool, requests_per_minute: int) -> BackfillCost:
    """The cost of trading days' reference_bars and what follows them. tickers: None for the whole market."""
    count = len(days)
    bars = WHOLE_MARKET_BARS if tickers is None else min(tickers * _BARS_PER_TICKER, WHOLE_MARKET_BARS)
    asked = tickers or WHOLE_MARKET_TICKERS
    datasets_runs = math.ceil(count / _DATASETS_DAYS_PER_RUN)
    if by_flat_files:
        requests, fetched = count, count * _FLAT_FILE_BYTES
        seconds = count * _FLAT_FILE_SECONDS + fetched / _BYTES_PER_SECOND
        bars, refused = WHOLE_MARKET_BARS, False
    else:
        requests = math.ceil(count / DAYS_PER_REQUEST) * asked + (count if tickers is None else 0)
        fetched = round(count * asked * _REST_BYTES_PER_TICKER_DAY * bars / (asked * _BARS_PER_TICKER))
        seconds = max(requests / requests_per_minute * 60, fetched / _BYTES_PER_SECOND)
        refused = asked / requests_per_minute * 60 > LONGEST_SECONDS
    return BackfillCost(
        days=count,
        requests=requests,
        fetched_bytes=fetched,
        fetch_seconds=seconds + math.ceil(count / _HISTORY_DAYS_PER_RUN) * _RUN_SECONDS,
        make_seconds=count * (_DATASETS_SECONDS + _DATASETS_SECONDS_PER_BAR * bars) + datasets_runs * _RUN_SECONDS,
        stored_bytes=round(count * bars * _ROWS_PER_BAR * _BYTES_PER_ROW),
        puts=count * _FILES_PER_DAY * _PUTS_PER_FILE,
        is_refused=refused,
    )
