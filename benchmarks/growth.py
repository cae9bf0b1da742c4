"""How cost grows: the same work at 1, 4 and 16 times the size. With --write, also growth.png.

Frames of more and more tickers are normalized and derived from; frames of one journal are published. The memory of
publishing holds the simulator that filled the journal, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import data, derived, normalizing
from benchmarks.harness import Measured, Run, Table, at_most, measure
from polygon_pipeline.market.bars import Channel

PLOT = Path(__file__).with_name("growth.png")
_TIMES = (1, 4, 16)


def publishing(run: Run, tickers: int) -> Callable[[], int]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.collector.journal import Journal, JournalHeader, RecordType
    from polygon_pipeline.collector.publisher import Publisher

    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    lake = data.local_lake(folder)
    header = JournalHeader("bench", data.DAY, lake.uri, "simulated", datetime.now(UTC), False, True)
    journal = Journal(folder / "journal", header)
    for _, payload, _ in data.payloads(tickers, run.seed, Channel.MINUTE):
        journal.append(RecordType.FRAME, payload)
    journal.close()
    publisher = Publisher(lake, journal, header)

    def work() -> int:
        while publisher.step():
            pass
        return publisher.account.bars

    return work


def benchmark(run: Run) -> Iterator[Table]:
    largest = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    series: dict[str, list[tuple[int, Measured]]] = {"publishing": [], "normalizing": [], "deriving": []}
    for times in _TIMES:
        tickers = largest * times // _TIMES[-1]
        _, bars = data.frames_lake(run, tickers)
        normalized = normalizing.ours(run, tickers, Channel.MINUTE)()
        series["publishing"].append((bars, measure(publishing, run, tickers)))
        series["normalizing"].append((bars, measure(normalizing.ours, run, tickers, Channel.MINUTE)))
        series["deriving"].append((bars, measure(derived.ours, run, normalized)))
    for name, points in series.items():
        (least, small), (most, large) = points[0], points[-1]
        slope = (large.seconds / most) / (small.seconds / least)
        yield Table(
            f"growth: {name} at {', '.join(map(str, _TIMES))} times the size",
            "bars",
            [(f"{times} times", bars, measured) for times, (bars, measured) in zip(_TIMES, points, strict=True)],
            [at_most(1.3, slope, "times the time a bar at the largest size")],
        )
    if run.full:
        _plot(series)


def _plot(series: dict[str, list[tuple[int, Measured]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for name, points in series.items():
        bars = [bars / 1e6 for bars, _ in points]
        time.plot(bars, [measured.seconds for _, measured in points], marker="o", label=name)
        memory.plot(bars, [measured.peak_mb for _, measured in points], marker="o", label=name)
    for axes, what in ((time, "seconds"), (memory, "peak MB")):
        axes.set(xlabel="million bars", ylabel=what, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    time.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
