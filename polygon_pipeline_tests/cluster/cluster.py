"""Dagster on several machines: one as deploy/celery says, with workers on others, or one of its own on each.

Belongs here: what runs where, and with which environment. Does not belong here: what is to happen to it (scenarios).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.cluster.machines import EXCHANGE, REDIS, S3, Machine
from polygon_pipeline_tests.cluster.servers import Postgres, Redis, Volume
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

_ROOT = Path(__file__).parents[2]
_CELERY = _ROOT / "deploy" / "celery"
_LOCAL = _ROOT / "deploy" / "local"
_BIN = Path(sys.executable).parent
_DEFINITIONS = "polygon_pipeline_tests.cluster.definitions"

# What `kill` finds a worker's processes by: their node's name.
COLLECTOR, DATASETS = "collector@", "datasets@"


class WebUI(DagsterDev):
    """What a user asks the cluster's web server."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    def _ask(self, query: str) -> dict[str, Any]:
        """A person reloads the page: the first answers after an outage of PostgreSQL are errors."""
        for _ in range(10):
            with contextlib.suppress(HTTPError):
                return super()._ask(query)
            time.sleep(1)
        return super()._ask(query)

    def statuses(self, job: str | None = None) -> list[str]:
        """Of the runs, newest first."""
        wanted = f'(filter: {{pipelineName: "{job}"}})' if job else ""
        found = self._ask(f"{{ runsOrError{wanted} {{ ... on Runs {{ results {{ status }} }} }} }}")
        return [run["status"] for run in found["runsOrError"]["results"]]

    def check_history(self, asset: str, check: str) -> list[str]:
        """How a check went where it was made, newest first."""
        asked = f'assetCheckExecutions(assetKey: {{ path: ["{asset}"] }}, checkName: "{check}", limit: 100)'
        found = [execution["status"] for execution in self._ask(f"{{ {asked} {{ status }} }}")["assetCheckExecutions"]]
        return [status for status in found if status in ("SUCCEEDED", "FAILED")]

    def launch(self, job: str, config: str = "{}") -> str:
        """As the launchpad does it; returns the run's id."""
        selector = (
            f"""{{ repositoryLocationName: "cluster", repositoryName: "__repository__", pipelineName: "{job}" }}"""
        )
        answer = self._ask(
            f"mutation {{ launchRun(executionParams: {{ selector: {selector}, runConfigData: {config} }}) "
            "{ ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"
        )
        return str(answer["launchRun"]["run"]["runId"])


