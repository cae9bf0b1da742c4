"""The tickers of the synthetic market."""

from __future__ import annotations

from polygon_pipeline.simulator.tickers import WATCH_LIST, first_tickers


def test_first_tickers_are_all_different() -> None:
    tickers = first_tickers(11_000)
    assert len(set(tickers)) == 11_000
    assert tickers[: len(WATCH_LIST)] == list(WATCH_LIST)
