"""Histograms of lags: how exact their percentiles are, and that they stay small."""

from __future__ import annotations

import math
from datetime import timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.lake.lag import (
    LONGEST_SECONDS,
    RESOLUTION,
    SHORTEST_SECONDS,
    Histogram,
    Lags,
    Lateness,
    Percentiles,
    revisions_came,
)
from polygon_pipeline.lake.ledger import Account, decode_ledger, encode_ledger
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of

_ROUNDING = 1.001
_LAGS = st.lists(st.floats(SHORTEST_SECONDS, LONGEST_SECONDS), min_size=1, max_size=300)


def _histogram(lags: list[float]) -> Histogram:
    found = Histogram()
    for lag in lags:
        found.add(lag)
    return found


@given(_LAGS)
def test_a_percentile_is_the_true_one_or_up_to_a_bucket_more(lags: list[float]) -> None:
    found, ordered = _histogram(lags).percentiles(), sorted(lags)
    assert found.count == len(lags)
    for share, percentile in ((0.5, found.p50), (0.99, found.p99), (0.999, found.p999)):
        true = ordered[math.ceil(share * len(lags)) - 1]
        assert true / _ROUNDING <= percentile <= true * RESOLUTION * _ROUNDING


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=300))
def test_any_times_take_a_bounded_number_of_buckets(lags: list[float]) -> None:
    """A clock may say anything."""
    found = _histogram(lags)
    assert sum(found.buckets.values()) == len(lags)
    assert all(-104 <= number <= 192 for number in found.buckets)


@given(_LAGS)
def test_cumulative_counts_are_those_of_the_times_themselves(lags: list[float]) -> None:
    limits = [limit for limit, _ in _histogram(lags).cumulative(-10, 17)]
    assert limits == [2.0**power for power in range(-10, 18)]
    for limit, count in _histogram(lags).cumulative(-10, 17):
        # A time beside a limit may be rounded to its other side.
        assert sum(lag <= limit / _ROUNDING for lag in lags) <= count <= sum(lag <= limit * _ROUNDING for lag in lags)


def test_many_equal_times_count_as_one_by_one() -> None:
    together, apart = Histogram(), Histogram()
    together.add(0.25, 3)
    for _ in range(3):
        apart.add(0.25)
    assert together == apart
    assert together.percentiles() == Percentiles(3, 0.25, 0.25, 0.25)


def test_nothing_measured_has_no_percentiles() -> None:
    assert Histogram().percentiles() == Percentiles()


@given(_LAGS)
def test_an_account_keeps_its_lags_when_it_is_stored(lags: list[float]) -> None:
    account = Account(lags=Lags(to_archive=_histogram(lags)))
    assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account


@pytest.mark.parametrize("left_out", ["lags", "lag"])
def test_a_ledger_from_before_lags_were_kept_is_read(left_out: str) -> None:
    stored = msgspec.json.decode(encode_ledger(ledger_of(account_of(1))))
    (stored["account"] if left_out == "lags" else stored).pop(left_out)
    assert decode_ledger(msgspec.json.encode(stored)) == ledger_of(account_of(1))


def test_people_read_how_late_revisions_came_beside_how_long_they_are_waited_for() -> None:
    lateness = Lateness()
    assert revisions_came(lateness.summary(), timedelta(minutes=15)) == (
        "no revision was measured; they are waited for 15 min (POLYGON_REVISION_MINUTES)"
    )
    lateness.revised.add(60.0, 99)
    lateness.revised.add(840.0)
    lateness.latest_revision_seconds = 840.0
    said = revisions_came(lateness.summary(), timedelta(minutes=30))
    assert said == (
        "half of 100 revisions came within 1.1 min of the bar's end, 99 of 100 within 1.1, the latest after 14.0; they "
        "are waited for 30 min (POLYGON_REVISION_MINUTES)"
    )


def test_no_share_of_the_revisions_is_said_to_be_later_than_the_latest() -> None:
    lateness = Lateness(latest_revision_seconds=780.0)
    lateness.revised.add(780.0, 3)
    assert "within 13.0 min of the bar's end, 99 of 100 within 13.0, the latest after 13.0" in revisions_came(
        lateness.summary(), timedelta(minutes=15)
    )
