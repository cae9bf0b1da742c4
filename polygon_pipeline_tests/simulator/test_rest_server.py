"""The simulated REST server: it serves the last version of each bar that was streamed, and faults on request."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import date
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]
from massive.rest.models import (  # type: ignore[import-untyped, unused-ignore]
    Agg,
    GroupedDailyAgg,
)

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.rest_server import HistoryServer, RestFault, RestFaultType, corrected
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY, OPENING, JsonObject

MARKET = SyntheticMarket(["AAPL", "BRK.B", "KIMpL", "TCEHY"])
FRIDAY = date(2026, 1, 23)
RANGE = f"/v2/aggs/ticker/BRK.B/range/1/minute/{DAY}/{DAY}"
ONE_DAY = "?adjusted=false&limit=50000"

Bars = list[JsonObject]


def ask(server: HistoryServer, path: str, key: str | None = "k", timeout: float = 20) -> tuple[int, Any]:
    """The status and the decoded body (bytes if it is not JSON) of a request for a path or a next_url."""
    url = path if path.startswith("http") else server.url + path
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = urllib3.request("GET", url, headers=headers, retries=False, timeout=timeout)
    try:
        return answer.status, json.loads(answer.data)
    except ValueError:
        return answer.status, answer.data


def pages(server: HistoryServer, path: str) -> Iterator[JsonObject]:
    """The page at this path and all that follow it."""
    url: str | None = path
    while url:
        status, page = ask(server, url)
        assert status == 200
        yield page
        url = page.get("next_url")


def listed(server: HistoryServer, path: str) -> Bars:
    return [bar for page in pages(server, path) for bar in page.get("results", [])]


def true_bars(ticker: str, *days: date) -> Bars:
    """The market's bars of a ticker, with the vendor's field names."""
    bars: Bars = [bar for day in days for bar in MARKET.day_bars(day).to_pylist() if bar["ticker"] == ticker]
    names = {"v": "volume", "vw": "vwap", "o": "open", "c": "close", "h": "high", "l": "low", "t": "start_ms"}
    otc = {"otc": True} if ticker == "TCEHY" else {}
    return [{to: bar[name] for to, name in (names | {"n": "transactions"}).items()} | otc for bar in bars]


def true_daily(ticker: str, day: date) -> JsonObject:
    """One ticker's day as the vendor has it, computed from its minute bars: the closing auction is the close, and
    trades outside regular hours count in the shares alone."""
    session = calendar.session(day)
    assert session
    open_ms, close_ms = session.open.timestamp() * 1000, session.close.timestamp() * 1000
    bars = true_bars(ticker, day)
    regular = [bar for bar in bars if open_ms <= bar["t"] < close_ms]
    [close] = [bar["o"] for bar in bars if bar["t"] == close_ms] or [regular[-1]["c"]]
    volume = sum(bar["v"] for bar in bars)
    return {
        "open": regular[0]["o"],
        "high": max(close, *(bar["h"] for bar in regular)),
        "low": min(close, *(bar["l"] for bar in regular)),
        "close": close,
        "volume": pytest.approx(volume),
        "vwap": pytest.approx(sum(bar["vw"] * bar["v"] for bar in bars) / volume, abs=1e-4),
        "transactions": sum(bar["n"] for bar in bars),
    }


# Responses


@pytest.mark.parametrize("ticker", MARKET.tickers)
@pytest.mark.parametrize("sort", ["asc", "desc"])
def test_the_official_client_lists_the_markets_bars_page_by_page(ticker: str, sort: str) -> None:
    with HistoryServer(MARKET.day_bars, key="k") as server:
        client = RESTClient("k", base=server.url, retries=0)
        found = list(client.list_aggs(ticker, 1, "minute", FRIDAY, DAY, adjusted=False, sort=sort, limit=500))
        requests = len(server.requests)
    expected = [Agg.from_dict(bar) for bar in true_bars(ticker, FRIDAY, DAY)]
    assert found == (expected if sort == "asc" else expected[::-1])
    assert requests == max(1, -(-len(expected) // 500))


def test_the_history_has_the_last_version_of_each_streamed_bar() -> None:
    last = {}
    for event in SyntheticFeed(MARKET, DAY, [Channel.MINUTE], revised_share=0.2):
        last[event.ticker, event.start_ms] = json.loads(event.payload)
    with HistoryServer(MARKET.day_bars) as server:
        bars = {
            (ticker, bar["t"]): bar
            for ticker in MARKET.tickers
            for bar in listed(server, f"/v2/aggs/ticker/{ticker}/range/1/minute/{DAY}/{DAY}")
        }
    assert bars.keys() == last.keys()
    for key, bar in bars.items():
        sent = last[key]
        assert [bar[name] for name in ("o", "h", "l", "c", "vw")] == [sent[name] for name in ("o", "h", "l", "c", "vw")]
        assert bar["v"] == float(sent["dv"])
        assert bar.get("otc") == sent.get("otc")


@settings(max_examples=25, deadline=None)
@given(
    bounds=st.tuples(st.integers(-60, 1500), st.integers(-60, 1500)).map(sorted),
    limit=st.integers(5, 300),
    sort=st.sampled_from(["asc", "desc"]),
)
def test_the_pages_of_any_range_together_have_each_bar_exactly_once(bounds: list[int], limit: int, sort: str) -> None:
    first_ms, last_ms = (OPENING + 60_000 * minute for minute in bounds)
    path = f"/v2/aggs/ticker/TCEHY/range/1/minute/{first_ms}/{last_ms}?limit={limit}&sort={sort}"
    with HistoryServer(MARKET.day_bars) as server:
        found = list(pages(server, path))
    expected = [bar for bar in true_bars("TCEHY", DAY, date(2026, 1, 27)) if first_ms <= bar["t"] <= last_ms]
    bars = [bar for page in found for bar in page.get("results", [])]
    assert bars == (expected if sort == "asc" else expected[::-1])
    assert all(page["resultsCount"] == limit for page in found[:-1])


def test_a_page_has_the_vendors_fields_in_the_vendors_order() -> None:
    with HistoryServer(MARKET.day_bars) as server:
        _, page = ask(server, f"{RANGE}?limit=2&adjusted=false")
    assert list(page) == [
        "ticker",
        "queryCount",
        "resultsCount",
        "adjusted",
        "results",
        "status",
        "request_id",
        "count",
        "next_url",
    ]
    assert (page["ticker"], page["adjusted"], page["resultsCount"], page["status"]) == ("BRK.B", False, 2, "OK")
    assert list(page["results"][0]) == ["v", "vw", "o", "c", "h", "l", "t", "n"]
    assert urlsplit(page["next_url"]).netloc == urlsplit(server.url).netloc


@pytest.mark.parametrize("ticker", ["UNKNOWN", "brk.b", "A%2F..%2FB"])
def test_the_response_for_a_ticker_without_bars_has_no_results_field(ticker: str) -> None:
    with HistoryServer(MARKET.day_bars) as server:
        status, page = ask(server, f"/v2/aggs/ticker/{ticker}/range/1/minute/{DAY}/{DAY}")
    assert status == 200
    assert "results" not in page
    assert "next_url" not in page
    assert (page["resultsCount"], page["adjusted"]) == (0, True)


@pytest.mark.parametrize(("ticker", "encoded"), [("BRK.B", "BRK%2EB"), ("A/B %", "A%2FB%20%25")])
def test_a_ticker_may_be_percent_encoded_and_is_so_in_next_url(ticker: str, encoded: str) -> None:
    market = SyntheticMarket([ticker], seed=5)
    with HistoryServer(market.day_bars) as server:
        found = listed(server, f"/v2/aggs/ticker/{encoded}/range/1/minute/{DAY}/{DAY}?limit=50")
    assert [bar["t"] for bar in found] == market.day_bars(DAY)["start_ms"].to_pylist()
    assert len(found) > 50


def test_a_weekend_has_no_bars() -> None:
    with HistoryServer(MARKET.day_bars) as server:
        assert listed(server, "/v2/aggs/ticker/AAPL/range/1/minute/2026-01-24/2026-01-25") == []
        assert ask(server, "/v2/aggs/grouped/locale/us/market/stocks/2026-01-25")[1]["resultsCount"] == 0


def test_only_bars_that_have_ended_are_served() -> None:
    now = [0]
    with HistoryServer(MARKET.day_bars, clock=lambda: now[0]) as server:
        for now[0] in (0, OPENING - 10**8, OPENING, OPENING + 59_999, OPENING + 60_000, OPENING + 10**8):
            expected = [bar for bar in true_bars("AAPL", FRIDAY, DAY) if bar["t"] + 60_000 <= now[0]]
            assert listed(server, f"/v2/aggs/ticker/AAPL/range/1/minute/{FRIDAY}/{DAY}") == expected


def test_grouped_daily_bars_are_the_vendors_days_of_the_whole_market() -> None:
    session = calendar.session(DAY)
    assert session
    with HistoryServer(MARKET.day_bars) as server:
        client = RESTClient("k", base=server.url)
        without_otc = client.get_grouped_daily_aggs(DAY)
        with_otc = client.get_grouped_daily_aggs(DAY, include_otc=True)
    assert isinstance(without_otc, list)
    assert isinstance(with_otc, list)
    close_ms = int(session.close.timestamp() * 1000)
    by_ticker = {bar.ticker: bar for bar in with_otc}
    for ticker in ("AAPL", "BRK.B"):
        assert by_ticker[ticker] == GroupedDailyAgg(ticker=ticker, **true_daily(ticker, DAY), timestamp=close_ms)
    assert by_ticker["TCEHY"].otc
    assert by_ticker.keys() - {bar.ticker for bar in without_otc} == {"TCEHY"}


def test_planned_changes_of_a_day_are_served_and_no_minute_shows_them() -> None:
    changes = {("AAPL", DAY): {"close": 1.5}, ("BRK.B", DAY): None}
    with HistoryServer(MARKET.day_bars, daily_changes=changes) as server:
        days = RESTClient("k", base=server.url).get_grouped_daily_aggs(DAY)
        assert listed(server, f"/v2/aggs/ticker/AAPL/range/1/minute/{DAY}/{DAY}") == true_bars("AAPL", DAY)[:5000]
    assert isinstance(days, list)
    assert {day.ticker: day.close for day in days if day.ticker in ("AAPL", "BRK.B")} == {"AAPL": 1.5}


# Errors


@pytest.mark.parametrize("key", [None, "", "wrong"])
def test_the_key_must_be_in_the_header(key: str | None) -> None:
    with HistoryServer(MARKET.day_bars, key="k") as server:
        status, body = ask(server, RANGE, key=key)
    assert (status, body["status"]) == (401, "ERROR")


def test_a_key_in_the_url_is_refused_and_not_recorded_or_returned() -> None:
    with HistoryServer(MARKET.day_bars, key="secret") as server:
        status, body = ask(server, f"{RANGE}?apiKey=secret&limit=1", key=None)
        _, page = ask(server, f"{RANGE}?apiKey=secret&limit=1", key="secret")
        paths = [request.path for request in server.requests]
    assert status == 401
    assert paths == [f"{RANGE}?limit=1"] * 2
    assert "secret" not in json.dumps([body, page])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"/v2/aggs/ticker/AAPL/range/5/minute/{DAY}/{DAY}", "5/minute"),
        (f"/v2/aggs/ticker/AAPL/range/1/day/{DAY}/{DAY}", "1/day"),
        (f"/v2/aggs/ticker/AAPL/range/1/minute/{DAY}/{FRIDAY}", "'to' cannot be a time that occurs before 'from'"),
        (f"/v2/aggs/ticker/AAPL/range/1/minute/yesterday/{DAY}", "'from'"),
        (f"/v2/aggs/ticker/AAPL/range/1/minute/{DAY}/{10**17}", "'to'"),
        (f"/v2/aggs/ticker/AAPL/range/1/minute/{DAY}/9999-12-31", "'to'"),
        (f"{RANGE}?limit=50001", "'limit'"),
        (f"{RANGE}?limit=0", "'limit'"),
        (f"{RANGE}?sort=up", "'sort'"),
        (f"{RANGE}?adjusted=maybe", "'adjusted'"),
        (f"{RANGE}?cursor=%C3%BC", "'cursor'"),
        ("/v2/aggs/grouped/locale/us/market/stocks/today", "'date'"),
    ],
)
def test_invalid_parameters_are_a_bad_request(path: str, message: str) -> None:
    with HistoryServer(MARKET.day_bars) as server:
        status, body = ask(server, path)
    assert (status, body["status"]) == (400, "ERROR")
    assert message in body["error"]


def test_an_unknown_route_is_not_found() -> None:
    with HistoryServer(MARKET.day_bars) as server:
        assert ask(server, "/v3/reference/tickers")[0] == 404


def test_requests_over_the_rate_limit_get_an_empty_429_and_are_counted() -> None:
    with HistoryServer(MARKET.day_bars, requests_per_minute=3) as server:
        answers = [ask(server, f"{RANGE}?limit=1") for _ in range(5)]
        assert [status for status, _ in answers] == [200, 200, 200, 429, 429]
        assert answers[-1][1] == b""
        assert server.happened == {RestFaultType.TOO_MANY_REQUESTS: 2}
        assert len(server.requests) == 5
        times = [request.at for request in server.requests]
        assert times == sorted(times)


def test_the_rate_limit_allows_requests_again_after_its_minute() -> None:
    with HistoryServer(MARKET.day_bars, requests_per_minute=1, minute_seconds=0.01) as server:
        for _ in range(3):
            assert ask(server, f"{RANGE}?limit=1")[0] == 200
            time.sleep(0.01)


# Faults on request


@pytest.mark.parametrize(
    ("kind", "status", "body_status"),
    [
        (RestFaultType.TOO_MANY_REQUESTS, 429, None),
        (RestFaultType.SERVER_ERROR, 500, "ERROR"),
        (RestFaultType.UNAVAILABLE, 503, "ERROR"),
        (RestFaultType.NOT_AUTHORIZED, 403, "NOT_AUTHORIZED"),
    ],
)
def test_a_planned_error_happens_once_and_the_next_request_succeeds(
    kind: RestFaultType, status: int, body_status: str | None
) -> None:
    with HistoryServer(MARKET.day_bars, faults=[RestFault(kind)]) as server:
        actual, body = ask(server, RANGE)
        assert actual == status
        assert body["status"] == body_status if body_status else body == b""
        assert listed(server, RANGE) == true_bars("BRK.B", DAY)
        assert server.happened == {kind: 1}


def test_a_fault_applies_only_to_the_requests_it_is_planned_for() -> None:
    fault = RestFault(RestFaultType.UNAVAILABLE, path="/BRK.B/", after=1, times=2)
    with HistoryServer(MARKET.day_bars, faults=[fault]) as server:
        statuses = []
        for _ in range(4):
            assert ask(server, RANGE.replace("BRK.B", "AAPL"))[0] == 200
            statuses.append(ask(server, RANGE)[0])
    assert statuses == [200, 503, 503, 200]


def test_faults_at_a_rate_are_the_same_for_the_same_seed() -> None:
    def statuses(seed: int) -> list[int]:
        fault = RestFault(RestFaultType.SERVER_ERROR, times=None, rate=0.5)
        with HistoryServer(MARKET.day_bars, faults=[fault], seed=seed) as server:
            return [ask(server, f"{RANGE}?limit=1")[0] for _ in range(30)]

    assert statuses(1) == statuses(1) != statuses(2)
    assert set(statuses(1)) == {200, 500}


def test_a_slow_response_does_not_delay_other_requests_or_the_shutdown() -> None:
    fault = RestFault(RestFaultType.SLOW, path="/BRK.B/", seconds=1000)
    with HistoryServer(MARKET.day_bars, faults=[fault]) as server:
        with pytest.raises(urllib3.exceptions.ReadTimeoutError):
            ask(server, RANGE, timeout=0.1)
        assert listed(server, RANGE) == true_bars("BRK.B", DAY)


def test_a_cut_body_is_incomplete() -> None:
    with HistoryServer(MARKET.day_bars, faults=[RestFault(RestFaultType.CUT_BODY)]) as server:
        with pytest.raises(urllib3.exceptions.ProtocolError, match="IncompleteRead"):
            ask(server, RANGE)
        assert listed(server, RANGE) == true_bars("BRK.B", DAY)


def test_a_repeated_next_url_always_leads_to_the_same_page() -> None:
    faults = [RestFault(RestFaultType.REPEATED_NEXT_URL, path="cursor=", times=None)]
    with HistoryServer(MARKET.day_bars, faults=faults) as server:
        _, first = ask(server, f"{RANGE}?limit=300")
        _, second = ask(server, first["next_url"])
        _, again = ask(server, second["next_url"])
    assert second["next_url"] == again["next_url"] == first["next_url"]
    assert second["results"] == again["results"]


def test_a_next_url_of_another_host() -> None:
    with HistoryServer(MARKET.day_bars, faults=[RestFault(RestFaultType.NEXT_URL_OF_ANOTHER_HOST)]) as server:
        _, page = ask(server, f"{RANGE}?limit=300")
    assert urlsplit(page["next_url"]).hostname == "elsewhere.invalid"


@pytest.mark.parametrize("after", [0, 1])
def test_the_next_url_of_an_empty_page_leads_to_the_missing_bars(after: int) -> None:
    with HistoryServer(MARKET.day_bars, faults=[RestFault(RestFaultType.EMPTY_PAGE, after=after)]) as server:
        found = list(pages(server, f"{RANGE}?limit=300"))
    assert "results" not in found[after]
    assert [bar for page in found for bar in page.get("results", [])] == true_bars("BRK.B", DAY)
    urls = [page.get("next_url") for page in found]
    assert len(set(urls)) == len(urls)


def test_an_error_in_the_server_is_answered_with_500_and_raised_on_exit() -> None:
    def broken(day: date) -> pa.Table:
        raise RuntimeError(f"no bars of {day}")

    def serve() -> None:
        with HistoryServer(broken) as server:
            assert ask(server, RANGE)[0] == 500

    with pytest.raises(RuntimeError, match="no bars of 2026-01-26"):
        serve()


def test_after_exit_no_request_is_answered() -> None:
    pool = urllib3.PoolManager(retries=False)
    with HistoryServer(MARKET.day_bars) as server:
        assert pool.request("GET", server.url + RANGE).status == 401
    with pytest.raises(urllib3.exceptions.HTTPError):
        pool.request("GET", server.url + RANGE)


# Later corrections by the vendor


def test_a_correction_changes_removes_and_adds_only_bars_of_its_day() -> None:
    before = true_bars("KIMpL", DAY)
    first, second = before[0], before[1]
    added = {name: 1.0 for name in ("open", "high", "low", "close", "vwap", "volume")} | {"transactions": 3}
    changes: dict[tuple[str, int], dict[str, float] | None] = {}
    history = corrected(MARKET.day_bars, changes)
    assert history(DAY).equals(MARKET.day_bars(DAY))
    changes[("KIMpL", first["t"])] = {"close": 1.25, "volume": 7.5}
    changes[("KIMpL", second["t"])] = None
    changes[("NEW", OPENING)] = added
    with HistoryServer(history) as server:
        found = listed(server, f"/v2/aggs/ticker/KIMpL/range/1/minute/{DAY}/{DAY}")
        new = listed(server, f"/v2/aggs/ticker/NEW/range/1/minute/{DAY}/{DAY}")
    assert found == [first | {"c": 1.25, "v": 7.5}, *before[2:]]
    assert [(bar["t"], bar["o"], bar["n"]) for bar in new] == [(OPENING, 1.0, 3)]
    assert history(FRIDAY).equals(MARKET.day_bars(FRIDAY))
    bars = history(DAY)
    assert bars.schema.equals(MARKET.day_bars(DAY).schema)
    assert bars.equals(bars.sort_by([("start_ms", "ascending"), ("ticker", "ascending")]))


@pytest.mark.parametrize("change", [{"open": 1.0}, {"colour": 1.0}])
def test_a_correction_with_wrong_columns_is_an_error(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must have exactly the columns"):
        corrected(MARKET.day_bars, {("NEW", OPENING): change})(DAY)
