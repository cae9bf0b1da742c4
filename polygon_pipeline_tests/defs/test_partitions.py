"""The trading days as partitions."""

from __future__ import annotations

import pytest

from polygon_pipeline.defs.partitions import trading_days


@pytest.mark.parametrize("closed", ["2026-11-26", "2026-11-21", "2026-11-22", "2012-10-29", "2003-09-09"])
def test_closed_days_are_no_partitions(closed: str) -> None:
    assert not trading_days.has_partition_key(closed)


@pytest.mark.parametrize("traded", ["2003-09-10", "2026-11-20", "2025-11-28"])
def test_trading_days_are_partitions(traded: str) -> None:
    assert trading_days.has_partition_key(traded)
