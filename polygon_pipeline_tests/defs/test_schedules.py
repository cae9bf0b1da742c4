"""The schedule of the history: what it asks for, and what it says when it asks for nothing. The nightly look over the
datasets is in test_following."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import dagster as dg
import pytest

from polygon_pipeline.defs.schedules import reference_schedule
from polygon_pipeline.market.calendar import NEW_YORK


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def _reference(instance: dg.DagsterInstance, day: str) -> dg.RunRequest | dg.SkipReason:
    when = datetime.fromisoformat(f"{day}T11:30:00").replace(tzinfo=NEW_YORK)
    result = reference_schedule(dg.build_schedule_context(instance=instance, scheduled_execution_time=when))
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


@pytest.mark.parametrize(
    ("today", "first", "last"),
    [
        ("2026-11-20", "2026-11-13", "2026-11-19"),
        ("2026-11-21", "2026-11-16", "2026-11-20"),
        ("2026-11-26", "2026-11-19", "2026-11-25"),
    ],
)
def test_on_the_day_after_a_trading_day_weekend_or_not_five_days_are_requested_in_one_run(
    instance: dg.DagsterInstance, today: str, first: str, last: str
) -> None:
    request = _reference(instance, today)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == last
    assert request.tags["dagster/asset_partition_range_start"] == first
    assert request.tags["dagster/asset_partition_range_end"] == last


@pytest.mark.parametrize(("today", "next_look"), [("2026-11-22", "2026-11-24"), ("2026-11-23", "2026-11-24")])
def test_after_a_closed_day_no_reference_is_requested_and_the_reason_names_the_next_time(
    instance: dg.DagsterInstance, today: str, next_look: str
) -> None:
    skip = _reference(instance, today)
    assert isinstance(skip, dg.SkipReason)
    assert skip.skip_message == f"yesterday was no trading day; the next look is on {next_look}, 11:30 New York time"
