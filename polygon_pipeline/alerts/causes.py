"""What is wrong now: pure judgements of runs, the collector's lease, the states of days, and disks.

Belongs here: what counts as a cause, and its sentence. Does not belong here: which causes are told when (telling), and
asking Dagster, the lake and the disks (defs.alerts).

A cause is made of names, times and counts alone. Errors' texts stay in Dagster and on the lake: what is sent to a chat
or a mailbox holds no word that another program chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

import msgspec

from polygon_pipeline.collector.lease import Holding
from polygon_pipeline.datasets.day_state import DayState, DayStatus
from polygon_pipeline.datasets.wording import date_and_clock
from polygon_pipeline.market.calendar import NEW_YORK, completed_sessions, current_or_next_session, session

# A renewal comes every 15 s, and the next attempt takes over within two minutes.
DEAD_AFTER = timedelta(minutes=3)
BACKLOG_LIMIT_SECONDS = 300.0
# Eight times what ends a collector.
DISK_LIMIT_BYTES = 2 * 1024**3
_DISK_IS_WELL_AGAIN = 1.25
# Noon of the next day: flat files are out by 11:00, and reference_schedule fetches them at 11:30.
_DEADLINE = time(12)
# Both are kept in every tick of the sensor.
_MOST_FAILURES = 20
_MOST_DAYS = 20
_SESSIONS_LOOKED_AT = 5

_PASSING = timedelta(minutes=2)
# A collector that fails again and again is tried again every ten minutes at least, and two that evict each other come
# back after minutes.
_AGAIN = timedelta(minutes=15)


class Cause(NamedTuple):
    """Something that is wrong. key: its topic, a colon and what tells it from others; the same while it lasts.

    patience: how long it must have been there before it is told. calm: how long it must have been gone before it is
    over; what comes back within that is the same, and not told again.
    """

    key: str
    text: str
    patience: timedelta = timedelta()
    calm: timedelta = timedelta()

    @property
    def topic(self) -> str:
        return topic_of(self.key)


class EndedRun(NamedTuple):
    """A run that succeeded or failed. assets: those it was asked for; none where its job says it."""

    run_id: str
    job: str
    assets: frozenset[str]
    days: frozenset[date]
    succeeded: bool


class Failure(msgspec.Struct):
    """What failed, and was not made since. days: those that are still to be made, the newest of them; none where it was
    of no day. span: all its days, for people.
    """

    run_id: str
    job: str
    assets: set[str]
    days: set[date]
    at: datetime
    span: str = ""


def topic_of(key: str) -> str:
    return key.partition(":")[0]


def failures_after(failures: Mapping[str, Failure], ended: Sequence[EndedRun], now: datetime) -> dict[str, Failure]:
    """The failures that are left after these runs, which come in the order they ended."""
    left = dict(failures)
    for run in ended:
        if not run.succeeded:
            span = _span(run.days)
            key = f"run:{run.job} {','.join(sorted(run.assets))}{span}"
            if key in left or len(left) < _MOST_FAILURES:
                newest = set(sorted(run.days)[-_MOST_DAYS:])
                left[key] = Failure(run.run_id, run.job, set(run.assets), newest, now, span)
            continue
        for key, failure in list(left.items()):
            if not _makes(run, failure):
                continue
            if days := failure.days - run.days:
                left[key] = msgspec.structs.replace(failure, days=days)
            else:
                del left[key]
    return left


def without_replaced(
    failures: Mapping[str, Failure], collector_job: str, holding: Holding | None
) -> dict[str, Failure]:
    """Without the collector's, where another run has collected since."""
    return {
        key: failure
        for key, failure in failures.items()
        if failure.job != collector_job
        or holding is None
        or holding.released
        or holding.owner == failure.run_id
        or holding.renewed_at < failure.at
    }


def of_failures(failures: Mapping[str, Failure]) -> list[Cause]:
    return [
        Cause(
            key,
            f"Run {failure.run_id[:8]} of {_what(failure)} failed{failure.span}. Dagster has its error.",
            calm=_AGAIN,
        )
        for key, failure in failures.items()
    ]


