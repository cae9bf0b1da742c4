"""The project's definitions with a demo whose sessions take seconds: for a real `dagster dev` in tests and benchmarks.

Belongs here: the demo's own constants, set from the environment variables below, which every process of Dagster
inherits. Does not belong here: anything that would change what the project does.

FAST_DEMO_SESSIONS: how many are played. FAST_DEMO_SPEED: market seconds per second. FAST_DEMO_CHECKPOINT and
FAST_DEMO_DRAIN: seconds between checkpoints, and without progress at a run's end. FAST_DEMO_SENSORS: the most seconds
between two ticks of a sensor. FAST_DEMO_FAULTS: as the simulator's `--faults`, or empty for none; absent: the demo's
own.
"""

from __future__ import annotations

import os
from datetime import date
from typing import Any

import dagster as dg

from polygon_pipeline import demo
from polygon_pipeline.collector import collector
from polygon_pipeline.simulator.faults import Faults

_sensor = dg.sensor


def _faults(day: date) -> Faults:
    plan = os.environ["FAST_DEMO_FAULTS"]
    return Faults.parse(plan, seed=day.toordinal()) if plan else Faults()


def _frequent_sensor(*arguments: Any, minimum_interval_seconds: int, **options: Any) -> Any:
    most = int(os.environ["FAST_DEMO_SENSORS"])
    return _sensor(*arguments, minimum_interval_seconds=min(minimum_interval_seconds, most), **options)


demo.SESSIONS = int(os.environ["FAST_DEMO_SESSIONS"])
demo.SPEED = float(os.environ["FAST_DEMO_SPEED"])
demo.CHECKPOINT_SECONDS = float(os.environ["FAST_DEMO_CHECKPOINT"])
collector.DRAIN_SECONDS = float(os.environ["FAST_DEMO_DRAIN"])
if "FAST_DEMO_FAULTS" in os.environ:
    demo._faults = _faults
dg.sensor = _frequent_sensor  # type: ignore[assignment] # before the project's are made

from polygon_pipeline.definitions import defs  # noqa: E402

__all__ = ["defs"]
