"""What became of every minute, compared with plain Python."""

from __future__ import annotations

import tempfile
from collections import Counter
from datetime import date
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.coverage import Shortfall, below, totals, worst_first
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY
from polygon_pipeline_tests.support.day_files import columns, schema
from polygon_pipeline_tests.support.planned_day import Minute, PlannedDay, online


def states_of(day: PlannedDay, *minutes: int) -> list[str]:
    """The states of these minutes of SPY."""
    return [row["state"] for row in day.states(["SPY"]).to_pylist() if row["minute"] in minutes]


def test_every_state_has_its_minute(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("SPY", 1): "corrected", ("SPY", 2): "repaired", ("SPY", 10): "collected"}
    traded = [("SPY", minute) for minute in range(5)]
    day = PlannedDay(tmp_path, bars, traded, until=9, connected=online((0, 3)))
    assert states_of(day, 0, 1, 2, 3, 4, 5, 8, 9, 10) == [
        "collected",
        "corrected",
        "repaired",
        "lost_connected",
        "lost_disconnected",
        "no_trade",
        "no_trade",
        "unknown",
        "collected",
    ]
    assert day.rows()["SPY"] == {
        "ticker": "SPY",
        "date": DAY,
        "expected_minutes": 960,
        "regular_minutes": 390,
        "collected_minutes": 3,
        "traded_minutes": 5,
        "lost_disconnected": 1,
        "lost_connected": 2,
        "not_collected_minutes": 0,
        "repaired_minutes": 1,
        "corrected_minutes": 1,
        "late_minutes": 0,
        "unexpected_minutes": 0,
        "unknown_minutes": 950,
        "longest_gap_minutes": 3,
        "share": 0.6,
    }


def test_the_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    assert columns(PlannedDay(tmp_path, {("SPY", 0): "late"}).file()) == schema(catalog.BAR_COVERAGE)


def test_without_a_reference_no_minute_is_lost_and_those_without_a_bar_are_unknown(tmp_path: Path) -> None:
    day = PlannedDay(tmp_path, {("SPY", 0): "collected", ("SPY", 1): "late"}, connected=[], subscribed=["QQQ"])
    spy, quiet = day.rows()["SPY"], day.rows()["QQQ"]
    assert (spy["collected_minutes"], spy["late_minutes"], spy["unknown_minutes"]) == (2, 1, 958)
    assert (spy["traded_minutes"], spy["share"], spy["lost_disconnected"], spy["unexpected_minutes"]) == (
        None,
        None,
        0,
        0,
    )
    assert quiet["unknown_minutes"] == 960


def test_no_bar_of_a_past_day_that_is_played_counts_as_late(tmp_path: Path) -> None:
    """It came when it was played, days after its end."""
    assert PlannedDay(tmp_path, {("SPY", 0): "late"}, in_real_time=False).rows()["SPY"]["late_minutes"] is None
    assert "late_minutes" not in totals(tmp_path / "coverage.parquet")


def test_a_reference_of_some_tickers_leaves_the_others_unknown(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("IBM", 0): "collected"}
    rows = PlannedDay(tmp_path, bars, [], tickers=["SPY", "QQQ"]).rows()
    assert [rows[name]["traded_minutes"] for name in ("IBM", "QQQ", "SPY")] == [None, 0, 0]
    assert [rows[name]["unexpected_minutes"] for name in ("IBM", "QQQ", "SPY")] == [0, 0, 1]
    assert [rows[name]["unknown_minutes"] for name in ("IBM", "QQQ", "SPY")] == [959, 0, 0]
    assert [rows[name]["share"] for name in ("IBM", "QQQ", "SPY")] == [None, None, None]


