"""Which datasets of a trading day are to be made: those missing or older than what they are made of.

Belongs here: the decisions, on plain data. Does not belong here: asking Dagster's instance (defs.schedules).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime

from polygon_pipeline.datasets.catalog import FOLLOWING, Dataset
from polygon_pipeline.polygon.flat_files import expected_at


def stale_datasets(made: Mapping[str, int]) -> list[Dataset]:
    """The datasets of one day to make again, each after those it needs; one run may make them all.

    made: by name, the order of each dataset's latest materialization, the later the larger; one never made is absent. A
    dataset none of whose inputs is there cannot be made, and is not asked for.
    """
    found: list[Dataset] = []
    for dataset in FOLLOWING:
        newest_input = max((made[needed.name] for needed in dataset.inputs if needed.name in made), default=None)
        is_older = newest_input is not None and (dataset.name not in made or made[dataset.name] < newest_input)
        if is_older or any(needed in found for needed in dataset.inputs):
            found.append(dataset)
    return found


def reference_is_due(day: date, made_at: datetime | None, now: datetime) -> bool:
    """Whether the vendor's history of a day is out, and what we have of it is nothing or from before that.

    made_at: of the latest materialization. A repair during the session fetches a part of the day; asking before all
    is out would bring a part again.
    """
    published = expected_at(day)
    return published <= now and (made_at is None or made_at < published)
