"""`dagster dev` for real: its processes are killed, and exactly one collector goes on, with nothing lost.

The built-in simulator is the feed, as in the demo; the web server is asked what a user would see.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.collector.lease import Holding, read_lease
from polygon_pipeline.datasets.catalog import DAILY_BARS, FOLLOWING, REFERENCE_BARS
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.ledger import Ledger, decode_ledger, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, day_bounds_ms, trading_days
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST
from polygon_pipeline_tests.support.bars import reference_row
from polygon_pipeline_tests.support.day_files import reference_file
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.waiting import until

T = TypeVar("T")

_MINUTE = [dataset for dataset in FOLLOWING if dataset.channel is Channel.MINUTE]

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[1]


class DagsterDev:
    """A `dagster dev` in a session of its own, so that everything it starts can be found again."""

    def __init__(self, folder: Path, lake: Lake) -> None:
        self._folder = folder
        self._lake = lake
        [self._port] = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[int] = []
        (folder / "home").mkdir()
        shutil.copy(_ROOT / "deploy" / "local" / "dagster.yaml", folder / "home" / "dagster.yaml")

    def start(self, **variables: str) -> None:
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(self._folder / "home"),
            "LAKE_URI": self._lake.uri,
            "JOURNAL_DIR": str(self._folder / "journal"),
            **variables,
        }
        command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(self._port)]
        with (self._folder / "dev.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-m", "polygon_pipeline.definitions"],
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._sessions.append(self._process.pid)
        _until(self.serves, "dagster dev serves")

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

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to every process of the group."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(60)

    def kill(self, text: str, but: int | None = None) -> None:
        """SIGKILL to the processes whose command line has this text, except one."""
        victims = [pid for pid, line in self._processes() if text in line and pid != but]
        assert victims
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def collectors(self) -> int:
        """How many processes hold the local lake's lock open: the collectors at work."""
        lock = self._lake.local_root / "lease.lock"
        return sum(1 for pid in _pids() if lock in _open_files(pid))

    def close(self) -> None:
        for pid, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process:
            self._process.wait(30)

    def _processes(self) -> list[tuple[int, str]]:
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
            f"http://127.0.0.1:{self._port}/graphql",
            data=json.dumps({"query": query}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)["data"]
        return answer


@pytest.fixture
def dev(tmp_path: Path, file_lake: Lake) -> Iterator[DagsterDev]:
    dev = DagsterDev(tmp_path, file_lake)
    try:
        dev.start()
        yield dev
    finally:
        dev.close()


@pytest.mark.timeout(600)
def test_exactly_one_collector_continues_after_any_process_is_killed(
    dev: DagsterDev, file_lake: Lake, say: Callable[[str], None]
) -> None:
    first = _until(lambda: _alive(file_lake), "the sensor starts a collector")
    _until(lambda: file_lake.keys("raw-data/"), "bars are on the lake")
    assert _statuses(dev) == ["STARTED"]

    os.kill(first.pid, signal.SIGKILL)
    second = _until(lambda: _alive(file_lake, after=first), "a second attempt follows the killed worker")
    assert _statuses(dev) == ["STARTED", "FAILURE"]
    assert dev.collectors() == 1

    dev.kill("dagster._daemon")
    _until(lambda: not dev.serves(), "dagster dev ends without its daemon")
    dev.start()
    time.sleep(20)  # a sensor tick and more: time enough to start a second collector
    assert _statuses(dev) == ["STARTED", "FAILURE"], "the collector at work goes on"
    assert dev.collectors() == 1

    dev.kill("dagster", but=second.pid)
    _until(lambda: dev.collectors() == 0, "a collector whose launcher is gone ends by itself")
    dev.start()
    third = _until(lambda: _alive(file_lake, after=second), "the next start begins another")
    assert dev.collectors() == 1

    dev.kill("")
    _until(lambda: dev.collectors() == 0, "everything is dead")
    dev.start()
    fourth = _until(lambda: _alive(file_lake, after=third), "it goes on after everything was killed")
    assert dev.collectors() == 1
    statuses = _statuses(dev)
    assert statuses[0] == "STARTED"
    assert "STARTED" not in statuses[1:]

    dev.interrupt()
    _until(lambda: dev.collectors() == 0, "Ctrl-C ends the collector")
    dev.start()
    _until(lambda: _statuses(dev)[1] == "CANCELED", "the interrupted run is canceled, and another begun")
    fifth = _until(lambda: _alive(file_lake, after=fourth), "an interrupted session goes on")
    statuses = _statuses(dev)
    ledgers = [decode_ledger(file_lake.get(key) or b"") for key in file_lake.keys("ledger/")]
    _assert_nothing_lost(file_lake, [ledger for ledger in ledgers if ledger.run != fifth.run])
    say(
        f"dagster dev: worker, daemon, launcher and everything killed, then Ctrl-C: {len(statuses)} runs "
        f"({', '.join(reversed(statuses))}), never two collectors, "
        f"{sum(ledger.account.bars for ledger in ledgers)} bars, 0 lost"
    )


