"""Plans for collectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygon_pipeline.collector.collector import Plan
from polygon_pipeline_tests.support.bars import DAY


def plan(url: str, journal_dir: Path, **changes: Any) -> Plan:
    """A run that collects every minute bar of DAY. changes: what else than usual."""
    usual: dict[str, Any] = {
        "run": "run-001",
        "owner": "owner",
        "session_date": DAY,
        "feed": "polygon",
        "key": "key",
        "topics": ["AM.*"],
        "checkpoint_seconds": 1.0,
    }
    return Plan(url=url, journal_dir=journal_dir, **{**usual, **changes})
