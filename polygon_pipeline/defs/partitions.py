"""The trading-day partitions, and what was last made of one.

Belongs here: what several of Dagster's parts ask of a partition. Does not belong here: which days there are, which is
the calendar's to say (market.calendar).
"""

from __future__ import annotations

from datetime import datetime, time

import dagster as dg

from polygon_pipeline.market import calendar

# Today is a partition while its session runs (end_offset); closed days are none.
trading_days = dg.DailyPartitionsDefinition(
    start_date=calendar.FIRST_SESSION.isoformat(),
    timezone=str(calendar.NEW_YORK),
    end_offset=1,
    exclusions=["0 0 * * 6", "0 0 * * 0", *(datetime.combine(day, time()) for day in calendar.closed_weekdays())],
)


def latest_materialization(instance: dg.DagsterInstance, asset: str, partition: str) -> dg.EventLogRecord | None:
    """The last one of a trading day, or None if there was none."""
    of_day = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition])
    return next(iter(instance.fetch_materializations(of_day, limit=1).records), None)
