"""Leases as other collectors hold them, and the time that passes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from polygon_pipeline.collector.lease import TTL, Holding

ELSEWHERE = "elsewhere/boot"
"""Another machine than the one that the tests run on."""


class Clock:
    """One's own clock, which goes on when one waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


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
