"""What may be a ticker, a timestamp and a volume."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polygon_pipeline.market.bars import EARLIEST_MS, iso_seconds, shares, ticker_error, timestamp_error
from polygon_pipeline_tests.support.bars import EPOCH, moments

NOW = datetime(2026, 1, 26, 18, 31, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
DAY_MS = 86_400_000


@pytest.mark.parametrize("ticker", ["SPY", "BRK.B", "KIMpL", "AAC.WS", "AAC.U", "A", "brk.b", "BRK-B", "É"])
def test_tickers_of_every_kind_are_accepted_in_their_own_case(ticker: str) -> None:
    assert ticker_error(ticker) is None


@pytest.mark.parametrize(
    "ticker",
    ["", ".", "..", "A/B", "/", "../etc", "A..B", "A\\B", "A\nB", "A\x00", "A\x7f", "A\x85", "A\u2028B", "A" * 65],
)
def test_text_that_could_leave_its_folder_or_break_a_line_is_no_ticker(ticker: str) -> None:
    fault = ticker_error(ticker)
    assert fault
    assert "ticker" in fault


@given(st.text(max_size=70) | st.text(alphabet="./\\A\x00 ", max_size=6))
@example("..")
@example(".")
@example("A/../..")
def test_an_accepted_ticker_is_one_name_in_its_folder_and_one_line(ticker: str) -> None:
    if ticker_error(ticker) is not None:
        return
    folder = PurePosixPath("/lake/raw-data/2026-01-26")
    path = folder / ticker
    assert path.parent == folder
    assert path.name == ticker
    assert ticker not in (".", "..")
    assert len(ticker.splitlines()) == 1


def test_an_accepted_ticker_is_short_enough_to_name_a_file() -> None:
    longest = [ticker for length in range(1, 80) if ticker_error(ticker := "\U0001f600" * length) is None]
    assert max(len(ticker.encode()) for ticker in longest) <= 255


@given(st.integers(EARLIEST_MS // 1000, (NOW_MS + DAY_MS) // 1000))
def test_a_whole_second_from_2003_to_tomorrow_can_be_a_bars_start(second: int) -> None:
    assert timestamp_error(second * 1000, NOW) is None


@pytest.mark.parametrize(
    ("start_ms", "reason"),
    [
        (EARLIEST_MS - 1000, "between 2003 and tomorrow"),
        (NOW_MS + DAY_MS + 1000, "between 2003 and tomorrow"),
        (0, "between 2003 and tomorrow"),
        (-NOW_MS, "between 2003 and tomorrow"),
        (NOW_MS // 1000, "between 2003 and tomorrow"),  # seconds where milliseconds are meant
        (NOW_MS * 1000, "between 2003 and tomorrow"),  # microseconds
        (NOW_MS + 1, "whole second"),
    ],
)
def test_a_start_that_no_bar_can_have_is_refused(start_ms: int, reason: str) -> None:
    fault = timestamp_error(start_ms, NOW)
    assert fault
    assert reason in fault
    assert str(start_ms) in fault


@pytest.mark.parametrize(
    ("value", "volume"),
    [
        (4989, 4989),
        (4989.0, 4989),
        ("4989.0", 4989),
        ("4332125.038360", 4332125.03836),
        (0.5, 0.5),
        (0, 0),
        ("0", 0),
    ],
)
def test_whole_shares_are_ints_and_fractions_floats(value: int | float | str, volume: int | float) -> None:
    assert shares(value) == volume
    assert type(shares(value)) is type(volume)


@given(st.decimals(0, 10**12, places=6))
def test_a_decimal_string_keeps_its_value(value: Decimal) -> None:
    assert shares(str(value)) == float(value)


@pytest.mark.parametrize(
    "value", ["", "x", "0x10", "nan", "inf", "1e3", " 5", "1_0", "+5", "5.", "\uff11", math.nan, math.inf, 10**400]
)
def test_text_that_is_no_finite_decimal_number_is_no_volume(value: float | str) -> None:
    with pytest.raises(ValueError, match=r"not a (finite|decimal) number"):
        shares(value)


@given(moments)
def test_iso_seconds_can_be_read_back(moment: datetime) -> None:
    text = iso_seconds((moment - EPOCH) // timedelta(milliseconds=1))
    assert datetime.fromisoformat(text) == moment.replace(microsecond=0)
    assert len(text) == len("2026-01-26T18:30:00Z")
    assert text.endswith("Z")
