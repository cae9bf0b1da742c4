"""The tickers of the synthetic market: a watch list for the demo, and any number of invented ones.

Belongs here: ticker names, their typical prices and trading activity. Does not belong here: bars (synthetic).
"""

from __future__ import annotations

import itertools
import string
from typing import NamedTuple


class TickerProfile(NamedTuple):
    """A ticker's price level in dollars, and its mean number of trades per minute of regular hours."""

    price: float
    trades_per_minute: float


# The demo must also show unusual names (BRK.B with a dot, KIMpL with a lower-case letter), an OTC share (TCEHY), and
# tickers that trade so rarely that most minutes have no bar (KIMpL, TCEHY, UHT).
KNOWN: dict[str, TickerProfile] = {
    "AAPL": TickerProfile(230.0, 1500),
    "AMZN": TickerProfile(215.0, 1100),
    "BRK.B": TickerProfile(480.0, 90),
    "GME": TickerProfile(24.0, 120),
    "KIMpL": TickerProfile(21.5, 0.05),
    "MSFT": TickerProfile(470.0, 900),
    "NVDA": TickerProfile(175.0, 3000),
    "QQQ": TickerProfile(590.0, 1200),
    "SPY": TickerProfile(650.0, 2000),
    "TCEHY": TickerProfile(78.0, 0.6),
    "TSLA": TickerProfile(340.0, 2200),
    "UHT": TickerProfile(40.0, 0.4),
}

WATCH_LIST: tuple[str, ...] = tuple(KNOWN)


def first_tickers(count: int) -> list[str]:
    """This many different tickers, at most 400,000: the watch list, then invented ones of four letters."""
    invented = ("".join(letters) for letters in itertools.product(string.ascii_uppercase, repeat=4))
    others = (ticker for ticker in invented if ticker not in KNOWN)
    return list(itertools.islice(itertools.chain(WATCH_LIST, others), count))


def is_otc(ticker: str) -> bool:
    """Whether the ticker trades over the counter, by the market's naming rule: five capital letters, F or Y last."""
    return len(ticker) == 5 and ticker.isalpha() and ticker.isupper() and ticker[-1] in "FY"
