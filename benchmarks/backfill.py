"""A backfill of all minute datasets with their checks, beside the same transformations as a bare loop in one process.

The history is on the lake already. A watch list's days go through a real `dagster dev`, from the click to the
backfill's end; then the same days again, with the run's process killed half way. The whole market's go through one run
of Dagster's in one process. All must come to the same bytes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path

from benchmarks import data
from benchmarks.harness import Measured, Run, Table, at_most, measure, say
from benchmarks.processes import usage_by_part
from polygon_pipeline.collector.lease import Holding, read_lease
from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.waiting import until

_TICKERS = 12
MINUTE = [d for d in catalog.FOLLOWING if d.channel is Channel.MINUTE and not d.required]
_LAST = date(2026, 10, 30)
_MOST_SECONDS = {252: 180, 5_000: 3_600}


def benchmark(run: Run) -> Iterator[Table]:
    yield _session_start(run)
    yield _through_the_daemon(run, 252)
    if run.full:
        yield _through_the_daemon(run, 5_000)
    yield _whole_market(run, 6)  # more than are drawn by themselves


def bare_loop(run: Run, history: Path, days: Sequence[date]) -> Callable[[], Path]:
    from polygon_pipeline.datasets.making import make_days
    from polygon_pipeline.lake.dataset_files import put_dataset

    source, folder = data.local_lake(history), Path(tempfile.mkdtemp(dir=run.scratch))
    target, space = data.local_lake(folder), folder / "space"
    space.mkdir()

    def work() -> Path:
        for made in make_days(source, days, lambda _: MINUTE, space, datetime.now(UTC)):
            put_dataset(target, made.dataset.name, made.day.isoformat(), made.file)  # type: ignore[union-attr]
        return target.local_root

    return work


def in_one_process(run: Run, history: Path, days: Sequence[date]) -> Callable[[], Path]:
    import dagster as dg

    from polygon_pipeline.definitions import build_defs
    from polygon_pipeline.defs.partitions import Project, day_tags

    lake = _copy_of(history, Path(tempfile.mkdtemp(dir=run.scratch)))
    os.environ["LAKE_URI"] = lake.uri
    job = build_defs(Project(history_start=days[0])).resolve_implicit_global_asset_job_def()
    instance = dg.DagsterInstance.local_temp(tempfile.mkdtemp(dir=run.scratch))

    def work() -> Path:
        names = [dg.AssetKey(dataset.name) for dataset in MINUTE]
        assert job.execute_in_process(asset_selection=names, instance=instance, tags=day_tags(days)).success
        return lake.local_root

    return work


def _through_the_daemon(run: Run, count: int) -> Table:
    days = trading_days(date(2003, 9, 10), _LAST)[-count:]
    history = history_of(run, days, _TICKERS)
    # 252 days are enough for a day's time; the rest of 5,000 is like them.
    bare = measure(bare_loop, run, history, days[-252:])
    with _dagster(run, history, days[0]) as (dev, lake):
        ours, started_after = _backfill(dev, lake, days)
        say(f"{count:,} days took {ours.seconds:.0f} s, {bare.seconds / 252 * count:.0f} s in the bare loop …")
        made = _hashes(lake.local_root, MINUTE)
        assert _hashes(bare.result, MINUTE).items() <= made.items(), "the backfill's files are not the bare loop's"
        killed = _killed_half_way(dev, lake, days) if count == 252 else None
        assert _hashes(lake.local_root, MINUTE) == made, "the same days again came to other files"
    rows = [("through the daemon", count, ours), ("bare loop", 252, bare)]
    if killed:
        rows.append(("the same days again, killed half way", count, killed))
    ratio = (ours.seconds / count) / (bare.seconds / 252)
    return Table(
        f"a backfill of {count:,} days of {_TICKERS} tickers, {len(MINUTE)} datasets",
        "days",
        rows,
        [at_most(_MOST_SECONDS[count], ours.seconds, "seconds"), at_most(3, ratio, "times the bare loop")],
        f"Dagster: the first day is made {started_after:.0f} s after the click, as the daemon looks for backfills "
        "every 30 s and writes a planned event for each day and dataset (some 10 ms each) before a run may start; its "
        "end is noticed at such a look as well. Each of the seven materializations of a day is another 10 ms.",
    )


def _session_start(run: Run) -> Table:
    """How long after the sensor is turned on a collector is connected, at rest and beside a backfill."""
    days = trading_days(date(2003, 9, 10), _LAST)[-252:]
    rows = []
    with _dagster(run, history_of(run, days, _TICKERS), days[0], demo=True) as (dev, lake):
        until(lambda: _is_connected(lake, None), "the first session begins", seconds=120, pause=0.5)
        for name in ("beside a backfill", "at rest"):
            dev.turn_off("market_session_sensor")
            before = read_lease(lake)
            dev.terminate(dev.runs()[0]["runId"])
            until(lambda: not dev.collectors(), "the session before is terminated", seconds=120, pause=0.5)
            if name == "beside a backfill":
                made = _count(lake)
                dev.backfill([dataset.name for dataset in MINUTE], days)
                until(lambda: _count(lake) > made + 20, "the backfill is at work", seconds=300, pause=0.5)  # noqa: B023
            started = time.monotonic()
            dev.turn_on("market_session_sensor")
            until(lambda: _is_connected(lake, before), "the next session begins", seconds=120, pause=0.2)  # noqa: B023
            rows.append((name, 1, Measured(time.monotonic() - started, float("nan"), float("nan"), None)))
            if name == "beside a backfill":
                until(lambda: _count(lake) >= len(days) * len(MINUTE), "it is made", seconds=600, pause=1)
    return Table(
        "from the sensor being turned on to a collector that is connected",
        "sessions",
        rows,
        [at_most(30, rows[0][2].seconds, "seconds beside a backfill")],
        "the sensor's next tick, up to 15 s away, and the start of the run's process.",
    )


def _is_connected(lake: Lake, after: Holding | None) -> bool:
    holding = read_lease(lake)
    return bool(holding and holding.status.connected and not (after and holding.run == after.run))


def _whole_market(run: Run, count: int) -> Table:
    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    days = trading_days(date(2026, 1, 1), _LAST)[-count:]
    history = history_of(run, days, tickers)
    bare = measure(bare_loop, run, history, days)
    ours = measure(in_one_process, run, history, days)
    assert _hashes(ours.result, MINUTE) == _hashes(bare.result, MINUTE)
    return Table(
        f"{count} days of {tickers:,} tickers, {len(MINUTE)} datasets with their checks, in one run",
        "days",
        [("one run", count, ours), ("bare loop", count, bare)],
        [at_most(1.2, ours.seconds / bare.seconds, "times the bare loop"), at_most(2000, ours.peak_mb, "MB")],
        "the transformations; checks and events of one day are made beside those of the next.",
    )


def history_of(run: Run, days: Sequence[date], tickers: int) -> Path:
    """A folder with the history of these days and tickers, kept; made like the vendor's flat files."""
    from polygon_pipeline.datasets.reference import from_flat_file
    from polygon_pipeline.lake.dataset_files import put_dataset
    from polygon_pipeline.simulator.flat_files import flat_file

    folder = run.folder / f"history-{tickers}-seed-{run.seed}"
    lake, market = data.local_lake(folder), data.market(tickers, run.seed)
    known = {key.split("date=")[1][:10] for key in lake.keys(f"datasets/{catalog.REFERENCE_BARS.name}/")}
    missing = [day for day in days if day.isoformat() not in known]
    if missing:
        say(f"making the history of {len(missing):,} days of {tickers:,} tickers …")
    packed, file = run.scratch / "flat-file.csv.gz", run.scratch / "reference.parquet"
    for day in missing:
        packed.write_bytes(flat_file(market.day_bars(day, Channel.MINUTE)))
        from_flat_file(day, packed, datetime(2026, 11, 1, tzinfo=UTC), "an-etag", file, run.scratch)
        put_dataset(lake, catalog.REFERENCE_BARS.name, day.isoformat(), file)
    return folder


