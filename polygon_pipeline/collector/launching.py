"""Should a collector start now? Pure decisions from the clock, the calendar and the runs there have been.

Belongs here: when a session is collected, and how soon after a failure again. Does not belong here: asking Dagster
for its runs, or starting one (defs.sensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import Enum, auto

from polygon_pipeline.collector.lease import TOLERANCE, TTL, Holding
from polygon_pipeline.market.calendar import NEW_YORK, clock, current_or_next_session, session
from polygon_pipeline.market.revisions import collected_after

# Taking over an expired lease takes up to 75 s, and ending a run a few.
_WITHOUT_LEASE = timedelta(minutes=3)
_QUIET_SECONDS = 180.0
_FIRST_PAUSE = timedelta(seconds=30)
_LONGEST_PAUSE = timedelta(minutes=10)
_AFTER_REFUSAL = timedelta(minutes=2)


class Outcome(Enum):
    """How a run ended. STOPPED: terminated by hand; INTERRUPTED: its process was ended by a signal, or is lost."""

    ACTIVE = auto()
    SUCCEEDED = auto()
    STOPPED = auto()
    INTERRUPTED = auto()
    FAILED = auto()
    FAILED_FOR_GOOD = auto()  # credentials or configuration: where it is so again, trying on cannot help


# These had been accepted when they ended.
_WORKED = frozenset({Outcome.SUCCEEDED, Outcome.STOPPED, Outcome.INTERRUPTED})


@dataclass(frozen=True)
class PastRun:
    """A collector run of one feed. ended_at: aware, None while it is active. attempt: 0 when launched by hand."""

    session_date: date
    outcome: Outcome
    ended_at: datetime | None
    attempt: int = 0


@dataclass(frozen=True)
class Start:
    """Start a run. attempt: 1 for the session's first."""

    session_date: date
    attempt: int


@dataclass(frozen=True)
class Wait:
    """Start nothing; the reason says what is waited for."""

    reason: str


def session_end(day: date) -> datetime:
    """When the collector of a session may end: after the last revisions."""
    found = session(day)
    if found is None:
        raise ValueError(f"{day} is not a trading day")
    return found.post_close + collected_after()


def why_lost(lease: Holding | None, unchanged: timedelta) -> str | None:
    """Why a run that counts as started is lost, or None if it may be alive. lease: the run's own, or None where it
    has none. unchanged: for how long that was seen to be so, on one's own clock.

    A run holds the lease and renews it, or is about to take it or to end; one that does neither for minutes is gone.
    """
    if lease is None or lease.released:
        return "it holds no lease" if unchanged > _WITHOUT_LEASE else None
    return f"its lease was not renewed for {unchanged.total_seconds():.0f} s" if unchanged > TTL + TOLERANCE else None


def quiet_limit(now: datetime) -> float | None:
    """How many seconds without a bar are suspicious now: minutes in regular hours, any number outside them."""
    found = current_or_next_session(now)
    return _QUIET_SECONDS if found.open + timedelta(seconds=_QUIET_SECONDS) <= now < found.close else None


def decide_live(now: datetime, loaded_at: datetime, runs: Sequence[PastRun]) -> Start | Wait:
    """Collects every session from its begin, at night or at 04:00, until the last revisions are in.

    runs: this feed's, newest first. loaded_at: when the code location read its environment; a failure for good
    before that may have been corrected since.
    """
    found = current_or_next_session(now - collected_after())
    if now < found.begin:
        opening = found.begin.astimezone(NEW_YORK)
        return Wait(f"the market is closed; collecting starts {opening:%A %Y-%m-%d %H:%M} New York")
    return decide_session(found.date, now, loaded_at, runs)


def decide_session(day: date, now: datetime, loaded_at: datetime, runs: Sequence[PastRun]) -> Start | Wait:
    """Whether a session that is to be collected now needs a run. The arguments are decide_live's."""
    if active := next((run for run in runs if run.outcome is Outcome.ACTIVE), None):
        return Wait(f"a collector is at work on {active.session_date}")
    mine = [run for run in runs if run.session_date == day]
    if not mine:
        return Start(day, 1)
    last, attempt = mine[0], max(len(mine), *(run.attempt for run in mine)) + 1
    match last.outcome:
        case Outcome.SUCCEEDED:
            return Wait(f"{day} is collected")
        case Outcome.STOPPED:
            return Wait(f"the collector of {day} was terminated by hand; launch collect_aggregates to go on")
        case Outcome.FAILED_FOR_GOOD if _is_refused(runs, loaded_at):
            return Wait(
                f"attempt {len(mine)} at {day} failed in a way that trying again cannot correct; see its error, then "
                "restart Dagster (the environment is read at start)"
            )
    failures = 0
    for run in mine:
        if run.outcome not in (Outcome.FAILED, Outcome.FAILED_FOR_GOOD):
            break
        failures += 1
    # The first failure is answered at once; a run that keeps failing is given time, and so is a refusal.
    pause = min(_FIRST_PAUSE * 2 ** min(failures - 2, 10), _LONGEST_PAUSE) if failures > 1 else timedelta()
    if last.outcome is Outcome.FAILED_FOR_GOOD and last.ended_at and last.ended_at > loaded_at:
        pause = max(pause, _AFTER_REFUSAL)
    if last.ended_at and now < last.ended_at + pause:
        due_at = clock(last.ended_at + pause, seconds=True)
        return Wait(f"attempt {len(mine)} at {day} failed; the next is due at {due_at} New York")
    return Start(day, attempt)


def _is_refused(runs: Sequence[PastRun], loaded_at: datetime) -> bool:
    """Whether what the environment says was refused from the start and again. What worked once is asked for again."""
    outcomes = [run.outcome for run in runs if run.ended_at and run.ended_at > loaded_at]
    return outcomes.count(Outcome.FAILED_FOR_GOOD) > 1 and not _WORKED.intersection(outcomes)
