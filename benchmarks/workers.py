"""The same whole-market days by one worker and by two, each of which has one core: what a second machine gives.

The workers make datasets by the function that Dagster's runs call, from and into a folder. Two machines would not share
memory and caches as these do; the network between them and the lake is not in it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from benchmarks import data
from benchmarks.backfill import MINUTE, history_of
from benchmarks.harness import Measured, Run, Table, at_most
from polygon_pipeline.market.calendar import trading_days

_DAYS = 4


def benchmark(run: Run) -> Iterator[Table]:
    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    days = trading_days(date(2026, 1, 1), date(2026, 10, 30))[-_DAYS:]
    history = history_of(run, days, tickers)
    cores = sorted(os.sched_getaffinity(0))[:2]
    one = _workers(run, history, [(cores[0], days)])
    two = _workers(run, history, [(core, days[place::2]) for place, core in enumerate(cores)])
    yield Table(
        f"{_DAYS} days of {tickers:,} tickers by two workers and by one, each with one core",
        "days",
        [("two workers", _DAYS, two), ("one worker", _DAYS, one)],
        [at_most(0.6, two.seconds / one.seconds, "times one worker's time")],
        "days are independent; the workers share the machine's memory and caches, and each takes two seconds to start.",
    )


def _workers(run: Run, history: Path, shares: Sequence[tuple[int, Sequence[date]]]) -> Measured:
    """CPU: of all workers; peak_mb: not told."""
    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    shutil.copytree(history / "lake", folder / "lake")
    context = multiprocessing.get_context("spawn")
    cpu = context.Queue()
    workers = [context.Process(target=_make, args=(folder, core, days, cpu)) for core, days in shares]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    spent = sum(cpu.get(timeout=3600) for _ in workers)
    for worker in workers:
        worker.join()
    return Measured(time.monotonic() - began, spent, float("nan"), None)


def _make(folder: Path, core: int, days: Sequence[date], cpu: multiprocessing.Queue[float]) -> None:
    from polygon_pipeline.datasets.making import FailedDay, make_days
    from polygon_pipeline.lake.dataset_files import put_dataset

    os.sched_setaffinity(0, {core})
    lake, space = data.local_lake(folder), Path(tempfile.mkdtemp(dir=folder))
    for made in make_days(lake, days, lambda _: MINUTE, space, datetime.now(UTC)):
        assert not isinstance(made, FailedDay), made
        put_dataset(lake, made.dataset.name, made.day.isoformat(), made.file)
    cpu.put(time.process_time())
