"""The data the benchmarks work on: the simulator's days, made once and kept below var/benchmarks.

Belongs here: making them. Does not belong here: reading them in any way that is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

from benchmarks.harness import Run, say
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import first_tickers
from polygon_pipeline_tests.support import lakes

DAY = date(2026, 1, 26)
WHOLE_MARKET = 11_000

_EVENTS_A_FRAME = 200
_FRAME_MS = 50  # of market time: a quiet minute makes small frames, as the vendor's does
_SEGMENT_BYTES = 16 * 1024 * 1024


def market(tickers: int, seed: int) -> SyntheticMarket:
    return SyntheticMarket(first_tickers(tickers), seed=seed)


def payloads(tickers: int, seed: int, channel: Channel) -> Iterator[tuple[datetime, bytes, int]]:
    """A day's frames as the vendor would send them: when each arrives, its bytes, and how many bars it has."""
    waiting: list[Event] = []
    for event in SyntheticFeed(market(tickers, seed), DAY, (channel,)):
        if waiting and (len(waiting) == _EVENTS_A_FRAME or event.emit_ms - waiting[0].emit_ms > _FRAME_MS):
            yield _frame(waiting)
            waiting = []
        waiting.append(event)
    if waiting:
        yield _frame(waiting)


def frames_lake(run: Run, tickers: int, channel: Channel = Channel.MINUTE) -> tuple[Lake, int]:
    """A local lake with a day's raw-frames of so many tickers, and how many bars they hold, revisions included."""
    folder = run.folder / f"frames-{channel}-{tickers}-seed-{run.seed}"
    count = folder / "bars"
    lake = local_lake(folder)
    if not count.exists():
        say(f"making a day of {channel} frames of {tickers:,} tickers …")
        count.write_text(str(_archive(lake, payloads(tickers, run.seed, channel))))
    return lake, int(count.read_text())


def local_lake(folder: Path) -> Lake:
    return lakes.local_lake(folder / "lake")


def frame_files(lake: Lake) -> list[Path]:
    return [lake.local_root / key for key in lake.keys(layout.frames_prefix(DAY))]


def _archive(lake: Lake, day: Iterator[tuple[datetime, bytes, int]]) -> int:
    lines: list[bytes] = []
    size = bars = 0
    segment = 1
    previous_us = 0
    for arrival, payload, count in day:
        # Strictly increasing, as the journal stamps them.
        previous_us = max(previous_us + 1, int(arrival.timestamp() * 1_000_000))
        lines.append(archive.frame_line(datetime.fromtimestamp(previous_us / 1_000_000, UTC), payload, ()))
        size, bars = size + len(payload), bars + count
        if size > _SEGMENT_BYTES:
            lake.put(layout.frames_key(DAY, "bench", segment), archive.compress(lines))
            lines, size, segment = [], 0, segment + 1
    lake.put(layout.frames_key(DAY, "bench", segment), archive.compress(lines))
    return bars


def _frame(events: list[Event]) -> tuple[datetime, bytes, int]:
    arrival = datetime.fromtimestamp(events[-1].emit_ms / 1000, UTC)
    return arrival, b"[" + b",".join(event.payload for event in events) + b"]", len(events)
