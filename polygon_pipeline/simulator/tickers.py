"""The tickers of the synthetic market: a watch list for demonstrations, and as many more as are asked for.

Belongs here: names and rough characters. Does not belong here: bars (synthetic).
"""

from __future__ import annotations

import itertools
import string
from typing import NamedTuple


class Character(NamedTuple):
    """How a ticker trades: its price level in dollars, and the mean number of trades in a regular minute."""

    price: float
    trades_per_minute: float


# Three of these hardly trade: a share class, a preferred share and an OTC one, because names like theirs
# (a dot, a lower-case letter) and minutes without a bar are what a demonstration must not leave out.
KNOWN: dict[str, Character] = {
    "AAPL": Character(230.0, 1500),
    "AMZN": Character(215.0, 1100),
    "BRK.B": Character(480.0, 90),
    "GME": Character(24.0, 120),
    "KIMpL": Character(21.5, 0.05),
    "MSFT": Character(470.0, 900),
    "NVDA": Character(175.0, 3000),
    "QQQ": Character(590.0, 1200),
    "SPY": Character(650.0, 2000),
    "TCEHY": Character(78.0, 0.6),
    "TSLA": Character(340.0, 2200),
    "UHT": Character(40.0, 0.4),
}

WATCH_LIST: tuple[str, ...] = tuple(KNOWN)


def first_tickers(count: int) -> list[str]:
    """That many different tickers, at most 400,000: the watch list, then invented ones of four letters."""
    invented = ("".join(letters) for letters in itertools.product(string.ascii_uppercase, repeat=4))
    others = (ticker for ticker in invented if ticker not in KNOWN)
    return list(itertools.islice(itertools.chain(WATCH_LIST, others), count))


def is_otc(ticker: str) -> bool:
    """Whether it trades over the counter, by the market's own naming: five capital letters ending in F or Y."""
    return len(ticker) == 5 and ticker.isalpha() and ticker.isupper() and ticker[-1] in "FY"
