"""What is out of date, by the order of what was made; and when history is asked for."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.datasets.catalog import (
    BAR_COVERAGE,
    DAILY_BARS,
    DAILY_DIFFERENCES,
    DATASETS,
    FOLLOWING,
    NORMALIZED_BARS,
    RAW_BARS,
    REFERENCE_DAILY_BARS,
    find,
)
from polygon_pipeline.datasets.staleness import PastRepair, group_days, next_repair, reference_is_due, stale_datasets
from polygon_pipeline.market.calendar import NEW_YORK, session

_NAMES = [dataset.name for dataset in DATASETS]
_ROOTS = [dataset.name for dataset in DATASETS if not dataset.inputs]
_makings = st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 20))
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def stale(made: dict[str, int], as_of: dict[str, int] | None = None) -> list[str]:
    return [dataset.name for dataset in stale_datasets(FOLLOWING, made, as_of)]


def done(made: dict[str, int], names: list[str]) -> dict[str, int]:
    return {**made, **{name: 100 + n for n, name in enumerate(names)}}


@given(_makings)
def test_what_is_asked_for_makes_once_done_nothing_stale(made: dict[str, int]) -> None:
    asked = stale(made)
    assert len(set(asked)) == len(asked)
    assert stale(done(made, asked)) == []


@given(st.lists(st.sampled_from(_ROOTS)), _makings)
def test_a_day_made_after_all_its_inputs_is_left_alone(inputs: list[str], before: dict[str, int]) -> None:
    assert stale(done(before, [*inputs, *(dataset.name for dataset in FOLLOWING)])) == []


@given(_makings)
def test_a_dataset_is_asked_for_when_something_on_the_way_to_it_is_out_of_order(made: dict[str, int]) -> None:
    def outdated(name: str) -> bool:
        inputs = [needed.name for needed in find(name).inputs]
        return can_be_made(name) and any(
            made.get(needed, -1) > made.get(name, -1) or outdated(needed) for needed in inputs
        )

    def can_be_made(name: str) -> bool:
        found = find(name)
        needed = [needed.name for needed in found.inputs if needed.inputs or needed in found.required]
        return all(name in made or outdated(name) for name in needed)

    assert set(stale(made)) == {name for name in _NAMES if outdated(name)}


def test_a_day_that_only_the_vendor_has_makes_nothing_and_differences_wait_for_the_vendors_day() -> None:
    assert stale({REFERENCE_DAILY_BARS.name: 1}) == []
    assert DAILY_DIFFERENCES.name not in stale({RAW_BARS.name: 1})
    assert {DAILY_BARS.name, DAILY_DIFFERENCES.name} <= {*stale({RAW_BARS.name: 1, REFERENCE_DAILY_BARS.name: 1})}


def test_what_arrived_while_a_day_was_made_makes_it_stale_though_it_was_made_later() -> None:
    made = {RAW_BARS.name: 7} | {dataset.name: 9 for dataset in FOLLOWING}
    assert NORMALIZED_BARS.name not in stale(made)
    assert {NORMALIZED_BARS.name, BAR_COVERAGE.name} <= {*stale(made, {NORMALIZED_BARS.name: 5})}
    assert NORMALIZED_BARS.name not in stale(made, {NORMALIZED_BARS.name: 7})


def test_days_that_need_the_same_belong_together_newest_first() -> None:
    days = [date(2026, 11, day) for day in (16, 17, 18, 19)]
    groups = group_days(
        {
            days[0]: [NORMALIZED_BARS, BAR_COVERAGE],
            days[1]: [BAR_COVERAGE],
            days[2]: [NORMALIZED_BARS, BAR_COVERAGE],
            days[3]: [],
        }
    )
    assert groups == [((NORMALIZED_BARS, BAR_COVERAGE), [days[2], days[0]]), ((BAR_COVERAGE,), [days[1]])]


@pytest.mark.parametrize(
    ("known", "now", "due"),
    [
        (None, "2026-11-21T10:59", False),
        (None, "2026-11-21T11:00", True),
        ("19:59", "2026-11-21T11:00", True),
        ("20:00", "2026-11-21T11:00", False),
    ],
)
def test_history_is_due_when_it_is_out_and_what_we_have_does_not_reach_the_end(
    known: str | None, now: str, due: bool
) -> None:
    day = date(2026, 11, 20)
    moment = None if known is None else datetime.fromisoformat(f"{day}T{known}").replace(tzinfo=NEW_YORK)
    known_until_ms = 0 if moment is None else int(moment.timestamp() * 1000)
    at = datetime.fromisoformat(now).replace(tzinfo=NEW_YORK)
    assert reference_is_due(day, known_until_ms, at) is due
    assert session(day) is not None


def repairs(*ended: tuple[int, bool]) -> list[PastRepair]:
    """Runs that ended so many minutes ago, newest first."""
    return [PastRepair(NOW - timedelta(minutes=minutes), succeeded) for minutes, succeeded in ended]


@pytest.mark.parametrize(
    ("past", "minutes"),
    [
        ([], 0),
        (repairs((5, True)), 0),
        (repairs((1, False)), 1),
        (repairs((1, False), (10, False)), 3),
        (repairs((1, True), (10, True), (20, True)), 7),
        (repairs(*[(1, False)] * 20), 359),
    ],
)
def test_a_repair_that_failed_is_asked_for_again_after_growing_pauses(past: list[PastRepair], minutes: int) -> None:
    assert next_repair(past, NOW) == NOW + timedelta(minutes=minutes) or (
        minutes == 0 and next_repair(past, NOW) <= NOW
    )


def test_a_repair_under_way_is_waited_for() -> None:
    assert next_repair([PastRepair(None, False)], NOW) > NOW
