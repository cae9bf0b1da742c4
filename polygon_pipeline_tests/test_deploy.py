"""The files of deploy/ say what Dagster, Kubernetes and AWS understand, as far as that can be told without them.

What runs for real is in cluster/. Nothing here reaches a network.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import boto3
import dagster as dg
import pytest
import yaml
from dagster_aws.ecs import EcsRunLauncher
from dagster_celery.app import app
from dagster_k8s import K8sRunLauncher
from dagster_k8s.job import construct_dagster_k8s_job
from moto import mock_aws
from moto.core.models import responses_mock
from moto.ecs.models import EC2ContainerServiceBackend, ecs_backends

from polygon_pipeline.definitions import defs
from polygon_pipeline.launcher import WatchingCeleryRunLauncher

_DEPLOY = Path(__file__).parents[1] / "deploy"
_TASK = json.loads((_DEPLOY / "ecs" / "task-definition.json").read_text())
_SYSTEMD = sorted((_DEPLOY / "celery" / "systemd").glob("*.service"))


@contextmanager
def _instance(
    folder: Path, configuration: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """An instance of this configuration, on SQLite: all but the storage is as it will be."""
    del configuration["storage"]
    for name in ("DAGSTER_POSTGRES_URL", "CELERY_BROKER_URL", "COMPUTE_LOGS_BUCKET"):
        monkeypatch.setenv(name, "memory://" if name == "CELERY_BROKER_URL" else "a-name")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (folder / "dagster.yaml").write_text(yaml.safe_dump(configuration))
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        yield instance


@pytest.mark.parametrize(("engine", "launcher"), [("celery", WatchingCeleryRunLauncher), ("ecs", EcsRunLauncher)])
def test_an_instance_is_what_its_configuration_says(
    engine: str, launcher: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = _yaml(_DEPLOY / engine / "dagster.yaml")
    assert set(configuration["storage"]["postgres"]) == {"postgres_url"}
    aws = _aws(monkeypatch) if engine == "ecs" else nullcontext()  # which the launcher asks as soon as it is made
    with aws, _instance(tmp_path, configuration, monkeypatch) as instance:
        assert type(instance.run_launcher) is launcher
        assert instance.run_launcher.supports_check_run_worker_health
        assert instance.run_monitoring_enabled
        assert instance.run_retries_enabled
        queue = instance.get_concurrency_config()
        assert queue.run_queue_config is not None
        assert queue.run_queue_config.max_concurrent_runs >= 5
        assert queue.pool_config.default_pool_limit == 1


def test_the_workers_processes_wait_for_the_collector_and_its_queue_is_one_of_theirs() -> None:
    tags = defs.resolve_job_def("collect_aggregates").tags
    services = _yaml(_DEPLOY / "celery" / "compose.yaml")["services"]
    units = {path.stem: _unit(path) for path in _SYSTEMD}
    for command in (services["collector"]["command"], shlex.split(units["polygon-collector"]["ExecStart"])):
        assert _option(command, "--queues") == tags["dagster-celery/queue"]
        assert _option(command, "--concurrency") == "1"
        assert "--disable-prefetch" in command
    for command in (services["datasets"]["command"], shlex.split(units["polygon-datasets"]["ExecStart"])):
        assert _option(command, "--queues") == "dagster"
        assert "--disable-prefetch" in command
    celery = _yaml(_DEPLOY / "celery" / "dagster.yaml")
    grace = celery["run_monitoring"]["cancel_timeout_seconds"]
    assert _minutes(services["collector"]["stop_grace_period"]) * 60 >= grace
    assert _minutes(units["polygon-collector"]["TimeoutStopSec"]) * 60 >= grace
    assert json.loads(tags["dagster-k8s/config"])["pod_spec_config"]["termination_grace_period_seconds"] >= grace
    slots = 2 * int(_option(services["datasets"]["command"], "--concurrency")) + 1
    assert celery["concurrency"]["runs"]["max_concurrent_runs"] == slots, "two machines', and the collector's"
    assert {"execute_job", "resume_job"} <= set(app.tasks)


def test_every_command_of_the_services_is_that_of_their_units() -> None:
    """Compose and systemd start the same, but for addresses and paths."""
    services = _yaml(_DEPLOY / "celery" / "compose.yaml")["services"]
    commands = {Path(shlex.split(_unit(path)["ExecStart"])[0]).name for path in _SYSTEMD}
    started = {service["command"][0] for name, service in services.items() if "command" in service and name != "redis"}
    assert commands == {*started, "dagster"}, "the code server is what the image starts by itself"
    for name, service in services.items():
        assert "healthcheck" in service or name == "code", "the image checks the code server"
        assert service["restart"] == "unless-stopped"


def test_a_machine_that_has_everything_ends_its_processes_before_their_database() -> None:
    """Else a collector takes four minutes to end, and its run fails. systemd stops in the reverse of After=."""
    after = {path.stem: _unit(path, "Unit")["After"].split() for path in _SYSTEMD}
    for units in after.values():
        assert {"network-online.target", "postgresql.service", "redis.service"} <= set(units)
    for name in ("polygon-web", "polygon-daemon"):
        assert "polygon-code.service" in after[name], "or their first lines are errors"


def test_the_environments_example_has_no_comment_behind_a_value() -> None:
    """systemd, and `docker run --env-file`, take such a comment for a part of the value."""
    lines = [line.strip() for line in (_DEPLOY / "celery" / "README.md").read_text().splitlines()]
    values = dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))
    assert {"CODE_SERVER_HOST", "LAKE_URI"} <= set(values)
    assert not [name for name, value in values.items() if "#" in value]


@pytest.mark.parametrize("job", ["collect_aggregates", "catch_up"])
def test_a_runs_pod_is_one_that_kubernetes_would_take(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by Dagster's own code from the values and the job's tags, with Kubernetes' own types."""
    values = _yaml(_DEPLOY / "kubernetes" / "values.yaml")
    chosen = {_snake(key): value for key, value in values["runLauncher"]["config"]["k8sRunLauncher"].items()}
    config = {
        "service_account_name": "dagster",
        "instance_config_map": "dagster-instance",
        "dagster_home": values["global"]["dagsterHome"],
        "load_incluster_config": False,
        "job_image": "an-image",
        "image_pull_policy": chosen["image_pull_policy"],
        "env_secrets": [secret["name"] for secret in chosen["env_secrets"]],
        "fail_pod_on_run_failure": chosen["fail_pod_on_run_failure"],
        "run_k8s_config": {_snake(key): value for key, value in chosen["run_k8s_config"].items()},
    }
    assert set(config) <= set(K8sRunLauncher.config_type())  # type: ignore[no-untyped-call]
    monkeypatch.setattr("kubernetes.config.load_kube_config", lambda *_, **__: None)
    with dg.DagsterInstance.ephemeral() as instance:
        definition = defs.resolve_job_def(job)
        run = instance.create_run_for_job(definition, tags=definition.tags)
    launcher = K8sRunLauncher(**config, k8s_client_batch_api=object(), k8s_client_core_api=object())
    context = launcher.get_container_context_for_run(run)
    made = construct_dagster_k8s_job(
        context.get_k8s_job_config(job_image="an-image", run_launcher=launcher),
        args=["dagster", "api", "execute_run"],
        job_name="a-run",
        user_defined_k8s_config=context.run_k8s_config,
    )
    pod = made.spec.template.spec
    [container] = pod.containers
    assert container.command is None, "the image's tini stays the first process"
    assert container.security_context.read_only_root_filesystem
    assert pod.security_context.run_as_non_root
    mounted = {mount.name: mount.mount_path for mount in container.volume_mounts}
    assert set(mounted) <= {volume.name for volume in pod.volumes}
    assert mounted["tmp"] == "/tmp"
    assert len(set(mounted.values())) == len(container.volume_mounts), "Kubernetes takes one mount a path"
    assert mounted["home"] == "/var/lib/polygon"
    [claim] = yaml.safe_load_all((_DEPLOY / "kubernetes" / "collector.yaml").read_text())
    claims = [volume.persistent_volume_claim.claim_name for volume in pod.volumes if volume.persistent_volume_claim]
    if job == "collect_aggregates":
        assert claims == [claim["metadata"]["name"]]
        assert f"JOURNAL_DIR={mounted['journal']}" in (_DEPLOY / "container" / "Dockerfile").read_text()
        assert pod.termination_grace_period_seconds >= values["dagsterDaemon"]["runMonitoring"]["cancelTimeoutSeconds"]
    else:
        assert claims == [], "only one pod can have it"


