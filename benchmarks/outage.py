"""The memory of a collector while its storage is gone for ten minutes of a full market, and when it is back.

The ten minutes' bars, one per ticker and minute, come as fast as the collector takes them, and ten times over, which
stands for the second bars; the server behind the lake is stopped meanwhile.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import data
from benchmarks.collecting import plan
from benchmarks.edge import Server
from benchmarks.harness import PeakMemory, Run, Table, at_most, measure, resident_mb
from benchmarks.server import serving
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.s3_server import SeaweedFS

Found = tuple[float, float, float, int]  # MB before, at most during, at most after; bytes that waited


def collector(run: Run, url: str, bars: int) -> Callable[[], Found]:
    import pyarrow  # noqa: F401 so that it is in memory before

    from polygon_pipeline.collector.collector import Collector, Progress

    server = SeaweedFS(Path(tempfile.mkdtemp(dir=run.scratch)))
    server.start()
    reach = Server(server)
    lake = reach.lake(reach.new_bucket())
    journal_dir = Path(tempfile.mkdtemp(dir=run.scratch))
    latest: list[Progress] = []
    waited = 0

    def run_through() -> Found:
        nonlocal waited
        collecting = Collector(lake, plan(journal_dir, url), logging.getLogger("quiet"))
        over = threading.Event()
        thread = threading.Thread(
            target=lambda: collecting.run(lambda: "all" if over.is_set() else None, latest.append), daemon=True
        )
        thread.start()
        while not latest or latest[-1].account.bars < bars // 11:
            time.sleep(0.05)
        before = resident_mb()
        server.stop()
        with PeakMemory() as during:
            journal = journal_dir / "bench"
            previous = -1
            while previous < (waited := sum(path.stat().st_size for path in journal.glob("*.segment"))):
                previous = waited
                time.sleep(3)
        server.start()
        with PeakMemory() as after:
            while latest[-1].account.bars < bars:
                time.sleep(0.1)
            over.set()
            thread.join()
        server.stop()
        return before, during.mb, after.mb, waited

    return run_through


def benchmark(run: Run) -> Iterator[Table]:
    minutes = 10 if run.full else 2
    bars = 11 * minutes * data.WHOLE_MARKET
    with serving(data.WHOLE_MARKET, run.seed, bars, Channel.MINUTE) as (url, sent):
        measured = measure(collector, run, url, sent)
    before, during, after, waited = measured.result
    yield Table(
        f"an outage of the storage through {minutes} minutes of a full market: {waited / 2**20:,.0f} MiB wait on disk",
        "bars",
        [("ours", sent, measured)],
        [at_most(1.2, max(during, after) / before, f"times its memory before ({before:.0f} MB)")],
        "one segment of the journal (16 MB) and what is made of it; the backlog stays on disk.",
    )
