"""The trading-day partitions. Which days those are is the calendar's to say (market.calendar)."""

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
