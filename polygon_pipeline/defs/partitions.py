"""The trading-day partitions, what the settings make of the project, and what was last made of a partition.

Belongs here: what several of Dagster's parts ask of a partition. Does not belong here: which days there are, which is
the calendar's to say (market.calendar).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from itertools import pairwise

import dagster as dg

from polygon_pipeline import demo, settings
from polygon_pipeline.market import calendar, hours
from polygon_pipeline.market.bars import Channel

# Dagster's names for the days of a run.
_ONE_DAY = "dagster/partition"
_FIRST_DAY = "dagster/asset_partition_range_start"
_LAST_DAY = "dagster/asset_partition_range_end"

# Runs of the newest days go before those of a backfill; the collector's goes before all (collect).
URGENT = {"dagster/priority": "5"}

# A closure further ahead than that is left out by a later start of Dagster.
_CLOSURES_AHEAD = timedelta(days=400)


@dataclass(frozen=True)
class Project:
    """What of the settings decides which assets and partitions there are, and whether they are to be fresh.
    history_start: the first partition. has_flat_files: whether whole days come from the vendor's bucket."""

    history_start: date = settings.HISTORY_START
    channels: tuple[Channel, ...] = (Channel.MINUTE,)
    is_simulated: bool = False
    has_flat_files: bool = False
    days_per_run: int = settings.DAYS_PER_RUN

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Project:
        """A variable that cannot work counts as not set: the sensors and runs name it, and the UI must be there."""
        environment = demo.with_defaults(environment)
        try:
            channels = settings.channels(environment)
        except settings.ConfigurationError:
            channels = cls.channels
        try:
            start = settings.history_start(environment)
        except settings.ConfigurationError:
            start = cls.history_start
        try:
            days_per_run = settings.days_per_run(environment)
        except settings.ConfigurationError:
            days_per_run = cls.days_per_run
        has_flat_files = bool(environment.get("POLYGON_FLAT_FILES_KEY_ID", "").strip())
        return cls(start, channels, settings.is_simulated(environment), has_flat_files, days_per_run)

    @cached_property
    def trading_days(self) -> dg.TimeWindowPartitionsDefinition:
        """A partition per trading day: today is one while its session runs, and a weekend's last one is Friday.

        A night session begins on the evening before its day, and Dagster's days begin at midnight: then the next
        session is a partition a day earlier, of a weekend the Monday.

        Only the closures in the span are left out, because Dagster stores the definition many times over. On a holiday
        the next session is a partition already (Dagster issue 33551).
        """
        last = datetime.now(UTC).date() + _CLOSURES_AHEAD
        closed = [day for day in calendar.closed_weekdays() if self.history_start <= day <= last]
        return dg.TimeWindowPartitionsDefinition(
            start=self.history_start.isoformat(),
            fmt="%Y-%m-%d",
            cron_schedule="0 0 * * 1-5",
            timezone=str(calendar.NEW_YORK),
            end_offset=1 if hours.night_session_from() is None else 2,
            exclusions=[datetime.combine(day, time()) for day in closed],
        )

    def is_partition(self, day: date) -> bool:
        return day >= self.history_start and calendar.session(day) is not None


def latest_materialization(
    instance: dg.DagsterInstance, asset: str, partition: str | None = None
) -> dg.EventLogRecord | None:
    """The last one of a trading day, or of an asset without partitions; None if there was none."""
    of_day = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
    return next(iter(instance.fetch_materializations(of_day, limit=1).records), None)


def latest_ids(
    instance: dg.DagsterInstance, assets: Iterable[str], days: Collection[str] | None = None
) -> dict[str, dict[str, int]]:
    """The event log's id of each day's last materialization, by day and asset. days: only these (YYYY-MM-DD)."""
    found: dict[str, dict[str, int]] = {}
    for asset in assets:
        ids = instance.get_latest_storage_id_by_partition(
            dg.AssetKey(asset),
            dg.DagsterEventType.ASSET_MATERIALIZATION,
            None if days is None else set(days),
        )
        for day, storage_id in ids.items():
            found.setdefault(day, {})[asset] = storage_id
    return found


def days_of(tags: Mapping[str, str]) -> list[date]:
    """The trading days that a run with these tags makes; none of a user's own partitions that are no days."""
    first = tags.get(_FIRST_DAY) or tags.get(_ONE_DAY) or ""
    last = tags.get(_LAST_DAY) or first
    try:
        return calendar.trading_days(date.fromisoformat(first), date.fromisoformat(last))
    except ValueError:
        return []


def day_tags(days: Sequence[date]) -> dict[str, str]:
    """The tags of a run that makes these trading days, which must follow each other."""
    return {_FIRST_DAY: days[0].isoformat(), _LAST_DAY: days[-1].isoformat()}


def spans(days: Collection[date], longest: int) -> list[list[date]]:
    """Trading days in groups that follow each other without a gap, of so many at the most; in order."""
    if not days:
        return []
    ordered = sorted(days)
    every = calendar.trading_days(ordered[0], ordered[-1])
    place = {day: number for number, day in enumerate(every)}
    found = [[ordered[0]]]
    for before, day in pairwise(ordered):
        if place[day] != place[before] + 1 or len(found[-1]) == longest:
            found.append([])
        found[-1].append(day)
    return found


def made_days(instance: dg.DagsterInstance, asset: str) -> set[str]:
    """The days (YYYY-MM-DD) that were ever materialized of an asset."""
    return set(instance.get_materialized_partitions(dg.AssetKey(asset)))