@pytest.mark.timeout(900)
def test_a_day_gets_to_final_by_itself_whatever_happened_to_its_session(
    tmp_path: Path, file_lake: Lake, say: Callable[[str], None]
) -> None:
    """A session whose worker is killed and whose next attempt is terminated by hand, while a backfill is under way."""
    dev = DagsterDev(tmp_path, file_lake)
    try:
        backfilled = trading_days(date(2026, 1, 5), date(2026, 3, 31))
        _put_history(file_lake, backfilled, tmp_path)
        dev.start(POLYGON_HISTORY_START="2026-01-02")
        asked = dev.backfill([dataset.name for dataset in _MINUTE], backfilled)
        first = _until(lambda: _alive(file_lake), "the sensor starts a collector beside the backfill")
        day = completed_sessions(datetime.now(UTC), 5)[0]
        _until(lambda: _state(file_lake, day) == "collecting", "half a day is called half a day")
        os.kill(first.pid, signal.SIGKILL)
        _until(lambda: _alive(file_lake, after=first), "another attempt follows the killed worker")
        _until(lambda: len(file_lake.keys(layout.ledger_prefix(day))) == 2, "it has published something")
        dev.terminate(dev.runs()[0]["runId"])
        _until(lambda: _state(file_lake, day) == "final", "the day is completed by itself", 240)
        _until(lambda: dev.backfill_status(asked).startswith("COMPLETED"), "the backfill is completed", 300)
        assert dev.backfill_status(asked) == "COMPLETED_SUCCESS"
        assert {_state(file_lake, day) for day in backfilled} == {"final"}
        ledgers, unreadable, _ = read_ledgers(file_lake, day)
        assert not unreadable
        assert [(ledger.complete, ledger.imbalance) for ledger in ledgers] == [(True, []), (True, [])]
    finally:
        dev.close()
    say(f"a session killed and terminated beside a backfill of {len(backfilled)} days: every day final")


def _put_history(lake: Lake, days: Sequence[date], folder: Path) -> None:
    """The vendor's history of days, as fetched before."""
    market = SyntheticMarket(WATCH_LIST[:3])
    for day in days:
        rows = [
            reference_row(
                row["ticker"],
                row["start_ms"],
                **{name: row[name] for name in ("open", "high", "low", "close", "volume", "vwap")},
            )
            for row in market.day_bars(day).to_pylist()
        ]
        until_ms = day_bounds_ms(day)[1]
        file = reference_file(folder / "reference.parquet", rows, list(WATCH_LIST[:3]), until_ms)
        put_dataset(lake, REFERENCE_BARS.name, day.isoformat(), file)


def _state(lake: Lake, day: date) -> str | None:
    """What the daily bars say of a day; None while there are none."""
    content = lake.get(layout.dataset_key(DAILY_BARS.name, day.isoformat()))
    if content is None:
        return None
    states = pq.read_table(pa.BufferReader(content)).column("day_state").to_pylist()
    return str(states[0])


def _assert_nothing_lost(lake: Lake, ledgers: list[Ledger]) -> None:
    assert len(ledgers) >= 4
    for ledger in ledgers:
        assert ledger.complete, ledger.run
        assert ledger.imbalance == []
    counted = sum(count.objects for ledger in ledgers for day in ledger.account.days.values() for count in day.values())
    assert len(lake.keys("raw-data/")) >= counted


def _alive(lake: Lake, after: Holding | None = None) -> Holding | None:
    lease = read_lease(lake)
    if lease is None or lease.is_free(datetime.now(UTC)) or (after and lease.run == after.run):
        return None
    return lease


def _statuses(dev: DagsterDev) -> list[str]:
    return [run["status"] for run in dev.runs()]


def _until(condition: Callable[[], T | None], what: str, seconds: float = 120) -> T:
    return until(condition, what, seconds=seconds, pause=0.5)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _open_files(pid: int) -> set[Path]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(link.readlink())
    return found