@contextmanager
def _aws(monkeypatch: pytest.MonkeyPatch, note: Callable[..., None] = lambda **_: None) -> Iterator[dict[str, Any]]:
    """An imitation of AWS, with the task definition as it is, and a daemon on Fargate; yields where the daemon is.

    note: is told what AWS is asked from then on.
    """
    monkeypatch.setenv("ECS_CONTAINER_METADATA_URI_V4", "http://169.254.170.2/v4/daemon")
    # It adds up what containers reserve of a machine, and fails where they reserve nothing, as they may on Fargate.
    monkeypatch.setattr(EC2ContainerServiceBackend, "_calculate_task_resource_requirements", lambda *_: {})
    with mock_aws():
        session = boto3.Session(region_name="us-east-1")
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
        ecs, ec2 = session.client("ecs"), session.client("ec2")
        ecs.create_cluster(clusterName="polygon")
        ecs.register_task_definition(**_TASK)
        network: Any = {
            "subnets": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
            "securityGroups": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
            "assignPublicIp": "DISABLED",
        }
        place: Any = {"launchType": "FARGATE", "networkConfiguration": {"awsvpcConfiguration": network}}
        [daemon] = ecs.run_task(cluster="polygon", taskDefinition=_TASK["family"], **place)["tasks"]
        answer = {"Cluster": "polygon", "TaskARN": daemon["taskArn"]}
        responses_mock.get("http://169.254.170.2/v4/daemon/task", json=answer)
        session.events.register("provide-client-params", note)
        yield {"cluster": "polygon", **place}


