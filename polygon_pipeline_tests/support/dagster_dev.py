"""A real `dagster dev`, for tests and benchmarks: started, asked as the web UI asks it, and ended.

Belongs here: its processes, and the requests of a user in the web UI. Does not belong here: what a project in it is to
do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.waiting import until

_ROOT = Path(__file__).parents[2]


class DagsterDev:
    """A `dagster dev` in a session of its own, so that everything it starts can be found again.

    folder: an empty one, for its DAGSTER_HOME (`home`), the journals and its log. module: the definitions.
    """

    def __init__(self, folder: Path, lake: Lake, module: str = "polygon_pipeline.definitions") -> None:
        self.home = folder / "home"
        self._folder = folder
        self._lake = lake
        self._module = module
        [self._port] = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[int] = []
        self.home.mkdir()
        shutil.copy(_ROOT / "deploy" / "local" / "dagster.yaml", self.home / "dagster.yaml")

    def start(self, **variables: str) -> None:
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(self.home),
            "LAKE_URI": self._lake.uri,
            "JOURNAL_DIR": str(self._folder / "journal"),
            "PYTHONPATH": str(_ROOT),
            **variables,
        }
        command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self._port)]
        with (self._folder / "dev.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-m", self._module],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._sessions.append(self._process.pid)
        until(self.serves, "dagster dev serves", seconds=120, pause=0.5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def runs(self) -> list[dict[str, Any]]:
        """The collector's runs as the UI lists them, newest first."""
        query = (
            '{ runsOrError(filter: {pipelineName: "collect_aggregates"}) { ... on Runs { results { runId status } } } }'
        )
        return list(self._ask(query)["runsOrError"]["results"])

    def terminate(self, run: str) -> None:
        """As the UI's button does it."""
        self._ask(f'mutation {{ terminateRun(runId: "{run}") {{ __typename }} }}')

    def backfill(self, assets: Sequence[str], days: Sequence[date]) -> str:
        """As the UI's dialog does it; returns the backfill's id."""
        names = ", ".join(f'{{ path: ["{asset}"] }}' for asset in assets)
        keys = ", ".join(f'"{day}"' for day in days)
        parameters = f"{{ assetSelection: [{names}], partitionNames: [{keys}] }}"
        query = f"""mutation {{ launchPartitionBackfill(backfillParams: {parameters}) {{
            ... on LaunchBackfillSuccess {{ backfillId }} ... on PythonError {{ message }} }} }}"""
        return str(self._ask(query)["launchPartitionBackfill"]["backfillId"])

    def backfill_status(self, backfill: str) -> str:
        query = f'{{ partitionBackfillOrError(backfillId: "{backfill}") {{ ... on PartitionBackfill {{ status }} }} }}'
        return str(self._ask(query)["partitionBackfillOrError"]["status"])

    def set_cursor(self, sensor: str, cursor: str) -> None:
        """As the UI's dialog does it."""
        self._of_sensor("setSensorCursor", f"sensorSelector: {self._selector(sensor)}, cursor: {json.dumps(cursor)}")

    def turn_on(self, sensor: str) -> None:
        """As the UI's switch does it."""
        self._of_sensor("startSensor", f"sensorSelector: {self._selector(sensor)}")

    def turn_off(self, sensor: str) -> None:
        asked = f"sensorOrError(sensorSelector: {self._selector(sensor)})"
        found = self._ask(f"{{ {asked} {{ ... on Sensor {{ sensorState {{ id }} }} }} }}")
        self._of_sensor("stopSensor", f"id: {json.dumps(found['sensorOrError']['sensorState']['id'])}")

    def _of_sensor(self, mutation: str, arguments: str) -> None:
        answer = self._ask(f"mutation {{ {mutation}({arguments}) {{ __typename }} }}")
        assert answer[mutation]["__typename"] in ("Sensor", "StopSensorMutationResult"), answer

    def _selector(self, sensor: str) -> str:
        [location] = self._ask("{ workspaceOrError { ... on Workspace { locationEntries { name } } } }")[
            "workspaceOrError"
        ]["locationEntries"]
        return (
            f'{{ repositoryLocationName: "{location["name"]}", repositoryName: "__repository__", '
            f'sensorName: "{sensor}" }}'
        )

    @contextlib.contextmanager
    def storage_away(self) -> Iterator[None]:
        """Meanwhile Dagster's storage answers nobody: its SQLite files cannot be opened, as on a disk that is gone."""
        folders = [self.home / "history", self.home / "schedules"]
        for folder in folders:
            folder.rename(folder.with_suffix(".away"))
            folder.touch()  # a folder would be filled with new files
        try:
            yield
        finally:
            for folder in folders:
                folder.unlink()
                folder.with_suffix(".away").rename(folder)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to every process of the group."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(60)

    def kill(self, text: str, but: int | None = None) -> None:
        """SIGKILL to the processes whose command line has this text, except one."""
        victims = [pid for pid, line in self.processes() if text in line and pid != but]
        assert victims
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def collectors(self) -> list[int]:
        """The processes that hold a journal's lock: the collectors at work."""
        locks = {path.parent / "lock" for path in self._folder.glob("journal/*/journal.json")}
        return [pid for pid, _ in self.processes() if locks & _open_files(pid)]

    def close(self) -> None:
        for pid, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process:
            self._process.wait(30)

    def processes(self) -> list[tuple[int, str]]:
        """The id and the command line of each process that belongs to it."""
        found = []
        for pid in _pids():
            with contextlib.suppress(OSError):
                if os.getsid(pid) in self._sessions:
                    found.append((pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
        return found

    def serves(self) -> bool:
        """Whether the web server answers."""
        with contextlib.suppress(OSError):
            self._ask("{ version }")
            return True
        return False

    def _ask(self, query: str) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": query}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)["data"]
        return answer


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _open_files(pid: int) -> set[Path]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(link.readlink())
    return found
