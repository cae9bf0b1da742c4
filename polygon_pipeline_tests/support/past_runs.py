"""Runs that there have been, as the decision about the next one sees them."""

from __future__ import annotations

from datetime import date, datetime, timedelta

from hypothesis import strategies as st

from polygon_pipeline.collector.launching import Outcome, PastRun

_OVER = [outcome for outcome in Outcome if outcome is not Outcome.ACTIVE]


@st.composite
def past_runs(draw: st.DrawFn, now: datetime, days: list[date], active: bool) -> list[PastRun]:
    """Runs up to now, newest first; at most the newest is active."""
    ages = sorted(draw(st.lists(st.integers(0, 40_000), max_size=6)))
    runs = [
        PastRun(draw(st.sampled_from(days)), draw(st.sampled_from(_OVER)), now - timedelta(seconds=age)) for age in ages
    ]
    return [PastRun(draw(st.sampled_from(days)), Outcome.ACTIVE, None), *runs] if active else runs