def _job(name: str) -> dg.JobDefinition:
    return defs.resolve_job_def(name)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["collect_aggregates", "catch_up"])
def test_a_run_is_a_task_of_ecs_that_is_watched_and_ended(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[dict[str, Any], dg.DagsterRunStatus]] = {}  # of AWS, and the run's status at that moment

    def now() -> dg.DagsterRun:
        found = instance.get_run_by_id(run.run_id)
        assert found
        return found

    def note(params: dict[str, Any], model: Any, **_: object) -> None:
        asked[f"{model.service_model.service_name}:{model.name}"] = params, now().status

    configuration = _yaml(_DEPLOY / "ecs" / "dagster.yaml")
    with _aws(monkeypatch, note) as place, _instance(tmp_path, configuration, monkeypatch) as instance:
        origin = dg.build_reconstructable_job(__name__, _job.__name__, (job,)).get_python_origin()
        run = instance.create_run_for_job(_job(job), tags=_job(job).tags, job_code_origin=origin)
        instance.launch_run(run.run_id, None)  # type: ignore[arg-type] # this launcher has no use for a workspace
        launched, _ = asked["ecs:RunTask"]
        assert place.items() <= launched.items(), "a run is where the daemon is"
        [override] = launched["overrides"]["containerOverrides"]
        assert {*launched["overrides"], *override} == {"containerOverrides", "name", "command"}, (
            "its size is there already"
        )
        assert override["command"][:3] == ["dagster", "api", "execute_run"]
        assert len(json.dumps(launched["overrides"])) <= 8192, "ECS takes no more"
        task = ecs_backends["123456789012"]["us-east-1"].tasks["polygon"][now().tags["ecs/task_arn"]]
        health = instance.run_launcher.check_run_worker_health
        assert health(now()).status.value == "RUNNING"
        for code in (137, None):  # it was killed, or lost with its machine
            task.last_status, task.containers[0].exitCode = "STOPPED", code  # type: ignore[assignment]
            assert health(now()).status.value == "FAILED"
        task.last_status = "RUNNING"
        assert instance.run_launcher.terminate(run.run_id)
        assert task.last_status == "STOPPED"
        assert asked["ecs:StopTask"][1] is dg.DagsterRunStatus.CANCELING, "so that the collector stays ended"
    for action in asked:
        assert f"`{action}`" in (_DEPLOY / "ecs" / "README.md").read_text(), "the roles have no other right"


def test_the_task_definition_keeps_the_rules_of_fargate() -> None:
    """Those that the imitation of AWS does not know."""
    sizes = {1024: range(2048, 8193, 1024), 2048: range(4096, 16385, 1024), 4096: range(8192, 30721, 1024)}
    assert int(_TASK["memory"]) in sizes[int(_TASK["cpu"])]
    [container] = _TASK["containerDefinitions"]
    assert 2 <= container["stopTimeout"] <= 120
    assert "entryPoint" not in container, "the image's tini stays the first process"
    mounted = {mount["sourceVolume"]: mount["containerPath"] for mount in container["mountPoints"]}
    assert mounted.keys() == {volume["name"] for volume in _TASK["volumes"]}
    assert f"JOURNAL_DIR={mounted['journal']}" in (_DEPLOY / "container" / "Dockerfile").read_text()
    assert f"VOLUME {mounted['tmp']}" in (_DEPLOY / "ecs" / "Dockerfile").read_text(), "else only root may write there"


def test_the_image_is_built_from_what_is_there_and_starts_without_a_shell_as_nobody_special() -> None:
    lines = (_DEPLOY / "container" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word.isupper()]
    copied = [shlex.split(rest) for word, rest in instructions if word == "COPY" and "--from" not in rest]
    sources = {name for words in copied for name in words[:-1] if not name.startswith("--")}
    kept = [line[1:] for line in (_DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()]
    for name in sources:
        assert (_DEPLOY.parent / name).exists(), name
        assert any(Path(name).is_relative_to(part) for part in kept if part), f"{name} is ignored"
    said = {word: rest for word, rest in instructions}
    assert json.loads(said["ENTRYPOINT"]) == ["/usr/bin/tini", "-g", "--"]
    assert json.loads(said["CMD"])[0] == "dagster"
    assert int(said["USER"].partition(":")[0]) > 0


def _yaml(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def _unit(path: Path, section: str = "Service") -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return dict(parser[section])


def _option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def _minutes(text: str) -> int:
    return int(text.removesuffix("min").removesuffix("m"))


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
