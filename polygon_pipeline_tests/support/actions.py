"""Splits and dividends as the vendor's records have them, and the tables of a fetch.

Belongs here: making them of few words. Does not belong here: what becomes of prices (the tests of adjustment).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from polygon_pipeline.datasets.listings import ASKED_FOR
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake

FETCHED_AT = datetime(2026, 6, 30, 12, tzinfo=UTC)


class Split(NamedTuple):
    """split_to new shares for split_from old ones. factor: the vendor's, cumulative."""

    date: date | None
    split_from: float | None
    split_to: float | None
    ticker: str = "SPY"
    factor: float | None = 1.0
    adjustment_type: str = "forward_split"


class Dividend(NamedTuple):
    """cash: a share. factor: the vendor's, cumulative."""

    date: date | None
    cash: float | None
    ticker: str = "SPY"
    factor: float | None = 1.0
    currency: str | None = "USD"
    distribution_type: str = "recurring"


def splits_table(splits: Iterable[Split]) -> pa.Table:
    """A fetch of `splits`."""
    rows = [
        {
            "ticker": split.ticker,
            "execution_date": split.date,
            "adjustment_type": split.adjustment_type,
            "split_from": split.split_from,
            "split_to": split.split_to,
            "historical_adjustment_factor": split.factor,
            "fetched_at": FETCHED_AT,
        }
        for split in splits
    ]
    return pa.Table.from_pylist(rows, schema=_schema("execution_date", "split_from", "split_to"))


def dividends_table(dividends: Iterable[Dividend]) -> pa.Table:
    """A fetch of `dividends`."""
    rows = [
        {
            "ticker": dividend.ticker,
            "ex_dividend_date": dividend.date,
            "cash_amount": dividend.cash,
            "currency": dividend.currency,
            "distribution_type": dividend.distribution_type,
            "split_adjusted_cash_amount": dividend.cash,
            "historical_adjustment_factor": dividend.factor,
            "fetched_at": FETCHED_AT,
        }
        for dividend in dividends
    ]
    return pa.Table.from_pylist(
        rows,
        schema=_schema(
            "ex_dividend_date", "cash_amount", "currency", "distribution_type", "split_adjusted_cash_amount"
        ),
    )


def _schema(on: str, *columns: str) -> pa.Schema:
    text = {"currency", "distribution_type", "adjustment_type"}
    names = ["adjustment_type", *columns] if on == "execution_date" else columns
    return pa.schema(
        [
            ("ticker", pa.string()),
            (on, pa.date32()),
            *((name, pa.string() if name in text else pa.float64()) for name in names),
            ("historical_adjustment_factor", pa.float64()),
            ("fetched_at", pa.timestamp("us", "UTC")),
        ]
    )


def put_fetches(
    lake: Lake,
    fetched: date,
    splits: Iterable[Split] = (),
    dividends: Iterable[Dividend] = (),
    asked_for: list[str] | None = None,
) -> None:
    """Puts what was fetched on a day into the lake. asked_for: the watch list; None for the whole market."""
    for name, table in (("splits", splits_table(splits)), ("dividends", dividends_table(dividends))):
        content = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({ASKED_FOR: json.dumps(asked_for)}), content)
        lake.put(layout.listing_key(name, fetched), content.getvalue().to_pybytes())
