"""Which datasets of a day are stale, and when its reference is due."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.datasets.catalog import DATASETS, FOLLOWING
from polygon_pipeline.datasets.staleness import reference_is_due, stale_datasets
from polygon_pipeline.market.calendar import NEW_YORK

INPUTS = {dataset.name: [needed.name for needed in dataset.inputs] for dataset in FOLLOWING}
NAMES = [dataset.name for dataset in DATASETS]
SOURCES = [name for name in NAMES if name not in INPUTS]

makings = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 20))


@given(makings)
def test_once_what_is_stale_is_made_nothing_is_stale(made: dict[str, int]) -> None:
    stale = [dataset.name for dataset in stale_datasets(made)]
    assert len(set(stale)) == len(stale)
    assert stale_datasets(after(made, stale)) == []


@given(st.lists(st.sampled_from(SOURCES)), makings)
def test_a_day_made_after_all_its_inputs_is_not_stale(inputs: list[str], before: dict[str, int]) -> None:
    assert stale_datasets(after(before, [*inputs, *INPUTS])) == []


@given(makings)
def test_a_dataset_is_stale_when_it_or_an_input_of_it_is_older_than_its_inputs(made: dict[str, int]) -> None:
    def outdated(name: str) -> bool:
        inputs = INPUTS.get(name, ())
        return any(made.get(needed, -1) > made.get(name, -1) or outdated(needed) for needed in inputs)

    assert {dataset.name for dataset in stale_datasets(made)} == {name for name in INPUTS if outdated(name)}


def after(made: dict[str, int], names: list[str]) -> dict[str, int]:
    return {**made, **{name: 100 + n for n, name in enumerate(names)}}


@pytest.mark.parametrize(
    ("made_at", "now", "due"),
    [
        (None, "2026-11-21T10:59", False),
        (None, "2026-11-21T11:00", True),
        ("2026-11-20T12:00", "2026-11-21T02:00", False),
        ("2026-11-20T12:00", "2026-11-22T02:00", True),
        ("2026-11-21T10:59", "2026-11-22T02:00", True),
        ("2026-11-21T11:00", "2026-11-22T02:00", False),
    ],
)
def test_a_reference_is_due_when_the_history_is_published_and_ours_is_older(
    made_at: str | None, now: str, due: bool
) -> None:
    made = None if made_at is None else new_york(made_at)
    assert reference_is_due(date(2026, 11, 20), made, new_york(now)) is due


def new_york(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=NEW_YORK).astimezone(UTC)
