"""Our day against the vendor's: what differs, and that no reason is given that the day's minutes do not show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.differences import Agreement, Differences
from polygon_pipeline.datasets.reference import from_day_answer, from_flat_file
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.market import calendar
from polygon_pipeline.polygon.flat_files import FlatFileKind
from polygon_pipeline.polygon.rest import DailyBar, DayAnswer
from polygon_pipeline.simulator.daily import daily_bars
from polygon_pipeline.simulator.flat_files import daily_flat_file
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.bars import (
    ARRIVAL,
    DAY,
    HALF_DAY,
    Row,
    at,
    later,
    moment,
    normalized_row,
    reference_daily_row,
    reference_row,
)
from polygon_pipeline_tests.support.day_files import (
    columns,
    dataset_file,
    read,
    reference_daily_file,
    reference_file,
    schema,
)

# Two minutes of regular hours, and one before and after them. Each gives an average price of 10.5.
PRE, FIRST, LAST, BELL, EVENING = at(8, 0), at(9, 30), at(15, 59), at(16, 0), at(18, 0)
_VALUES: dict[str, Any] = {"open": 10.0, "high": 12.0, "low": 9.0, "close": 11.0, "volume": 50.0, "vwap": 10.5}
AUCTION: dict[str, Any] = {"open": 13.0, "high": 14.0, "low": 8.5, "close": 12.5, "volume": 30.0, "vwap": 13.1}
# What the vendor's day is where nothing differs.
SAME: dict[str, Any] = {"open": 10.0, "high": 12.0, "low": 9.0, "close": 11.0, "volume": 100.0, "vwap": 10.5}

Reasons = dict[str, str]


def ours(start_ms: int, ticker: str = "SPY", **fields: object) -> Row:
    return normalized_row(ticker, start_ms, **_VALUES | fields)


def vendors(start_ms: int, ticker: str = "SPY", **fields: object) -> Row:
    return reference_row(ticker, start_ms, **_VALUES | fields)


OURS = [ours(FIRST), ours(LAST)]
VENDORS = [vendors(FIRST), vendors(LAST)]


def compare(
    folder: Path,
    bars: Sequence[Row] | Path,
    days: Iterable[Row],
    minutes: Sequence[Row] | None = None,
    *,
    asked: Sequence[str] | None = (),
    until_ms: int = at(23, 59),
    day: date = DAY,
) -> tuple[Agreement, list[Row]]:
    """bars: ours, or their file. minutes: the vendor's, None where there are none."""
    normalized = bars if isinstance(bars, Path) else dataset_file(folder / "normalized.parquet", bars)
    daily, target = folder / "daily.parquet", folder / "differences.parquet"
    theirs = reference_daily_file(folder / "theirs.parquet", days)
    reference = None
    if minutes is not None:
        reference = reference_file(folder / "reference.parquet", minutes, until_ms=until_ms)
    with Resampling(day, normalized, folder) as resampling:
        resampling.write(catalog.DAILY_BARS, daily)
    with Differences(day, daily, theirs, normalized, reference, asked, folder) as differences:
        agreement = differences.write(target)
    assert columns(target) == schema(catalog.DAILY_DIFFERENCES)
    return agreement, read(target)


def reasons(
    folder: Path,
    theirs: dict[str, Any],
    bars: Sequence[Row] = OURS,
    minutes: Sequence[Row] | None = None,
    **options: Any,
) -> Reasons:
    """The reason of each field that differs, where the vendor's day is SAME but for these values."""
    _, rows = compare(folder, bars, [reference_daily_row(**SAME | theirs)], minutes, **options)
    assert all(row["date"] == DAY and row["ticker"] == "SPY" for row in rows)
    return {row["field"]: row["reason"] for row in rows}


def test_a_day_that_agrees_has_no_rows(tmp_path: Path) -> None:
    agreement, rows = compare(tmp_path, OURS, [reference_daily_row(**SAME)])
    assert rows == []
    assert agreement.facts()["outcome"] == "All 1 ticker agree with the vendor's day in every field."


