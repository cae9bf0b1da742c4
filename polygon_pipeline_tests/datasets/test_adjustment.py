from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from itertools import pairwise
from math import prod

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.adjustment import (
    PRICES,
    SHARES,
    Adjusted,
    Difference,
    adjusted_rows,
    differences,
    make_factors,
    skipped,
)
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline_tests.support.actions import Dividend, Split, dividends_table, splits_table

FIRST = date(2026, 1, 5)
TODAY = date(2026, 6, 30)

Close = tuple[date, float]


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def with_tables(
    closes: Sequence[Close], splits: Sequence[Split] = (), dividends: Sequence[Dividend] = ()
) -> DuckSession:
    """A session with the three tables; the closes, of SPY, are also `bars`, with a volume of 1,000."""
    session = DuckSession()
    session.connection.register("splits", splits_table(splits))
    session.connection.register("dividends", dividends_table(dividends))
    rows = [{"ticker": "SPY", "date": on, "close": close, "volume": 1000.0} for on, close in closes]
    fields = [("ticker", pa.string()), ("date", pa.date32()), ("close", pa.float64()), ("volume", pa.float64())]
    session.connection.register("closes", pa.Table.from_pylist(rows, schema=pa.schema(fields)))
    return session


def adjust(
    closes: Sequence[Close],
    splits: Sequence[Split] = (),
    dividends: Sequence[Dividend] = (),
    adjusted: Adjusted = "all",
    as_of: date = TODAY,
) -> list[tuple[float, float]]:
    """The adjusted closes and volumes, in the order of the days."""
    with with_tables(closes, splits, dividends) as session:
        make_factors(session.connection, as_of)
        rows = session.rows(f"{adjusted_rows('closes', ['date', 'close', 'volume'], adjusted)} ORDER BY date")
    return [(close, volume) for _, close, volume in rows]


def test_a_split_of_two_for_one_halves_the_prices_before_it_and_doubles_their_volumes() -> None:
    found = adjust([(day(0), 100.0), (day(1), 50.0)], [Split(day(1), 1, 2)], adjusted="splits")
    assert found == [(50.0, 2000.0), (50.0, 1000.0)]


def test_a_reverse_split_of_one_for_ten_multiplies_the_prices_before_it_by_ten() -> None:
    found = adjust([(day(0), 1.5), (day(1), 15.0)], [Split(day(1), 10, 1)], adjusted="splits")
    assert found == [(15.0, 100.0), (15.0, 1000.0)]


def test_two_splits_of_a_day_are_multiplied_and_a_repeated_record_counts_once() -> None:
    two = [Split(day(1), 1, 2), Split(day(1), 1, 3), Split(day(1), 1, 3)]
    assert adjust([(day(0), 60.0), (day(1), 10.0)], two) == [(pytest.approx(10.0), pytest.approx(6000.0)), (10, 1000)]


def test_a_dividend_takes_its_cash_from_the_close_before_and_leaves_volumes_alone() -> None:
    closes = [(day(0), 80.0), (day(1), 100.0), (day(2), 97.0)]
    found = adjust(closes, dividends=[Dividend(day(2), 2.0)])
    assert found == [(pytest.approx(80 * 0.98), 1000), (pytest.approx(98.0), 1000), (97.0, 1000)]
    assert adjust(closes, dividends=[Dividend(day(2), 2.0)], adjusted="splits") == [(c, 1000) for _, c in closes]


def test_two_dividends_of_a_day_are_added_up() -> None:
    special = [Dividend(day(1), 2.0), Dividend(day(1), 2.0, distribution_type="special")]
    assert adjust([(day(0), 100.0), (day(1), 96.0)], dividends=special) == [(96.0, 1000), (96.0, 1000)]


def test_a_dividend_before_a_split_is_counted_in_the_shares_of_its_own_ex_date() -> None:
    closes = [(day(0), 100.0), (day(1), 98.0), (day(2), 49.0)]
    found = adjust(closes, [Split(day(2), 1, 2)], [Dividend(day(1), 2.0)])
    assert found == [(49.0, 2000), (49.0, 2000), (49.0, 1000)]


def test_a_dividend_on_the_day_of_a_split_is_counted_in_the_new_shares() -> None:
    found = adjust([(day(0), 100.0), (day(1), 49.0)], [Split(day(1), 1, 2)], [Dividend(day(1), 1.0)])
    assert found == [(49.0, 2000), (49.0, 1000)]


