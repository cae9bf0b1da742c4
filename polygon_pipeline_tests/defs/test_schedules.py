"""The schedule after the close: what it asks for, and what it says when it asks for nothing."""

from __future__ import annotations

from datetime import datetime

import dagster as dg

from polygon_pipeline.defs.schedules import after_close_schedule
from polygon_pipeline.market.calendar import NEW_YORK


def _tick(instance: dg.DagsterInstance, day: str) -> dg.RunRequest | dg.SkipReason:
    at = datetime.fromisoformat(f"{day}T20:30:00").replace(tzinfo=NEW_YORK)
    result = after_close_schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=at))
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def test_a_closed_day_is_skipped_and_the_next_session_named() -> None:
    with dg.instance_for_test() as instance:
        skip = _tick(instance, "2026-11-26")
    assert isinstance(skip, dg.SkipReason)
    assert skip.skip_message == "2026-11-26 is not a trading day; the next is 2026-11-27"


def test_a_day_on_which_nothing_was_collected_is_skipped() -> None:
    with dg.instance_for_test() as instance:
        skip = _tick(instance, "2026-11-20")
    assert isinstance(skip, dg.SkipReason)
    assert "no raw bars of 2026-11-20" in (skip.skip_message or "")


def test_the_collected_channels_datasets_are_made() -> None:
    with dg.instance_for_test() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("raw_bars", partition="2026-11-20"))
        request = _tick(instance, "2026-11-20")
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "2026-11-20"
    assert {key.to_user_string() for key in request.asset_selection or []} == {
        "normalized_bars",
        "bars_5m",
        "bars_15m",
        "bars_1h",
        "daily_bars",
    }
