"""A synthetic market: bars that look like a day's trading and are a pure function of seed, tickers and day.

Belongs here: making the bars of a day, in their final form (what the vendor's history would say) and as a feed
(what its socket would send, early forms and revisions included). Does not belong here: the protocol (exchange) and
recorded bars (replay).

Second bars are cut from the minute bars, so they add up to them exactly in prices, volume and transactions; only
their VWAPs agree no better than roughly. They are made a minute of the day at a time and never held longer.
"""

from __future__ import annotations

import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import date, datetime
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
from polygon_pipeline.simulator.feed import Aggregate, Event, encode, window_ms
from polygon_pipeline.simulator.tickers import KNOWN, Character, is_otc

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", np.int64, np.float64)

MINUTE_MS = 60_000
REVISED_SHARE = 0.02
_LONGEST_DELAY_MS = 2_000  # from the end of a bar until it is first sent
_LONGEST_REVISION_MS = 14 * MINUTE_MS  # and until its last revision: the vendor says "about 15 minutes"


class _Bars(NamedTuple):
    """Columns of equal length, one row a bar."""

    ticker: Ints  # its position in the market's sorted tickers
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
    """A market of the given tickers. Duplicates count once; ValueError if there is none at all.

    The same seed and tickers give the same bars for a day, in any process and whatever was asked before.
    """

    def __init__(self, tickers: Sequence[str], seed: int = 7) -> None:
        if not tickers:
            raise ValueError("a market needs at least one ticker")
        self.tickers = sorted(set(tickers))
        self.seed = seed
        characters = [_character(ticker, seed) for ticker in self.tickers]
        self._price = np.array([character.price for character in characters])
        self._trades_per_minute = np.array([character.trades_per_minute for character in characters])
        # Two days, because who looks at one often compares it with the day before.
        self._minute_bars = functools.lru_cache(maxsize=2)(self._make_minute_bars)

    def day_bars(self, day: date, channel: Channel = Channel.MINUTE) -> pa.Table:
        """The day's final bars, sorted by start_ms, then ticker; a window without a trade has none.

        Columns: ticker (string), start_ms (int64, Unix ms), open, high, low, close, vwap (float64, dollars, at most
        4 decimals), volume (float64, shares, sometimes fractional), transactions (int64). ValueError if the market
        is closed that day. Second bars of many tickers are better read through day_batches.
        """
        return pa.concat_tables(self.day_batches(day, channel))

    def day_batches(self, day: date, channel: Channel) -> Iterator[pa.Table]:
        """The tables that make up day_bars: the whole day for minute bars, one minute each for second bars."""
        bars = self._minute_bars(day)
        if channel is Channel.MINUTE:
            yield self._table(bars)
            return
        for minute, rows in enumerate(self._rows_by_minute(day)):
            seconds = self._second_bars(day, minute, bars.take(rows))
            yield self._table(seconds.take(np.argsort(seconds.start_ms, kind="stable")))

    def _table(self, bars: _Bars) -> pa.Table:
        columns = bars._asdict() | {
            "ticker": pa.array(self.tickers, pa.string()).take(pa.array(bars.ticker)),
            "volume": bars.volume / 1000,
        }
        return pa.table(columns)

    def _rows_by_minute(self, day: date) -> list[slice]:
        """Where each minute of the session lies in the day's minute bars."""
        opened, minutes = _opening_ms(day), _minutes(_session(day))
        starts = opened + MINUTE_MS * np.arange(minutes + 1)
        edges = np.searchsorted(self._minute_bars(day).start_ms, starts).tolist()
        return [slice(first, last) for first, last in pairwise(edges)]

    def _make_minute_bars(self, day: date) -> _Bars:
        session = _session(day)
        rng = np.random.default_rng([self.seed, day.toordinal()])
        trades = rng.poisson(self._trades_per_minute[:, np.newaxis] * _activity(session))
        ticker, minute = np.nonzero(trades)
        transactions = trades[ticker, minute]
        del trades  # the only array as large as the whole grid of tickers and minutes
        count = len(ticker)

        # Each ticker's price walks twice a bar: from the last close to the open, and on to the close.
        steps = 0.0005 * rng.standard_normal(2 * count)
        walk = _running_sum(steps, *_groups(np.repeat(ticker, 2)))
        # A slow wave around the ticker's level, so that a day opens near where the last one did.
        level = self._price * np.exp(0.2 * np.sin(day.toordinal() / 40 + self._price))
        opened = level[ticker] * np.exp(walk[0::2])
        close = np.where(transactions > 1, level[ticker] * np.exp(walk[1::2]), opened)
        # Two trades are an open and a close; it takes a third to go beyond them.
        reach = np.where(transactions > 2, 0.0004, 0.0) * rng.exponential(size=(2, count))
        high = _to_tick(np.maximum(opened, close) * (1 + reach[0]))
        low = _to_tick(np.minimum(opened, close) * (1 - reach[1]))
        opened, close = _to_tick(opened), _to_tick(close)
        lean = rng.random(count)
        vwap = np.round((opened + close) / 4 + (low * lean + high * (1 - lean)) / 2, 4)

        whole = transactions + np.floor(transactions * rng.exponential(80, count)).astype(np.int64)
        fraction = np.where(rng.random(count) < 0.2, rng.integers(0, 1000, count), 0)
        start_ms = _opening_ms(day) + MINUTE_MS * minute
        bars = _Bars(ticker, start_ms, opened, high, low, close, 1000 * whole + fraction, vwap, transactions)
        return bars.take(np.argsort(minute, kind="stable"))

    def _second_bars(self, day: date, minute: int, bars: _Bars) -> _Bars:
        """The seconds of one minute's bars, sorted by ticker, then second."""
        rng = np.random.default_rng([self.seed, day.toordinal(), minute])
        # How many of 60 seconds so many trades would meet.
        lengths = np.ceil(60 * -np.expm1(-bars.transactions / 60)).astype(np.int64)
        shuffled = rng.random((len(lengths), 60)).argsort(axis=1)
        _, second = np.nonzero(shuffled < lengths[:, np.newaxis])
        first = np.cumsum(lengths) - lengths
        last = first + lengths - 1
        whole = bars.take(np.repeat(np.arange(len(lengths)), lengths))  # of each second, its minute's bar
        place = 1 + np.arange(len(second)) - np.repeat(first, lengths)
        of = np.repeat(lengths, lengths)

        # The price goes from the minute's open to its close, and one second each meets its high and low.
        noise = 0.3 * (whole.high - whole.low) * rng.standard_normal(len(second))
        line = whole.open + (whole.close - whole.open) * place / of + noise
        close = np.clip(_to_tick(np.clip(line, whole.low, whole.high)), whole.low, whole.high)
        close[last] = bars.close
        opened = np.roll(close, 1)
        opened[first] = bars.open
        high, low = np.maximum(opened, close), np.minimum(opened, close)
        high[first + rng.integers(0, lengths)] = bars.high
        low[first + rng.integers(0, lengths)] = bars.low

        weight = _running_sum(rng.exponential(size=len(second)), first, lengths)
        part = weight / np.repeat(weight[last], lengths)

        def share_out(total: Ints) -> Ints:
            """Whole numbers, each at least 1, that add up to the minute's total."""
            running: Ints = place + np.floor((total - of) * part).astype(np.int64)
            before: Ints = np.roll(running, 1)
            before[first] = 0
            return running - before

        volume = 1000 * share_out(whole.volume // 1000)
        volume[last] += bars.volume % 1000
        return _Bars(
            ticker=whole.ticker,
            start_ms=whole.start_ms + 1000 * second,
            open=opened,
            high=high,
            low=low,
            close=close,
            volume=volume,
            vwap=np.round((opened + high + low + close) / 4, 4),
            transactions=share_out(whole.transactions),
        )


class SyntheticFeed:
    """What the vendor's socket would send of a day, as events in the order of sending. Can be iterated again.

    Each bar is sent at most 2 seconds of market time after its end. A share of them (revised_share, 0 to 1) is first
    sent in an early form with less volume, and again within 15 minutes; the last form is day_bars'. ValueError if the
    market is closed that day. Leave out Channel.SECOND if nobody wants it: of the whole market it is millions.
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
        self._regular_ms = _unix_ms(_session(day).open), _unix_ms(_session(day).close)

    def __iter__(self) -> Iterator[Event]:
        bars = self.market._minute_bars(self.day)
        opens = self._official_opens(bars)
        totals = {channel: _DayTotals(len(self.market.tickers)) for channel in self.channels}
        waiting: list[Event] = []
        minute_end = _opening_ms(self.day)
        for minute, rows in enumerate(self.market._rows_by_minute(self.day)):
            minute_bars = bars.take(rows)
            for channel in self.channels:
                made = minute_bars
                if channel is Channel.SECOND:
                    made = self.market._second_bars(self.day, minute, minute_bars)
                waiting += self._events(channel, minute, made, opens, totals[channel])
            # Whatever later minutes add is sent after this one's end, so up to there the order is settled.
            minute_end += MINUTE_MS
            waiting.sort(key=attrgetter("emit_ms"))
            settled = bisect_right(waiting, minute_end, key=attrgetter("emit_ms"))
            yield from waiting[:settled]
            del waiting[:settled]
        yield from waiting

    def _official_opens(self, bars: _Bars) -> Floats:
        """Of each ticker, its first regular bar's open; 0 if it has none."""
        first, last = np.searchsorted(bars.start_ms, self._regular_ms)
        regular = bars.take(slice(first, last))
        opens = np.zeros(len(self.market.tickers))
        opens[regular.ticker[::-1]] = regular.open[::-1]  # backwards, so that the earliest is what stays
        return opens

    def _events(self, channel: Channel, minute: int, bars: _Bars, opens: Floats, totals: _DayTotals) -> list[Event]:
        rng = np.random.default_rng([self.market.seed, self.day.toordinal(), minute, window_ms(channel)])
        count = len(bars.ticker)
        day_volume, day_vwap = totals.add(bars)
        day_open = np.where(bars.start_ms >= self._regular_ms[0], opens[bars.ticker], 0.0)
        first_sent = bars.start_ms + window_ms(channel) + rng.integers(0, _LONGEST_DELAY_MS, count)
        revised = (rng.random(count) < self.revised_share) & (bars.volume >= 2000)
        revision = np.where(revised, rng.integers(1000, _LONGEST_REVISION_MS, count), 0)
        events = self._encode(channel, bars, first_sent + revision, day_volume, day_vwap, day_open)

        rows = np.flatnonzero(revised)
        final = bars.take(rows)
        known = rng.uniform(0.5, 0.95, len(rows))
        early = final._replace(
            close=_to_tick(final.low + (final.high - final.low) * rng.random(len(rows))),
            volume=1000 * np.maximum(1, np.floor(final.volume // 1000 * known).astype(np.int64)),
            transactions=np.maximum(1, np.floor(final.transactions * known).astype(np.int64)),
        )
        volume_then = day_volume[rows] - (final.volume - early.volume)
        return events + self._encode(channel, early, first_sent[rows], volume_then, day_vwap[rows], day_open[rows])

    def _encode(
        self,
        channel: Channel,
        bars: _Bars,
        emit_ms: Ints,
        day_volume: Ints,
        day_vwap: Floats,
        day_open: Floats,
    ) -> list[Event]:
        places = bars.ticker.tolist()
        tickers = [self.market.tickers[place] for place in places]
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
            [self._otc[place] for place in places],
        )
        return list(map(Event, emit_ms.tolist(), repeat(channel), tickers, encode(aggregates)))


class _DayTotals:
    """Every ticker's volume (thousandths of a share) and turnover so far that day, as one channel reports them."""

    def __init__(self, tickers: int) -> None:
        self._volume = np.zeros(tickers, np.int64)
        self._turnover = np.zeros(tickers)

    def add(self, bars: _Bars) -> tuple[Ints, Floats]:
        """Count bars sorted by ticker; of each, the day's volume and VWAP up to and including it."""
        first, lengths = _groups(bars.ticker)
        volume = self._volume[bars.ticker] + _running_sum(bars.volume, first, lengths)
        turnover = self._turnover[bars.ticker] + _running_sum(bars.volume * bars.vwap, first, lengths)
        last = first + lengths - 1
        self._volume[bars.ticker[last]] = volume[last]
        self._turnover[bars.ticker[last]] = turnover[last]
        return volume, np.round(np.divide(turnover, volume, dtype=np.float64), 4)


def _character(ticker: str, seed: int) -> Character:
    if ticker in KNOWN:
        return KNOWN[ticker]
    # From a digest and not from a generator in turn: a ticker's character is its own, whatever others are listed.
    digest = hashlib.blake2b(f"{seed}:{ticker}".encode(), digest_size=8).digest()
    price, trades = (NormalDist().inv_cdf((int.from_bytes(half) + 0.5) / 2**32) for half in (digest[:4], digest[4:]))
    # Medians and spreads that give about the real market's two million minute bars for 11,000 tickers.
    return Character(price=25 * math.exp(1.3 * price), trades_per_minute=0.5 * math.exp(2 * trades))


def _activity(session: calendar.Session) -> Floats:
    """How busy each minute of the session is, relative to a ticker's mean regular minute."""
    minute = np.arange(_minutes(session))
    opens, closes = (int((at - session.pre_open).total_seconds()) // 60 for at in (session.open, session.close))
    pre = 0.01 + 0.1 * (minute / opens) ** 2
    regular = 0.7 + 1.5 * (2 * (minute - opens) / (closes - opens) - 1) ** 4
    post = 0.005 + 0.1 * np.exp(-np.maximum(0, minute - closes) / 40)
    activity = np.select([minute < opens, minute < closes], [pre, regular], post)
    activity[closes] = 4.0  # the closing auction prints in the minute after the bell
    return activity


def _session(day: date) -> calendar.Session:
    found = calendar.session(day)
    if found is None:
        raise ValueError(f"the market is closed on {day.isoformat()}")
    return found


def _minutes(session: calendar.Session) -> int:
    return int((session.post_close - session.pre_open).total_seconds()) // 60


def _opening_ms(day: date) -> int:
    return _unix_ms(_session(day).pre_open)


def _unix_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _to_tick(price: Floats) -> Floats:
    """Rounded to what shares are quoted in: cents, or hundredths of a cent below a dollar."""
    return np.where(price >= 1, np.round(price, 2), np.maximum(np.round(price, 4), 0.0001))


def _groups(keys: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal keys begins, and how long it is."""
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return first, np.diff(np.append(first, len(keys)))


def _running_sum(values: npt.NDArray[Number], first: Ints, lengths: Ints) -> npt.NDArray[Number]:
    """The cumulative sum that begins anew with each group."""
    total = np.cumsum(values)
    return total - np.repeat((total - values)[first], lengths)