def test_a_row_has_both_values(tmp_path: Path) -> None:
    agreement, [row] = compare(tmp_path, OURS, [reference_daily_row(**SAME | {"close": 7.0})])
    assert row == {
        "ticker": "SPY",
        "date": DAY,
        "field": "close",
        "ours": 11.0,
        "theirs": 7.0,
        "reason": "unexplained",
    }
    assert agreement == Agreement(1, 0, {"unexplained": 1}, 1, ["SPY close: ours 11, theirs 7"])


@pytest.mark.parametrize("field", ["open", "high", "low", "close", "volume", "vwap"])
def test_what_no_minute_shows_is_unexplained(tmp_path: Path, field: str) -> None:
    bars = [ours(PRE), *OURS, ours(BELL, **AUCTION), ours(EVENING)]
    minutes = [vendors(row_ms) for row_ms in (PRE, FIRST, LAST, EVENING)] + [vendors(BELL, **AUCTION)]
    assert reasons(tmp_path, {field: 9.875}, bars, minutes) == {field: "unexplained"}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"close": 13.0}, {"close": "closing_auction"}),
        ({"close": 13.0, "high": 13.0}, {"close": "closing_auction", "high": "closing_auction"}),
        ({"close": 8.5, "low": 8.5}, {"close": "closing_auction", "low": "closing_auction"}),
        ({"close": 12.5, "high": 14.0}, {"close": "closing_auction", "high": "unexplained"}),
        ({"close": 13.25}, {"close": "unexplained"}),  # within the minute's range, and none of its four prices
        ({"high": 13.0}, {"high": "unexplained"}),  # of the auction's minute, but not the close
        ({"volume": 130.0, "vwap": 11.1}, {"volume": "closing_auction", "vwap": "closing_auction"}),
        ({"volume": 100.0, "vwap": 11.1}, {"vwap": "unexplained"}),  # the shares do not say that the auction is in it
    ],
)
def test_the_closing_auction_is_a_reason_where_its_minute_has_the_value(
    tmp_path: Path, theirs: dict[str, float], expected: Reasons
) -> None:
    assert reasons(tmp_path, theirs, [*OURS, ours(BELL, **AUCTION)]) == expected


def test_the_closing_auction_is_in_the_minute_after_the_bell_of_the_day(tmp_path: Path) -> None:
    for day, bell, other in ((DAY, (16, 0), (13, 0)), (HALF_DAY, (13, 0), (16, 0))):
        minutes = [at(9, 30, day), at(12, 59, day)]
        for at_minute, reason in ((bell, "closing_auction"), (other, "unexplained")):
            bars = [*map(ours, minutes), ours(at(*at_minute, day), **AUCTION | {"volume": 0.0})]
            theirs = [reference_daily_row(day=day, **SAME | {"close": 13.0})]
            _, rows = compare(tmp_path, bars, theirs, day=day)
            assert {row["reason"] for row in rows if row["field"] == "close"} == {reason}


def test_shares_outside_regular_hours_explain_a_volume_that_counts_them_all(tmp_path: Path) -> None:
    bars = [ours(PRE), *OURS, ours(BELL, **AUCTION), ours(EVENING)]
    assert reasons(tmp_path, {"volume": 230.0}, bars) == {"volume": "extended_hours"}
    assert reasons(tmp_path, {"volume": 229.0}, bars) == {"volume": "unexplained"}
    vwap = (4 * 50 * 10.5 + 30 * 13.1) / 230
    assert reasons(tmp_path, {"volume": 230.0, "vwap": round(vwap, 4)}, bars) == {
        "volume": "extended_hours",
        "vwap": "extended_hours",
    }


def test_the_official_open_of_the_feed_explains_the_vendors_open(tmp_path: Path) -> None:
    bars = [ours(FIRST, day_open=9.5), ours(LAST, day_open=9.5)]
    assert reasons(tmp_path, {"open": 9.5}, bars) == {"open": "official_open"}
    assert reasons(tmp_path, {"open": 9.25}, bars) == {"open": "unexplained"}


