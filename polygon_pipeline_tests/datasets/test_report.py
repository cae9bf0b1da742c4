"""The session report: its rows, its figures, and what became of each gap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.coverage import Coverage
from polygon_pipeline.datasets.day_state import DayState, DayStatus
from polygon_pipeline.datasets.report import Gap, Report, Reporting, day_gaps
from polygon_pipeline.lake.lag import Lateness
from polygon_pipeline.lake.ledger import Account, Connection, Ledger
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, Row, at, moment, normalized_row, reference_row
from polygon_pipeline_tests.support.day_files import columns, dataset_file, read, reference_file, schema
from polygon_pipeline_tests.support.ledgers import ledger_of

STATUS = DayStatus(DayState.PARTIAL, "", True)
EVENING = at(20, 0)
NOW = datetime(2026, 1, 27, 12, tzinfo=UTC)


def bar(ticker: str, start_ms: int, lag_seconds: float = 1.0, **fields: Any) -> Row:
    """A row of normalized_bars whose bar came so long after its end."""
    arrived = moment(start_ms) + timedelta(seconds=60 + lag_seconds)
    return normalized_row(ticker, start_ms, **{"received_at": arrived, **fields})


def repaired(ticker: str, start_ms: int) -> Row:
    return bar(ticker, start_ms, 86_400, revisions=0, source="rest")


def run_of(*connections: tuple[int, int, str], **changes: Any) -> Ledger:
    """A run's ledger. connections: from, until (Unix ms), and what ended it."""
    account = Account(connections=[Connection(moment(a), moment(b), why) for a, b, why in connections])
    return ledger_of(account, topics=("AM.SPY", "AM.QQQ"), **changes)


WITH_A_GAP = run_of((at(3, 55), at(10, 15) + 30_000, "the server closed"), (at(10, 20) + 30_000, EVENING + 99_000, ""))


def report(
    folder: Path,
    rows: Sequence[Row],
    ledgers: Sequence[Ledger] = (),
    traded: Iterable[Row] | None = None,
    known_until_ms: int = EVENING,
) -> tuple[Report, dict[str, Row]]:
    """The figures, and the rows by ticker."""
    bars, coverage, file = folder / "bars.parquet", folder / "coverage.parquet", folder / "report.parquet"
    dataset_file(bars, rows)
    reference = None
    if traded is not None:
        reference = reference_file(folder / "reference.parquet", traded, ["QQQ", "SPY"], known_until_ms)
    with Coverage(DAY, bars, reference, [(at(4, 0), at(19, 59))], folder) as covering:
        covering.write(coverage)
    known = known_until_ms if reference else 0
    with Reporting(DAY, bars, reference, coverage, known, folder) as reporting:
        reporting.write(file, STATUS)
        found = reporting.report(file, ledgers, day_gaps(DAY, ledgers, NOW))
    assert columns(file) == schema(catalog.SESSION_REPORT)
    return found, {row["ticker"]: row for row in read(file)}


def test_a_row_says_what_a_ticker_did_all_day(tmp_path: Path) -> None:
    _, rows = report(
        tmp_path,
        [
            bar("SPY", at(8, 0), open=90.0, close=95.0, volume=100.5),
            bar("SPY", at(9, 30), open=100.0, close=101.0, volume=200.0),
            bar("SPY", at(15, 59), open=101.0, close=102.5, volume=300.0),
            bar("SPY", at(16, 0), open=120.0, close=130.0, volume=0.0),
            bar("QQQ", at(7, 0), volume=399.5, close=9.5),
        ],
    )
    spy, qqq = rows["SPY"], rows["QQQ"]
    assert (spy["bars"], spy["first_bar"], spy["last_bar"]) == (4, moment(at(8, 0)), moment(at(16, 0)))
    assert (spy["last_price"], spy["day_return"]) == (130.0, pytest.approx(0.025))
    assert (spy["volume"], spy["share_of_volume"]) == (600.5, pytest.approx(0.6005))
    assert (qqq["bars"], qqq["last_price"], qqq["day_return"]) == (1, 9.5, None)
    assert {row["day_state"] for row in rows.values()} == {"partial"}


def test_a_ticker_without_a_bar_has_a_row_and_moves_nothing(tmp_path: Path) -> None:
    found, rows = report(tmp_path, [bar("SPY", at(10, 0))], [WITH_A_GAP], traded=[reference_row("QQQ", at(12, 0))])
    assert (rows["QQQ"]["bars"], rows["QQQ"]["volume"], rows["QQQ"]["missing_minutes"]) == (0, 0.0, 1)
    assert (found.bars, found.tickers, found.asked_for) == (1, 1, 2)
    assert [mover.ticker for mover in found.most_traded] == ["SPY"]