def test_the_close_before_a_dividend_is_brought_across_a_split_on_a_day_without_trades() -> None:
    found = adjust([(day(0), 100.0), (day(3), 49.0)], [Split(day(1), 1, 2)], [Dividend(day(3), 1.0)])
    assert found == [(49.0, 2000), (49.0, 1000)]


def test_an_event_after_the_day_asked_for_changes_nothing() -> None:
    closes = [(day(0), 100.0), (day(1), 50.0)]
    events = [Split(day(1), 1, 2), Split(TODAY + timedelta(days=1), 1, 4)]
    assert adjust(closes, events) == [(50.0, 2000), (50.0, 1000)]
    assert adjust(closes, events, as_of=day(0)) == [(100.0, 1000), (50.0, 1000)]


def test_prices_are_in_the_shares_of_the_day_asked_for_and_not_of_the_last_bar() -> None:
    assert adjust([(day(0), 100.0)], [Split(TODAY, 1, 2)]) == [(50.0, 2000)]


@pytest.mark.parametrize(
    ("splits", "dividends", "told"),
    [
        ([Split(day(1), 0, 2)], [], "split_from is 0.0, split_to 2.0"),
        ([Split(day(1), 1, None)], [], "split_from is 1.0, split_to null"),
        ([Split(None, 1, 2)], [], "it has no execution_date"),
        ([], [Dividend(day(1), 0.0)], "cash_amount is 0.0"),
        ([], [Dividend(day(1), None)], "cash_amount is null"),
        ([], [Dividend(day(1), 1.0, currency="CAD")], "it is paid in CAD"),
        ([], [Dividend(day(1), 1.0, currency=None)], "it has no currency"),
        ([], [Dividend(day(1), 200.0)], "the cash of its day is 200.0, and the price before it 100.0"),
        ([], [Dividend(None, 1.0)], "it has no ex_dividend_date"),
    ],
)
def test_a_record_that_says_nothing_usable_is_left_out_and_told(
    splits: list[Split], dividends: list[Dividend], told: str
) -> None:
    closes = [(day(0), 100.0), (day(1), 50.0)]
    assert adjust(closes, splits, dividends) == [(100.0, 1000), (50.0, 1000)]
    with with_tables(closes, splits, dividends) as session:
        assert [record.problem for record in skipped(session.connection, TODAY)] == [told]


def test_only_what_would_change_the_prices_read_is_told() -> None:
    bad = [Split(day(number), 0, 2) for number in (0, 1, 2, 3)]
    with with_tables([], bad) as session:
        assert [record.date for record in skipped(session.connection, as_of=day(2), first=day(0))] == [day(1), day(2)]


def test_a_dividend_without_a_close_before_it_is_told() -> None:
    with with_tables([(day(5), 10.0)], dividends=[Dividend(day(1), 1.0)]) as session:
        [record] = skipped(session.connection, TODAY)
    assert str(record) == "the dividend of SPY on 2026-01-06 is left out: no close is known before it"


def test_factors_that_agree_with_the_vendors_are_no_difference() -> None:
    splits = [
        Split(day(1), 1, 2, factor=0.5 * 10 * 0.25),
        Split(day(2), 10, 1, factor=10 * 0.25),
        Split(day(3), 1, 4, factor=0.25),
    ]
    closes = [(day(0), 100.0), (day(4), 50.0)]
    dividends = [Dividend(day(1), 0.5, factor=0.99 * 0.98), Dividend(day(5), 1.0, factor=0.98)]
    with with_tables(closes, splits, dividends) as session:
        assert differences(session.connection, TODAY) == []


def test_an_event_that_differs_from_the_vendors_factor_is_told_and_not_those_before_it() -> None:
    splits = [Split(day(1), 1, 2, factor=0.1), Split(day(2), 1, 4, factor=0.2), Split(day(3), 1, 2, factor=0.5)]
    with with_tables([], splits) as session:
        assert differences(session.connection, TODAY) == [Difference("split", "SPY", day(2), 0.25, 0.4)]


@pytest.mark.parametrize("factor", [0.0, None])
def test_a_factor_of_the_vendors_that_is_zero_or_null_is_told_and_not_used(factor: float | None) -> None:
    splits = [Split(day(1), 1, 2, factor=0.25), Split(day(2), 1, 2, factor=factor), Split(day(3), 1, 2, factor=0.5)]
    with with_tables([], splits) as session:
        assert differences(session.connection, TODAY) == [Difference("split", "SPY", day(2), 0.5, factor)]
    assert adjust([(day(0), 80.0), (day(3), 10.0)], splits)[0] == (10.0, 8000.0)


