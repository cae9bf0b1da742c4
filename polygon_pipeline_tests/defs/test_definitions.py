"""What the code location offers: the public names, what runs by itself, and that loading it does nothing else."""

from __future__ import annotations

import subprocess
import sys

import dagster as dg
import pytest

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import trading_days


def test_the_public_names_are_there() -> None:
    repository = build_defs().get_repository_def()
    assert {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()} >= {
        "raw_bars",
        "normalized_bars",
        "normalized_second_bars",
        "daily_bars",
        "bars_5m",
        "bars_15m",
        "bars_1h",
    }
    job = repository.get_job("collect_aggregates")
    assert [node.definition.name for node in job.nodes] == ["collect_aggregates"]
    assert repository.has_sensor_def("market_session_sensor")


def test_what_must_run_by_itself_is_on_by_default() -> None:
    repository = build_defs().get_repository_def()
    assert all(sensor.default_status is dg.DefaultSensorStatus.RUNNING for sensor in repository.sensor_defs)
    assert all(schedule.default_status is dg.DefaultScheduleStatus.RUNNING for schedule in repository.schedule_defs)


def test_every_asset_is_partitioned_by_trading_day_and_described() -> None:
    graph = build_defs().get_repository_def().asset_graph
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.partitions_def == trading_days
        assert node.description
        assert node.kinds


@pytest.mark.parametrize("closed", ["2026-11-26", "2026-11-21", "2026-11-22", "2012-10-29", "2003-09-09"])
def test_closed_days_are_no_partitions(closed: str) -> None:
    assert not trading_days.has_partition_key(closed)


@pytest.mark.parametrize("traded", ["2003-09-10", "2026-11-20", "2025-11-28"])
def test_trading_days_are_partitions(traded: str) -> None:
    assert trading_days.has_partition_key(traded)


def test_loading_needs_no_environment_and_no_network() -> None:
    """A socket at import would raise here; a variable that is asked for at import is not set here."""
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import polygon_pipeline.definitions\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
