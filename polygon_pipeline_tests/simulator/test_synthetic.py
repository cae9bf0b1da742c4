"""The synthetic market: its bars are valid, and the last streamed version of each bar equals its history."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST, first_tickers
from polygon_pipeline_tests.support.bars import DAY, JsonObject

EARLY_CLOSE = date(2025, 11, 28)
TRADING_DAYS = calendar.trading_days(date(2024, 1, 1), date(2026, 1, 31))


def market(tickers: tuple[str, ...] = WATCH_LIST, seed: int = 7) -> SyntheticMarket:
    return SyntheticMarket(tickers, seed)


def sent(feed: SyntheticFeed, channel: Channel) -> list[JsonObject]:
    return [json.loads(event.payload) for event in feed if event.channel is channel]


def test_the_same_seed_tickers_and_day_give_the_same_bars_in_any_order_of_calls() -> None:
    used = market()
    used.day_bars(EARLY_CLOSE, Channel.MINUTE)
    assert used.day_bars(DAY, Channel.MINUTE).equals(market().day_bars(DAY, Channel.MINUTE))
    assert list(SyntheticFeed(used, DAY, [Channel.MINUTE])) == list(SyntheticFeed(market(), DAY, [Channel.MINUTE]))


def test_a_different_seed_or_day_gives_different_bars() -> None:
    bars = market().day_bars(DAY, Channel.MINUTE)
    assert not bars.equals(market(seed=8).day_bars(DAY, Channel.MINUTE))
    closes = market().day_bars(date(2026, 1, 27), Channel.MINUTE)["close"].to_pylist()
    assert closes != bars["close"].to_pylist()


@settings(max_examples=25, deadline=None)
@given(
    day=st.sampled_from(TRADING_DAYS),
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
)
def test_every_bar_is_valid(day: date, seed: int, count: int) -> None:
    bars = SyntheticMarket(first_tickers(count), seed).day_bars(day, Channel.MINUTE).to_pandas()
    session = calendar.session(day)
    assert session
    assert (bars.low <= bars[["open", "close"]].min(axis=1)).all()
    assert (bars.high >= bars[["open", "close"]].max(axis=1)).all()
    assert (bars.low > 0).all()
    assert bars.vwap.between(bars.low, bars.high).all()
    assert (bars.volume >= bars.transactions).all()
    assert (bars.transactions >= 1).all()
    prices = bars[["open", "high", "low", "close", "vwap"]]
    assert prices.equals(prices.round(4))
    first_ms, end_ms = session.pre_open.timestamp() * 1000, session.post_close.timestamp() * 1000
    assert bars.start_ms.between(first_ms, end_ms - 60_000).all()
    assert (bars.start_ms % 60_000 == 0).all()
    assert not bars.duplicated(["ticker", "start_ms"]).any()
    assert bars.equals(bars.sort_values(["start_ms", "ticker"], ignore_index=True))


def test_on_an_early_close_regular_hours_end_at_13_and_the_session_at_17() -> None:
    session = calendar.session(EARLY_CLOSE)
    assert session
    starts = market(("SPY",)).day_bars(EARLY_CLOSE, Channel.MINUTE)["start_ms"].to_numpy()
    assert starts.max() == session.post_close.timestamp() * 1000 - 60_000
    assert len(starts) == 13 * 60
    trades = market(("SPY",)).day_bars(EARLY_CLOSE, Channel.MINUTE)["transactions"].to_numpy()
    assert starts[trades.argmax()] == session.close.timestamp() * 1000, (
        "the closing auction is in the minute after the close"
    )


def test_liquid_tickers_trade_every_minute_and_illiquid_ones_rarely() -> None:
    bars = Counter(market().day_bars(DAY, Channel.MINUTE)["ticker"].to_pylist())
    assert bars["SPY"] == 960
    assert 0 < bars["KIMpL"] < 60


def test_a_closed_day_and_a_market_without_tickers_are_errors() -> None:
    with pytest.raises(ValueError, match="closed on 2026-01-25"):
        market().day_bars(date(2026, 1, 25), Channel.MINUTE)
    with pytest.raises(ValueError, match="closed on 2026-01-25"):
        SyntheticFeed(market(), date(2026, 1, 25))
    with pytest.raises(ValueError, match="at least one ticker"):
        SyntheticMarket([])


@pytest.mark.slow
def test_a_market_without_trades_has_no_bars_and_sends_nothing() -> None:
    inactive = market(("KIMpL",), seed=0)
    inactive._trades_per_minute[:] = 0
    assert inactive.day_bars(DAY, Channel.MINUTE).num_rows == 0
    assert inactive.day_bars(DAY, Channel.SECOND).num_rows == 0
    assert list(SyntheticFeed(inactive, DAY)) == []


def test_second_bars_resampled_to_minutes_equal_the_minute_bars() -> None:
    some = market(("AAPL", "BRK.B", "KIMpL", "UHT"))
    seconds = some.day_bars(DAY, Channel.SECOND).to_pandas()
    assert seconds.equals(seconds.sort_values(["start_ms", "ticker"], ignore_index=True))
    seconds["start_ms"] -= seconds.start_ms % 60_000
    resampled = seconds.groupby(["start_ms", "ticker"]).agg(
        open=("open", "first"),
        high=("high", "max"),
        low=("low", "min"),
        close=("close", "last"),
        volume=("volume", "sum"),
        transactions=("transactions", "sum"),
    )
    minutes = some.day_bars(DAY, Channel.MINUTE).to_pandas().set_index(["start_ms", "ticker"])
    assert resampled.index.equals(minutes.index)
    np.testing.assert_allclose(resampled, minutes[resampled.columns], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("channel", list(Channel))
def test_the_last_version_sent_equals_the_days_bars(channel: Channel) -> None:
    some = market(("AAPL", "BRK.B", "KIMpL", "TCEHY"))
    last = {(event["s"], event["sym"]): event for event in sent(SyntheticFeed(some, DAY, [channel]), channel)}
    bars = some.day_bars(DAY, channel).to_pylist()
    assert sorted(last) == [(bar["start_ms"], bar["ticker"]) for bar in bars]
    for bar in bars:
        event = last[bar["start_ms"], bar["ticker"]]
        assert [event[name] for name in ("o", "h", "l", "c", "vw")] == [
            bar[name] for name in ("open", "high", "low", "close", "vwap")
        ]
        assert float(event["dv"]) == bar["volume"]
        assert event["v"] == int(bar["volume"])
        assert event["z"] == max(1, int(bar["volume"] / bar["transactions"]))


@pytest.mark.slow
def test_some_bars_are_revised_within_15_minutes_and_events_are_in_the_order_of_sending() -> None:
    events = list(SyntheticFeed(market(("BRK.B", "GME", "UHT")), DAY))
    assert [event.emit_ms for event in events] == sorted(event.emit_ms for event in events)
    versions: dict[tuple[str, str, int], list[tuple[int, JsonObject]]] = {}
    for event in events:
        bar = json.loads(event.payload)
        versions.setdefault((bar["ev"], bar["sym"], bar["s"]), []).append((event.emit_ms, bar))
    for sent_versions in versions.values():
        end_ms = sent_versions[0][1]["e"]
        assert end_ms <= sent_versions[0][0] <= end_ms + 2000
        assert sent_versions[-1][0] <= end_ms + 15 * 60_000
    revised = [sent_versions for sent_versions in versions.values() if len(sent_versions) > 1]
    assert 0.01 < len(revised) / len(versions) < 0.03
    for (_, early), (_, final) in revised:
        assert Decimal(early["dv"]) < Decimal(final["dv"])
        assert early["l"] <= early["c"] <= early["h"]
    assert len(events) == len(versions) + len(revised)


def test_with_a_revised_share_of_0_every_bar_is_sent_once() -> None:
    some = market(("AAPL", "UHT"))
    feed = SyntheticFeed(some, DAY, [Channel.MINUTE], revised_share=0)
    assert len(list(feed)) == some.day_bars(DAY, Channel.MINUTE).num_rows


@pytest.mark.slow
@pytest.mark.parametrize("channel", list(Channel))
def test_the_fields_of_the_day_have_the_vendors_meaning(channel: Channel) -> None:
    session = calendar.session(DAY)
    assert session
    open_ms, close_ms = session.open.timestamp() * 1000, session.close.timestamp() * 1000
    feed = SyntheticFeed(market(("GME", "TCEHY")), DAY, [channel], revised_share=0)
    for ticker in ("GME", "TCEHY"):
        events = [event for event in sent(feed, channel) if event["sym"] == ticker]
        events.sort(key=lambda event: int(event["s"]))
        official_open = next(event["o"] for event in events if open_ms <= event["s"] < close_ms)
        volume = Decimal(0)
        turnover = 0.0
        for event in events:
            volume += Decimal(event["dv"])
            turnover += float(event["dv"]) * event["vw"]
            assert event["op"] == (official_open if event["s"] >= open_ms else 0)
            assert Decimal(event["dav"]) == volume
            assert event["av"] == int(volume)
            assert event["a"] == pytest.approx(turnover / float(volume), abs=1e-4)
            assert event.get("otc") == (True if ticker == "TCEHY" else None)
            assert event["e"] - event["s"] == (60_000 if channel is Channel.MINUTE else 1000)


def test_the_fields_have_the_order_and_types_of_a_real_frame() -> None:
    event = next(iter(SyntheticFeed(market(("AAPL",)), DAY, [Channel.SECOND])))
    bar = json.loads(event.payload)
    assert list(bar) == [
        "ev",
        "sym",
        "v",
        "av",
        "op",
        "vw",
        "o",
        "c",
        "h",
        "l",
        "a",
        "z",
        "s",
        "e",
        "dv",
        "dav",
    ]
    assert isinstance(bar["v"], int)
    assert isinstance(bar["av"], int)
    assert isinstance(bar["dv"], str)
    assert "." in bar["dav"]
