"""Measuring and reporting, the same way for every benchmark.

Belongs here: running a contender in a process of its own, and the tables. Does not belong here: any contender.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """How the benchmarks are run: everything a benchmark may depend on.

    folder: for data that is worth keeping; scratch: for what is not.
    """

    full: bool
    seed: int
    folder: Path
    scratch: Path


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender's work. cpu: seconds of all threads of its process; peak_mb: of the process, imports included."""

    seconds: float
    cpu: float
    peak_mb: float
    result: Any

    def rate(self, units: float) -> float:
        return units / self.seconds


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a contender returns that has to wait for others before it begins: its result, and its own time."""

    result: Any
    seconds: float


@dataclasses.dataclass(frozen=True)
class Table:
    """What a benchmark found. ours comes first in rows. goals: (what was to be reached, what was, whether it is)."""

    title: str
    unit: str
    rows: Sequence[tuple[str, int, Measured]]
    goals: Sequence[tuple[str, str, bool]]
    bound: str = ""

    def markdown(self) -> str:
        _, units, ours = self.rows[0]
        lines = [
            f"| | {self.unit} | seconds | {self.unit} a second | times ours | CPU µs each | peak MB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, count, measured in self.rows:
            relation = measured.seconds / count / (ours.seconds / units)
            lines.append(
                f"| {name} | {count:,} | {measured.seconds:.2f} | {measured.rate(count):,.0f} | {relation:.2f} | "
                f"{measured.cpu / count * 1e6:.2f} | {measured.peak_mb:,.0f} |"
            )
        goals = [f"- {'met' if met else '**missed**'}: {goal}: {found}" for goal, found, met in self.goals]
        bound = ["\n" + textwrap.fill(f"What bounds it: {self.bound}", 120)] if self.bound else []
        return "\n".join([f"### {self.title}", "", *lines, "", *goals, *bound])


def at_least(goal: float, found: float, what: str) -> tuple[str, str, bool]:
    return f"at least {goal:,g} {what}", f"{found:,.2f}", found >= goal


def at_most(goal: float, found: float, what: str) -> tuple[str, str, bool]:
    return f"at most {goal:,g} {what}", f"{found:,.2f}", found <= goal


def measure(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> Measured:
    """Runs `prepare(*arguments)` and then, timed, what that returns, in a fresh process.

    Both must be importable; imports belong into prepare, so that they are not timed. Raises what either raises.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured: Measured = pool.apply(_work, (prepare, arguments))
        return measured


def contest(
    contenders: Sequence[tuple[str, Callable[[], Measured]]], units: int, repeats: int, same: Callable[[Any, Any], None]
) -> list[tuple[str, int, Measured]]:
    """Measures all of them in turn, `repeats` times over, and takes each one's median run.

    same(ours, theirs) is called with the results of the first round, and raises where they are not equal: only then
    does a time count.
    """
    rounds = [[measured() for _, measured in contenders]]
    for theirs in rounds[0][1:]:
        same(rounds[0][0].result, theirs.result)
    rounds += [[measured() for _, measured in contenders] for _ in range(repeats - 1)]
    return [
        (name, units, _median([measurements[place] for measurements in rounds]))
        for place, (name, _) in enumerate(contenders)
    ]


def resident_mb() -> float:
    """What this process holds in memory now."""
    return _status("VmRSS")


class PeakMemory:
    """The largest resident size between start and end of a `with` block, looked at a hundred times a second."""

    def __enter__(self) -> PeakMemory:
        self.mb = resident_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.mb = max(self.mb, resident_mb())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _work(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> Measured:
    work = prepare(*arguments)
    started, used = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    if isinstance(result, Timed):
        result, seconds = result.result, result.seconds
    return Measured(seconds, cpu, _status("VmHWM"), result)


def _median(measurements: Sequence[Measured]) -> Measured:
    middle = statistics.median_low([measured.seconds for measured in measurements])
    return next(measured for measured in measurements if measured.seconds == middle)


def _status(name: str) -> float:
    # Not getrusage: its maximum is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
