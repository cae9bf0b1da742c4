"""The schedules. They skip closed days and say so."""

from datetime import timedelta

import dagster as dg

from polygon_pipeline.defs.collect import RAW_ASSETS
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel

_OF_CHANNEL = {
    Channel.MINUTE: ["normalized_bars", "bars_5m", "bars_15m", "bars_1h", "daily_bars"],
    Channel.SECOND: ["normalized_second_bars"],
}

daily_datasets_job = dg.define_asset_job(
    "daily_datasets",
    selection=[name for names in _OF_CHANNEL.values() for name in names],
    description="Makes all datasets of a trading day from its raw bars.",
)


@dg.schedule(
    job=daily_datasets_job,
    cron_schedule="30 20 * * *",  # the collector ends at 20:20, after the last revisions
    execution_timezone=str(calendar.NEW_YORK),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Makes the day's datasets once more when everything is in.",
)
def after_close_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    day = context.scheduled_execution_time.astimezone(calendar.NEW_YORK).date()
    if calendar.session(day) is None:
        following = calendar.trading_days(day, day + timedelta(days=14))[0]
        return dg.SkipReason(f"{day} is not a trading day; the next is {following}")
    key = day.isoformat()
    names = [
        name
        for channel, raw_asset in RAW_ASSETS.items()
        if key in context.instance.get_materialized_partitions(dg.AssetKey(raw_asset))
        for name in _OF_CHANNEL[channel]
    ]
    if not names:
        return dg.SkipReason(f"no raw bars of {day} were collected")
    return dg.RunRequest(run_key=key, partition_key=key, asset_selection=[dg.AssetKey(name) for name in names])
