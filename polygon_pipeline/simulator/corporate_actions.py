"""Splits, dividends, listings and renames of a simulated market: what is planned, and what the vendor's API says of it.

Belongs here: the events and what they do to a ticker's shares, and the rows in the vendor's spelling. Does not belong
here: bars (synthetic), requests and pages (rest_server), and any code that reads these rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, NamedTuple

from polygon_pipeline.market import calendar
from polygon_pipeline.simulator.tickers import is_otc

JsonObject = dict[str, Any]

_FIRST_LISTED = date(2003, 9, 10)  # the vendor's first day
_ETFS = ("QQQ", "SPY")

# The demo's events: a ticker that is split and put together again every week, so that a price jumps within any five
# sessions, and one that pays a few cents every week. They begin at a fixed date, as bars must be the same in every
# process.
_WEEKLY_SPLIT, _WEEKLY_DIVIDEND = "GME", "MSFT"
_FIRST_WEEK = date(2026, 1, 5)
_WEEKLY_CASH = 0.05


@dataclass(frozen=True)
class Split:
    """split_from old shares become split_to new ones with the first bar of execution_date."""

    ticker: str
    execution_date: date
    split_from: float
    split_to: float


@dataclass(frozen=True)
class Dividend:
    """cash: dollars a share of ex_date, which the price falls by."""

    ticker: str
    ex_date: date
    cash: float
    frequency: int = 4


class Shares(NamedTuple):
    """What a ticker's price and shares are on a day, from those without any event: price * ratio - cash, and shares
    divided by ratio."""

    ratio: float = 1.0
    cash: float = 0.0


@dataclass(frozen=True)
class Actions:
    """A market's planned events. A ticker's events of a day have an effect in their order, splits first."""

    splits: Sequence[Split] = ()
    dividends: Sequence[Dividend] = ()

    def shares(self, ticker: str, day: date) -> Shares:
        """On a day, after all events up to it."""
        events = [
            (split.execution_date, 0, split.split_from / split.split_to, 0.0)
            for split in self.splits
            if split.ticker == ticker
        ]
        events += [(paid.ex_date, 1, 1.0, paid.cash) for paid in self.dividends if paid.ticker == ticker]
        ratio, cash = Shares()
        for event_day, _, factor, paid_cash in sorted(events, key=lambda event: event[:2]):
            if event_day <= day:
                ratio, cash = ratio * factor, cash * factor + paid_cash
        return Shares(ratio, cash)


def weekly(tickers: Collection[str], last: date) -> Actions:
    """The demo's events up to a day, of the tickers that have any: four for one on Tuesday, one for four on Thursday,
    and a dividend on Wednesday, each on the next session where that is none."""
    splits: list[Split] = []
    dividends: list[Dividend] = []
    for week in range(max(0, (last - _FIRST_WEEK).days) // 7 + 1):
        monday = _FIRST_WEEK + timedelta(weeks=week)
        tuesday, wednesday, thursday = (_session_from(monday + timedelta(days=days)) for days in (1, 2, 3))
        if _WEEKLY_SPLIT in tickers:
            splits += [Split(_WEEKLY_SPLIT, tuesday, 1, 4), Split(_WEEKLY_SPLIT, thursday, 4, 1)]
        if _WEEKLY_DIVIDEND in tickers:
            dividends.append(Dividend(_WEEKLY_DIVIDEND, wednesday, _WEEKLY_CASH, frequency=52))
    return Actions(
        [split for split in splits if split.execution_date <= last],
        [paid for paid in dividends if paid.ex_date <= last],
    )


def _session_from(day: date) -> date:
    return calendar.trading_days(day, day + timedelta(days=7))[0]


@dataclass(frozen=True)
class Renamed:
    """A company's ticker, and what it was called before the day."""

    ticker: str
    before: str
    day: date


@dataclass(frozen=True)
class Delisted:
    ticker: str
    day: date


