"""The session report's page: short, plain, and in New York's time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import dagster as dg

from polygon_pipeline.datasets.day_state import DayState, DayStatus
from polygon_pipeline.datasets.report import Gap, Mover, Report
from polygon_pipeline.defs import report_page
from polygon_pipeline.lake.lag import LatenessSummary, Percentiles
from polygon_pipeline_tests.support.bars import DAY, at, moment

STATUS = DayStatus(DayState.COMPLETE, "a collector was connected to the session's end", True)
GAP = Gap(moment(at(10, 15)), moment(at(10, 22)), "the server closed", 77, 0, True)


def report_of(**changes: Any) -> Report:
    """A quiet day. changes: what differs."""
    usual: dict[str, Any] = {
        "feeds": ["polygon"],
        "asked_for": 12,
        "bars": 8910,
        "tickers": 12,
        "volume": 1_234_567.0,
        "first_bar": moment(at(4, 0)),
        "last_bar": moment(at(19, 59)),
        "gaps": [],
        "quarantined": 0,
        "lag_seconds": (0.41, 2.2),
        "minutes": {"repaired_minutes": 0},
        "missing": 0,
        "share": 1.0,
        "up": [Mover("GME", 24.1, 0.0412, 1000.0, 0.2)],
        "down": [Mover("UHT", 44.1, -0.01, 3000.0, 0.8)],
        "most_traded": [Mover("UHT", 44.1, -0.01, 3000.0, 0.8)],
    }
    return Report(**{**usual, **changes})


def summary(**changes: Any) -> str:
    return report_page.summary(DAY, STATUS, report_of(**changes), "9 of 9 passed")


def test_how_late_revisions_came_stands_beside_how_long_they_are_waited_for() -> None:
    assert "revision" not in summary()
    measured = LatenessSummary(revised=Percentiles(100, 60.0, 600.0, 840.0), latest_revision_seconds=870.0)
    assert (
        "- half of 100 revisions came within 1.0 min of the bar's end, 99 of 100 within 10.0, the latest after 14.5; "
        "they are waited for 15 min (POLYGON_REVISION_MINUTES)\n"
    ) in summary(revisions=measured)


def test_a_day_is_told_in_a_few_lines() -> None:
    assert summary(gaps=[GAP]).splitlines() == [
        "**Monday, 26 January 2026: complete**, a collector was connected to the session's end",
        "",
        "- feed: polygon",
        "- 8,910 bars, 12 of 12 tickers, 04:00 to 19:59 New York, 1,234,567 shares",
        "- 1 gap, New York: 10:15 to 10:22 (77 bars repaired)",
        "- every traded minute that the history knows is there",
        "- in quarantine: nothing",
        "- checks: 9 of 9 passed",
        "- half of the bars came within 0.4 s of their end, 99 of 100 within 2.2 s",
        "- up: GME +4.12 %",
        "- down: UHT -1.00 %",
    ]


def test_the_line_of_a_day_says_how_it_stands() -> None:
    assert report_page.headline(STATUS, report_of()) == "complete: 8,910 bars, 12 of 12 tickers, no gap"


def test_simulated_bars_are_called_simulated() -> None:
    assert "- feed: **SIMULATED**" in summary(feeds=["simulated"])


def test_what_is_not_known_is_not_told_as_none() -> None:
    unknown = summary(share=None, lag_seconds=None, gaps=[GAP._replace(repaired=0, is_known=False)])
    assert "no history yet that says which minutes traded" in unknown
    assert "10:15 to 10:22 (the history does not reach over it yet)" in unknown
    assert "half of the bars" not in unknown


def test_nearly_all_is_not_called_all() -> None:
    assert "> 99.99 % of the traded minutes are there, 1 bar missing" in summary(share=0.999999, missing=1)


def test_a_ticker_stays_text() -> None:
    odd = [Mover("[x](http://evil)|", 1.0, 0.5, 1.0, 1.0)]
    shown = report_page.metadata(DAY, STATUS, report_of(up=odd, most_traded=odd), "")
    for name in ("at_a_glance", "movers", "most_traded"):
        assert r"\[x\]\(http\:\/\/evil\)\|" in shown[name].value


def test_a_page_is_shown_at_once_and_is_small_however_much_went_wrong() -> None:
    gaps = [
        Gap(moment(at(5 + n // 6, n % 6 * 10)), moment(at(5 + n // 6, n % 6 * 10 + 5)), "x" * 500, 1234, 567, False)
        for n in range(60)
    ]
    movers = [Mover(f"TICKER{n}.LONG", 1234.5, 0.1, 1e9, 0.1) for n in range(5)]
    status = DayStatus(DayState.PARTIAL, "not known, New York: " + "05:00-05:05, " * 40, False)
    report = report_of(gaps=gaps, up=movers, down=movers, most_traded=movers, missing=999, share=0.5)
    shown = report_page.metadata(DAY, status, report, "1 of 9 passed; failed: " + "a_rule_of_ours, " * 20)
    assert len(shown["at_a_glance"].value) < 1_000
    event = dg.AssetMaterialization("session_report", metadata=shown)
    assert len(dg.serialize_value(event)) < 6_500


def test_gaps_are_a_table_in_new_yorks_time() -> None:
    long = GAP._replace(last=GAP.last + timedelta(hours=1), missing=3)
    [row] = report_page.metadata(DAY, STATUS, report_of(gaps=[long]), "")["gaps"].records
    assert row.data == {
        "New York": "10:15 to 11:22",
        "minutes": 68,
        "cause": "the server closed",
        "what became of it": "77 bars repaired, 3 bars missing",
    }
