"""`python -m benchmarks.soak`: sessions back to back with chaos, on a real `dagster dev` and a real S3 server.

Every session has dropped and reset connections, refused logins and corrupted frames; every third one's first collector
is killed, and in every other third the store goes away for a while. Nobody helps. At the end every day must be final,
or complete while its history is not out, and every ledger complete and balanced. What daemon, code server and collector
take must be in the last third of the time at most 1.3 times what it was in the first; each session's collector is a new
process, so its figures are compared between sessions. Ten sessions take some forty minutes, most of it waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import say
from benchmarks.processes import CODE_SERVER, COLLECTOR, DAEMON, Usage, folder_mb, usage_by_part
from polygon_pipeline.lake.errors import STORE_ERRORS
from polygon_pipeline.lake.ledger import read_ledgers, reconcile
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, trading_days
from polygon_pipeline.polygon.flat_files import expected_at
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.made_days import day_state
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_PARTS = (DAEMON, CODE_SERVER, COLLECTOR)
_FIGURES: dict[str, Callable[[Usage], float]] = {
    "memory, MB": lambda usage: usage.rss_mb,
    "threads": lambda usage: usage.threads,
    "files": lambda usage: usage.files,
}
_HIGHEST_RATIO = 1.3
_SAMPLE_SECONDS = 5.0
_OUTAGE_SECONDS = 40.0
_FAULTS = (
    "drop=0.001,reset=0.0005,close=0.0005,auth_timeout=0.2,late=0.01,duplicate=0.005,bad_event=0.005,not_a_number=0.001"
)
# From the end of the last session, until its history is fetched and its datasets are made.
_FINAL_SECONDS = 900.0


class Sample(NamedTuple):
    """What was there at a time. at: seconds since the start. session: how many have begun."""

    at: float
    session: int
    usage: dict[str, Usage]
    home_mb: float


class Soak:
    """One soak. sessions: how many are played, the last being the last complete one; speed: market seconds a second."""

    def __init__(self, folder: Path, sessions: int, speed: float) -> None:
        self.days = completed_sessions(datetime.now(UTC), sessions)
        self.samples: list[Sample] = []
        self.events: list[str] = []
        self._speed = speed
        self._server = SeaweedFS(folder / "s3")
        self._server.start()
        self._started = time.monotonic()
        self.lake = self._server.lake()
        (folder / "dev").mkdir()
        self._dev = DagsterDev(folder / "dev", self.lake, "polygon_pipeline_tests.support.fast_demo")

    def run(self) -> None:
        """Plays all sessions and waits until the days are final, or until that takes too long."""
        variables = {
            "POLYGON_API_KEY": "simulator",
            "POLYGON_HISTORY_START": trading_days(date(2026, 1, 1), self.days[0])[-1].isoformat(),
            "FAST_DEMO_SESSIONS": str(len(self.days)),
            "FAST_DEMO_SPEED": str(self._speed),
            "FAST_DEMO_CHECKPOINT": "20",
            "FAST_DEMO_DRAIN": "20",
            "FAST_DEMO_SENSORS": "120",
            "FAST_DEMO_FAULTS": _FAULTS,
        }
        over = threading.Event()
        try:
            self._dev.start(**self._server.address.environment(), **variables)
            sampling = threading.Thread(target=self._sample, args=(over,), daemon=True)
            sampling.start()
            for number in range(len(self.days)):
                self._play(number)
            deadline = time.monotonic() + _FINAL_SECONDS
            while self.not_final() and time.monotonic() < deadline:
                time.sleep(10)
            over.set()
            sampling.join()
        finally:
            self._dev.close()

    def close(self) -> None:
        self._server.stop()

    def not_final(self) -> list[date]:
        """Days that are not as they should be by now: one without a gap is complete, until its history is out."""
        now = datetime.now(UTC)
        states = {day: _state(self.lake, day) for day in self.days}
        return [
            day
            for day in self.days
            if states[day] != "final" and (states[day] != "complete" or expected_at(day) <= now)
        ]

    def _play(self, number: int) -> None:
        """Waits through one session, and disturbs it."""
        pids = self._wait_for_collector()
        self._say(f"session {number + 1} of {len(self.days)}")
        length = 57_600 / self._speed
        time.sleep(length / 3)
        if number % 3 == 1:
            os.kill(pids[0], signal.SIGKILL)
            self._say("the collector is killed")
            self._wait_for_collector(after=pids[0])
            time.sleep(length / 3)
        elif number % 3 == 2:
            self._server.stop()
            self._say("the store is away")
            time.sleep(_OUTAGE_SECONDS)
            self._server.start()
            self._say("the store is back")
        while self._dev.collectors():
            time.sleep(1)

    def _wait_for_collector(self, after: int | None = None) -> list[int]:
        deadline = time.monotonic() + 400
        while not (pids := [pid for pid in self._dev.collectors() if pid != after]):
            if time.monotonic() > deadline:
                raise RuntimeError("no collector was started within 400 s")
            time.sleep(1)
        return pids

    def _sample(self, over: threading.Event) -> None:
        while not over.wait(_SAMPLE_SECONDS):
            session = sum(1 for event in self.events if event.startswith("session"))
            usage = usage_by_part(self._dev)
            self.samples.append(Sample(time.monotonic() - self._started, session, usage, folder_mb(self._dev.home)))

    def _say(self, event: str) -> None:
        self.events.append(event)
        say(f"{time.monotonic() - self._started:5.0f} s: {event}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--sessions", type=int, default=10, help="how many are played (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=640.0, help="market seconds a second (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.sessions, options.speed)
        try:
            soak.run()
            missed = _report(soak)
        finally:
            soak.close()
    if missed:
        sys.exit(f"Missed: {'; '.join(missed)}.")


def _report(soak: Soak) -> list[str]:
    """Prints what was found; returns what is not as it has to be."""
    missed = [f"{day} is {_state(soak.lake, day)}, not final" for day in soak.not_final()]
    print("| day | runs | bars | revisions | quarantined | gaps | state |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for day in soak.days:
        ledgers, _, _ = read_ledgers(soak.lake, day)
        balance = reconcile(soak.lake, day, Channel.MINUTE)
        missed += [f"{day}: {error}" for error in balance.errors]
        missed += [f"{day}: the ledger of {ledger.run} is not complete" for ledger in ledgers if not ledger.complete]
        if balance.objects_on_lake != balance.objects_counted:
            missed.append(f"{day}: {balance.objects_on_lake} objects, but {balance.objects_counted} counted")
        revisions = balance.bars - balance.objects_counted
        counts = (balance.runs, balance.bars, revisions, balance.quarantined, balance.gaps)
        print(f"| {day} | {' | '.join(f'{count:,}' for count in counts)} | {_state(soak.lake, day)} |")
    print("\n| part | figure | first third | last third | ratio |")
    print("|---|---|--:|--:|--:|")
    for part in _PARTS:
        for figure, value in _FIGURES.items():
            first, last = _thirds(soak.samples, part, value)
            print(f"| {part} | {figure} | {first:.0f} | {last:.0f} | {last / first:.2f} |")
            if last > _HIGHEST_RATIO * first:
                missed.append(f"{figure} of the {part} grew {last / first:.2f} times")
    first_session = next(sample for sample in soak.samples if sample.session)
    end = soak.samples[-1]
    grown = (end.home_mb - first_session.home_mb) / len(soak.days)
    print(f"\nDAGSTER_HOME: {end.home_mb:.1f} MB after {end.at / 60:.0f} minutes, {grown:.1f} MB a session.")
    return missed


def _thirds(samples: Sequence[Sample], part: str, value: Callable[[Usage], float]) -> tuple[float, float]:
    """The median of a figure in the first third of the time and in the last; of the collector's, of the sessions."""
    found = [value(sample.usage[part]) for sample in samples if sample.session and part in sample.usage]
    third = max(1, len(found) // 3)
    return statistics.median(found[:third]), statistics.median(found[-third:])


def _state(lake: Lake, day: date) -> str:
    """What the daily bars say of a day."""
    with contextlib.suppress(*STORE_ERRORS):
        return day_state(lake, day) or "not made"
    return "not made"


if __name__ == "__main__":
    main()