def _copy_of(history: Path, folder: Path, simulated: bool = False) -> Lake:
    lake = data.local_lake(folder)
    if simulated:
        lake.claim("simulated")  # refused once there is data
    shutil.copytree(history / "lake", lake.local_root, dirs_exist_ok=True)
    return lake


@contextmanager
def _dagster(run: Run, history: Path, first: date, demo: bool = False) -> Iterator[tuple[DagsterDev, Lake]]:
    """A `dagster dev` and its lake with the history. demo: with simulated sessions; else nothing is to be collected."""
    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    lake = _copy_of(history, folder, demo)
    dev = DagsterDev(folder, lake)
    try:
        live = {"POLYGON_API_KEY": "none", "POLYGON_TICKERS": "SPY", "POLYGON_WEBSOCKET_URL": "ws://127.0.0.1:9"}
        dev.start(POLYGON_HISTORY_START=first.isoformat(), **({} if demo else live))
        yield dev, lake
    finally:
        dev.close()


def _backfill(dev: DagsterDev, lake: Lake, days: Sequence[date]) -> tuple[Measured, float]:
    """How long it took, and after how long the first file was there. CPU: of the daemon, the code server and runs."""
    before = sum(usage.cpu for usage in usage_by_part(dev).values())
    started = time.monotonic()
    asked = dev.backfill([dataset.name for dataset in MINUTE], days)
    until(lambda: _count(lake), "the first day is made", seconds=300, pause=0.5)
    first = time.monotonic() - started
    until(lambda: dev.backfill_status(asked) != "REQUESTED", "the backfill ends", seconds=7200, pause=0.5)
    seconds = time.monotonic() - started
    assert dev.backfill_status(asked) == "COMPLETED_SUCCESS", dev.backfill_status(asked)
    usage = usage_by_part(dev).values()
    return Measured(seconds, sum(u.cpu for u in usage) - before, sum(u.rss_mb for u in usage), None), first


def _killed_half_way(dev: DagsterDev, lake: Lake, days: Sequence[date]) -> Measured:
    """The same backfill from the history alone, with the process of its run killed once; CPU is not told."""
    for dataset in MINUTE:
        shutil.rmtree(lake.local_root / "datasets" / dataset.name)
    started = time.monotonic()
    asked = dev.backfill([dataset.name for dataset in MINUTE], days)
    half = len(days) * len(MINUTE) // 2
    until(lambda: _count(lake) >= half, "half of it is made", seconds=300, pause=0.5)
    for pid, line in dev.processes():
        if "spawn_main" in line:  # the code server's child, in which the run is
            os.kill(pid, signal.SIGKILL)
    until(lambda: dev.backfill_status(asked) != "REQUESTED", "the backfill ends", seconds=900, pause=0.5)
    until(lambda: _count(lake) == len(days) * len(MINUTE), "every day is made", seconds=300, pause=0.5)
    return Measured(time.monotonic() - started, float("nan"), float("nan"), None)


def _count(lake: Lake) -> int:
    return sum(1 for dataset in MINUTE for _ in (lake.local_root / "datasets" / dataset.name).glob("date=*/*"))


def _hashes(root: Path, datasets: Sequence[Dataset]) -> Mapping[str, str]:
    """Each file's content by its key."""
    return {
        str(file.relative_to(root)): sha256(file.read_bytes()).hexdigest()
        for dataset in datasets
        for file in sorted((root / "datasets" / dataset.name).glob("date=*/*"))
    }
