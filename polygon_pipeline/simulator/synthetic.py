"""A synthetic market: bars that look like a day's trading and are a pure function of seed, tickers and day.

Belongs here: making the bars of a day, as final bars (what the vendor's REST API serves) and as a feed (what the
vendor's socket sends, including early versions and revisions). Does not belong here: the protocol (exchange) and
recorded bars (replay).

Second bars are derived from the minute bars: resampled to minutes, they give exactly the same prices, volumes and
transactions, but only roughly the same VWAPs. They are made for one minute of the day at a time, to save memory.
"""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from itertools import pairwise, repeat
from operator import attrgetter
from statistics import NormalDist
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import UNSET, UnsetType

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.corporate_actions import Actions, Listings, Shares
from polygon_pipeline.simulator.feed import Aggregate, Event, encode, window_ms
from polygon_pipeline.simulator.tickers import KNOWN, TickerProfile, is_otc

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", np.int64, np.float64)

MINUTE_MS = 60_000
REVISED_SHARE = 0.02
_NO_ACTIONS = Actions()
_MAX_DELAY_MS = 2_000  # from the end of a bar until it is first sent
_MAX_REVISION_DELAY_MS = 14 * MINUTE_MS  # from then until it is sent again, revised: the vendor says "about 15 minutes"


class _Bars(NamedTuple):
    """Columns of equal length, one row per bar."""

    ticker: Ints  # index into the market's sorted tickers
    start_ms: Ints
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Ints  # thousandths of a share, so that sums are exact
    vwap: Floats
    transactions: Ints

    def take(self, rows: Ints | slice) -> _Bars:
        columns: Iterable[Any] = (column[rows] for column in self)
        return _Bars(*columns)


