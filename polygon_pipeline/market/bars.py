"""What a bar is, and what makes one acceptable.

Belongs here: the bar itself, the channels it comes in, and the rules any bar must keep before it may be stored.
Does not belong here: how a vendor spells it (polygon.messages) or how it is kept (lake).
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec


class Channel(StrEnum):
    """The vendor's two aggregate streams."""

    MINUTE = "AM"
    SECOND = "A"

    @property
    def window_ms(self) -> int:
        """How long its bars last."""
        return 60_000 if self is Channel.MINUTE else 1000


class Bar(NamedTuple):
    """One ticker's trades of one window.

    start_ms is the window's start in Unix ms (UTC). Prices are US dollars, unadjusted. volume is in shares, an int
    when it is whole and a float when the feed reports fractional shares. vwap may be absent, and may lie outside
    low..high.
    """

    ticker: str
    start_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: int | float
    vwap: float | None


# What a bar may hold. Sums over a day are decimals with 28 digits before the point (datasets.resample), and 1,380
# minutes of such a volume at such a price still fit: 1,380 * 10^15 * 10^9 < 10^28. The dearest share costs less than
# 10^6 dollars, and the whole market trades some 10^10 shares a day.
PRICE_LIMIT = 1e9
SHARES_LIMIT = 1e15
Price = Annotated[float, msgspec.Meta(gt=-PRICE_LIMIT, lt=PRICE_LIMIT)]
Shares = (
    Annotated[int, msgspec.Meta(gt=-int(SHARES_LIMIT), lt=int(SHARES_LIMIT))]
    | Annotated[float, msgspec.Meta(gt=-SHARES_LIMIT, lt=SHARES_LIMIT)]
)

# When bars may have arrived: not before there were any, and not later than every reader of times can hold.
EARLIEST = datetime(2003, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 1, 1, tzinfo=UTC)
EARLIEST_MS = int(EARLIEST.timestamp() * 1000)

_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")

# A ticker becomes part of a path, so nothing that could leave its folder; and 64 bytes, because a file system
# takes 255 a name and US symbols have at most a dozen. Case and dots are the ticker's own.
_TICKER = re.compile(r"(?!\.\.?$)(?!.*\.\.)[^\x00-\x1f\x7f-\x9f/\\\u2028\u2029]+")
_TICKER_BYTES = 64


def ticker_error(ticker: str) -> str | None:
    """Why this cannot be a ticker, or None if it can."""
    if not ticker:
        return "the ticker is empty"
    if not _TICKER.fullmatch(ticker) or len(ticker.encode(errors="replace")) > _TICKER_BYTES:
        return f"the ticker has a '/', '\\', '..' or control character, or more than {_TICKER_BYTES} bytes"
    return None


def timestamp_error(start_ms: int, now: datetime) -> str | None:
    """Why this cannot be a bar's start, or None if it can. now: the aware time it arrived."""
    tomorrow = (now + timedelta(days=1)).timestamp() * 1000
    if not EARLIEST_MS <= start_ms <= tomorrow:
        return f"the timestamp {start_ms} is not between 2003 and tomorrow (Unix ms)"
    if start_ms % 1000:
        return f"the timestamp {start_ms} is not on a whole second, which is all that a key can hold"
    return None


def arrival_error(moment: datetime) -> str | None:
    """Why nothing can have arrived then, or None if it can."""
    if moment.tzinfo is None:
        return f"the time {moment.isoformat()} has no zone; a UTC time ends with Z"
    if not EARLIEST <= moment < LATEST:
        return f"the time {moment.isoformat()} is not between {EARLIEST.year} and {LATEST.year}"
    return None


def shares(value: int | float | str) -> int | float:
    """A volume in shares: an int if whole, else a float. Takes the feed's decimal strings; ValueError if no number."""
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):  # float() takes more than DuckDB does
        raise ValueError(f"{value[:40]!r} is not a decimal number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:40]} is not a finite number")
    return int(number) if number.is_integer() else number


def iso_seconds(start_ms: int) -> str:
    """Unix ms as `2026-01-26T18:30:00Z`."""
    return datetime.fromtimestamp(start_ms // 1000, UTC).isoformat()[:19] + "Z"
