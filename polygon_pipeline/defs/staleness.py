"""Which assets of a trading day are to be made: those missing or older than what they are made of.

Belongs here: the decisions, on plain data. Does not belong here: asking Dagster's instance (schedules).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime

from polygon_pipeline.polygon.flat_files import expected_at

REFERENCE = "reference_bars"

# What each dataset is made of; a dataset comes after those it needs.
INPUTS: Mapping[str, Sequence[str]] = {
    "normalized_bars": ("raw_bars", REFERENCE),
    "bars_5m": ("normalized_bars",),
    "bars_15m": ("normalized_bars",),
    "bars_1h": ("normalized_bars",),
    "daily_bars": ("normalized_bars",),
    "bar_coverage": ("normalized_bars", REFERENCE),
    "normalized_second_bars": ("raw_second_bars",),
}


def stale_datasets(made: Mapping[str, int]) -> list[str]:
    """The datasets of one day to make anew, each after those it needs; one run may make them all.

    made: the order of each asset's latest materialization, the later the larger; an asset never made is absent. A
    dataset none of whose inputs is there cannot be made, and is not asked for.
    """
    found: list[str] = []
    for name, inputs in INPUTS.items():
        newest_input = max((made[needed] for needed in inputs if needed in made), default=None)
        is_older = newest_input is not None and (name not in made or made[name] < newest_input)
        if is_older or any(needed in found for needed in inputs):
            found.append(name)
    return found


def reference_is_due(day: date, made_at: datetime | None, now: datetime) -> bool:
    """Whether the vendor's history of a day is out, and what we have of it is nothing or from before that.

    made_at: of the latest materialization. A repair during the session fetches a part of the day; asking before all
    is out would bring a part again.
    """
    published = expected_at(day)
    return published <= now and (made_at is None or made_at < published)
