"""What the code location offers: the public names, what runs by itself, and that loading it does nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from polygon_pipeline import defs as project_defs
from polygon_pipeline.datasets.catalog import DATASETS, LISTINGS
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.defs.sensors import lost_runs_sensor
from polygon_pipeline.market.bars import Channel


def test_the_public_names_exist() -> None:
    repository = build_defs(Project(channels=tuple(Channel))).get_repository_def()
    names = {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()}
    assert names >= {dataset.name for dataset in (*DATASETS, *LISTINGS)}
    job = repository.get_job("collect_aggregates")
    assert [node.definition.name for node in job.nodes] == ["collect_aggregates"]
    assert repository.has_sensor_def("market_session_sensor")


def test_sensors_and_schedules_are_on_by_default() -> None:
    repository = build_defs().get_repository_def()
    assert all(sensor.default_status is dg.DefaultSensorStatus.RUNNING for sensor in repository.sensor_defs)
    assert all(schedule.default_status is dg.DefaultScheduleStatus.RUNNING for schedule in repository.schedule_defs)


def test_a_sensors_tick_makes_no_s3_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's resource makes one whenever it is opened; that was most of what the sensors took at rest."""
    monkeypatch.setenv("LAKE_URI", tmp_path.as_uri())
    made: list[object] = []
    monkeypatch.setattr("boto3.session.Session.resource", lambda *name, **_: made.append(name))
    resources = build_defs().resources or {}
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance, resources={"lake": resources["lake"]}) as context,
    ):
        assert isinstance(lost_runs_sensor(context), dg.SkipReason)
    assert made == []


@pytest.mark.slow
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


@pytest.mark.slow
def test_loading_says_nothing_on_the_terminal() -> None:
    """Every process of every run would say it again."""
    code = "from polygon_pipeline.definitions import defs; defs.get_repository_def().get_all_jobs()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_what_is_put_into_the_folder_of_definitions_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import dagster as dg\n\n\n@dg.asset\ndef my_own() -> None: ...\n")
    monkeypatch.setattr(project_defs, "__path__", [*project_defs.__path__, str(tmp_path)])
    assert build_defs().get_repository_def().asset_graph.has(dg.AssetKey("my_own"))
