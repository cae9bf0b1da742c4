"""Resampled and daily bars, compared with plain Python."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import RESAMPLED, find
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.market.calendar import session
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY, NIGHT_DAY, NOON, Row, at, moment, normalized_row
from polygon_pipeline_tests.support.day_files import columns, read, schema
from polygon_pipeline_tests.support.nights import first_night

PARTS = ("overnight", "pre", "regular", "post")


def table(rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=catalog.NORMALIZED_BARS.schema())


def random_bars(seed: int, day: date = DAY) -> list[Row]:
    """Bars of three tickers over a whole session, some minutes silent, some VWAPs missing, fractional volumes."""
    choice = random.Random(seed)
    found = session(day)
    assert found
    rows = []
    for ticker, share in (("AAA", 0.9), ("BBB", 0.1), ("CCC", 0.01)):
        for minute in range(found.minutes):
            if choice.random() > share:
                continue
            low = round(choice.uniform(5, 500), 4)
            high = round(low + choice.uniform(0, 5), 4)
            rows.append(
                normalized_row(
                    ticker,
                    int(found.begin.timestamp() * 1000) + 60_000 * minute,
                    low=low,
                    high=high,
                    open=round(choice.uniform(low, high), 4),
                    close=round(choice.uniform(low, high), 4),
                    volume=choice.choice([0.0, float(choice.randrange(1, 10**6)), choice.randrange(10**10) / 10**6]),
                    vwap=choice.choice([None, round(choice.uniform(low, high), 4)]),
                    day_open=choice.choice([None, round(choice.uniform(5, 500), 4)]),
                )
            )
    return rows


def test_a_day_of_bars_at_the_bounds_is_summed(tmp_path: Path) -> None:
    largest = {"volume": 999_999_999_999_999.0, "vwap": 999_999_999.999}
    rows = [normalized_row("AAA", at(4, 0) + 60_000 * minute, **largest) for minute in range(960)]
    file, target = tmp_path / "normalized.parquet", tmp_path / "daily.parquet"
    pq.write_table(table(rows), file)
    with Resampling(DAY, file, tmp_path) as resampling:
        resampling.write(catalog.DAILY_BARS, target)
    [daily] = read(target)
    assert daily["volume"] == pytest.approx(390e15)
    assert daily["vwap"] == pytest.approx(1e9)


def summed(rows: list[Row]) -> float:
    return float(sum((Decimal(repr(row["volume"])) for row in rows), Decimal(0)))


def volume_weighted(rows: list[Row]) -> float | None:
    weighted = [row for row in rows if row["vwap"] is not None]
    shares = sum((Fraction(row["volume"]) for row in weighted), Fraction(0))
    turnover = sum((Fraction(row["vwap"]) * Fraction(row["volume"]) for row in weighted), Fraction(0))
    return float(turnover / shares) if shares else None


def bar_of(rows: list[Row]) -> Row:
    """One bar of several, which are in the order of time."""
    return {
        "open": rows[0]["open"],
        "high": max(row["high"] for row in rows),
        "low": min(row["low"] for row in rows),
        "close": rows[-1]["close"],
        "volume": summed(rows),
        "vwap": None if (vwap := volume_weighted(rows)) is None else pytest.approx(vwap, rel=1e-9),
        "bar_count": len(rows),
    }


def derive(name: str, day: date, source: pa.Table | Path, target: Path, folder: Path) -> None:
    if isinstance(source, pa.Table):
        pq.write_table(source, folder / "source.parquet")
        source = folder / "source.parquet"
    with Resampling(day, source, folder) as resampling:
        resampling.write(find(name), target)


def resampled(folder: Path, name: str, source: pa.Table | Path) -> list[Row]:
    target = folder / f"{name}.parquet"
    derive(name, DAY, source, target, folder)
    assert columns(target) == schema(find(name))
    return read(target)


@pytest.mark.parametrize(("name", "minutes"), [(dataset.name, dataset.interval_minutes) for dataset in RESAMPLED])
def test_resampled_bars_equal_those_of_plain_python(tmp_path: Path, name: str, minutes: int) -> None:
    rows = random_bars(seed=minutes)
    buckets: dict[tuple[str, datetime], list[Row]] = defaultdict(list)
    for row in rows:
        start = row["timestamp"]
        buckets[row["ticker"], start - timedelta(minutes=start.minute % minutes)].append(row)
    expected = [
        {"ticker": ticker, "timestamp": start, **bar_of(bars), "session": bars[0]["session"]}
        for (ticker, start), bars in sorted(buckets.items())
    ]
    assert len(expected) > 20
    assert resampled(tmp_path, name, table(random.Random(0).sample(rows, len(rows)))) == expected


def day_row(folder: Path, day: date, source: pa.Table | Path) -> list[Row]:
    target = folder / "daily.parquet"
    derive("daily_bars", day, source, target, folder)
    assert columns(target) == schema(catalog.DAILY_BARS)
    return read(target)


@pytest.mark.parametrize("day", [DAY, HALF_DAY, NIGHT_DAY])
def test_daily_bars_equal_those_of_plain_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    first_night(monkeypatch, NIGHT_DAY)
    rows = random_bars(seed=7, day=day)
    expected = []
    for ticker in ("AAA", "BBB", "CCC"):
        bars = [row for row in rows if row["ticker"] == ticker]
        parts = {part: [row for row in bars if row["session"] == part] for part in PARTS}
        regular = parts["regular"]
        assert regular
        expected.append(
            {
                "ticker": ticker,
                "date": day,
                **bar_of(regular),
                "overnight_volume": summed(parts["overnight"]),
                "pre_market_volume": summed(parts["pre"]),
                "after_hours_volume": summed(parts["post"]),
                "first_bar": regular[0]["timestamp"],
                "last_bar": regular[-1]["timestamp"],
                "official_open": [row["day_open"] for row in bars if row["day_open"] is not None][-1],
                "official_close": None,
                "official_close_source": None,
                "day_state": "partial",
            }
        )
    assert day_row(tmp_path, day, table(random.Random(0).sample(rows, len(rows)))) == expected


def test_extended_hours_never_affect_the_days_prices(tmp_path: Path) -> None:
    extreme = {"open": 1.0, "high": 999.0, "low": 0.5, "close": 2.0, "vwap": 500.0, "volume": 7.0}
    rows = [
        normalized_row("SPY", at(9, 29), **extreme),
        normalized_row("SPY", at(9, 30), day_open=10.0),
        normalized_row("SPY", at(16, 0), **extreme),  # the closing auction
    ]
    [row] = day_row(tmp_path, DAY, table(rows))
    assert [row[name] for name in ("open", "high", "low", "close", "vwap")] == [10.0, 12.0, 9.0, 11.0, 10.5]
    assert [row[name] for name in ("volume", "pre_market_volume", "after_hours_volume")] == [100.0, 7.0, 7.0]
    assert row["official_open"] == 10.0, "the auction's bar does not say"


def test_a_ticker_that_traded_outside_regular_hours_only_has_a_row_without_prices(tmp_path: Path) -> None:
    [row] = day_row(tmp_path, DAY, table([normalized_row("SPY", at(8, 0), volume=3.5)]))
    assert [row[name] for name in ("volume", "bar_count", "pre_market_volume", "after_hours_volume")] == [0, 0, 3.5, 0]
    for name in ("open", "high", "low", "close", "vwap", "first_bar", "last_bar", "official_open"):
        assert row[name] is None, name


def test_a_vwap_of_no_volume_is_null_and_not_an_error(tmp_path: Path) -> None:
    rows = [normalized_row("SPY", NOON, volume=0.0), normalized_row("QQQ", NOON, vwap=None)]
    assert [row["vwap"] for row in resampled(tmp_path, "bars_5m", table(rows))] == [None, None]
    assert [row["vwap"] for row in day_row(tmp_path, DAY, table(rows))] == [None, None]


def test_the_nine_oclock_hour_holds_pre_market_and_regular_bars(tmp_path: Path) -> None:
    rows = [normalized_row("SPY", at(9, 29)), normalized_row("SPY", at(9, 30)), normalized_row("SPY", at(10, 0))]
    hours = resampled(tmp_path, "bars_1h", table(rows))
    assert [(row["timestamp"], row["bar_count"], row["session"]) for row in hours] == [
        (moment(at(9, 0)), 2, "pre"),
        (moment(at(10, 0)), 1, "regular"),
    ]


@pytest.mark.parametrize("name", ["bars_1h", "daily_bars"])
def test_the_same_bars_give_the_same_bytes_in_any_order_and_the_same_rows_from_a_file(
    tmp_path: Path, name: str
) -> None:
    rows = random_bars(seed=3)
    target = tmp_path / "out.parquet"
    seen = set()
    for seed in range(5):
        derive(name, DAY, table(random.Random(seed).sample(rows, len(rows))), target, tmp_path)
        seen.add(target.read_bytes())
    assert len(seen) == 1
    from_a_table = read(target)
    pq.write_table(table(rows), tmp_path / "normalized.parquet")
    derive(name, DAY, tmp_path / "normalized.parquet", target, tmp_path)
    assert read(target) == from_a_table


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["AAA", "BBB"]), st.integers(0, 959), st.decimals(0, 10**6, places=6), st.booleans()),
        min_size=1,
        max_size=20,
        unique_by=lambda bar: bar[:2],
    ),
    st.sampled_from([dataset.name for dataset in RESAMPLED]),
)
def test_no_share_is_lost_between_minutes_buckets_and_days(
    tmp_path_factory: pytest.TempPathFactory, bars: list[tuple[str, int, Decimal, bool]], name: str
) -> None:
    folder = tmp_path_factory.mktemp("shares")
    rows = [
        normalized_row(ticker, at(4, 0) + 60_000 * minute, volume=float(volume), vwap=10.5 if priced else None)
        for ticker, minute, volume, priced in bars
    ]
    total = sum(volume for _, _, volume, _ in bars)
    buckets = resampled(folder, name, table(rows))
    assert sum(row["volume"] for row in buckets) == pytest.approx(float(total), rel=1e-12)
    assert sum(row["bar_count"] for row in buckets) == len(rows)
    parts = ("volume", "pre_market_volume", "after_hours_volume")
    days = day_row(folder, DAY, table(rows))
    assert sum(row[part] for row in days for part in parts) == pytest.approx(float(total), rel=1e-12)