def of_collector(holding: Holding | None, unchanged: timedelta, is_live: bool, now: datetime) -> list[Cause]:
    """holding: the lake's lease; None where there never was one. unchanged: for how long it was seen to be so.

    is_live: whether the feed is the market's, which has hours.
    """
    if holding is None:
        return []
    at = date_and_clock(holding.renewed_at)
    host = holding.machine.split("/")[0]
    if holding.released:
        if not is_live or not _session_runs(now):
            return []
        text = f"No collector is at work although the session runs: run {holding.run} ended at {at}."
        return [Cause("collector:none", text, DEAD_AFTER, _PASSING)]
    if unchanged > DEAD_AFTER:
        text = (
            f"The collector is dead, or cannot write to the lake: run {holding.run} on {host} renewed its lease "
            f"last at {at}. What it received waits in its journal; the next start on that machine publishes it."
        )
        return [Cause("collector:dead", text, calm=_PASSING)]
    status, found = holding.status, []
    if status.evicted:
        text = (
            f"Another connection has taken the feed over from run {holding.run} on {host}. Only one may use the key: "
            "look for another program that does."
        )
        found.append(Cause("collector:evicted", text, calm=_AGAIN))
    if status.unpublished_seconds > BACKLOG_LIMIT_SECONDS:
        text = (
            f"Bars wait on disk: the oldest for {status.unpublished_seconds / 60:.0f} minutes, "
            f"{_size(status.backlog_bytes)} in all, in the journal of run {holding.run} on {host}. The run's log says "
            "what the lake answers."
        )
        found.append(Cause("collector:backlog", text, _PASSING, _PASSING))
    return found


def of_lake(uri: str | None) -> Cause:
    """A lake that cannot be read. uri: None where even that is not known."""
    text = f"The lake {uri or '(LAKE_URI)'} cannot be read from here. What the collector receives waits in its journal."
    return Cause("lake:away", text, DEAD_AFTER, _PASSING)


def of_disks(free: Mapping[str, int], told: Iterable[str], topic: str = "disk") -> list[Cause]:
    """free: the bytes that are left, by what the disk is. told: the keys of causes that are open: a disk must have
    some more before it is well again."""
    known = set(told)
    found = []
    for name, left in sorted(free.items()):
        key = f"{topic}:{name}"
        if left < DISK_LIMIT_BYTES * (_DISK_IS_WELL_AGAIN if key in known else 1):
            text = f"The disk of {name} has {_size(left)} left. Below 0.25 GiB a collector stops: free some space."
            found.append(Cause(key, text, calm=_PASSING))
    return found


def days_due(since: datetime, now: datetime) -> list[date]:
    """The last sessions that ended after `since`, and should be complete by now."""
    return [
        day
        for day in completed_sessions(now, _SESSIONS_LOOKED_AT)
        if (found := session(day)) and found.post_close > since and now >= deadline(day)
    ]


def deadline(day: date) -> datetime:
    """When a trading day must be complete, whatever had to be repaired."""
    return datetime.combine(day + timedelta(days=1), _DEADLINE, NEW_YORK).astimezone(UTC)


def of_day(day: date, status: DayStatus) -> Cause | None:
    if status.state in (DayState.COMPLETE, DayState.FINAL):
        return None
    return Cause(f"day:{day}", f"{day} is {status.state} although it should be complete by now: {status.detail}.")


def _makes(run: EndedRun, failure: Failure) -> bool:
    """Whether a run makes what failed, some of its days at least."""
    if failure.assets and run.assets:
        same = failure.assets <= run.assets
    else:
        same = failure.job == run.job and not failure.assets
    return same and (not failure.days or bool(failure.days & run.days))


def _session_runs(now: datetime) -> bool:
    found = current_or_next_session(now)
    return found.begin + DEAD_AFTER <= now < found.post_close


def _what(failure: Failure) -> str:
    named = sorted(failure.assets)
    return f"{', '.join(named[:3])}{' …' if len(named) > 3 else ''}" if named else failure.job


def _span(days: Iterable[date]) -> str:
    ordered = sorted(days)
    if not ordered:
        return ""
    return f" ({ordered[0]})" if len(ordered) == 1 else f" ({ordered[0]} to {ordered[-1]})"


def _size(count: int) -> str:
    return f"{count / 1024**3:.1f} GiB" if count >= 1024**3 else f"{count / 1024**2:.1f} MiB"
