"""What must hold of a day's normalized bars, and of every row in it.

Belongs here: the rules, as one scan of the Parquet file. Does not belong here: how they show in the UI
(defs.checks), and whether ledgers balance (lake.ledger).
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import NamedTuple

from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.market.calendar import session

# Each rule's meaning, and the condition that a row breaks it by. vwap is left out on purpose: the vendor's may lie
# outside low..high.
_RULES = {
    "one_row_a_bar": ("One row per ticker and start.", "repeats > 1"),
    "prices_in_range": (
        "low ≤ open, close ≤ high, and none is missing.",
        # NaN is above every number to DuckDB, so it must be asked for.
        "NOT coalesce(low <= open AND low <= close AND open <= high AND close <= high "
        "AND isfinite(open) AND isfinite(high) AND isfinite(low) AND isfinite(close), false)",
    ),
    "volume_not_negative": ("Volume is there and not negative.", "NOT coalesce(volume >= 0, false)"),
    "inside_the_session": (
        "Every bar starts within the session, from its begin (pre-market, or the night before it) to its end.",
        "timestamp < $begin OR timestamp >= $post_close",
    ),
}
ROW_RULES = {rule: meaning for rule, (meaning, _) in _RULES.items()}


class Verdict(NamedTuple):
    """broken: rows that break the rule; examples: the first few, as text."""

    broken: int
    examples: list[str]


def check_rows(file: Path, day: date) -> dict[str, Verdict]:
    """Checks a normalized Parquet file against ROW_RULES. Raises ValueError for a day that is no trading day."""
    found = session(day)
    if found is None:
        raise ValueError(f"{day} is not a trading day")
    counts = ", ".join(f"count(*) FILTER ({condition}) AS {rule}" for rule, (_, condition) in _RULES.items())
    examples = ", ".join(
        f"min(bar, 3) FILTER ({condition}) AS {rule}_examples" for rule, (_, condition) in _RULES.items()
    )
    query = f"""
        SELECT {counts}, {examples}
        FROM (
            SELECT
                *,
                count(*) OVER (PARTITION BY ticker, timestamp) AS repeats,
                concat_ws(' ', ticker, timestamp, open, high, low, close, volume) AS bar
            FROM read_parquet($file)
        )
    """
    parameters = {"file": str(file), "begin": found.begin, "post_close": found.post_close}
    with DuckSession() as checking:
        [row] = checking.rows(query, parameters)
    half = len(_RULES)
    return {rule: Verdict(row[i], row[half + i] or []) for i, rule in enumerate(_RULES)}


def schema_errors(file: Path, dataset: Dataset) -> list[str]:
    """How a file's columns differ from the catalog's, or why it has none; empty when they do not differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [(field.name, field.type) for field in dataset.schema()]
    try:
        actual = [(field.name, field.type) for field in pq.read_schema(file)]
    except (pa.ArrowException, OSError) as error:
        return [f"it is no whole Parquet file: {error}"]
    missing = [f"{name} {kind} is missing" for name, kind in wanted if (name, kind) not in actual]
    extra = [f"{name} {kind} is not in the schema" for name, kind in actual if (name, kind) not in wanted]
    return missing + extra or ([] if wanted == actual else ["the columns are in another order"])
