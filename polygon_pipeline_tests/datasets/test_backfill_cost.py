"""What a backfill costs: the README's table, and which plans are refused."""

from __future__ import annotations

from datetime import date

import pytest

from polygon_pipeline.datasets.backfill_cost import estimate
from polygon_pipeline.market.calendar import trading_days

YEAR = trading_days(date(2025, 1, 1), date(2026, 1, 2))


@pytest.mark.parametrize(
    ("tickers", "per_minute", "requests", "minutes"), [(10, 5, 120, 24), (500, 5, 6000, 1200), (500, 6000, 6000, 15)]
)
def test_a_year_by_rest_takes_what_the_readme_says(
    tickers: int, per_minute: int, requests: int, minutes: float
) -> None:
    cost = estimate(YEAR[:250], tickers, False, per_minute)
    assert cost.requests == pytest.approx(requests, rel=0.2)
    assert cost.fetch_seconds / 60 == pytest.approx(minutes, rel=0.3)
    assert not cost.is_refused


def test_a_year_of_flat_files_is_a_file_a_day_of_the_whole_market() -> None:
    cost = estimate(YEAR, None, True, 5)
    assert cost.requests == cost.days == len(YEAR)
    assert 25e6 < cost.fetched_bytes / cost.days < 40e6
    assert 5 < cost.fetch_seconds / cost.days < 15


def test_the_datasets_of_a_year_of_twelve_tickers_take_what_was_measured() -> None:
    assert estimate(YEAR, 12, False, 6000).make_seconds == pytest.approx(144, rel=0.3)


def test_the_whole_market_by_a_free_plan_is_refused_and_costs_a_request_a_day_more() -> None:
    cost = estimate(YEAR, None, False, 5)
    assert cost.is_refused
    assert not estimate(YEAR, None, False, 6000).is_refused
    assert cost.requests % 11_000 == len(YEAR)


def test_what_is_kept_costs_by_its_bytes_and_what_is_written_by_its_requests() -> None:
    one, ten = (estimate(YEAR, tickers, False, 6000) for tickers in (1, 10))
    assert ten.dollars_a_month == pytest.approx(10 * one.dollars_a_month)
    assert ten.dollars_once == one.dollars_once > 0
    assert ten.stored_bytes / len(YEAR) / 10 == pytest.approx(800 * 2.3 * 40, rel=0.05)
