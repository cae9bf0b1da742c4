"""What a launch cannot do: whoever reaches the web server makes one, and it leads neither key nor bars elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.settings import ConfigurationError
from polygon_pipeline_tests.support.materializing import PROJECT
from polygon_pipeline_tests.support.nights import first_night
from polygon_pipeline_tests.support.planned_server import PlannedServer, planned_server

KEY = "the-key-that-nobody-may-see-11a1"
DAY = "2026-01-26"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_TICKERS", "SPY")
    monkeypatch.setenv("POLYGON_REST_REQUESTS_PER_MINUTE", "6000")
    monkeypatch.setenv("POLYGON_REST_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("POLYGON_WEBSOCKET_URL", "ws://127.0.0.1:9/stocks")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))


@pytest.fixture
def spy() -> Iterator[PlannedServer]:
    """Where a launch would like to have the key."""
    with planned_server() as server:
        yield server


def launch(job: str, run_config: dict[str, Any]) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        return (
            build_defs(PROJECT)
            .get_job_def(job)
            .execute_in_process(run_config=run_config, instance=instance, partition_key=DAY)
        )


def test_a_launch_cannot_send_the_key_to_a_server_that_it_names(spy: PlannedServer) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="rest_url"):
        launch("reference", {"resources": {"polygon": {"config": {"rest_url": spy.url}}}})
    assert spy.asked == []


def resource_settings(job: dg.JobDefinition) -> set[str]:
    """What a launch of this job could set of its resources, as `resource.field`."""
    resources = fields(fields(job.run_config_schema.config_type)["resources"].config_type)
    return {
        f"{name}.{field}"
        for name, resource in resources.items()
        for field in fields(fields(resource.config_type)["config"].config_type)
        if name != "io_manager"  # Dagster's own, which keeps nothing of the project's
    }


def fields(config_type: Any) -> dict[str, dg.Field]:
    return dict(getattr(config_type, "fields", {}))


def test_no_job_takes_any_configuration_of_its_resources() -> None:
    jobs = build_defs(PROJECT).get_repository_def().get_all_jobs()
    assert len(jobs) > 4
    assert {job.name: resource_settings(job) for job in jobs} == {job.name: set() for job in jobs}


@pytest.mark.parametrize(
    "asked",
    [
        {"session_date": {"env": "POLYGON_API_KEY"}},
        {"tickers": [{"env": "POLYGON_API_KEY"}]},
        {"channels": [{"env": "POLYGON_API_KEY"}]},
    ],
)
def test_a_launch_cannot_have_a_variable_shown(asked: dict[str, Any]) -> None:
    """Dagster puts a variable's value where a text of a dg.Config is `{"env": NAME}`, and an error would show it."""
    with (
        dg.DagsterInstance.ephemeral() as instance,
        pytest.raises(dg.DagsterInvalidConfigError, match="POLYGON_API_KEY"),
    ):
        build_defs().get_job_def("collect_aggregates").execute_in_process(
            run_config={"ops": {"collect_aggregates": {"config": asked | {"stop_after_seconds": 0.1}}}},
            instance=instance,
        )


def test_a_lake_that_nobody_named_is_refused_where_runs_start_on_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would get a lake of its own below its working directory. To say so, a run asks nothing of AWS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAKE_URI")
    celery = {"module": "polygon_pipeline.launcher", "class": "WatchingCeleryRunLauncher", "config": {}}
    ecs = {"module": "dagster_aws.ecs", "class": "EcsRunLauncher", "config": {"task_definition": "polygon-run"}}
    for launcher, refused in ({}, False), ({"run_launcher": celery}, True), ({"run_launcher": ecs}, True):
        with (
            dg.instance_for_test(overrides=launcher) as instance,
            dg.build_resources({"lake": LakeResource(s3=S3Resource())}, instance=instance) as resources,
            pytest.raises(ConfigurationError, match="LAKE_URI is not set") if refused else nullcontext(),
        ):
            resources.lake.open()


def test_nothing_opens_the_lake_with_a_first_night_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    lake = LakeResource(s3=S3Resource())
    assert lake.open()
    first_night(monkeypatch, "2026-12-06")  # a Sunday
    with pytest.raises(ConfigurationError, match="POLYGON_NIGHT_SESSION_FROM"):
        lake.open()
