"""Flat files: an independent reader finds the market's bars in them."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import duckdb
import pyarrow as pa

from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.simulator.daily import daily_bars
from polygon_pipeline.simulator.flat_files import daily_flat_file, flat_file, publish
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.support.bars import DAY

MARKET = SyntheticMarket(WATCH_LIST)


def test_duckdb_reads_back_the_days_bars_sorted_by_ticker_and_time(tmp_path: Path) -> None:
    bars = MARKET.day_bars(DAY)
    path = tmp_path / "day.csv.gz"
    path.write_bytes(flat_file(bars))
    found = duckdb.connect().read_csv(path, header=True).to_arrow_table().to_pylist()
    expected = [
        {
            "ticker": bar["ticker"],
            "volume": bar["volume"],
            "open": bar["open"],
            "close": bar["close"],
            "high": bar["high"],
            "low": bar["low"],
            "window_start": bar["start_ms"] * 1_000_000,
            "transactions": bar["transactions"],
        }
        for bar in sorted(bars.to_pylist(), key=lambda bar: (bar["ticker"], bar["start_ms"]))
    ]
    assert found == expected
    assert any(row["volume"] % 1 for row in found), "there are fractional volumes among them"


def test_the_text_has_the_vendors_format() -> None:
    lines = gzip.decompress(flat_file(MARKET.day_bars(DAY))).decode().splitlines()
    assert lines[0] == "ticker,volume,open,close,high,low,window_start,transactions"
    assert lines[1].startswith("AAPL,")
    assert '"' not in "".join(lines)


def test_the_same_bars_give_the_same_bytes() -> None:
    bars = MARKET.day_bars(DAY)
    shuffled = bars.sort_by([("close", "descending")])
    assert flat_file(shuffled) == flat_file(bars)


def test_a_published_file_has_the_vendors_key_and_may_be_replaced(lake: Lake) -> None:
    for content in (b"early", b"corrected"):
        publish(lake.store, date(2026, 1, 6), content)
        assert lake.get("us_stocks_sip/minute_aggs_v1/2026/01/2026-01-06.csv.gz") == content


def test_a_days_file_has_a_row_per_ticker_that_starts_at_new_yorks_midnight_and_a_folder_of_its_own(
    file_lake: Lake,
) -> None:
    session = calendar.session(DAY)
    assert session
    days = daily_bars(MARKET.day_bars(DAY), session)
    content = daily_flat_file(days, DAY)
    publish(file_lake.store, DAY, content, "day_aggs_v1")
    assert file_lake.get("us_stocks_sip/day_aggs_v1/2026/01/2026-01-26.csv.gz") == content
    header, *lines = gzip.decompress(content).decode().splitlines()
    assert header == "ticker,volume,open,close,high,low,window_start,transactions"
    rows = [line.split(",") for line in lines]
    assert [(row[0], float(row[3])) for row in rows] == [(day["ticker"], day["close"]) for day in days.to_pylist()]
    assert {row[6] for row in rows} == {"1769403600000000000"}  # 2026-01-26 05:00 UTC


def test_the_file_of_a_day_without_bars_has_only_the_header() -> None:
    empty: pa.Table = MARKET.day_bars(DAY).slice(0, 0)
    assert gzip.decompress(flat_file(empty)).count(b"\n") == 1
