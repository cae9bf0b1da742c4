"""How values are written for people."""

from __future__ import annotations

from datetime import date

import pytest

from polygon_pipeline.datasets import wording
from polygon_pipeline_tests.support.bars import at, moment


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (0.01234, "0.0123"),
        (450.3012, "450.30"),
        (-1.5, "-1.50"),
        (1_234_567.246, "1,234,567"),
    ],
)
def test_a_number_has_as_many_digits_as_it_is_small(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "–"),
        (0.0, "0.00 %"),
        (1.0, "100.00 %"),
        (0.99999, "> 99.99 %"),
        (0.00001, "< 0.01 %"),
        (0.99, "99.00 %"),
    ],
)
def test_nearly_all_and_nearly_nothing_are_not_all_and_nothing(share: float | None, text: str) -> None:
    assert wording.percent(share) == text


def test_times_are_new_yorks_and_say_so() -> None:
    assert wording.clock(moment(at(14, 42))) == "14:42 New York"
    assert wording.date_and_clock(moment(at(19, 59))) == "2026-01-26 19:59 New York", "the next day in UTC"
    assert wording.span(moment(at(10, 15)), moment(at(10, 22))) == "10:15 to 10:22"
    assert wording.span(moment(at(10, 15)), moment(at(10, 15))) == "10:15"
    night = [moment(at(*clock, day)) for clock, day in (((21, 30), date(2026, 12, 6)), ((1, 15), date(2026, 12, 7)))]
    assert wording.span(*night) == "Sun 21:30 to 01:15"


def test_a_change_has_a_sign() -> None:
    assert [wording.change(ratio) for ratio in (0.0159, -0.002, 0.0, None)] == ["+1.59 %", "-0.20 %", "+0.00 %", "–"]


def test_one_is_not_many() -> None:
    assert [wording.count(n, "bar") for n in (0, 1, 8910)] == ["0 bars", "1 bar", "8,910 bars"]


def test_text_stays_text() -> None:
    assert wording.plain("a|b [c](http://d)\n# e") == r"a\|b \[c\]\(http\:\/\/d\) \# e"
