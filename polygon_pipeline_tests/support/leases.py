"""Leases as other collectors hold them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from polygon_pipeline.collector.lease import TTL, Holding

ELSEWHERE = "elsewhere/boot"
"""Another machine than the one that the tests run on."""


def holding(
    run: str = "run-old",
    *,
    owner: str | None = None,
    machine: str = ELSEWHERE,
    pid: int = 1,
    expires_in: timedelta = TTL,
    released: bool = False,
    now: datetime | None = None,
) -> Holding:
    """A lease that was renewed a TTL before it expires. owner: "owner of RUN" unless it is given."""
    expires_at = (now or datetime.now(UTC)) + expires_in
    return Holding(run, owner or f"owner of {run}", machine, pid, expires_at - TTL, expires_at, released=released)