class Cluster:
    """Redis, PostgreSQL, S3 and three machines. The control machine has the host name of the first worker's, so that
    what looks at host names alone is fooled."""

    def __init__(self, folder: Path, s3: SeaweedFS, variables: Mapping[str, str], days_per_run: int) -> None:
        self.redis = Redis(folder / "redis")
        self.postgres = Postgres()
        self.s3 = s3
        self.lake: Lake = s3.lake()
        self.control = Machine("worker-a", 10, folder / "control")
        self.workers = [Machine("worker-a", 11, folder / "a"), Machine("worker-b", 12, folder / "b")]
        self.over = folder / "session-is-over"
        self._logs = s3.new_bucket()
        self._variables = {**variables, "POLYGON_DAYS_PER_RUN": str(days_per_run), "CLUSTER_OVER": str(self.over)}
        self.ui = WebUI(f"http://{self.control.address}:3000")

    def start(self) -> None:
        self.redis.start()
        self.postgres.start()
        for machine in (self.control, *self.workers):
            self._install(machine)
            machine.start()
        control = self.environment(self.control)
        code = ["api", "grpc", "-h", "0.0.0.0", "-p", "4000", "-m", _DEFINITIONS, "--location-name", "cluster"]
        self._dagster(self.control, code, control, "code-server.log")
        until(lambda: "Started Dagster code server" in self._log("code-server.log"), "the code server serves", 60)
        web = ["-h", "0.0.0.0", "-p", "3000", "-w", "workspace.yaml"]
        self.control.run([str(_BIN / "dagster-webserver"), *web], control, "web.log")
        until(self.ui.serves, "the web server serves", 60, 0.5)
        # PostgreSQL's tables are there now.
        self._dagster(self.control, ["instance", "concurrency", "set", "datasets", "2"], control, "set.log")
        self.control.run([str(_BIN / "dagster-daemon"), "run", "-w", "workspace.yaml"], control, "daemon.log")
        for machine in self.workers:
            self.start_workers(machine)

    def start_workers(self, machine: Machine, datasets: bool = True, collector: bool = True) -> None:
        """The two workers that each machine has: one for the collector, and one for everything else."""
        if collector:
            self._worker(machine, "collector", "collector", 1)
        if datasets:
            self._worker(machine, "datasets", "dagster", 2)

    def restart(self, machine: Machine) -> None:
        """A machine that was lost comes back, with its disk."""
        machine.start()
        self.start_workers(machine)

    def close(self) -> None:
        for machine in (*self.workers, self.control):
            machine.lose()
        self.redis.stop()
        self.postgres.close()

    def environment(self, machine: Machine) -> dict[str, str]:
        """The same everywhere but for the machine's own folders."""
        return {
            **_environment(machine, self.lake, self.s3),
            "PYTHONPATH": f"{_ROOT}:{_CELERY}",
            "DAGSTER_POSTGRES_URL": self.postgres.url,
            "CELERY_BROKER_URL": self.redis.url,
            "COMPUTE_LOGS_BUCKET": self._logs,
            **self._variables,
        }

    def _install(self, machine: Machine) -> None:
        _make_home(machine, _CELERY)
        workspace = (
            f"load_from: [{{grpc_server: {{host: {self.control.address}, port: 4000, location_name: cluster}}}}]"
        )
        (machine.folder / "workspace.yaml").write_text(workspace)

    def _worker(self, machine: Machine, name: str, queue: str, slots: int) -> None:
        command = [str(_BIN / "celery"), "-A", "dagster_celery.app", "worker", "--disable-prefetch", "--queues", queue]
        options = ["--concurrency", str(slots), "--hostname", f"{name}@%h", "--loglevel", "INFO"]
        machine.run([*command, *options], self.environment(machine), f"{name}.log")

    def _dagster(self, machine: Machine, arguments: Sequence[str], environment: Mapping[str, str], log: str) -> None:
        machine.run([str(_BIN / "dagster"), *arguments], environment, log)

    def _log(self, name: str) -> str:
        path = self.control.folder / name
        return re.sub(r"\x1b\[[0-9;]*m", "", path.read_text()) if path.exists() else ""


class Pair:
    """Two machines, each with a Dagster of its own as `make dev` starts it, and one lake: one collects, the other
    stands by. volume: where both have their journals; None for disks of their own."""

    def __init__(self, folder: Path, s3: SeaweedFS, variables: Mapping[str, str], volume: Volume | None = None) -> None:
        self._volume = volume
        self.s3 = s3
        self.lake: Lake = s3.lake()
        self.workers = [Machine("desk-a", 11, folder / "a"), Machine("desk-b", 12, folder / "b")]
        self.over = folder / "session-is-over"
        self._variables = {**variables, "POLYGON_STANDBY": "yes", "CLUSTER_OVER": str(self.over)}

    def start(self) -> None:
        for machine in self.workers:
            _make_home(machine, _LOCAL)
            self.restart(machine)

    def restart(self, machine: Machine) -> None:
        """It is turned on, and Dagster starts there; what a machine that was lost had on its disk is there."""
        machine.start()
        if self._volume:
            self._volume.mount(machine, machine.folder / "journal")
        environment = {**_environment(machine, self.lake, self.s3), **self._variables}
        machine.run([str(_BIN / "dagster"), "dev", "-m", _DEFINITIONS], environment, "dev.log")

    def close(self) -> None:
        for machine in self.workers:
            machine.lose()


def _environment(machine: Machine, lake: Lake, s3: SeaweedFS) -> dict[str, str]:
    """What every process has, whatever starts it."""
    return {
        "PATH": f"{_BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(_ROOT),
        "HOME": str(machine.folder),
        "DAGSTER_HOME": str(machine.folder / "home"),
        "LAKE_URI": lake.uri,
        "JOURNAL_DIR": str(machine.folder / "journal"),
        "ALLOW_PLAINTEXT_HOSTS": f"{S3},{REDIS},{EXCHANGE}",
        "AWS_EC2_METADATA_DISABLED": "true",
        **s3.address.environment(),
    }


def _make_home(machine: Machine, deployment: Path) -> None:
    home = machine.folder / "home"
    home.mkdir(parents=True)
    shutil.copy(deployment / "dagster.yaml", home)