class SyntheticMarket:
    """A market of the given tickers, without duplicates; ValueError if there are none.

    The same seed and tickers give the same bars for a day, in any process and in any order of calls. actions: splits
    and dividends; a day's bars depend on those up to it, and on no later ones.
    """

    def __init__(self, tickers: Sequence[str], seed: int = 7, actions: Actions = _NO_ACTIONS) -> None:
        if not tickers:
            raise ValueError("a market needs at least one ticker")
        self.tickers = sorted(set(tickers))
        self.seed = seed
        self.actions = actions
        profiles = [_profile(ticker, seed) for ticker in self.tickers]
        self._price = np.array([profile.price for profile in profiles])
        self._trades_per_minute = np.array([profile.trades_per_minute for profile in profiles])
        # Two days, because callers often compare a day with the day before.
        self._minute_bars = functools.lru_cache(maxsize=2)(self._make_minute_bars)

    def day_bars(self, day: date, channel: Channel = Channel.MINUTE) -> pa.Table:
        """The day's final bars, sorted by start_ms, then ticker; a window without trades has no bar.

        Columns: ticker (string), start_ms (int64, Unix ms), open, high, low, close, vwap (float64, dollars, at most
        4 decimals), volume (float64, shares, sometimes fractional), transactions (int64). ValueError if the market
        is closed that day. For second bars of many tickers, use day_batches.
        """
        return pa.concat_tables(self.day_batches(day, channel))

    def day_batches(self, day: date, channel: Channel) -> Iterator[pa.Table]:
        """The same bars in several tables: minute bars in one for the whole day, second bars in one per minute."""
        bars = self._minute_bars(day)
        if channel is Channel.MINUTE:
            yield self._table(bars)
            return
        for minute, rows in enumerate(self._rows_by_minute(day)):
            seconds = self._second_bars(day, minute, bars.take(rows))
            yield self._table(seconds.take(np.argsort(seconds.start_ms, kind="stable")))

    def close_before(self, ticker: str, day: date) -> float:
        """The last price of regular hours on the session before a day."""
        before = _session(calendar.trading_days(day - timedelta(days=7), day - timedelta(days=1))[-1])
        bars = self._minute_bars(before.date)
        regular = (bars.start_ms < _unix_ms(before.close)) & (bars.ticker == self.tickers.index(ticker))
        return float(bars.close[regular][-1])

    def listings(self) -> Listings:
        """What the vendor lists of this market."""
        return Listings(self.tickers, self.actions, self.close_before)

    def _table(self, bars: _Bars) -> pa.Table:
        columns = bars._asdict() | {
            "ticker": pa.array(self.tickers, pa.string()).take(pa.array(bars.ticker)),
            "volume": bars.volume / 1000,
        }
        return pa.table(columns)

    def _rows_by_minute(self, day: date) -> list[slice]:
        """For each minute of the session, its rows in the day's minute bars."""
        first_ms, minutes = _session_start_ms(day), _session(day).minutes
        starts = first_ms + MINUTE_MS * np.arange(minutes + 1)
        edges = np.searchsorted(self._minute_bars(day).start_ms, starts).tolist()
        return [slice(first, last) for first, last in pairwise(edges)]

    def _make_minute_bars(self, day: date) -> _Bars:
        session = _session(day)
        rng = np.random.default_rng([self.seed, day.toordinal()])
        trades = rng.poisson(self._trades_per_minute[:, np.newaxis] * _activity(session))
        ticker, minute = np.nonzero(trades)
        transactions = trades[ticker, minute]
        del trades  # the only array with an element for every ticker and minute
        count = len(ticker)

        # A ticker's price is a random walk with two steps per bar: from the last close to the open, then to the close.
        steps = 0.0005 * rng.standard_normal(2 * count)
        walk = _running_sum(steps, *_groups(np.repeat(ticker, 2)))
        # The level follows a slow wave around the ticker's price, so that consecutive days open at similar prices.
        level = self._price * np.exp(0.2 * np.sin(day.toordinal() / 40 + self._price))
        open_price = level[ticker] * np.exp(walk[0::2])
        close = np.where(transactions > 1, level[ticker] * np.exp(walk[1::2]), open_price)
        # With two trades, these are the open and the close; only a third can be above or below both.
        excess = np.where(transactions > 2, 0.0004, 0.0) * rng.exponential(size=(2, count))
        high = _to_tick(np.maximum(open_price, close) * (1 + excess[0]))
        low = _to_tick(np.minimum(open_price, close) * (1 - excess[1]))
        open_price, close = _to_tick(open_price), _to_tick(close)
        low_weight = rng.random(count)
        vwap = np.round((open_price + close) / 4 + (low * low_weight + high * (1 - low_weight)) / 2, 4)

        whole_shares = transactions + np.floor(transactions * rng.exponential(80, count)).astype(np.int64)
        thousandths = np.where(rng.random(count) < 0.2, rng.integers(0, 1000, count), 0)
        start_ms = _session_start_ms(day) + MINUTE_MS * minute
        volume = 1000 * whole_shares + thousandths
        bars = _Bars(ticker, start_ms, open_price, high, low, close, volume, vwap, transactions)
        bars = self._in_shares_of(day, bars)
        return bars.take(np.argsort(minute, kind="stable"))

    def _in_shares_of(self, day: date, bars: _Bars) -> _Bars:
        """The bars after the splits and dividends up to the day, all of its bars alike."""
        shares = [self.actions.shares(ticker, day) for ticker in self.tickers]
        if all(held == Shares() for held in shares):
            return bars
        ratio, cash = (np.array(column)[bars.ticker] for column in zip(*shares, strict=True))
        open_price, high, low, close = (
            _to_tick(price * ratio - cash) for price in (bars.open, bars.high, bars.low, bars.close)
        )
        volume = np.rint(bars.volume / ratio).astype(np.int64)
        return bars._replace(
            open=open_price,
            high=high,
            low=low,
            close=close,
            volume=np.maximum(volume, 1000 * bars.transactions),  # a trade is of one share at least
            vwap=np.clip(np.round(bars.vwap * ratio - cash, 4), low, high),
        )

    def _second_bars(self, day: date, minute: int, bars: _Bars) -> _Bars:
        """The second bars of one minute's bars, sorted by ticker, then second."""
        rng = np.random.default_rng([self.seed, day.toordinal(), minute])
        # The expected number of the 60 seconds in which at least one of that many trades falls.
        lengths = np.ceil(60 * -np.expm1(-bars.transactions / 60)).astype(np.int64)
        shuffled = rng.random((len(lengths), 60)).argsort(axis=1)
        _, second = np.nonzero(shuffled < lengths[:, np.newaxis])
        first = np.cumsum(lengths) - lengths
        last = first + lengths - 1
        # From here on there is one row per second bar. Its minute bar:
        minute_bar = bars.take(np.repeat(np.arange(len(lengths)), lengths))
        # Its number within the minute, from 1, and how many second bars the minute has:
        number = 1 + np.arange(len(second)) - np.repeat(first, lengths)
        count = np.repeat(lengths, lengths)

        # The price goes from the minute's open to its close, and reaches its high in one second and its low in one.
        noise = 0.3 * (minute_bar.high - minute_bar.low) * rng.standard_normal(len(second))
        price = minute_bar.open + (minute_bar.close - minute_bar.open) * number / count + noise
        close = _to_tick(np.clip(price, minute_bar.low, minute_bar.high))
        close = np.clip(close, minute_bar.low, minute_bar.high)
        close[last] = bars.close
        open_price = np.roll(close, 1)
        open_price[first] = bars.open
        high, low = np.maximum(open_price, close), np.minimum(open_price, close)
        high[first + rng.integers(0, lengths)] = bars.high
        low[first + rng.integers(0, lengths)] = bars.low

        weight = _running_sum(rng.exponential(size=len(second)), first, lengths)
        cumulative_share = weight / np.repeat(weight[last], lengths)

        def distribute(total: Ints) -> Ints:
            """Whole numbers, each at least 1, that add up to the minute's total."""
            running: Ints = number + np.floor((total - count) * cumulative_share).astype(np.int64)
            before: Ints = np.roll(running, 1)
            before[first] = 0
            return running - before

        volume = 1000 * distribute(minute_bar.volume // 1000)
        volume[last] += bars.volume % 1000
        return _Bars(
            ticker=minute_bar.ticker,
            start_ms=minute_bar.start_ms + 1000 * second,
            open=open_price,
            high=high,
            low=low,
            close=close,
            volume=volume,
            vwap=np.round((open_price + high + low + close) / 4, 4),
            transactions=distribute(minute_bar.transactions),
        )


class SyntheticFeed:
    """What the vendor's socket sends for a day, as events in the order of sending. Can be iterated more than once.

    Each bar is sent at most 2 seconds of market time after its end. A share of the bars (revised_share, 0 to 1) is
    first sent in an early version with less volume, and again within 15 minutes; the last version equals day_bars.
    ValueError if the market is closed that day. Leave out Channel.SECOND if it is not needed: for the whole market it
    has millions of events.
    """

    def __init__(
        self,
        market: SyntheticMarket,
        day: date,
        channels: Collection[Channel] = (Channel.MINUTE, Channel.SECOND),
        revised_share: float = REVISED_SHARE,
    ) -> None:
        self.market, self.day, self.channels, self.revised_share = market, day, channels, revised_share
        self._otc: list[bool | UnsetType] = [is_otc(ticker) or UNSET for ticker in market.tickers]
        self._regular_hours_ms = _unix_ms(_session(day).open), _unix_ms(_session(day).close)

    def __iter__(self) -> Iterator[Event]:
        bars = self.market._minute_bars(self.day)
        official_opens = self._official_opens(bars)
        totals = {channel: _DayTotals(len(self.market.tickers)) for channel in self.channels}
        pending: list[Event] = []
        minute_end = _session_start_ms(self.day)
        for minute, rows in enumerate(self.market._rows_by_minute(self.day)):
            minute_bars = bars.take(rows)
            for channel in self.channels:
                channel_bars = minute_bars
                if channel is Channel.SECOND:
                    channel_bars = self.market._second_bars(self.day, minute, minute_bars)
                pending += self._events(channel, minute, channel_bars, official_opens, totals[channel])
            # Events of later minutes are sent after the end of this one, so the order up to its end is final.
            minute_end += MINUTE_MS
            pending.sort(key=attrgetter("emit_ms"))
            final = bisect_right(pending, minute_end, key=attrgetter("emit_ms"))
            yield from pending[:final]
            del pending[:final]
        yield from pending

    def _official_opens(self, bars: _Bars) -> Floats:
        """For each ticker, the open of its first bar in regular hours; 0 if it has none."""
        first, last = np.searchsorted(bars.start_ms, self._regular_hours_ms)
        regular = bars.take(slice(first, last))
        opens = np.zeros(len(self.market.tickers))
        opens[regular.ticker[::-1]] = regular.open[::-1]  # in reverse, so that the earliest bar is written last
        return opens

    def _events(
        self, channel: Channel, minute: int, bars: _Bars, official_opens: Floats, totals: _DayTotals
    ) -> list[Event]:
        rng = np.random.default_rng([self.market.seed, self.day.toordinal(), minute, window_ms(channel)])
        count = len(bars.ticker)
        day_volume, day_vwap = totals.add(bars)
        day_open = np.where(bars.start_ms >= self._regular_hours_ms[0], official_opens[bars.ticker], 0.0)
        first_sent = bars.start_ms + window_ms(channel) + rng.integers(0, _MAX_DELAY_MS, count)
        revised = (rng.random(count) < self.revised_share) & (bars.volume >= 2000)
        revision = np.where(revised, rng.integers(1000, _MAX_REVISION_DELAY_MS, count), 0)
        events = self._encode(channel, bars, first_sent + revision, day_volume, day_vwap, day_open)

        rows = np.flatnonzero(revised)
        final = bars.take(rows)
        early_share = rng.uniform(0.5, 0.95, len(rows))
        early = final._replace(
            close=_to_tick(final.low + (final.high - final.low) * rng.random(len(rows))),
            volume=1000 * np.maximum(1, np.floor(final.volume // 1000 * early_share).astype(np.int64)),
            transactions=np.maximum(1, np.floor(final.transactions * early_share).astype(np.int64)),
        )
        early_day_volume = day_volume[rows] - (final.volume - early.volume)
        return events + self._encode(channel, early, first_sent[rows], early_day_volume, day_vwap[rows], day_open[rows])

    def _encode(
        self,
        channel: Channel,
        bars: _Bars,
        emit_ms: Ints,
        day_volume: Ints,
        day_vwap: Floats,
        day_open: Floats,
    ) -> list[Event]:
        indices = bars.ticker.tolist()
        tickers = [self.market.tickers[index] for index in indices]
        aggregates = map(
            Aggregate,
            repeat(channel.value),
            tickers,
            (bars.volume // 1000).tolist(),
            (day_volume // 1000).tolist(),
            day_open.tolist(),
            bars.vwap.tolist(),
            bars.open.tolist(),
            bars.close.tolist(),
            bars.high.tolist(),
            bars.low.tolist(),
            day_vwap.tolist(),
            np.maximum(1, bars.volume // (1000 * bars.transactions)).tolist(),
            bars.start_ms.tolist(),
            (bars.start_ms + window_ms(channel)).tolist(),
            map(str, (bars.volume / 1000).tolist()),
            map(str, (day_volume / 1000).tolist()),
            [self._otc[index] for index in indices],
        )
        return list(map(Event, emit_ms.tolist(), repeat(channel), tickers, encode(aggregates)))


class _DayTotals:
    """The day's volume (thousandths of a share) and turnover so far of every ticker, for one channel."""

    def __init__(self, tickers: int) -> None:
        self._volume = np.zeros(tickers, np.int64)
        self._turnover = np.zeros(tickers)

    def add(self, bars: _Bars) -> tuple[Ints, Floats]:
        """Add bars, which are sorted by ticker; returns for each bar the day's volume and VWAP up to its end."""
        first, lengths = _groups(bars.ticker)
        volume = self._volume[bars.ticker] + _running_sum(bars.volume, first, lengths)
        turnover = self._turnover[bars.ticker] + _running_sum(bars.volume * bars.vwap, first, lengths)
        last = first + lengths - 1
        self._volume[bars.ticker[last]] = volume[last]
        self._turnover[bars.ticker[last]] = turnover[last]
        return volume, np.round(np.divide(turnover, volume, dtype=np.float64), 4)


def _profile(ticker: str, seed: int) -> TickerProfile:
    if ticker in KNOWN:
        return KNOWN[ticker]
    # From a hash and not from a random generator, so that a ticker's profile does not depend on the other tickers.
    digest = hashlib.blake2b(f"{seed}:{ticker}".encode(), digest_size=8).digest()
    price, trades = (NormalDist().inv_cdf((int.from_bytes(half) + 0.5) / 2**32) for half in (digest[:4], digest[4:]))
    # With these parameters, 11,000 tickers have about two million minute bars a day, like the real market.
    return TickerProfile(price=25 * math.exp(1.3 * price), trades_per_minute=0.5 * math.exp(2 * trades))


def _activity(session: calendar.Session) -> Floats:
    """The number of trades in each minute of the session, relative to a ticker's mean in regular hours."""
    begin = (session.begin - session.pre_open) // timedelta(minutes=1)  # the night is before minute 0
    minute = np.arange(begin, begin + session.minutes)
    opens, closes = ((at - session.pre_open) // timedelta(minutes=1) for at in (session.open, session.close))
    night = 0.002 + 0.01 * np.exp((begin - minute) / 60)
    pre = 0.01 + 0.1 * (minute / opens) ** 2
    regular = 0.7 + 1.5 * (2 * (minute - opens) / (closes - opens) - 1) ** 4
    post = 0.005 + 0.1 * np.exp(-np.maximum(0, minute - closes) / 40)
    activity = np.select([minute < 0, minute < opens, minute < closes], [night, pre, regular], post)
    activity[closes - begin] = 4.0  # the closing auction prints in the minute after the bell
    return activity


def _session(day: date) -> calendar.Session:
    found = calendar.session(day)
    if found is None:
        raise ValueError(f"the market is closed on {day.isoformat()}")
    return found


def _session_start_ms(day: date) -> int:
    return _unix_ms(_session(day).begin)


def _unix_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _to_tick(price: Floats) -> Floats:
    """Rounded to the tick size: a cent, or a hundredth of a cent below one dollar."""
    return np.where(price >= 1, np.round(price, 2), np.maximum(np.round(price, 4), 0.0001))


def _groups(keys: Ints) -> tuple[Ints, Ints]:
    """The start and the length of each run of equal keys."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return first, np.diff(np.append(first, len(keys)))


def _running_sum(values: npt.NDArray[Number], first: Ints, lengths: Ints) -> npt.NDArray[Number]:
    """The cumulative sum within each group."""
    total = np.cumsum(values)
    return total - np.repeat((total - values)[first], lengths)
