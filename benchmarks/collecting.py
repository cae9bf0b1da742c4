"""Frames from a socket until they are archived on the lake: ours beside the same work without our code.

Both take the same frames from the same server over a real WebSocket into a local lake, and are timed from their
subscription until the last bar is archived. The rival receives, decodes,
appends to a file that it syncs once a second, and packs it every 16 MB: nobody could lose less work and still have an
archive. It has no account, no lease, no recovery, and a crash loses it a second.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import data
from benchmarks.harness import Run, Table, Timed, at_least, contest, measure
from benchmarks.server import serving
from polygon_pipeline.market.bars import Channel

if TYPE_CHECKING:
    from polygon_pipeline.collector.collector import Plan

_SEGMENT_BYTES = 16 * 1024 * 1024


def plan(journal_dir: Path, url: str) -> Plan:
    """A collector's of the whole market: frames alone."""
    from polygon_pipeline.collector.collector import Plan

    return Plan(
        owner="bench",
        run="bench",
        session_date=data.DAY,
        feed="simulated",
        url=url,
        key="simulator",
        topics=["AM.*"],
        journal_dir=journal_dir,
        write_objects=False,
        checkpoint_seconds=1.0,
    )


def ours(run: Run, url: str, bars: int) -> Callable[[], Timed]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.collector.collector import Collector, Progress

    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    lake = data.local_lake(folder)

    def work() -> Timed:
        seen: list[Progress] = []

        def over() -> str | None:
            return "all" if seen and seen[-1].account.bars >= bars else None

        Collector(lake, plan(folder / "journal", url), logging.getLogger("quiet")).run(over, seen.append)
        # The run looks twice a second whether it is over; the last archive says when it was.
        archived = max(file.stat().st_mtime for file in data.frame_files(lake))
        account = seen[-1].account
        return Timed(account.bars, archived - account.connections[0].since.timestamp())

    return work


def without_our_code(run: Run, url: str, bars: int) -> Callable[[], Timed]:
    import msgspec
    import pyarrow as pa
    import websocket

    class Aggregate(msgspec.Struct):
        ev: str
        sym: str
        s: int
        e: int
        o: float
        h: float
        l: float  # noqa: E741 the vendor's name
        c: float
        v: float
        vw: float
        av: float
        op: float
        a: float
        z: float
        dv: str | None = None
        dav: str | None = None
        otc: bool = False

    decode = msgspec.json.Decoder(list[Aggregate]).decode
    codec = pa.Codec("zstd", compression_level=1)
    folder = Path(tempfile.mkdtemp(dir=run.scratch))

    def work() -> Timed:
        socket = websocket.WebSocket(skip_utf8_validation=True)
        socket.connect(url)
        for action in ({"action": "auth", "params": "key"}, {"action": "subscribe", "params": "AM.*"}):
            socket.recv()
            socket.send(json.dumps(action))
        socket.recv()
        count = segment = 0
        synced = started = time.monotonic()
        while count < bars:
            segment += 1
            path = folder / f"{segment}.jsonl"
            with path.open("wb") as file:
                while count < bars and file.tell() < _SEGMENT_BYTES:
                    _, payload = socket.recv_data()
                    count += len(decode(payload))
                    file.write(payload + b"\n")
                    if time.monotonic() - synced > 1:
                        file.flush()
                        os.fdatasync(file.fileno())
                        synced = time.monotonic()
            path.with_suffix(".zst").write_bytes(codec.compress(path.read_bytes(), asbytes=True))
            path.unlink()
        os.sync()
        seconds = time.monotonic() - started
        socket.shutdown()
        return Timed(count, seconds)

    return work


def _same(ours: int, theirs: int) -> None:
    assert ours == theirs, f"ours archived {ours} bars, the rival {theirs}"


def benchmark(run: Run) -> Iterator[Table]:
    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 4
    with serving(tickers, run.seed, 2_400_000 if run.full else 600_000, Channel.MINUTE) as (url, bars):
        rows = contest(
            [
                ("ours", lambda: measure(ours, run, url, bars)),
                ("recv + msgspec + file + zstd", lambda: measure(without_our_code, run, url, bars)),
            ],
            bars,
            3,
            _same,
        )
    ours_rate, rival_rate = (measured.rate(bars) for _, _, measured in rows)
    yield Table(
        f"frames of {tickers:,} tickers from a socket to the lake's archive",
        "bars",
        rows,
        [
            at_least(0.6, ours_rate / rival_rate, "of the rate without our code"),
            at_least(150_000, ours_rate, "bars a second"),
        ],
        "Python's lock: ours has two threads and needs 4.3 µs of processor a bar, where the rival has one and needs "
        "2.5; the server takes most of the other core. Of ours, decoding takes 1.0, judging and counting 0.7, "
        "packing 0.6, receiving and journaling 1.0. It was 0.2 of the rival's rate before frames were judged "
        "together.",
    )
