"""How much of a day is known: by the connections of all its runs, and by the vendor's history."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from polygon_pipeline.datasets.day_state import DayState, day_status
from polygon_pipeline.lake.ledger import (
    SESSION_OVER,
    Account,
    Connection,
    Ledger,
    TimeBase,
    connected_minutes,
    missing_minutes,
    repairable_gaps,
)
from polygon_pipeline.market.calendar import NEW_YORK

DAY = date(2026, 1, 26)


def at(clock: str) -> datetime:
    """A New York time of the day."""
    return datetime.fromisoformat(f"{DAY}T{clock}").replace(tzinfo=NEW_YORK).astimezone(UTC)


def ms(clock: str) -> int:
    return int(at(clock).timestamp() * 1000)


def ledger(
    *connections: tuple[str, str | None], run: str = "run-1", complete: bool = True, last: str | None = None
) -> Ledger:
    """A run connected from and until these New York times. last: its last frame."""
    account = Account(
        connections=[Connection(at(since), at(until) if until else None) for since, until in connections],
        last_received_at=at(last) if last else None,
    )
    return made(account, run, complete, "processing")


def made(account: Account, run: str, complete: bool, time_base: TimeBase) -> Ledger:
    return Ledger(
        run=run,
        feed="polygon",
        session_date=DAY,
        started_at=at("04:00"),
        complete=complete,
        write_objects=False,
        write_frames=True,
        imbalance=[],
        account=account,
        gaps=[],
        topics=("AM.SPY",),
        time_base=time_base,
    )


def missing(ledgers: list[Ledger], until: str = "23:00", live_run: str | None = None) -> list[tuple[str, str]]:
    """The missing minutes in New York time."""
    found = missing_minutes(DAY, ledgers, at(until), live_run)
    return [tuple(f"{moment.astimezone(NEW_YORK):%H:%M}" for moment in span) for span in found]  # type: ignore[misc]


def test_a_run_that_was_there_all_day_misses_nothing() -> None:
    assert missing([ledger(("04:00:20", "20:20"))]) == []


def test_a_stop_before_the_end_is_a_gap_to_the_end() -> None:
    assert missing([ledger(("04:00:20", "14:43:30"))]) == [("14:43", "19:59")]


def test_what_lies_between_two_runs_is_a_gap_whatever_became_of_the_first() -> None:
    killed = ledger(("04:00:20", None), complete=False, last="11:00:02")
    following = ledger(("11:40:30", "20:20"), run="run-2")
    assert missing([killed, following]) == [("10:59", "11:39")]


def test_a_start_in_mid_session_leaves_the_morning_missing() -> None:
    assert missing([ledger(("09:30:30", "20:20"))]) == [("04:00", "09:29")]


def test_a_day_without_any_run_is_missing_as_a_whole_and_never_beyond_now() -> None:
    assert missing([]) == [("04:00", "19:59")]
    assert missing([], until="09:30:30") == [("04:00", "09:29")]


def test_what_comes_after_the_last_frame_of_a_run_at_work_is_not_missing_yet() -> None:
    run = ledger(("04:00:20", None), complete=False, last="11:00:02")
    assert missing([run], until="12:00", live_run="run-1") == []
    assert missing([run], until="12:00") == [("10:59", "11:59")]


def test_two_runs_beside_each_other_miss_what_neither_has() -> None:
    first = ledger(("04:00:20", "12:00:30"))
    second = ledger(("11:00:20", "15:00:30"), run="run-2")
    assert missing([first, second]) == [("15:00", "19:59")]


@pytest.mark.parametrize(("ended_by", "missed"), [(SESSION_OVER, []), ("terminated", [("10:00", "19:59")])])
def test_in_event_time_the_bars_say_what_was_covered(ended_by: str, missed: list[tuple[str, str]]) -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    account = Account(
        connections=[Connection(now, now + timedelta(seconds=30), "", ms("04:00"), ms("10:00"))], ended_by=ended_by
    )
    assert missing([made(account, "run-1", True, "event")]) == missed


def test_in_event_time_the_ends_of_a_dropped_connection_may_have_come_in_part() -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    account = Account(
        connections=[
            Connection(now, now, "", ms("04:00"), ms("10:15")),
            Connection(now, now, "", ms("10:20"), ms("19:50")),
        ],
        ended_by=SESSION_OVER,
    )
    assert missing([made(account, "run-1", True, "event")]) == [("10:15", "10:20")]


@pytest.mark.parametrize(
    ("ledgers", "known", "now", "live", "state", "is_over"),
    [
        (
            [ledger(("04:00:20", None), complete=False, last="11:00")],
            None,
            "11:01",
            "run-1",
            DayState.COLLECTING,
            False,
        ),
        ([ledger(("04:00:20", None), complete=False, last="20:10")], None, "20:11", "run-1", DayState.COMPLETE, True),
        ([ledger(("04:00:20", "14:43:30"))], None, "15:00", None, DayState.PARTIAL, False),
        ([ledger(("04:00:20", "14:43:30"))], None, "21:00", None, DayState.PARTIAL, True),
        ([ledger(("04:00:20", "14:43:30"))], "20:00", "21:00", None, DayState.FINAL, True),
        ([ledger(("04:00:20", "20:20"))], None, "20:21", None, DayState.COMPLETE, True),
        ([ledger(("04:00:20", "20:20"))], "20:00", "23:00", None, DayState.FINAL, True),
        ([], "20:00", "23:00", None, DayState.FINAL, True),
        ([], None, "23:00", None, DayState.PARTIAL, True),
    ],
)
def test_a_day_has_a_state(
    ledgers: list[Ledger], known: str | None, now: str, live: str | None, state: DayState, is_over: bool
) -> None:
    status = day_status(DAY, ledgers, ms(known) if known else 0, at(now), live)
    assert (status.state, status.is_over) == (state, is_over)


def test_history_that_fills_the_morning_makes_a_day_complete() -> None:
    late = ledger(("09:30:30", "20:20"))
    assert day_status(DAY, [late], ms("09:30"), at("21:00")).state is DayState.COMPLETE
    partial = day_status(DAY, [late], ms("09:00"), at("21:00"))
    assert (partial.state, "04:00-09:29" in partial.detail) == (DayState.PARTIAL, True)


@pytest.mark.parametrize(("now", "known", "due"), [("15:15", None, 0), ("15:16", None, 1), ("15:16", "15:00", 0)])
def test_a_gap_is_repaired_once_its_minutes_have_settled(now: str, known: str | None, due: int) -> None:
    run = ledger(("04:00:20", "14:59:30"), ("15:00:30", "20:20"))
    assert len(repairable_gaps(DAY, [run], ms(known) if known else 0, timedelta(minutes=16), at(now), "run-1")) == due
    assert connected_minutes([run])