def test_a_ticker_that_was_not_subscribed_counts_as_never_connected(tmp_path: Path) -> None:
    rows = PlannedDay(tmp_path, {("SPY", 1): "repaired"}, [("SPY", 1), ("IBM", 1)], subscribed=["SPY"]).rows()
    assert (rows["SPY"]["lost_connected"], rows["SPY"]["lost_disconnected"]) == (1, 0)
    assert (rows["IBM"]["lost_connected"], rows["IBM"]["lost_disconnected"]) == (0, 1)


def test_the_longest_gap_is_of_consecutive_minutes(tmp_path: Path) -> None:
    lost = [0, 1, 5, 6, 7, 9, 958, 959]
    bars = {("SPY", 6): "repaired", ("SPY", 8): "collected"}
    day = PlannedDay(tmp_path, bars, [("SPY", minute) for minute in [*lost, 8]])
    assert day.rows()["SPY"]["longest_gap_minutes"] == 3


def test_a_half_day_expects_fewer_minutes_and_a_holiday_cannot_be_covered(tmp_path: Path) -> None:
    # Its files hold another day's bars, which are none of its minutes.
    day = PlannedDay(tmp_path, {("SPY", 1): "collected"}, day=HALF_DAY, connected=[])
    row = day.rows()["SPY"]
    assert [row[name] for name in ("date", "expected_minutes", "regular_minutes", "collected_minutes")] == [
        HALF_DAY,
        780,
        210,
        0,
    ]
    with pytest.raises(ValueError, match="2026-01-25 is not a trading day"):
        PlannedDay(tmp_path, {("SPY", 1): "collected"}, day=date(2026, 1, 25)).file()


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    bars = {(f"T{n % 50}", n): "collected" for n in range(900)}
    first, second = (PlannedDay(tmp_path / name, bars, bars.keys()).file().read_bytes() for name in ("a", "b"))
    assert first == second


# Against plain Python

spots = st.tuples(st.sampled_from(["AAA", "BBB", "CCC"]), st.sampled_from([0, 1, 2, 3, 4, 329, 330, 719, 720, 959]))
edges = st.integers(-2, 8) | st.sampled_from([329, 330, 500, 959, 970])
some_tickers = st.none() | st.lists(st.sampled_from(["AAA", "BBB", "DDD"]), unique=True)