@pytest.mark.parametrize("factor", [0.5, 0.5 * 0.25])
def test_the_vendor_may_count_an_announced_event_in_its_factors_or_not(factor: float) -> None:
    splits = [Split(day(1), 1, 2, factor=factor), Split(day(9), 1, 4, factor=0.25)]
    with with_tables([], splits) as session:
        assert differences(session.connection, day(3)) == []


@pytest.mark.parametrize("factors", [(1 / 6, 1 / 6), (1 / 6, 1 / 3), (1 / 2, 1 / 6)])
def test_the_vendors_factors_of_one_day_may_be_the_days_or_one_after_the_other(factors: tuple[float, float]) -> None:
    splits = [Split(day(1), 1, 2, factor=factors[0]), Split(day(1), 1, 3, factor=factors[1])]
    with with_tables([], splits) as session:
        assert differences(session.connection, TODAY) == []


def test_a_bar_is_not_compared_with_every_event() -> None:
    """DuckDB would, where it expects few bars."""
    with with_tables([(day(0), 1.0)], [Split(day(1), 1, 2)]) as session:
        make_factors(session.connection, TODAY)
        [(_, plan)] = session.rows(f"EXPLAIN {adjusted_rows('closes', ['ticker', 'close'], 'all')}")
    assert "asof join" in plan.lower()
    assert "loop" not in plan.lower()


def test_every_column_of_bars_with_fractions_is_a_price_or_counts_shares() -> None:
    bars = (catalog.NORMALIZED_BARS, catalog.NORMALIZED_SECOND_BARS, *catalog.DERIVED)
    doubles = {column.name for dataset in bars for column in dataset.columns if column.type == "double"}
    assert doubles <= PRICES | SHARES, "say in datasets.adjustment what becomes of the new column"


ratios = st.sampled_from([(1, 2), (1, 3), (2, 3), (10, 1), (100, 101), (1, 20)])
number_of_days = 12
split_events = st.dictionaries(st.integers(1, number_of_days), ratios, max_size=4)
cash_events = st.dictionaries(st.integers(1, number_of_days), st.lists(st.floats(0.01, 0.05), min_size=1, max_size=2))


@settings(max_examples=40, deadline=None)
@given(
    prices=st.lists(st.floats(20, 2000), min_size=number_of_days, max_size=number_of_days),
    traded=st.sets(st.integers(0, number_of_days - 1), min_size=1),
    splits=split_events,
    dividends=cash_events,
)
def test_returns_across_an_ex_date_are_the_raw_returns_with_the_events_applied(
    prices: list[float],
    traded: set[int],
    splits: dict[int, tuple[int, int]],
    dividends: dict[int, list[float]],
) -> None:
    """Of any sequence of events, also of several between two trades. A dividend is a share of the price before."""
    days = sorted(traded)
    closes = [(day(number), prices[number]) for number in days]

    def price_before(number: int) -> float | None:
        """The last close before a day, in the shares of that day."""
        last = max((n for n in days if n < number), default=None)
        if last is None:
            return None
        return prices[last] * prod(a / b for n, (a, b) in splits.items() if last < n <= number)

    cash = {
        number: [share * price for share in shares]
        for number, shares in dividends.items()
        if (price := price_before(number))
    }
    split_records = [Split(day(number), *ratio) for number, ratio in splits.items()]
    dividend_records = [
        Dividend(day(number), amount, distribution_type=f"type {place}")
        for number, amounts in cash.items()
        for place, amount in enumerate(amounts)
    ]
    adjusted = adjust(closes, split_records, dividend_records)
    by_splits = adjust(closes, split_records, dividend_records, adjusted="splits")

    for (n, m), (before, after), (split_before, split_after) in zip(
        pairwise(days), pairwise(adjusted), pairwise(by_splits), strict=True
    ):
        ratio = prod(a / b for number, (a, b) in splits.items() if n < number <= m)
        left = prod(
            1 - sum(amounts) / (price_before(number) or 0) for number, amounts in cash.items() if n < number <= m
        )
        raw = prices[m] / prices[n]
        assert after[0] / before[0] == pytest.approx(raw / ratio / left)
        assert split_after[0] / split_before[0] == pytest.approx(raw / ratio)
        assert before[0] <= split_before[0] * (1 + 1e-9)
        assert split_before[0] * split_before[1] == pytest.approx(prices[n] * 1000)  # what was paid stays the same
