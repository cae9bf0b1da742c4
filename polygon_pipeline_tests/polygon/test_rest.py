"""The vendor's REST as it is and as it fails, against a real server. Its answers have the vendor's shapes."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]

from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import HistoryBar, Page, RestHistory, seconds_left
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server

KEY = "a-very-secret-key"
DAY = date(2026, 1, 26)
START_MS = 1769452200000
GROUPED = f"/v2/aggs/grouped/locale/us/market/stocks/{DAY}"


def bars_path(ticker: str, first: object = DAY, last: object = DAY) -> str:
    return f"/v2/aggs/ticker/{ticker}/range/1/minute/{first}/{last}"


SPY = bars_path("SPY")


def row(minute: int = 0, **fields: Any) -> dict[str, Any]:
    bar = {"v": 70790.5, "vw": 450.3, "o": 450.25, "c": 450.5, "h": 450.75, "l": 450.2, "t": START_MS, "n": 96}
    return bar | {"t": START_MS + 60_000 * minute} | fields


def answer(*rows: dict[str, Any], **fields: Any) -> Answer:
    """As the vendor sends it, down to what nobody reads."""
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
    server.plan[SPY] = [answer(row(), row(1, v=7.1e7, otc=True, new=[1]))]
    before = datetime.now(UTC)
    (page,) = spy(history)
    assert page.ticker == "SPY"
    assert before <= page.fetched_at <= datetime.now(UTC)
    assert page.bars == [
        HistoryBar(START_MS, 450.25, 450.75, 450.2, 450.5, 70790.5, 450.3, 96),
        HistoryBar(START_MS + 60_000, 450.25, 450.75, 450.2, 450.5, 7.1e7, 450.3, 96),
    ]
    assert page.is_last


def test_unadjusted_bars_are_asked_for_with_the_key_in_a_header_alone(
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
def test_what_cannot_be_a_ticker_is_not_asked_for(ticker: str, server: PlannedServer, history: RestHistory) -> None:
    with pytest.raises(ValueError, match="cannot be asked for"):
        list(history.minute_bars(ticker, DAY, DAY))
    assert not server.asked


def test_a_part_of_a_day_is_asked_for_in_milliseconds(server: PlannedServer, history: RestHistory) -> None:
    path = bars_path("SPY", START_MS, START_MS + 59_999)
    server.plan[path] = [answer(row())]
    (page,) = history.minute_bars("SPY", START_MS, START_MS + 59_999)
    assert len(page.bars) == 1


@pytest.mark.parametrize("body", [{}, {"results": None}, {"results": []}, {"status": "OK", "resultsCount": 0}])
def test_a_ticker_without_bars_has_one_empty_page(
    body: dict[str, Any], server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(body=body)]
    (page,) = spy(history)
    assert (list(page.bars), page.is_last) == ([], True)


def test_a_bar_needs_neither_vwap_nor_transactions(server: PlannedServer, history: RestHistory) -> None:
    bare = {name: value for name, value in row().items() if name not in ("vw", "n")}
    server.plan[SPY] = [answer(bare)]
    assert spy(history)[0].bars == [HistoryBar(START_MS, 450.25, 450.75, 450.2, 450.5, 70790.5, None, None)]


def test_the_tickers_of_a_day_are_those_with_a_daily_bar(server: PlannedServer, history: RestHistory) -> None:
    server.plan[GROUPED] = [answer(row(T="SPY"), row(T="KIMpL"), row(T="BRK.B"), row(T="A/B"), row(T="SPY"))]
    assert history.traded_tickers(DAY) == ["BRK.B", "KIMpL", "SPY"]
    assert server.paths == [f"{GROUPED}?adjusted=false"]


def test_a_day_without_daily_bars_has_no_tickers(server: PlannedServer, history: RestHistory) -> None:
    server.plan[GROUPED] = [Answer(body={"queryCount": 0, "resultsCount": 0, "adjusted": False, "status": "OK"})]
    assert history.traded_tickers(DAY) == []


# Pages


def test_pages_are_followed_to_the_last(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [
        answer(row(), next_url=f"{server.url}{SPY}?cursor=2"),
        answer(row(1), next_url=f"{server.url}{SPY}?cursor=3"),
        answer(row(2)),
    ]
    pages = spy(history)
    assert [bar.start_ms for page in pages for bar in page.bars] == [START_MS + 60_000 * n for n in range(3)]
    assert [page.is_last for page in pages] == [False, False, True]
    assert server.paths[1:] == [f"{SPY}?cursor=2", f"{SPY}?cursor=3"]
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.asked)


def test_the_official_client_reads_the_same_bars_from_the_same_answers(
    server: PlannedServer, history: RestHistory
) -> None:
    pages = [answer(row(), row(1), next_url=f"{server.url}{SPY}?cursor=2"), answer(row(2), row(3))]
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
        server.plan[SPY] = [answer(row(), next_url=disguise(server.url, other.url))]
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
def test_pages_that_go_in_a_circle_are_not_taken_for_complete(
    cursors: str, server: PlannedServer, history: RestHistory
) -> None:
    circle = cursors + cursors[0]
    server.plan[SPY] = [answer(row(), next_url=f"{server.url}{SPY}?cursor={cursor}") for cursor in circle]
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
    Answer(200, {"results": [row()]}, dropped=True),
    Answer(200, b"not gzip", {"Content-Encoding": "gzip"}),
]


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_tried_again(fault: Answer, server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [fault, fault, answer(row())]
    (page,) = spy(history)
    assert len(page.bars) == 1
    assert len(server.asked) == 3


def test_every_try_takes_its_turn(server: PlannedServer, tmp_path: Path) -> None:
    server.plan[SPY] = [Answer(429), Answer(503), answer(row())]
    history = RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1, 0.2), backoff=tenacity.wait_none())
    spy(history)
    times = [request.at for request in server.asked]
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(429, headers={"Retry-After": "1"}), answer(row())]
    spy(history)
    assert server.asked[1].at - server.asked[0].at >= 1


def test_a_server_that_wants_to_be_left_alone_for_long_is_asked_once(
    server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(429, headers={"Retry-After": "3600"})]
    with pytest.raises(HistoryUnavailable, match="left alone for 3600 s"):
        spy(history)
    assert len(server.asked) == 1


def test_a_fault_that_stays_is_told_with_the_request_and_its_cause(server: PlannedServer, history: RestHistory) -> None:
    server.plan[SPY] = [Answer(503, {"status": "ERROR", "error": f"down for {KEY}"})]
    with pytest.raises(HistoryUnavailable, match=r"/ticker/SPY/.* failed 8 times.*503 \(down for …\)"):
        spy(history)
    assert len(server.asked) == 8


def test_a_server_that_is_not_there_is_a_fault_that_may_pass(tmp_path: Path) -> None:
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
        json.dumps({"results": [row(o=None)]}).encode(),
        b'{"results": ' + b"[" * 100_000,
        b'{"status": "\xff"}',
        json.dumps({"status": "ERROR", "error": f"no such thing as {KEY}"}).encode(),
        KEY.encode(),
    ],
)
def test_an_answer_that_cannot_be_read_is_never_taken_for_an_empty_one(
    body: bytes, server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(200, body)]
    with pytest.raises(HistoryUnavailable, match="/ticker/SPY/") as error:
        spy(history)
    assert KEY not in str(error.value)


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
def test_a_refusal_is_final_and_says_of_what_and_why(
    status: int, body: object, kind: type[Exception], says: str, server: PlannedServer, history: RestHistory
) -> None:
    server.plan[SPY] = [Answer(status, body)]
    with pytest.raises(kind) as error:
        spy(history)
    assert SPY in str(error.value)
    assert says in str(error.value)
    assert KEY not in str(error.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("key", ["two\nlines", "sch\u00f6n"])
def test_what_cannot_be_a_key_is_refused_without_being_shown(key: str, tmp_path: Path) -> None:
    with pytest.raises(HistoryRefused, match="POLYGON_API_KEY") as error:
        RestHistory("http://127.0.0.1:1", key, RateLimit(tmp_path / "limit", 1, 1.0))
    assert key not in str(error.value)


# Many tickers

TICKERS = [f"T{n}" for n in range(40)]


def test_many_tickers_are_fetched_page_by_page_with_their_progress(server: PlannedServer, history: RestHistory) -> None:
    for ticker in TICKERS:
        path = bars_path(ticker)
        server.plan[path] = [answer(row(), next_url=f"{server.url}{path}?cursor=2"), answer(row(1))]
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


def test_the_first_error_ends_the_others_in_the_middle_of_their_waits(server: PlannedServer, tmp_path: Path) -> None:
    an_hour = tenacity.wait_fixed(3600)
    history = RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1000, 1.0), backoff=an_hour)
    server.plan |= {bars_path(ticker): [Answer(503)] for ticker in TICKERS} | {bars_path("T7"): [Answer(403)]}
    with pytest.raises(HistoryRefused, match="/T7/"):
        history.fetch_many(TICKERS, DAY, DAY, lambda page: None)


def test_an_error_of_who_uses_the_pages_ends_the_fetch(server: PlannedServer, history: RestHistory) -> None:
    server.plan |= {bars_path(ticker): [answer(row())] for ticker in TICKERS}

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
def test_the_time_left_is_none_at_the_end_alone(done: int, rest: int, elapsed: float, per_second: float) -> None:
    left = seconds_left(done, done + rest, elapsed, per_second)
    assert (left == 0) == (rest == 0)
    assert left >= rest / per_second
