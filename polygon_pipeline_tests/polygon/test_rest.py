"""The vendor's REST as it is and as it fails, against a real server. Its answers have the vendor's shapes."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]

from polygon_pipeline.polygon import rest
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import HistoryBar, Page, RestHistory, seconds_left
from polygon_pipeline_tests.support.bars import DAY, NOON, rest_bar
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server

KEY = "a-very-secret-key"
GROUPED = f"/v2/aggs/grouped/locale/us/market/stocks/{DAY}"


def bars_path(ticker: str, first: object = DAY, last: object = DAY) -> str:
    return f"/v2/aggs/ticker/{ticker}/range/1/minute/{first}/{last}"


SPY = bars_path("SPY")


def answer(*rows: dict[str, Any], **fields: Any) -> Answer:
    """As the vendor sends it, with the fields that we do not read."""
    body = {
        "ticker": "SPY",
        "queryCount": len(rows),
        "resultsCount": len(rows),
        "adjusted": False,
        "results": rows,
        "status": "OK",
        "request_id": "6a7e466379af0a71039d60cc78e72282",
        "count": len(rows),
    }
    return Answer(body=body | fields)


@pytest.fixture
def server() -> Iterator[PlannedServer]:
    with planned_server() as planned:
        yield planned


@pytest.fixture
def history(server: PlannedServer, tmp_path: Path) -> RestHistory:
    return RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1000, 1.0), backoff=tenacity.wait_none())


def spy(history: RestHistory) -> list[Page]:
    return list(history.minute_bars("SPY", DAY, DAY))


# What is asked and what comes


def test_a_page_has_the_bars_as_the_vendor_has_them(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [answer(rest_bar(), rest_bar(NOON + 60_000, v=7.1e7, otc=True, new=[1]))]
    before = datetime.now(UTC)
    (page,) = spy(history)
    assert page.ticker == "SPY"
    assert before <= page.fetched_at <= datetime.now(UTC)
    assert page.bars == [
        HistoryBar(NOON, 450.25, 450.75, 450.2, 450.5, 1000, 450.3, 7),
        HistoryBar(NOON + 60_000, 450.25, 450.75, 450.2, 450.5, 7.1e7, 450.3, 7),
    ]
    assert page.is_last


def test_unadjusted_bars_are_requested_with_the_key_in_a_header_only(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [answer()]
    spy(history)
    (request,) = server.asked
    assert request.path == f"{SPY}?adjusted=false&sort=asc&limit=50000"
    assert request.headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("ticker", ["BRK.B", "KIMpL", "A B", "É", "%2F", "A?B#C"])
def test_a_ticker_of_any_spelling_is_one_part_of_the_path(
    ticker: str, server: PlannedServer, history: RestHistory
) -> None:
    with pytest.raises(NotYetPublished):
        list(history.minute_bars(ticker, DAY, DAY))
    parts = server.paths[0].partition("?")[0].split("/")
    assert len(parts) == 10
    assert unquote(parts[4]) == ticker


@pytest.mark.parametrize("ticker", ["", "..", "A/B", "A\nB"])
def test_an_invalid_ticker_is_not_requested(ticker: str, server: PlannedServer, history: RestHistory) -> None:
    with pytest.raises(ValueError, match="cannot be asked for"):
        list(history.minute_bars(ticker, DAY, DAY))
    assert not server.asked


def test_a_part_of_a_day_is_requested_in_milliseconds(server: PlannedServer, history: RestHistory) -> None:
    path = bars_path("SPY", NOON, NOON + 59_999)
    server.plan[path] = [answer(rest_bar())]
    (page,) = history.minute_bars("SPY", NOON, NOON + 59_999)
    assert len(page.bars) == 1


@pytest.mark.parametrize("body", [{}, {"results": None}, {"results": []}, {"status": "OK", "resultsCount": 0}])
def test_a_ticker_without_bars_has_one_empty_page(
    body: dict[str, Any], server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(body=body)]
    (page,) = spy(history)
    assert (list(page.bars), page.is_last) == ([], True)


def test_a_bar_needs_neither_vwap_nor_transactions(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [answer(rest_bar(vw=None, n=None))]
    assert spy(history)[0].bars == [HistoryBar(NOON, 450.25, 450.75, 450.2, 450.5, 1000, None, None)]


def test_the_tickers_of_a_day_are_those_with_a_daily_bar(server: PlannedServer, history: RestHistory) -> None:
    server.plan[GROUPED] = [
        answer(rest_bar(T="SPY"), rest_bar(T="KIMpL"), rest_bar(T="BRK.B"), rest_bar(T="A/B"), rest_bar(T="SPY"))
    ]
    assert history.traded_tickers(DAY) == ["BRK.B", "KIMpL", "SPY"]
    assert server.paths == [f"{GROUPED}?adjusted=false&include_otc=true"]


def test_a_day_without_daily_bars_has_no_tickers(server: PlannedServer, history: RestHistory) -> None:
    server.plan[GROUPED] = [Answer(body={"queryCount": 0, "resultsCount": 0, "adjusted": False, "status": "OK"})]
    assert history.traded_tickers(DAY) == []


def test_a_day_of_the_whole_market_is_one_request_with_what_trades_over_the_counter(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[GROUPED] = [answer(rest_bar(T="SPY"), rest_bar(T="TCEHY", otc=True, n=None, vw=None))]
    found = history.daily_bars(DAY)
    assert server.paths == [f"{GROUPED}?adjusted=false&include_otc=true"]
    assert [(bar.ticker, bar.otc, bar.close, bar.vwap) for bar in found.bars] == [
        ("SPY", False, 450.5, 450.3),
        ("TCEHY", True, 450.5, None),
    ]
    assert not found.refused


def test_a_bad_bar_of_a_day_costs_only_itself_and_is_named(server: PlannedServer, history: RestHistory) -> None:
    bad = [rest_bar(T="GME", c="high"), rest_bar(T="../up"), rest_bar()]
    server.plan[GROUPED] = [answer(rest_bar(T="SPY"), *bad)]
    found = history.daily_bars(DAY)
    assert [bar.ticker for bar in found.bars] == ["SPY"]
    assert len(found.refused) == 3
    assert any("GME" in why for why in found.refused)
    assert any("../up" in why for why in found.refused)


def test_a_day_that_the_vendor_does_not_have_yet_has_no_bars(server: PlannedServer, history: RestHistory) -> None:
    server.plan[GROUPED] = [Answer(body={"queryCount": 0, "resultsCount": 0, "adjusted": False, "status": "OK"})]
    assert history.daily_bars(DAY).bars == []


# Pages


def test_pages_are_followed_to_the_last(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [
        answer(rest_bar(), next_url=f"{server.url}{SPY}?cursor=2"),
        answer(rest_bar(NOON + 60_000), next_url=f"{server.url}{SPY}?cursor=3"),
        answer(rest_bar(NOON + 2 * 60_000)),
    ]
    pages = spy(history)
    assert [bar.start_ms for page in pages for bar in page.bars] == [NOON + 60_000 * n for n in range(3)]
    assert [page.is_last for page in pages] == [False, False, True]
    assert server.paths[1:] == [f"{SPY}?cursor=2", f"{SPY}?cursor=3"]
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.asked)


def test_the_official_client_reads_the_same_bars_from_the_same_answers(
    server: PlannedServer, history: RestHistory
) -> None:
    pages = [
        answer(rest_bar(), rest_bar(NOON + 60_000), next_url=f"{server.url}{SPY}?cursor=2"),
        answer(rest_bar(NOON + 2 * 60_000), rest_bar(NOON + 3 * 60_000)),
    ]
    server.plan[SPY] = [*pages, *pages]
    client = RESTClient(KEY, base=server.url)
    theirs = list(client.list_aggs("SPY", 1, "minute", DAY, DAY, adjusted=False))
    ours = [bar for page in spy(history) for bar in page.bars]
    assert len(ours) == 4
    assert [(a.timestamp, a.open, a.high, a.low, a.close, a.volume, a.vwap, a.transactions) for a in theirs] == [
        (bar.start_ms, bar.open, bar.high, bar.low, bar.close, bar.volume, bar.vwap, bar.transactions) for bar in ours
    ]


@pytest.mark.parametrize(
    "disguise",
    [
        lambda own, other: f"{other}/next",
        lambda own, other: f"{own}@{other.removeprefix('http://')}/next",
        lambda own, other: f"{own}.{other.removeprefix('http://')}/next",
        lambda own, other: f"{other}/{own}/next",
        lambda own, other: f"//{other.removeprefix('http://')}/next",
        lambda own, other: own.replace("http://", "https://") + "/next",
        lambda own, other: own + "0/next",
        lambda own, other: "file:///etc/passwd",
    ],
)
def test_the_key_is_sent_to_no_other_server(
    disguise: Callable[[str, str], str], server: PlannedServer, history: RestHistory
) -> None:
    with planned_server() as other:
        server.plan[SPY] = [answer(rest_bar(), next_url=disguise(server.url, other.url))]
        with pytest.raises(HistoryRefused, match="which the API key is not sent to"):
            spy(history)
        assert not other.asked
    assert len(server.asked) == 1


def test_a_redirect_is_not_followed(server: PlannedServer, history: RestHistory) -> None:
    with planned_server() as other:
        server.plan[SPY] = [Answer(302, headers={"Location": f"{other.url}/"})]
        with pytest.raises(HistoryRefused, match="answered 302"):
            spy(history)
        assert not other.asked


@pytest.mark.parametrize("cursors", ["1", "12", "1231"])
def test_pages_that_repeat_are_an_error_and_not_a_complete_answer(
    cursors: str, server: PlannedServer, history: RestHistory
) -> None:
    circle = cursors + cursors[0]
    server.plan[SPY] = [answer(rest_bar(), next_url=f"{server.url}{SPY}?cursor={cursor}") for cursor in circle]
    pages: list[Page] = []
    with pytest.raises(HistoryUnavailable, match="a page that it gave before"):
        pages.extend(history.minute_bars("SPY", DAY, DAY))
    assert not any(page.is_last for page in pages)


# Faults that pass

PASSING = [
    Answer(429),
    Answer(429, headers={"Retry-After": "nonsense"}),
    Answer(408),
    Answer(500, {"status": "ERROR", "error": "oops"}),
    Answer(502, b"<html>bad gateway</html>"),
    Answer(503),
    Answer(504),
    Answer(200, {"results": [rest_bar()]}, dropped=True),
    Answer(200, b"not gzip", {"Content-Encoding": "gzip"}),
]


@pytest.mark.parametrize("fault", PASSING)
def test_a_temporary_fault_is_retried(fault: Answer, server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [fault, fault, answer(rest_bar())]
    (page,) = spy(history)
    assert len(page.bars) == 1
    assert len(server.asked) == 3


def test_every_attempt_takes_a_turn_of_the_rate_limit(server: PlannedServer, tmp_path: Path) -> None:
    server.plan[SPY] = [Answer(429), Answer(503), answer(rest_bar())]
    history = RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1, 0.2), backoff=tenacity.wait_none())
    spy(history)
    times = [request.at for request in server.asked]
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))


@pytest.mark.slow
def test_a_request_is_retried_no_earlier_than_the_server_asks(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [Answer(429, headers={"Retry-After": "1"}), answer(rest_bar())]
    spy(history)
    assert server.asked[1].at - server.asked[0].at >= 1


def test_a_server_that_asks_for_a_long_pause_gets_one_request(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [Answer(429, headers={"Retry-After": "3600"})]
    with pytest.raises(HistoryUnavailable, match="left alone for 3600 s"):
        spy(history)
    assert len(server.asked) == 1


def test_the_error_for_a_lasting_fault_names_the_request_and_the_cause(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(503, {"status": "ERROR", "error": f"down for {KEY}"})]
    with pytest.raises(HistoryUnavailable, match=r"/ticker/SPY/.* failed 8 times.*503 \(down for …\)"):
        spy(history)
    assert len(server.asked) == 8


def test_an_unreachable_server_is_a_temporary_fault(tmp_path: Path) -> None:
    with planned_server() as gone:
        url = gone.url
    history = RestHistory(url, KEY, RateLimit(tmp_path / "limit", 1000, 1.0), backoff=tenacity.wait_none())
    with pytest.raises(HistoryUnavailable, match="NewConnectionError") as error:
        history.traded_tickers(DAY)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Sign in to the hotel's network</html>",
        b"[]",
        b'{"results": [{"t": 1}]}',
        json.dumps({"results": [rest_bar() | {"o": None}]}).encode(),
        b'{"results": ' + b"[" * 100_000,
        b'{"status": "\xff"}',
        json.dumps({"status": "ERROR", "error": f"no such thing as {KEY}"}).encode(),
        KEY.encode(),
    ],
)
def test_an_unreadable_answer_is_an_error_and_not_an_empty_answer(
    body: bytes, server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(200, body)]
    with pytest.raises(HistoryUnavailable, match="/ticker/SPY/") as error:
        spy(history)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "odd", [{"v": 1e30}, {"vw": 1e300}, {"h": 1e9}, {"c": None}, {"o": "1"}, {"n": 2**63}, {"t": 10**30}, {"t": 1.5}]
)
def test_a_bar_that_is_none_is_left_out_and_named_and_costs_no_other(
    odd: dict[str, Any], server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [answer(rest_bar(), rest_bar(NOON + 60_000, **odd), rest_bar(NOON + 120_000))]
    [page] = spy(history)
    assert [bar.start_ms for bar in page.bars] == [NOON, NOON + 120_000]
    [refused] = page.refused
    assert f"$.{next(iter(odd))}" in refused or "missing required field" in refused


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_an_answer_without_end_is_an_error(
    encoding: str, server: PlannedServer, history: RestHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "_LARGEST_ANSWER", 1_000_000)
    body = b" " * 50_000_000
    packed = gzip.compress(body) if encoding == "gzip" else body[:1_000_001]
    server.plan[SPY] = [Answer(200, packed, {"Content-Encoding": encoding})]
    with pytest.raises(HistoryUnavailable, match="more than 1000000 bytes"):
        spy(history)


# Refusals


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (401, {"status": "ERROR", "error": "Unknown API Key"}, HistoryRefused, "POLYGON_API_KEY"),
        (403, {"status": "NOT_AUTHORIZED", "message": "You are not entitled"}, HistoryRefused, "You are not entitled"),
        (403, b"", HistoryRefused, "not in the plan"),
        (404, {"status": "NOT_FOUND", "message": "Data not found."}, NotYetPublished, "Data not found."),
        (400, {"status": "ERROR", "error": "bad date"}, HistoryRefused, "bad date"),
        (414, b"<html>", HistoryRefused, "answered 414"),
        (401, {"error": f"Unknown API Key {KEY}"}, HistoryRefused, "Unknown API Key …"),
    ],
)
def test_a_refusal_is_not_retried_and_names_the_request_and_the_reason(
    status: int, body: object, kind: type[Exception], says: str, server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(status, body)]
    with pytest.raises(kind) as error:
        spy(history)
    assert SPY in str(error.value)
    assert says in str(error.value)
    assert KEY not in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"status": "ERROR", "error": f"no access for {KEY}"},
        {"message": "x" * 290 + KEY},
        ("x" * 290 + KEY).encode(),
    ],
)
def test_a_key_that_the_server_repeats_is_not_shown_in_whole_nor_in_part(
    body: Any, server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(403, body)]
    with pytest.raises(HistoryRefused) as refused:
        spy(history)
    assert KEY[:8] not in str(refused.value)


def test_a_key_that_an_unreadable_answer_repeats_is_not_shown_in_whole_nor_in_part(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(200, ("x" * 190 + KEY).encode())]
    with pytest.raises(HistoryUnavailable, match="It begins: x") as unreadable:
        spy(history)
    assert KEY[:8] not in str(unreadable.value)


@pytest.mark.parametrize("key", ["two\nlines", "sch\u00f6n"])
def test_an_invalid_key_is_refused_without_being_shown(key: str, tmp_path: Path) -> None:
    with pytest.raises(HistoryRefused, match="POLYGON_API_KEY") as error:
        RestHistory("http://127.0.0.1:1", key, RateLimit(tmp_path / "limit", 1, 1.0))
    assert key not in str(error.value)


# Many tickers

TICKERS = [f"T{n}" for n in range(40)]


def test_many_tickers_are_fetched_page_by_page_with_their_progress(server: PlannedServer, history: RestHistory) -> None:
    for ticker in TICKERS:
        path = bars_path(ticker)
        server.plan[path] = [
            answer(rest_bar(), next_url=f"{server.url}{path}?cursor=2"),
            answer(rest_bar(NOON + 60_000)),
        ]
    pages: list[Page] = []
    said: list[tuple[int, int, float]] = []
    busy = threading.Lock()

    def use(page: Page) -> None:
        assert busy.acquire(blocking=False), "pages are handed over one at a time"
        pages.append(page)
        busy.release()

    history.fetch_many(TICKERS, DAY, DAY, use, lambda *progress: said.append(progress))
    assert [(done, total) for done, total, _ in said] == [(n, 40) for n in range(1, 41)]
    assert said[-1][2] == 0
    for ticker in TICKERS:
        assert [page.is_last for page in pages if page.ticker == ticker] == [False, True]


def test_the_first_error_ends_the_other_requests_during_their_pauses(server: PlannedServer, tmp_path: Path) -> None:
    an_hour = tenacity.wait_fixed(3600)
    history = RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1000, 1.0), backoff=an_hour)
    server.plan |= {bars_path(ticker): [Answer(503)] for ticker in TICKERS} | {bars_path("T7"): [Answer(401)]}
    with pytest.raises(HistoryRefused, match="/T7/"):
        history.fetch_many(TICKERS, DAY, DAY, lambda page: None)


@pytest.mark.parametrize("status", [400, 403, 404, 414])
def test_a_ticker_that_is_refused_is_named_and_costs_no_other(
    status: int, server: PlannedServer, history: RestHistory
) -> None:
    server.plan |= {bars_path(ticker): [answer(rest_bar())] for ticker in TICKERS}
    server.plan[bars_path("T7")] = [Answer(status, {"message": "no such ticker"})]
    pages: list[Page] = []
    refused = history.fetch_many(TICKERS, DAY, DAY, pages.append)
    assert sorted(page.ticker for page in pages) == sorted({*TICKERS} - {"T7"})
    assert list(refused) == ["T7"]
    assert "no such ticker" in refused["T7"]


@pytest.mark.parametrize(("status", "kind"), [(403, HistoryRefused), (404, NotYetPublished), (401, HistoryRefused)])
def test_where_every_ticker_is_refused_that_is_the_error_after_a_few_requests(
    status: int, kind: type[Exception], server: PlannedServer, history: RestHistory
) -> None:
    many = [f"M{n}" for n in range(200)]
    server.plan |= {bars_path(ticker): [Answer(status, {"message": "no"})] for ticker in many}
    with pytest.raises(kind):
        history.fetch_many(many, DAY, DAY, lambda page: None)
    assert len(server.asked) < 100
    with pytest.raises(kind):
        history.fetch_many(many[-2:], DAY, DAY, lambda page: None)


def test_tickers_that_are_refused_where_others_are_known_to_be_served_are_named(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(403)]
    assert list(history.fetch_many(["SPY"], DAY, DAY, lambda page: None, is_served=True)) == ["SPY"]


def test_an_error_of_the_pages_consumer_ends_the_fetch(server: PlannedServer, history: RestHistory) -> None:
    server.plan |= {bars_path(ticker): [answer(rest_bar())] for ticker in TICKERS}

    def use(page: Page) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        history.fetch_many(TICKERS, DAY, DAY, use)


def test_no_tickers_are_fetched_in_no_time(history: RestHistory) -> None:
    history.fetch_many([], DAY, DAY, lambda page: pytest.fail("there was a page"))


def test_the_time_left_is_bound_by_the_limit_at_first_and_by_the_pace_later() -> None:
    assert seconds_left(5, 20, 0.5, 5 / 60) == pytest.approx(180)
    assert seconds_left(10, 20, 600, 5 / 60) == pytest.approx(600)
    assert seconds_left(0, 20, 0.0, 100) == pytest.approx(0.2)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0, 1e6), st.floats(0.01, 100))
def test_the_time_left_is_zero_at_the_end_only(done: int, rest: int, elapsed: float, per_second: float) -> None:
    left = seconds_left(done, done + rest, elapsed, per_second)
    assert (left == 0) == (rest == 0)
    assert left >= rest / per_second