def test_bars_that_we_lack_are_a_reason_where_the_vendors_minutes_give_its_value(tmp_path: Path) -> None:
    minutes = [*VENDORS, vendors(at(12, 0), high=15.0, volume=25.0)]
    theirs = {"high": 15.0, "volume": 125.0}
    expected = {"high": "missing_bars", "volume": "missing_bars"}
    assert reasons(tmp_path, theirs, minutes=minutes) == expected
    assert reasons(tmp_path, theirs) == dict.fromkeys(expected, "unexplained"), "without the vendor's minutes"
    assert reasons(tmp_path, theirs, minutes=minutes, until_ms=at(19, 0)) == dict.fromkeys(expected, "unexplained")
    assert reasons(tmp_path, {"high": 16.0}, minutes=minutes) == {"high": "unexplained"}


def test_a_correction_that_we_do_not_have_and_a_bar_that_the_vendor_took_back_are_reasons(tmp_path: Path) -> None:
    corrected = [vendors(FIRST), vendors(LAST, close=10.75, volume=60.0)]
    assert reasons(tmp_path, {"close": 10.75, "volume": 110.0}, minutes=corrected) == {
        "close": "corrected_bars",
        "volume": "corrected_bars",
    }
    assert reasons(tmp_path, {"volume": 50.0}, minutes=VENDORS[:1]) == {"volume": "extra_bars"}


def test_reasons_that_are_true_together_are_joined(tmp_path: Path) -> None:
    minutes = [*VENDORS, vendors(at(12, 0), volume=25.0), vendors(BELL, **AUCTION)]
    assert reasons(tmp_path, {"close": 13.0, "volume": 155.0}, [*OURS, ours(BELL, **AUCTION)], minutes) == {
        "close": "closing_auction",
        "volume": "closing_auction + missing_bars",
    }
    assert reasons(tmp_path, {"close": 13.0}, OURS, minutes) == {"close": "closing_auction + missing_bars"}


def test_a_ticker_that_only_one_side_has_differs_in_every_field_but_not_if_nobody_asked_for_it(tmp_path: Path) -> None:
    days = [reference_daily_row(**SAME), reference_daily_row("GME", **SAME)]
    bars = [ours(FIRST, "AAPL"), *OURS]
    for asked, tickers in (((), {"AAPL"}), (("GME",), {"AAPL", "GME"}), (None, {"AAPL", "GME"})):
        agreement, rows = compare(tmp_path, bars, days, asked=asked)
        assert {row["ticker"] for row in rows} == tickers
        assert {row["field"] for row in rows} == {"open", "high", "low", "close", "volume"}
        assert all(row["ours"] is None for row in rows if row["ticker"] == "GME")
        assert all(row["theirs"] is None for row in rows if row["ticker"] == "AAPL")
        assert agreement.agreeing == 1
        assert agreement.compared == 1 + len(tickers)
    minutes = [*VENDORS, vendors(FIRST, "GME"), vendors(LAST, "GME")]
    _, rows = compare(tmp_path, bars, days, minutes, asked=None)
    assert {(row["ticker"], row["reason"]) for row in rows} == {("GME", "missing_bars"), ("AAPL", "extra_bars")}


def test_a_ticker_without_a_trade_in_regular_hours_agrees_with_a_vendor_that_has_no_day_of_it(tmp_path: Path) -> None:
    agreement, rows = compare(tmp_path, [ours(PRE, "AAPL"), *OURS], [reference_daily_row(**SAME)], asked=None)
    assert rows == []
    assert agreement.compared == 1


def test_flat_files_have_no_vwap_and_it_is_not_compared(tmp_path: Path) -> None:
    assert reasons(tmp_path, {"vwap": None}) == {}


# The simulated market, whose truth is planned

