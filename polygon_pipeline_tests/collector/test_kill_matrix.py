"""The collector's job as processes that are killed without warning, at whatever they are doing, and started again.

The truth is what lay on the disk: after each kill the journals are copied and read, and every frame that was ever seen
in one must be on the lake in the end, once.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polygon_pipeline.collector.journal import RecordType, leftovers
from polygon_pipeline.lake.ledger import decode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import iso_seconds
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import plain_bar
from polygon_pipeline_tests.support.feeds import feed_event
from polygon_pipeline_tests.support.files import stats
from polygon_pipeline_tests.support.s3_server import SeaweedFS

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.fault("processes killed")]

_START_MS = 1769490000000 - 10 * 60_000  # ten minutes before New York's midnight: the bars are of two days
_TICKERS = [f"T{number:03d}" for number in range(100)]
_REVISIONS = 3
_TICK_MS = 2000
_SPEED = 10.0

_PRELOAD = [
    "polygon_pipeline.definitions",
    "polygon_pipeline.collector.collector",
    "polygon_pipeline_tests.collector.test_kill_matrix",
    "boto3",
    "obstore.auth.boto3",
    "exchange_calendars",
]


class Doing(StrEnum):
    """What a collector is at when it is killed, as far as its folder shows."""

    STARTING = "starting"
    RECEIVING = "receiving"
    ROTATING = "rotating"
    UPLOADING = "uploading"
    DELETING = "deleting"
    RECOVERING = "recovering"


def _feed() -> Iterator[Event]:
    """Every fifth of a second a bar of every ticker, each bar three times, with another price each time; endless."""
    for tick in itertools.count():
        start_ms = _START_MS + 60_000 * (tick // _REVISIONS)
        for ticker in _TICKERS:
            yield feed_event(_START_MS + tick * _TICK_MS, plain_bar(ticker, start_ms, tick + 1))


def _collect(environment: Mapping[str, str], log: Path, config: dict[str, Any]) -> None:
    """The child: one run of the job, as Dagster would launch it."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)

    import dagster as dg

    from polygon_pipeline.definitions import build_defs

    job = build_defs().get_job_def("collect_aggregates")
    with dg.DagsterInstance.ephemeral() as instance:
        job.execute_in_process(run_config={"ops": {"collect_aggregates": {"config": config}}}, instance=instance)


