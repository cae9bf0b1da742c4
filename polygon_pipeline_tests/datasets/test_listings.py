"""Listings as they are kept: a file a day of what was fetched on it, with the catalog's columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from polygon_pipeline.datasets.catalog import DIVIDENDS, LISTINGS, SPLITS, TICKER_EVENTS, TICKERS, Listing
from polygon_pipeline.datasets.listings import ASKED_FOR, Fetched, fetch_listing, keep
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.polygon.errors import HistoryUnavailable
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server

SINCE, TODAY = date(2024, 12, 2), date(2026, 1, 26)
FETCHED_AT = datetime(2026, 1, 26, 12, tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[PlannedServer]:
    with planned_server() as planned:
        yield planned


@pytest.fixture
def rest(server: PlannedServer, tmp_path: Path) -> RestHistory:
    return RestHistory(server.url, "a-key", RateLimit(tmp_path / "limit", 1000, 1.0), backoff=tenacity.wait_none())


def listed(*rows: dict[str, Any]) -> Answer:
    return Answer(body={"status": "OK", "results": rows})


def fetched_of(listing: Listing, *rows: dict[str, Any], replaced: tuple[Any, ...] | None = None) -> Fetched:
    full = [dict.fromkeys(listing.schema().names) | {"fetched_at": FETCHED_AT} | row for row in rows]
    table = pa.Table.from_pylist(full, listing.schema())
    return Fetched(listing, table, FETCHED_AT, replaced, (), 1)


def kept(lake: Lake, name: str) -> list[dict[str, Any]]:
    [key] = lake.keys(layout.listing_prefix(name))
    assert key == f"datasets/{name}/fetched=2026-01-26/data.parquet"
    content = lake.get(key)
    assert content
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    return rows


@pytest.mark.parametrize("listing", LISTINGS, ids=[listing.name for listing in LISTINGS])
def test_a_fetch_has_the_catalogs_columns_sorted_and_says_when_it_was(
    listing: Listing, server: PlannedServer, rest: RestHistory
) -> None:
    event = {"type": "ticker_change", "date": "2022-06-09", "ticker_change": {"ticker": "META"}}
    server.plan = {
        "/stocks/v1/splits": [
            listed(
                {"ticker": "B", "execution_date": "2026-01-26"},
                {"ticker": "A", "execution_date": "2026-01-26", "split_to": 4},
            )
        ],
        "/stocks/v1/dividends": [listed({"ticker": "A", "ex_dividend_date": "2026-01-26", "frequency": 4})],
        "/v3/reference/tickers": [listed({"ticker": "A", "delisted_utc": "2020-03-02T05:00:00Z"})],
        "/vX/reference/tickers/A/events": [Answer(body={"results": {"cik": "1", "events": [event]}})],
        "/vX/reference/tickers/B/events": [Answer(404)],
    }
    before = datetime.now(UTC)
    fetched = fetch_listing(listing, rest, ["A", "B"], SINCE, TODAY)
    assert all(
        field.equals(wanted, check_metadata=True)
        for field, wanted in zip(fetched.table.schema, listing.schema(), strict=True)
    )
    rows = fetched.table.to_pylist()
    assert rows
    assert all(before <= row["fetched_at"] <= datetime.now(UTC) for row in rows)
    if listing == SPLITS:
        assert [(row["ticker"], row["execution_date"], row["split_to"]) for row in rows] == [
            ("A", TODAY, 4.0),
            ("B", TODAY, None),
        ]
    if listing == TICKERS:
        assert {(row["as_of"], row["delisted_utc"]) for row in rows} == {(TODAY, datetime(2020, 3, 2, 5, tzinfo=UTC))}
    if listing == TICKER_EVENTS:
        assert fetched.refused == ("B: the vendor has no events of it",)
        assert (rows[0]["requested_ticker"], rows[0]["ticker"], rows[0]["cik"]) == ("A", "META", "1")


@pytest.mark.parametrize(("tickers", "said"), [(["B", "A"], ["A", "B"]), (None, None)])
def test_a_kept_file_says_which_tickers_were_asked_for(
    tickers: list[str] | None,
    said: list[str] | None,
    server: PlannedServer,
    rest: RestHistory,
    file_lake: Lake,
    tmp_path: Path,
) -> None:
    server.plan["/stocks/v1/splits"] = [listed()]
    file = keep(file_lake, fetch_listing(SPLITS, rest, tickers, SINCE, TODAY), tmp_path)
    assert json.loads(pq.read_schema(file).metadata[ASKED_FOR.encode()]) == said


def test_a_market_without_a_ticker_is_not_kept(server: PlannedServer, rest: RestHistory) -> None:
    server.plan["/v3/reference/tickers"] = [listed()]
    with pytest.raises(HistoryUnavailable, match="lists none of the tickers as of 1999-01-04"):
        fetch_listing(TICKERS, rest, None, SINCE, date(1999, 1, 4))


def test_a_second_fetch_of_a_day_replaces_the_first_and_one_of_another_day_does_not(lake: Lake, tmp_path: Path) -> None:
    keep(lake, fetched_of(SPLITS, {"ticker": "A"}, {"ticker": "WITHDRAWN"}), tmp_path)
    keep(lake, fetched_of(SPLITS, {"ticker": "A"}), tmp_path)
    assert [row["ticker"] for row in kept(lake, "splits")] == ["A"]
    keep(lake, replace(fetched_of(SPLITS), fetched_at=datetime(2026, 1, 27, 0, 1, tzinfo=UTC)), tmp_path)
    assert lake.keys(layout.listing_prefix("splits")) == [
        layout.listing_key("splits", day) for day in (date(2026, 1, 26), date(2026, 1, 27))
    ]


def test_no_dividend_is_a_fact_that_is_kept(file_lake: Lake, tmp_path: Path) -> None:
    keep(file_lake, fetched_of(DIVIDENDS), tmp_path)
    assert kept(file_lake, "dividends") == []


def test_listings_as_of_several_dates_lie_beside_each_other(file_lake: Lake, tmp_path: Path) -> None:
    past = date(2020, 1, 2)
    for as_of, ticker in ((TODAY, "GONE"), (past, "OLD"), (TODAY, "NEW")):
        keep(file_lake, fetched_of(TICKERS, {"as_of": as_of, "ticker": ticker}, replaced=(as_of,)), tmp_path)
    rows = kept(file_lake, "tickers")
    assert [(row["as_of"], row["ticker"]) for row in rows] == [(past, "OLD"), (TODAY, "NEW")]


def test_renames_of_other_tickers_stay(file_lake: Lake, tmp_path: Path) -> None:
    row = {"requested_ticker": "META", "ticker": "FB"}
    keep(file_lake, fetched_of(TICKER_EVENTS, row, replaced=("META",)), tmp_path)
    keep(file_lake, fetched_of(TICKER_EVENTS, row | {"requested_ticker": "B"}, replaced=("A", "B")), tmp_path)
    assert [row["requested_ticker"] for row in kept(file_lake, "ticker_events")] == ["B", "META"]