def test_what_became_of_a_gap_is_told_by_the_history(tmp_path: Path) -> None:
    rows = [bar("SPY", at(10, 0)), repaired("SPY", at(10, 16)), repaired("SPY", at(10, 17)), repaired("SPY", at(11, 0))]
    traded = [reference_row(name, at(10, minute)) for name in ("SPY", "QQQ") for minute in (0, 16, 17)]
    found, _ = report(tmp_path, rows, [WITH_A_GAP], traded)
    assert found.gaps == [
        Gap(moment(at(10, 15)), moment(at(10, 19)), "the server closed", repaired=2, missing=2, is_known=True)
    ]
    assert (found.missing, found.minutes["repaired_minutes"]) == (3, 3)
    assert found.share == pytest.approx(0.5)


def test_a_gap_that_the_history_does_not_reach_is_not_known_yet(tmp_path: Path) -> None:
    [(gap,)] = [report(tmp_path, [bar("SPY", at(10, 0))], [WITH_A_GAP], [], known)[0].gaps for known in (at(10, 19),)]
    assert not gap.is_known
    without, _ = report(tmp_path, [bar("SPY", at(10, 0))], [WITH_A_GAP])
    assert (without.gaps[0].is_known, without.share) == (False, None)


def test_a_day_that_nobody_collected_has_no_gap_and_no_feed(tmp_path: Path) -> None:
    found, _ = report(tmp_path, [repaired("SPY", at(10, 0))], [], [reference_row("SPY", at(10, 0))])
    assert (found.gaps, found.feeds, found.asked_for, found.lag_seconds) == ([], [], None, None)


def test_before_the_first_run_no_collector_was_at_work(tmp_path: Path) -> None:
    found, _ = report(tmp_path, [bar("SPY", at(10, 0))], [run_of((at(9, 0), EVENING + 99_000, ""))])
    assert [(gap.first, gap.cause) for gap in found.gaps] == [(moment(at(4, 0)), "no collector was at work")]


@pytest.mark.parametrize("known", [True, False])
def test_a_gap_of_a_run_that_is_lost_names_it(known: bool, tmp_path: Path) -> None:
    began, last = moment(at(3, 55)), moment(at(10, 15))
    account = Account(connections=[Connection(began)], last_received_at=last) if known else Account()
    lost = ledger_of(account, run="LOST", complete=False, started_at=began if known else moment(at(4, 0)))
    next_one = run_of((at(10, 20) + 30_000, EVENING + 99_000, ""))
    found, _ = report(tmp_path, [bar("SPY", at(10, 0))], [lost, next_one])
    first = moment(at(10, 14)) if known else moment(at(4, 0))
    assert [(gap.first, gap.last, gap.cause) for gap in found.gaps] == [
        (first, moment(at(10, 19)), "what run LOST received then is not on the lake")
    ]


def test_how_late_revisions_came_is_that_of_all_runs(tmp_path: Path) -> None:
    runs = [run_of((at(3, 0), at(12, 0), "")), run_of((at(12, 0), EVENING + 99_000, ""))]
    unmeasured, _ = report(tmp_path, [bar("SPY", at(10, 0))], runs)
    assert unmeasured.revisions is None
    for run, seconds in zip(runs, (60.0, 840.0), strict=True):
        measured = run.account.lateness.setdefault(Channel.MINUTE, Lateness())
        measured.revised.add(seconds)
        measured.latest_revision_seconds = seconds
    found, _ = report(tmp_path, [bar("SPY", at(10, 0))], runs)
    assert found.revisions
    assert (found.revisions.revised.count, found.revisions.latest_revision_seconds) == (2, 840)


def test_the_lag_is_of_bars_that_the_stream_sent_once(tmp_path: Path) -> None:
    rows = [bar("SPY", at(10, minute), lag) for minute, lag in enumerate((0.2, 0.4, 5.0))]
    rows += [bar("SPY", at(11, 0), 900, revisions=2), repaired("SPY", at(12, 0))]
    found, _ = report(tmp_path, rows, [run_of((at(3, 0), EVENING + 99_000, ""))])
    assert found.lag_seconds == pytest.approx((0.4, 4.908))


def test_a_feed_that_plays_a_past_day_has_no_lag(tmp_path: Path) -> None:
    played = run_of((at(3, 0), EVENING + 99_000, ""), feed="simulated", time_base="event")
    found, _ = report(tmp_path, [bar("SPY", at(10, 0), 500_000)], [played])
    assert (found.feeds, found.lag_seconds) == (["simulated"], None)


def test_movers_are_the_tickers_that_moved_most_each_way(tmp_path: Path) -> None:
    rows = [bar(f"T{n}", at(10, 0), open=100.0, close=100.0 + n, volume=1000.0 - n) for n in range(-7, 8)]
    found, _ = report(tmp_path, rows)
    assert [mover.ticker for mover in found.up] == ["T7", "T6", "T5", "T4", "T3"]
    assert [mover.ticker for mover in found.down] == ["T-7", "T-6", "T-5", "T-4", "T-3"]
    assert [mover.ticker for mover in found.most_traded] == ["T-7", "T-6", "T-5", "T-4", "T-3"]
