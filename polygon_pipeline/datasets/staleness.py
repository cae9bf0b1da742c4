"""Which datasets of which trading days are to be made: those missing or older than what they are made of.

Belongs here: the decisions, on plain data. Does not belong here: asking Dagster's instance (defs.sensors,
defs.schedules).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import NamedTuple

from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.market.calendar import session
from polygon_pipeline.polygon.flat_files import expected_at

# The metadata of a materialization that says up to which event its inputs were known when its making began. What
# arrives while a day is made is newer than that, though older than the materialization.
AS_OF = "inputs_as_of"

_FIRST_PAUSE = timedelta(minutes=2)
_LONGEST_PAUSE = timedelta(hours=6)


class PastRepair(NamedTuple):
    """A run that asked for a day's history. ended_at: aware; None while it is not over."""

    ended_at: datetime | None
    succeeded: bool


def stale_datasets(
    datasets: Iterable[Dataset], made: Mapping[str, int], as_of: Mapping[str, int] | None = None
) -> list[Dataset]:
    """Of these datasets of one day those to make again, each after those it needs; one run may make them all.

    made: by name, the order of each dataset's latest materialization, the later the larger; one never made is absent.
    as_of: up to which order a dataset's inputs were known when it was made, where that is known. A dataset that cannot
    be made is not asked for: none of its inputs is there, or one that is made itself or required is not.
    """
    found: list[Dataset] = []
    for dataset in datasets:
        needed_for_sure = [needed for needed in dataset.inputs if needed.inputs or needed in dataset.required]
        if not dataset.inputs or any(n.name not in made and n not in found for n in needed_for_sure):
            continue
        known = min(made.get(dataset.name, -1), (as_of or {}).get(dataset.name, made.get(dataset.name, -1)))
        is_older = any(
            made[needed.name] > (made.get(dataset.name, -1) if needed.inputs else known)
            for needed in dataset.inputs
            if needed.name in made
        )
        if is_older or any(needed in found for needed in dataset.inputs):
            found.append(dataset)
    return found


def group_days(stale: Mapping[date, Sequence[Dataset]]) -> list[tuple[tuple[Dataset, ...], list[date]]]:
    """Days that need the same datasets belong together: those datasets, and their days, newest first."""
    groups: dict[tuple[Dataset, ...], list[date]] = {}
    for day in sorted(stale, reverse=True):
        if stale[day]:
            groups.setdefault(tuple(stale[day]), []).append(day)
    return list(groups.items())


def reference_is_due(day: date, known_until_ms: int, now: datetime) -> bool:
    """Whether the vendor's history of a day is out, and what we have of it does not reach to the session's end.

    known_until_ms: bars that start before this (Unix ms) are known; 0 where none are.
    """
    found = session(day)
    return found is not None and expected_at(day) <= now and known_until_ms < found.post_close.timestamp() * 1000


def next_repair(past: Sequence[PastRepair], now: datetime) -> datetime:
    """When a day's history is to be asked for again: at once, then after growing pauses. past: newest first.

    A run under way is waited for; after one that succeeded, there may be a new reason at once, but no more than two.
    """
    if not past:
        return now
    last = past[0]
    if last.ended_at is None:
        return now + _FIRST_PAUSE
    if len(past) < 3 and last.succeeded:
        return now
    pause: timedelta = min(_FIRST_PAUSE * 2.0 ** min(len(past) - 1, 10), _LONGEST_PAUSE)
    return last.ended_at + pause