@pytest.mark.slow
@given(
    bars=st.dictionaries(spots, st.sampled_from(["collected", "late", "corrected", "repaired"]), max_size=15),
    traded=st.none() | st.sets(spots, max_size=15),
    tickers=some_tickers,
    until=st.sampled_from([0, 2, 330, 960]),
    runs=st.lists(st.tuples(edges, edges), max_size=3),
    subscribed=some_tickers,
)
@settings(max_examples=25, deadline=None)
def test_the_classification_equals_that_of_plain_python(
    bars: dict[Minute, str],
    traded: set[Minute] | None,
    tickers: list[str] | None,
    until: int,
    runs: list[tuple[int, int]],
    subscribed: list[str] | None,
) -> None:
    known = {
        (ticker, minute)
        for ticker in ("AAA", "BBB", "CCC", "DDD")
        for minute in range(until)
        if traded is not None and (tickers is None or ticker in tickers)
    }
    traded = None if traded is None else traded & known
    names = {ticker for ticker, _ in bars} | {ticker for ticker, _ in traded or ()} | set(subscribed or ())
    names |= set(tickers or () if traded is not None else ())
    expected = {}
    connected = set()
    for spot in ((ticker, minute) for ticker in names for minute in range(960)):
        if any(first <= spot[1] <= last for first, last in runs) and (subscribed is None or spot[0] in subscribed):
            connected.add(spot)
        if kind := bars.get(spot):
            expected[spot] = "collected" if kind == "late" else kind
        elif traded and spot in traded:
            expected[spot] = "lost_connected" if spot in connected else "lost_disconnected"
        else:
            expected[spot] = "no_trade" if spot in known else "unknown"

    with tempfile.TemporaryDirectory() as name:
        day = PlannedDay(
            Path(name), bars, traded, tickers=tickers, until=until, connected=online(*runs), subscribed=subscribed
        )
        states = {(row["ticker"], row["minute"]): row for row in day.states().to_pylist()}
        rows = day.rows()
    assert {spot: row["state"] for spot, row in states.items()} == expected
    assert {spot for spot, row in states.items() if row["connected"]} == connected
    assert {spot: row["traded"] for spot, row in states.items() if row["traded"] is not None} == {
        spot: spot in (traded or ()) for spot in known if spot[0] in names
    }

    assert rows.keys() == names
    for ticker, row in rows.items():
        mine = {minute: state for (name, minute), state in expected.items() if name == ticker}
        counts = Counter(mine.values())
        unrepaired = counts["lost_connected"] + counts["lost_disconnected"]
        lost = [minute for minute, state in mine.items() if state == "repaired" or state.startswith("lost")]
        runs_of_lost = [len(list(run)) for _, run in groupby(enumerate(lost), key=lambda pair: pair[1] - pair[0])]
        spots_known = [minute for name, minute in known if name == ticker]
        minutes_traded = {minute for name, minute in traded or () if name == ticker}
        traded_count = len(minutes_traded)
        had = [minute for minute, state in mine.items() if state in ("collected", "corrected")]
        assert row["expected_minutes"] == 960 == (
            row["collected_minutes"] + row["lost_connected"] + row["lost_disconnected"]
            + counts["no_trade"] + row["unknown_minutes"]
        )  # fmt: skip
        assert row["collected_minutes"] == len(had)
        assert row["repaired_minutes"] == counts["repaired"]
        assert row["corrected_minutes"] == counts["corrected"]
        assert row["late_minutes"] == sum(kind == "late" for (name, _), kind in bars.items() if name == ticker)
        assert row["unknown_minutes"] == counts["unknown"]
        assert row["lost_connected"] == sum((ticker, minute) in connected for minute in lost)
        assert row["longest_gap_minutes"] == max(runs_of_lost, default=0)
        assert row["traded_minutes"] == (traded_count if spots_known else None)
        assert row["unexpected_minutes"] == len(set(had) & set(spots_known) - minutes_traded)
        assert row["share"] == ((traded_count - unrepaired) / traded_count if traded_count else None)


# The tickers with the least


def test_the_tickers_below_a_share_are_named_worst_first(tmp_path: Path) -> None:
    traded = [(name, minute) for name in ("AAA", "BBB", "CCC", "DDD") for minute in range(10)]
    missing = {"AAA": 1, "BBB": 4, "CCC": 0, "DDD": 4}
    bars = {(name, minute): "repaired" if minute == 9 else "collected" for name, minute in traded}
    bars = {(name, minute): kind for (name, minute), kind in bars.items() if minute >= missing[name]}
    file = PlannedDay(tmp_path, bars | {("EEE", 900): "collected"}, traded, tickers=["AAA", "BBB", "CCC", "DDD"]).file()
    worse = [Shortfall("BBB", 0.6, 10, 6), Shortfall("DDD", 0.6, 10, 6)]
    assert below(file, 0.9) == worse
    assert below(file, 0.95) == [*worse, Shortfall("AAA", 0.9, 10, 9)]
    assert worst_first(file, 4) == ["BBB", "DDD", "AAA", "CCC"]
    assert worst_first(file, 9)[-1] == "EEE"


def test_on_a_day_without_a_collector_nothing_was_lost(tmp_path: Path) -> None:
    traded = [("SPY", minute) for minute in range(3)]
    day = PlannedDay(tmp_path, {("SPY", 0): "repaired"}, traded, connected=[], was_collected=False)
    assert states_of(day, 0, 1, 3) == ["from_history", "not_collected", "no_trade"]
    row = day.rows()["SPY"]
    assert (row["not_collected_minutes"], row["repaired_minutes"], row["lost_disconnected"]) == (3, 0, 0)
    assert row["longest_gap_minutes"] == 0
    assert row["share"] == pytest.approx(1 / 3)