@dataclass
class _Matrix:
    """One lake, one journal folder, and one collector after another."""

    lake: Lake
    folder: Path
    environment: dict[str, str]
    random: random.Random
    seen: set[tuple[datetime, bytes]] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.journals = self.folder / "journal"
        self.journals.mkdir()
        self.log = self.folder / "collectors.log"
        self.environment |= {"JOURNAL_DIR": str(self.journals), "LAKE_URI": self.lake.uri, "POLYGON_API_KEY": "key"}
        self.environment |= {"POLYGON_TICKERS": ",".join(_TICKERS)}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOAD)

    def start(self, **config: Any) -> ForkServerProcess:
        process = self.context.Process(
            target=_collect, args=(self.environment, self.log, {"checkpoint_seconds": 0.6, **config}), daemon=True
        )
        process.start()
        return process

    def kill_one(self, doing: Doing) -> None:
        """Starts a collector, kills it at that, and notes what it leaves."""
        is_time = self.moment(doing)
        process = self.start()
        deadline = time.monotonic() + 10
        while process.is_alive() and not (hit := is_time()) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(self.random.choice([0, 0, 0.001, 0.003, 0.01, 0.03]))
        process.kill()
        process.join()
        assert process.exitcode == -9, self.log.read_text()[-5000:]
        self.kills[doing if hit else "whenever"] += 1
        self.look(self.folder / f"copy-{self.kills.total()}")

    def moment(self, doing: Doing) -> Callable[[], bool]:
        """A function that says whether the collector about to be started is at it."""
        before = {folder: _looks(folder) for folder in self.journals.iterdir()}
        started, pause = time.monotonic(), self.random.uniform(0, 1.0)
        enough = self.random.choice([1, 1000, 10_000, 25_000])
        saves = self.random.randint(1, 4)
        states: set[int] = set()
        deepest = 0

        def is_time() -> bool:
            nonlocal deepest
            own = next((folder for folder in self.journals.iterdir() if folder not in before), None)
            if doing is Doing.STARTING or (doing is Doing.RECOVERING and not before):
                return time.monotonic() > started + pause
            if doing is Doing.RECOVERING:
                return any(_looks(folder) != looks for folder, looks in before.items())
            if own is None:
                return False
            segments, state = _looks(own)
            states.add(state)
            deepest = max(deepest, *segments, 0) if segments else deepest
            match doing:
                case Doing.RECEIVING:
                    return sum(segments.values()) >= enough
                case Doing.ROTATING:
                    return len(segments) > 1
                case Doing.UPLOADING:
                    return len(states - {0}) >= saves
                case _:
                    return deepest > 1 and 1 not in segments

        return is_time

    def look(self, copy: Path) -> None:
        """Reads the dead collector's journals from a copy, and the archive's listing."""
        shutil.copytree(self.journals, copy)
        for journal in leftovers(copy):
            for number in journal.numbers():
                end, _ = journal.end_of(number)
                records = journal.read(number, 0, end)
                self.seen |= {(r.received_at, r.payload) for r in records if r.kind is RecordType.FRAME}
            journal.release()
        shutil.rmtree(copy)
        self.published |= set(self.lake.keys("raw-frames"))

    def finish(self) -> None:
        process = self.start(stop_after_seconds=3)
        process.join(120)
        assert process.exitcode == 0, self.log.read_text()[-5000:]

    def check(self) -> str:
        """Everything is on the lake, once. Returns the account."""
        assert list(self.journals.glob("*/journal.json")) == []
        assert leftovers(self.journals) == []
        archived = self.archived()
        keys = set(self.lake.keys("raw-frames"))
        assert keys >= self.published
        doubled = [frame for frame, count in Counter(archived).items() if count > 1]
        lost = self.seen - set(archived)
        assert (len(lost), len(doubled)) == (0, 0)

        latest: dict[str, tuple[datetime, dict[str, Any]]] = {}
        bars = 0
        for received_at, payload in archived:
            for event in json.loads(payload):
                if event["ev"] == "AM":
                    bars += 1
                    day = trade_date(event["s"])
                    key = f"raw-data/{day}/{event['sym']}/{iso_seconds(event['s'])}.json"
                    latest[key] = max(latest.get(key, (received_at, event)), (received_at, event), key=lambda x: x[0])
        content: dict[str, bytes] = {}
        objects = self.lake.keys("raw-data")
        self.lake.get_many(objects, content.__setitem__)
        assert set(objects) == set(latest)
        for key, (received_at, event) in latest.items():
            record = json.loads(content[key])
            assert record["bar_data"]["close"] == event["c"]
            assert record["collected_at"] == f"{received_at:%Y-%m-%dT%H:%M:%S.%f}"[:23] + "Z"

        ledgers = {key.rpartition("/")[2]: decode_ledger(self.lake.get(key) or b"") for key in self.lake.keys("ledger")}
        assert all(ledger.complete for ledger in ledgers.values())
        assert [ledger.imbalance for ledger in ledgers.values() if ledger.imbalance] == []
        counts = [
            count for ledger in ledgers.values() for days in ledger.account.days.values() for count in days.values()
        ]
        assert sum(count.bars for count in counts) == bars
        assert sum(count.objects for count in counts) == len(objects)
        assert sum(ledger.account.frames for ledger in ledgers.values()) == len(archived)
        assert len({key.split("/")[1] for key in objects}) == 2
        kills = ", ".join(f"{doing} {count}" for doing, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kills}), {len(ledgers)} runs, {len(archived):,} frames "
            f"({len(self.seen):,} of them seen in a dead run's journal), {bars:,} bars, {len(objects):,} objects, "
            f"{len(lost)} lost, {len(doubled)} doubled"
        )

    def archived(self) -> list[tuple[datetime, bytes]]:
        return [
            (datetime.fromisoformat(line.received_at).astimezone(UTC), line.content)
            for line in archived_lines(self.lake)
            if line.is_frame
        ]


def _looks(folder: Path) -> tuple[dict[int, int], int]:
    """A journal's segments with their sizes, and when its state was saved; 0: never."""
    found = stats(folder, "*")
    segments = {int(path.stem): stat.st_size for path, stat in found.items() if path.suffix == ".segment"}
    state = found.get(folder / "state.json")
    return segments, state.st_mtime_ns if state else 0


def _run(matrix: _Matrix, kills: int) -> str:
    # Each kind of moment in turn, in another order every time; so one recovery's kill may follow another's.
    moments = [moment for _ in range(kills) for moment in matrix.random.sample(list(Doing), len(Doing))][:kills]
    with Exchange(_feed(), speed=_SPEED) as exchange:
        matrix.environment["POLYGON_WEBSOCKET_URL"] = exchange.url
        matrix.kill_one(Doing.RECEIVING)
        for moment in moments[1:]:
            matrix.kill_one(moment)
        matrix.finish()
    return matrix.check()


def test_thirty_kills_with_a_file_lake_lose_and_duplicate_nothing(
    file_lake: Lake, tmp_path: Path, say: Callable[[str], None]
) -> None:
    account = _run(_Matrix(file_lake, tmp_path, {}, random.Random(7)), 30)
    say(f"kill matrix, file lake: {account}")


def test_twelve_kills_with_an_s3_lake_lose_and_duplicate_nothing(
    s3_lake: Lake, seaweedfs: SeaweedFS, tmp_path: Path, say: Callable[[str], None]
) -> None:
    account = _run(_Matrix(s3_lake, tmp_path, seaweedfs.address.environment(), random.Random(11)), 12)
    say(f"kill matrix, S3 lake: {account}")