MARKET = SyntheticMarket(["BRK.B", "KIMpL", "UHT"])
SESSION = calendar.current_or_next_session(moment(FIRST))
MINUTES = MARKET.day_bars(DAY)
NORMALIZED = [
    normalized_row(row["ticker"], row["start_ms"], **{name: row[name] for name in _VALUES}, source="rest")
    for row in MINUTES.sort_by([("ticker", "ascending"), ("start_ms", "ascending")]).to_pylist()
]


@pytest.mark.parametrize("by_flat_file", [True, False])
def test_every_difference_of_a_simulated_day_is_explained(tmp_path: Path, by_flat_file: bool) -> None:
    days, theirs = daily_bars(MINUTES, SESSION), tmp_path / "theirs.parquet"
    if by_flat_file:
        (tmp_path / "day.csv.gz").write_bytes(daily_flat_file(days, DAY))
        from_flat_file(DAY, tmp_path / "day.csv.gz", ARRIVAL, "etag", theirs, tmp_path, FlatFileKind.DAYS)
    else:
        bars = [DailyBar(**{name: value for name, value in row.items()}) for row in days.to_pylist()]
        from_day_answer(DAY, DayAnswer(ARRIVAL, bars), theirs, tmp_path)
    rows = read(theirs)
    assert columns(theirs) == schema(catalog.REFERENCE_DAILY_BARS)
    assert [(row["ticker"], row["close"]) for row in rows] == [
        (day["ticker"], day["close"]) for day in days.to_pylist()
    ]
    agreement, found = compare(tmp_path, NORMALIZED, rows)
    assert agreement.compared == 3
    expected = {("close", "closing_auction"), ("volume", "extended_hours"), ("vwap", "extended_hours")}
    assert {(row["field"], row["reason"]) for row in found} == {
        (name, reason) for name, reason in expected if not (by_flat_file and name == "vwap")
    }
    assert agreement.unexplained == 0


_changes = st.dictionaries(
    st.tuples(st.sampled_from(MARKET.tickers), st.sampled_from(["open", "high", "low", "close", "volume"])),
    st.integers(1, 10**6),
)


@given(_changes)
@settings(max_examples=8, deadline=None)
def test_exactly_what_was_changed_in_the_vendors_days_is_unexplained(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[tuple[str, str], int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("planned")
    planned: dict[tuple[str, date], dict[str, float]] = {}
    for (ticker, name), millionths in changes.items():
        # No price of the market has so many digits, nor has a sum of its shares.
        planned.setdefault((ticker, DAY), {})[name] = 5 + millionths * 1.1e-5
    days = daily_bars(MINUTES, SESSION, planned).to_pylist()
    theirs = [reference_daily_row(**{name: row[name] for name in ("ticker", *_VALUES)}) for row in days]
    _, rows = compare(tmp_path, NORMALIZED, theirs)
    unexplained = {(row["ticker"], row["field"]) for row in rows if row["reason"] == "unexplained"}
    # A high or low that is the auction's is explained by the close, and a VWAP by the volume.
    by_others = {(ticker, other) for ticker, name in changes for other in _EXPLAINS.get(name, ())}
    assert {*changes} <= unexplained <= {*changes} | by_others


_EXPLAINS = {"close": ("high", "low"), "volume": ("vwap",)}


def test_of_two_rows_of_a_ticker_one_is_kept_and_other_days_are_left_out(tmp_path: Path) -> None:
    end_ms = at(16, 0)
    bars = [
        DailyBar(start_ms=start_ms, open=1, high=1, low=1, close=1, volume=volume, ticker="SPY")
        for start_ms, volume in ((end_ms, 5), (end_ms, 7), (end_ms + 86_400_000, 9), (end_ms - 86_400_000, 9))
    ]
    from_day_answer(DAY, DayAnswer(later(0), bars), tmp_path / "day.parquet", tmp_path)
    [row] = read(tmp_path / "day.parquet")
    assert (row["volume"], row["received_at"], row["source"]) == (7.0, later(0), "rest")
