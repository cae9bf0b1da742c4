"""How much of a trading day is known: collecting, partial, complete or final.

Belongs here: that decision, on plain data. Does not belong here: when collectors were connected (lake.ledger), and how
a state shows in Dagster (defs.checks).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from enum import StrEnum
from typing import NamedTuple

from polygon_pipeline.lake.ledger import Ledger, market_time, missing_minutes
from polygon_pipeline.market.calendar import clock, session


class DayState(StrEnum):
    COLLECTING = "collecting"  # the session runs, and a collector is at work
    PARTIAL = "partial"  # minutes are missing that neither a collector nor the history knows
    COMPLETE = "complete"  # a collector was connected to the session's end
    FINAL = "final"  # the vendor's history of the whole session is merged


class DayStatus(NamedTuple):
    """detail: what is missing, for people. is_over: whether the session has ended, by the feed's own clock."""

    state: DayState
    detail: str
    is_over: bool


def day_status(
    day: date, ledgers: Sequence[Ledger], known_until_ms: int, now: datetime, live_run: str | None = None
) -> DayStatus:
    """The state of a trading day.

    known_until_ms: bars that start before this (Unix ms) are in the day's reference; 0 without one. live_run: the run
    that collects now, if one does. Raises ValueError for a day that is no trading day.
    """
    found = session(day)
    if found is None:
        raise ValueError(f"{day} is not a trading day")
    at = market_time(ledgers, now)
    is_over = at >= found.post_close
    if known_until_ms >= found.post_close.timestamp() * 1000:
        return DayStatus(DayState.FINAL, "the vendor's history of the whole session is merged", is_over)
    if not is_over and any(ledger.run == live_run for ledger in ledgers):
        return DayStatus(DayState.COLLECTING, f"{clock(at)} New York", is_over)
    missing = [
        (first, last)
        for first, last in missing_minutes(day, ledgers, min(at, found.post_close))
        if last.timestamp() * 1000 >= known_until_ms
    ]
    if is_over and not missing:
        return DayStatus(DayState.COMPLETE, "a collector was connected to the session's end", is_over)
    spans = ", ".join(_span(first, last) for first, last in missing[:5])
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return DayStatus(DayState.PARTIAL, f"not known, New York: {spans or 'the rest of the session'}{more}", is_over)


def _span(first: datetime, last: datetime) -> str:
    return f"{clock(first)}-{clock(last)}"