class Listings:
    """What the vendor's API says of a market beside its bars.

    close_before: a ticker's last regular close before a day, which the dividends' factors need.
    """

    def __init__(
        self,
        tickers: Sequence[str],
        actions: Actions,
        close_before: Callable[[str, date], float],
        renamed: Sequence[Renamed] = (Renamed("UHT", "UHTX", date(2018, 6, 4)),),
        delisted: Sequence[Delisted] = (Delisted("OLDCO", date(2020, 3, 2)),),
    ) -> None:
        self._tickers, self._actions, self._renamed, self._delisted = tickers, actions, renamed, delisted
        self._close_before = functools.cache(close_before)

    def splits(self) -> list[JsonObject]:
        """By date. The factor is of this and all later splits of the ticker."""
        rows = []
        for split in sorted(self._actions.splits, key=lambda split: (split.execution_date, split.ticker)):
            ratio = self._actions.shares(split.ticker, date.max).ratio
            before = self._actions.shares(split.ticker, split.execution_date - timedelta(days=1)).ratio
            rows.append(
                {
                    "id": _digest("E", split.ticker, split.execution_date, split.split_to, length=64),
                    "ticker": split.ticker,
                    "execution_date": split.execution_date.isoformat(),
                    "adjustment_type": "forward_split" if split.split_to > split.split_from else "reverse_split",
                    "split_from": split.split_from,
                    "split_to": split.split_to,
                    "historical_adjustment_factor": ratio / before,
                }
            )
        return rows

    def dividends(self) -> list[JsonObject]:
        """By date. The factor is of this and all later dividends of the ticker."""
        rows: list[JsonObject] = []
        factors: dict[str, float] = {}
        for paid in sorted(self._actions.dividends, key=lambda paid: (paid.ex_date, paid.ticker), reverse=True):
            close = self._close_before(paid.ticker, paid.ex_date) * self._split_on(paid.ticker, paid.ex_date)
            factors[paid.ticker] = factors.get(paid.ticker, 1.0) * (1 - paid.cash / close)
            later = self._actions.shares(paid.ticker, date.max).ratio
            rows.append(
                {
                    "id": _digest("E", paid.ticker, paid.ex_date, paid.cash, length=64),
                    "ticker": paid.ticker,
                    "cash_amount": paid.cash,
                    "split_adjusted_cash_amount": paid.cash
                    * later
                    / self._actions.shares(paid.ticker, paid.ex_date).ratio,
                    "currency": "USD",
                    "declaration_date": (paid.ex_date - timedelta(days=14)).isoformat(),
                    "ex_dividend_date": paid.ex_date.isoformat(),
                    "record_date": paid.ex_date.isoformat(),
                    "pay_date": (paid.ex_date + timedelta(days=14)).isoformat(),
                    "frequency": paid.frequency,
                    "distribution_type": "recurring",
                    "historical_adjustment_factor": factors[paid.ticker],
                }
            )
        return rows[::-1]

    def _split_on(self, ticker: str, day: date) -> float:
        """What a split of the day itself does to the close before it."""
        before = self._actions.shares(ticker, day - timedelta(days=1)).ratio
        return self._actions.shares(ticker, day).ratio / before

    def tickers(self, as_of: date, *, active: bool) -> list[JsonObject]:
        """By name, under the names that they had on that date."""
        rows = [self._row(self._name_on(ticker, as_of), ticker) for ticker in self._tickers] if active else []
        for gone in self._delisted:
            if active == (as_of < gone.day):
                end = {} if active else {"active": False, "delisted_utc": f"{gone.day}T05:00:00Z"}
                rows.append(self._row(gone.ticker, gone.ticker) | end)
        return sorted(rows, key=lambda row: str(row["ticker"]))

    def events(self, ticker: str) -> JsonObject | None:
        """The names of what a ticker stands for today, the newest first; None for one that is not listed."""
        if ticker not in self._tickers:
            return None
        names = [(ticker, _FIRST_LISTED)]
        for change in self._renamed:
            if change.ticker == ticker:
                names = [(ticker, change.day), (change.before, _FIRST_LISTED)]
        row = self._row(ticker, ticker)
        events = [
            {"ticker_change": {"ticker": name}, "type": "ticker_change", "date": day.isoformat()} for name, day in names
        ]
        return {name: row[name] for name in ("name", "composite_figi", "cik")} | {"events": events}

    def _name_on(self, ticker: str, day: date) -> str:
        return next((change.before for change in self._renamed if change.ticker == ticker and day < change.day), ticker)

    def _row(self, name: str, ticker: str) -> JsonObject:
        """name: the ticker on that date. ticker: the one of today, which the identifiers follow from."""
        return {
            "ticker": name,
            "name": f"{ticker} (simulated)",
            "market": "otc" if is_otc(ticker) else "stocks",
            "locale": "us",
            # The vendor has no such field for OTC shares.
            **({} if is_otc(ticker) else {"primary_exchange": "XNAS"}),
            "type": "ETF" if ticker in _ETFS else "CS",
            "active": True,
            "currency_name": "usd",
            "cik": f"{int(_digest('', ticker), 16) % 10**10:010}",
            "composite_figi": f"BBG{_digest('C', ticker).upper()}",
            "share_class_figi": f"BBG{_digest('S', ticker).upper()}",
            "last_updated_utc": "2026-01-02T06:07:08.123456789Z",
        }


def _digest(*parts: object, length: int = 9) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:length]
