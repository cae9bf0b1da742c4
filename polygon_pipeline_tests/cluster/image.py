"""The image, and deploy/celery/compose.yaml: a simulated session on two machines of containers. `make image` runs it.

It needs a Docker engine with Compose, and the ports 3000, 5432 and 6379 of this machine. What happens to processes,
machines and servers is in scenarios; here is what containers alone can show.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline import demo
from polygon_pipeline.collector.lease import Holding, read_lease
from polygon_pipeline.datasets.catalog import NORMALIZED_BARS
from polygon_pipeline.lake.ledger import Ledger, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import completed_sessions
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.cluster.cluster import WebUI
from polygon_pipeline_tests.cluster.scenarios import holder_after
from polygon_pipeline_tests.support.made_days import day_state, made_day
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

_ROOT = Path(__file__).parents[2]
_IMAGE = "polygon-pipeline:tried"
_UI = WebUI("http://127.0.0.1:3000")
_CONTROL = ["postgres", "redis", "code", "webserver", "daemon"]


class Machine:
    """A machine of compose.yaml: a project of its own, with volumes and a host name of its own."""

    def __init__(self, name: str, folder: Path, variables: dict[str, str], profiles: list[str]) -> None:
        self.name = name
        self._folder = folder
        self._options = [word for profile in profiles for word in ("--profile", profile)]
        folder.mkdir()
        shutil.copy(_ROOT / "deploy" / "celery" / "compose.yaml", folder)
        lines = [f"{key}={value}\n" for key, value in {**variables, "WORKER_NAME": name}.items()]
        (folder / ".env").write_text("".join(lines))

    def compose(self, *arguments: str) -> str:
        command = ["docker", "compose", "--project-name", f"polygon-tried-{self.name}", *self._options, *arguments]
        return _output(command, self._folder)

    def services(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(line) for line in self.compose("ps", "--all", "--format", "json").splitlines()]
        return {service["Service"]: service for service in found}

    def log(self, service: str) -> str:
        return self.compose("logs", "--no-log-prefix", "--no-color", service)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[SeaweedFS]:
    """Where containers reach it: at this machine's address on Docker's bridge."""
    server = SeaweedFS(tmp_path / "s3", _gateway())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def machines(tmp_path: Path, s3: SeaweedFS) -> Iterator[tuple[Lake, list[Machine]]]:
    lake, gateway = s3.lake(), _gateway()
    variables = {
        "IMAGE": _IMAGE,
        "DAGSTER_POSTGRES_URL": f"postgresql+psycopg2://dagster:postgres@{gateway}:5432/dagster",
        "CELERY_BROKER_URL": f"redis://:redis@{gateway}:6379/0",
        "CODE_SERVER_HOST": "code",
        "COMPUTE_LOGS_BUCKET": s3.new_bucket(),
        "LAKE_URI": lake.uri,
        "POLYGON_API_KEY": "simulator",
        "ALLOW_PLAINTEXT_HOSTS": gateway,
        "CONTROL_ADDRESS": gateway,
        "POSTGRES_PASSWORD": "postgres",
        "REDIS_PASSWORD": "redis",
        "AWS_EC2_METADATA_DISABLED": "true",
        **s3.address.environment(),
    }
    made = [
        Machine("worker-a", tmp_path / "a", variables, ["control", "worker"]),
        Machine("worker-b", tmp_path / "b", variables, ["worker"]),
    ]
    try:
        for machine in made:
            machine.compose("up", "--detach")
        yield lake, made
    finally:
        for machine in reversed(made):
            machine.compose("down", "--volumes", "--timeout", "30")


@pytest.mark.timeout(1800)
def test_a_session_is_collected_by_containers_whatever_docker_does_to_them(
    machines: tuple[Lake, list[Machine]], say: Callable[[str], None]
) -> None:
    lake, [first, second] = machines
    day = completed_sessions(datetime.now(UTC), demo.SESSIONS)[0]
    began = time.monotonic()

    def tell(what: str) -> None:
        text = f"{what}, after {time.monotonic() - began:.0f} s"
        print(text, flush=True)
        say(text)

    def collects(after: Holding | None) -> tuple[Holding, Machine]:
        """Who collects now, and is not who did."""

        def other() -> Holding | None:
            lease = holder_after(after, lake)
            return lease if lease and lease.status.bars else None

        found = until(other, "a collector is at work", 300, 0.5)
        tell(f"{found.machine} collects")
        return found, next(machine for machine in (first, second) if found.machine.startswith(machine.name))

    holder, machine = collects(None)
    began = time.monotonic()
    machine.compose("stop", "collector")
    tell("docker compose stop collector: it has published everything, and ended")
    assert machine.services()["collector"]["ExitCode"] == 0
    [ledger] = [ledger for ledger in read_ledgers(lake, day).ledgers if ledger.run == holder.run]
    assert ledger.complete
    until(lambda: "CANCELED" in _UI.statuses("collect_aggregates"), "its run is canceled")
    stopped = machine
    holder, machine = collects(holder)
    stopped.compose("start", "collector")

    began = time.monotonic()
    healthy = until(lambda: _all_healthy(first, second), "all containers are healthy", 120, 2)
    tell(f"all {healthy} containers are healthy")
    assert "Traceback" not in first.log("webserver") + first.log("daemon") + first.log("code")

    began = time.monotonic()
    machine.compose("kill", "collector")
    holder, now = collects(holder)
    machine.compose("start", "collector")
    assert now is not machine

    began = time.monotonic()
    first.compose("up", "--detach", "--force-recreate", *_CONTROL)
    tell("the control machine's containers are new, as after an update")
    until(lambda: _UI.serves() and _UI.statuses(), "the web server serves", 120, 1)
    lease = read_lease(lake)
    assert lease
    assert lease.run == holder.run

    began = time.monotonic()
    now.compose("up", "--detach", "--force-recreate", "collector", "datasets")
    tell("the collecting machine's containers are new")
    # Where the killed one was: what it had received is published now.
    holder, now = collects(holder)
    assert now is machine

    began = time.monotonic()
    ledgers = until(
        lambda: _complete(lake, day), "the session is over, and all its runs' accounts are complete", 400, 1
    )
    until(lambda: day_state(lake, day) == "final", "the day is final", 400, 1)
    tell("the day is final")
    made = made_day(lake, NORMALIZED_BARS.name, day)
    assert made is not None
    bars, expected = made.num_rows, SyntheticMarket(WATCH_LIST).day_bars(day).num_rows
    tell(f"{len(ledgers)} runs, {sum(ledger.account.bars for ledger in ledgers)} bars, {bars} of {expected} in the day")
    assert [ledger.imbalance for ledger in ledgers if ledger.imbalance] == []
    assert bars == expected


def _complete(lake: Lake, day: date) -> list[Ledger]:
    """The accounts of a day's runs; none while one of them is incomplete."""
    ledgers = read_ledgers(lake, day).ledgers
    return ledgers if all(ledger.complete for ledger in ledgers) else []


def _all_healthy(*machines: Machine) -> int:
    """How many containers there are; 0 while one of them is not healthy."""
    found = [service["Health"] for machine in machines for service in machine.services().values()]
    return len(found) if set(found) == {"healthy"} else 0


def _gateway() -> str:
    """This machine's address on Docker's bridge. Some engines do not name it: it is the network's first."""
    found = _output(["docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}"])
    return str(ip_network(found.strip())[1])


def _output(command: list[str], folder: Path = _ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
