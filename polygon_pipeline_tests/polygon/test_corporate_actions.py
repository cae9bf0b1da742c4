"""Splits, dividends, tickers and renames as the vendor sends them, and as it should not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import tenacity

from polygon_pipeline.polygon import corporate_actions
from polygon_pipeline.polygon.corporate_actions import Dividend, ListedTicker, Split, TickerEvent
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, RequestRefused
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server

KEY = "a-very-secret-key"
SINCE = date(2024, 12, 2)
SPLITS, DIVIDENDS, TICKERS = "/stocks/v1/splits", "/stocks/v1/dividends", "/v3/reference/tickers"

SPLIT = {
    "id": "E36416cce743c3964c5da63e1ef1626c0aece30fb47302eea5a49c0055c04e8d0",
    "ticker": "AAPL",
    "execution_date": "2020-08-31",
    "adjustment_type": "forward_split",
    "split_from": 1,
    "split_to": 4,
    "historical_adjustment_factor": 0.25,
}
AAPL = Split(
    ticker="AAPL",
    execution_date=date(2020, 8, 31),
    id=str(SPLIT["id"]),
    adjustment_type="forward_split",
    split_from=1,
    split_to=4,
    historical_adjustment_factor=0.25,
)


def answer(*rows: Any, **fields: Any) -> Answer:
    return Answer(body={"status": "OK", "request_id": "1", "results": rows} | fields)


@pytest.fixture
def server() -> Iterator[PlannedServer]:
    with planned_server() as planned:
        yield planned


@pytest.fixture
def rest(server: PlannedServer, tmp_path: Path) -> RestHistory:
    return RestHistory(server.url, KEY, RateLimit(tmp_path / "limit", 1000, 1.0), backoff=tenacity.wait_none())


def queries(server: PlannedServer) -> list[dict[str, str]]:
    return [dict(parse_qsl(urlsplit(path).query)) for path in server.paths]


def test_a_watch_lists_splits_are_asked_for_by_name_and_a_markets_since_a_day(
    server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[SPLITS] = [answer(SPLIT)]
    found = corporate_actions.splits(rest, ["AAPL", "BRK.B"], SINCE)
    assert (found.rows, found.refused, found.requests) == ([AAPL], [], 1)
    corporate_actions.splits(rest, None, SINCE)
    assert queries(server) == [
        {"ticker.any_of": "AAPL,BRK.B", "limit": "5000", "sort": "execution_date.asc"},
        {"execution_date.gte": "2024-12-02", "limit": "5000", "sort": "execution_date.asc"},
    ]
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_a_long_watch_list_is_asked_for_in_parts(server: PlannedServer, rest: RestHistory) -> None:
    server.plan[DIVIDENDS] = [answer()]
    names = [f"T{number}" for number in range(250)]
    assert corporate_actions.dividends(rest, names, SINCE).requests == 3
    assert [name for query in queries(server) for name in query["ticker.any_of"].split(",")] == names


def test_all_pages_are_read_and_a_row_that_comes_again_is_one(server: PlannedServer, rest: RestHistory) -> None:
    server.plan[SPLITS] = [
        answer(SPLIT, next_url=f"{server.url}{SPLITS}?cursor=1"),
        Answer(body={"status": "OK", "next_url": f"{server.url}{SPLITS}?cursor=2"}),
        answer(SPLIT, SPLIT | {"ticker": "NVDA"}),
    ]
    found = corporate_actions.splits(rest, None, SINCE)
    assert [row.ticker for row in found.rows] == ["AAPL", "NVDA"]
    assert found.requests == 3


def test_a_dividend_has_all_its_fields(server: PlannedServer, rest: RestHistory) -> None:
    row = {
        "id": "E1",
        "ticker": "AAPL",
        "cash_amount": 0.26,
        "split_adjusted_cash_amount": 0.26,
        "currency": "USD",
        "declaration_date": "2025-07-31",
        "ex_dividend_date": "2025-08-11",
        "record_date": "2025-08-11",
        "pay_date": "2025-08-14",
        "frequency": 4,
        "distribution_type": "recurring",
        "historical_adjustment_factor": 0.997899,
    }
    server.plan[DIVIDENDS] = [answer(row)]
    [found] = corporate_actions.dividends(rest, ["AAPL"], SINCE).rows
    assert {name: getattr(found, name) for name in row} == {
        name: date.fromisoformat(value) if name.endswith("_date") and isinstance(value, str) else value
        for name, value in row.items()
    }


@pytest.mark.parametrize("blank", ["", None])
def test_a_blank_field_is_absent(blank: object, server: PlannedServer, rest: RestHistory) -> None:
    server.plan[DIVIDENDS] = [
        answer({"ticker": "OLD", "ex_dividend_date": "2003-09-10", "pay_date": blank, "currency": blank})
    ]
    found = corporate_actions.dividends(rest, None, SINCE)
    assert (found.rows, found.refused) == ([Dividend(ticker="OLD", ex_dividend_date=date(2003, 9, 10))], [])


@pytest.mark.parametrize("factor", [0, None])
def test_a_factor_that_is_of_no_use_is_kept_as_the_vendor_has_it(
    factor: float | None, server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[SPLITS] = [answer(SPLIT | {"ticker": "RYCEF", "historical_adjustment_factor": factor})]
    [row] = corporate_actions.splits(rest, None, SINCE).rows
    assert row.historical_adjustment_factor == factor


@pytest.mark.parametrize(
    "row", [{}, [], "AAPL", None, 7, SPLIT | {"ticker": ""}, SPLIT | {"execution_date": "soon"}, {"ticker": "AAPL"}]
)
def test_a_row_without_what_makes_it_one_costs_only_itself_and_is_told(
    row: object, server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[SPLITS] = [answer(row, SPLIT)]
    found = corporate_actions.splits(rest, None, SINCE)
    assert found.rows == [AAPL]
    assert len(found.refused) == 1
    assert "a row is left out" in found.refused[0]


def test_a_field_that_cannot_be_read_costs_only_itself_and_is_told(server: PlannedServer, rest: RestHistory) -> None:
    server.plan[SPLITS] = [answer(SPLIT | {"historical_adjustment_factor": "a quarter", "id": KEY})]
    found = corporate_actions.splits(rest, None, SINCE)
    assert [(row.split_to, row.historical_adjustment_factor) for row in found.rows] == [(4, None)]
    assert "a quarter" in found.refused[0]
    assert KEY not in found.refused[0], "whatever the vendor puts into a row"


@pytest.mark.parametrize(
    ("next_url", "error"),
    [
        ("https://elsewhere.invalid/stocks/v1/splits", HistoryRefused),
        ("{url}/stocks/v1/splits?again", HistoryUnavailable),
    ],
)
def test_a_next_page_that_leads_elsewhere_or_nowhere_ends_it(
    next_url: str, error: type[Exception], server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[SPLITS] = [answer(SPLIT, next_url=next_url.format(url=server.url))]
    with pytest.raises(error, match="goes on"):
        corporate_actions.splits(rest, None, SINCE)


@pytest.mark.parametrize("body", [b"", b"<html>", {"results": {"ticker": "AAPL"}}, {"results": 7}])
def test_an_answer_that_is_no_list_is_an_error(body: object, server: PlannedServer, rest: RestHistory) -> None:
    server.plan[SPLITS] = [Answer(body=body)]
    with pytest.raises(HistoryUnavailable, match="cannot be read"):
        corporate_actions.splits(rest, None, SINCE)


def test_a_watch_lists_tickers_are_asked_for_one_by_one_listed_and_delisted(
    server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[TICKERS] = [answer({"ticker": "AAPL", "active": True, "cik": ""}), answer()]
    found = corporate_actions.tickers(rest, ["AAPL"], SINCE)
    assert found.rows == [ListedTicker(ticker="AAPL", active=True)]
    common = {"ticker": "AAPL", "date": "2024-12-02", "limit": "1000", "sort": "ticker"}
    assert queries(server) == [common | {"active": "true"}, common | {"active": "false"}]


def test_a_long_watch_list_is_taken_from_the_whole_listing(server: PlannedServer, rest: RestHistory) -> None:
    server.plan[TICKERS] = [answer({"ticker": "T7"}, {"ticker": "ELSE"}), answer()]
    found = corporate_actions.tickers(rest, [f"T{number}" for number in range(100)], SINCE)
    assert [row.ticker for row in found.rows] == ["T7"]
    assert [(query["market"], query["active"]) for query in queries(server)] == [
        ("stocks", "true"),
        ("stocks", "false"),
        ("otc", "true"),
        ("otc", "false"),
    ]


def test_the_times_of_a_listing_are_read(server: PlannedServer, rest: RestHistory) -> None:
    server.plan[TICKERS] = [
        answer({"ticker": "OLD", "active": False, "delisted_utc": "2020-03-02T05:00:00Z"}),
        answer(),
    ]
    [row] = corporate_actions.tickers(rest, None, SINCE).rows
    assert row.delisted_utc == datetime(2020, 3, 2, 5, tzinfo=UTC)


META = {
    "name": "Meta Platforms, Inc. Class A Common Stock",
    "composite_figi": "BBG000MM2P62",
    "cik": "0001326801",
    "events": [
        {"ticker_change": {"ticker": "META"}, "type": "ticker_change", "date": "2022-06-09"},
        {"ticker_change": {"ticker": "FB"}, "type": "ticker_change", "date": "2012-05-18"},
    ],
}


def events_of(ticker: str) -> str:
    return f"/vX/reference/tickers/{ticker}/events"


def test_a_companys_names_are_rows_and_an_unknown_ticker_costs_no_other(
    server: PlannedServer, rest: RestHistory
) -> None:
    server.plan[events_of("META")] = [Answer(body={"results": META, "status": "OK"})]
    server.plan[events_of("NEW")] = [Answer(body={"status": "OK"})]
    found = corporate_actions.ticker_events(rest, ["GONE", "META", "NEW"])
    assert [(row.ticker, row.date) for row in found.rows] == [("META", date(2022, 6, 9)), ("FB", date(2012, 5, 18))]
    assert found.rows[0] == TickerEvent(
        "META", "META", date(2022, 6, 9), "ticker_change", str(META["name"]), "BBG000MM2P62", "0001326801"
    )
    assert found.refused == ["GONE: the vendor has no events of it"]
    assert found.requests == 3


def test_where_the_plan_refuses_events_it_is_not_asked_for_every_ticker(
    server: PlannedServer, rest: RestHistory
) -> None:
    names = [f"T{number}" for number in range(100)]
    refusal = Answer(403, {"status": "NOT_AUTHORIZED", "message": "Please upgrade your plan"})
    server.plan |= {events_of(name): [refusal] for name in names}
    with pytest.raises(RequestRefused, match="not in the plan"):
        corporate_actions.ticker_events(rest, names)
    assert len(server.asked) == 20
