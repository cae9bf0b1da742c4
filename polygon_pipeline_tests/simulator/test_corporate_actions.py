"""Simulated splits and dividends: what they do to every feed's bars, and what the vendor's API says of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.corporate_actions import Actions, Dividend, Shares, Split, weekly
from polygon_pipeline.simulator.flat_files import flat_file
from polygon_pipeline.simulator.rest_server import HistoryServer
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket

BEFORE, DAY = date(2026, 1, 23), date(2026, 1, 26)
TICKERS = ["AAPL", "BRK.B", "UHT"]
SPLIT, REVERSE = Split("AAPL", DAY, 1, 4), Split("BRK.B", DAY, 10, 1)
ACTIONS = Actions([SPLIT, REVERSE], [Dividend("AAPL", DAY, 0.26), Dividend("UHT", BEFORE, 0.2)])
PLAIN, MARKET = SyntheticMarket(TICKERS), SyntheticMarket(TICKERS, actions=ACTIONS)
PRICES = ("open", "high", "low", "close")


def rows(table: pa.Table, ticker: str) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["ticker"] == ticker]


def test_a_split_is_in_every_bar_of_its_day_and_in_none_before() -> None:
    assert rows(MARKET.day_bars(BEFORE), "AAPL") == rows(PLAIN.day_bars(BEFORE), "AAPL")
    for split, cash in ((SPLIT, 0.26), (REVERSE, 0.0)):
        ratio = split.split_from / split.split_to
        old, new = (rows(market.day_bars(DAY), split.ticker) for market in (PLAIN, MARKET))
        assert new[0]["start_ms"] == old[0]["start_ms"]
        assert len(new) == len(old)
        for one, other in zip(old, new, strict=True):
            assert [other[name] for name in PRICES] == pytest.approx(
                [one[name] * ratio - cash for name in PRICES], abs=0.00501
            )
            assert other["low"] <= other["vwap"] <= other["high"]
            assert other["transactions"] == one["transactions"]
            assert other["volume"] == pytest.approx(max(one["transactions"], one["volume"] / ratio), abs=0.001)


def test_a_dividend_lowers_the_price_and_leaves_the_shares() -> None:
    for one, other in zip(*(rows(market.day_bars(BEFORE), "UHT") for market in (PLAIN, MARKET)), strict=True):
        assert other["close"] == pytest.approx(one["close"] - 0.2)
        assert other["volume"] == one["volume"]


def test_stream_seconds_and_flat_file_have_the_new_shares_too() -> None:
    final = {(row["ticker"], row["start_ms"]): row for row in MARKET.day_bars(DAY).to_pylist()}
    sent: dict[tuple[str, int], dict[str, Any]] = {}
    for event in SyntheticFeed(MARKET, DAY, [Channel.MINUTE]):
        bar = json.loads(event.payload)
        sent[bar["sym"], bar["s"]] = bar
    assert {key: (bar["o"], bar["c"], float(bar["dv"])) for key, bar in sent.items()} == {
        key: (row["open"], row["close"], row["volume"]) for key, row in final.items()
    }
    text = gzip.decompress(flat_file(MARKET.day_bars(DAY))).decode()
    lines = csv.DictReader(io.StringIO(text))
    assert {(line["ticker"], int(line["window_start"]) // 10**6): float(line["close"]) for line in lines} == {
        key: row["close"] for key, row in final.items()
    }
    seconds = next(iter(MARKET.day_batches(DAY, Channel.SECOND))).to_pylist()
    minute = min(row["start_ms"] for row in seconds)
    volume = sum(row["volume"] for row in seconds if row["ticker"] == "AAPL")
    assert volume == pytest.approx(final["AAPL", minute - minute % 60_000]["volume"])


_days = st.dates(date(2026, 1, 1), date(2026, 12, 31))
_splits = st.builds(Split, st.sampled_from(TICKERS), _days, st.sampled_from([1, 2, 3]), st.sampled_from([1, 4, 10]))
_dividends = st.builds(Dividend, st.sampled_from(TICKERS), _days, st.sampled_from([0.05, 0.26]))


@given(st.lists(_splits, max_size=5), st.lists(_dividends, max_size=5), _days, st.sampled_from(TICKERS))
def test_a_day_knows_no_later_event(splits: list[Split], dividends: list[Dividend], day: date, ticker: str) -> None:
    known = Actions(
        [split for split in splits if split.execution_date <= day], [paid for paid in dividends if paid.ex_date <= day]
    )
    assert Actions(splits, dividends).shares(ticker, day) == known.shares(ticker, day)
    assert Actions(splits, dividends).shares(ticker, date.min) == Shares()


def test_any_five_sessions_of_the_demo_have_a_dividend_and_a_price_that_jumps() -> None:
    sessions = calendar.trading_days(date(2026, 1, 5), date(2027, 1, 5))
    actions = weekly(["GME", "MSFT", "SPY"], sessions[-1])
    split_days = {split.execution_date for split in actions.splits}
    ex_dates = {paid.ex_date for paid in actions.dividends}
    for first in range(len(sessions) - 4):
        assert split_days & {*sessions[first + 1 : first + 5]}, sessions[first]
        assert ex_dates & {*sessions[first : first + 5]}, sessions[first]
    assert {actions.shares("GME", day).ratio for day in sessions} == {1.0, 0.25}
    assert weekly(["GME", "MSFT"], DAY) == Actions(
        [split for split in actions.splits if split.execution_date <= DAY],
        [paid for paid in actions.dividends if paid.ex_date <= DAY],
    )
    assert weekly(["SPY"], DAY) == Actions([], [])


def test_the_factors_are_cumulative_as_the_vendors_are() -> None:
    actions = Actions(
        [Split("AAPL", BEFORE, 1, 2), Split("AAPL", DAY, 1, 4)],
        [Dividend("AAPL", BEFORE, 1.0), Dividend("AAPL", DAY, 0.5)],
    )
    market = SyntheticMarket(TICKERS, actions=actions)
    listings = market.listings()
    assert [row["historical_adjustment_factor"] for row in listings.splits()] == [1 / 8, 1 / 4]
    closes = [market.close_before("AAPL", BEFORE) / 2, market.close_before("AAPL", DAY) / 4]
    last = 1 - 0.5 / closes[1]
    factors = [row["historical_adjustment_factor"] for row in listings.dividends()]
    assert factors == pytest.approx([(1 - 1.0 / closes[0]) * last, last])
    assert [row["split_adjusted_cash_amount"] for row in listings.dividends()] == [0.25, 0.5]


# As the vendor's own client reads it


def test_the_official_client_pages_and_filters() -> None:
    actions = Actions([Split(ticker, DAY - timedelta(days=days), 1, 2) for ticker in TICKERS for days in range(5)])
    with HistoryServer(MARKET.day_bars, listings=SyntheticMarket(TICKERS, actions=actions).listings()) as server:
        client = RESTClient("k", base=server.url)
        found = list(client.list_stocks_splits(limit=4, sort="execution_date.asc"))
        assert len({split.id for split in found}) == len(found) == 15
        assert len(server.requests) == 4
        assert [split.execution_date for split in found] == sorted(split.execution_date for split in found)
        some = client.list_stocks_splits(ticker_any_of="AAPL,UHT", execution_date_gt="2026-01-24")
        assert {(split.ticker, split.execution_date) for split in some} == {
            (ticker, day) for ticker in ("AAPL", "UHT") for day in ("2026-01-25", "2026-01-26")
        }


def test_a_past_date_has_its_own_tickers_and_a_company_its_former_name() -> None:
    with HistoryServer(MARKET.day_bars, listings=MARKET.listings()) as server:
        client = RESTClient("k", base=server.url)

        def listed(**filters: Any) -> dict[str, Any]:
            return {row.ticker: row for row in client.list_tickers(limit=1000, **filters)}

        assert [*listed(market="stocks")] == TICKERS
        gone = listed(active=False)
        assert [(row.ticker, row.delisted_utc) for row in gone.values()] == [("OLDCO", "2020-03-02T05:00:00Z")]
        past = listed(date="2018-06-01")
        assert [*past] == ["AAPL", "BRK.B", "OLDCO", "UHTX"]
        assert past["UHTX"].composite_figi == listed()["UHT"].composite_figi
        entity = client.get_ticker_events("UHT")
        assert [(event["ticker_change"]["ticker"], event["date"]) for event in entity.events] == [
            ("UHT", "2018-06-04"),
            ("UHTX", "2003-09-10"),
        ]
