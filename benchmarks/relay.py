"""The minute's edge of the whole market, relayed: from a frame's receipt until another program has it.

A collector of the whole market, with three readers of its relay and without any. 11,000 bars come within a second,
every two seconds. Two readers read, one never does. The collector, the exchange and the readers are processes of their
own, which share the cores.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from benchmarks import data
from benchmarks.collecting import plan
from benchmarks.harness import Run, Table, Timed, at_most, measure
from polygon_pipeline_tests.support.s3_server import free_ports

_BARS = data.WHOLE_MARKET
_EVERY_MS = 2000
_WITHIN_MS = 1000
_TOKEN = "a-secret-of-the-benchmark"
_READING = 2


class Found(NamedTuple):
    """synced_ms: from a frame's receipt until it is synced, the 99th of a hundred. received: when each frame came."""

    bars: int
    synced_ms: float
    received: list[float]


def collector(run: Run, url: str, bars: int, port: int | None) -> Callable[[], Timed]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.collector.collector import Collector, Progress
    from polygon_pipeline.collector.relay import RelayAccess
    from polygon_pipeline.lake.archive import read_frames

    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    lake = data.local_lake(folder)
    wanted = replace(plan(folder / "journal", url), relay=RelayAccess(port, _TOKEN) if port else None)

    def work() -> Timed:
        seen: list[Progress] = []

        def over() -> str | None:
            return "all" if seen and seen[-1].account.bars >= bars else None

        started = time.monotonic()
        Collector(lake, wanted, logging.getLogger("quiet")).run(over, seen.append)
        seconds = time.monotonic() - started
        account = seen[-1].account
        received = [
            line.received_at.timestamp()
            for file in sorted(data.frame_files(lake))
            for line in read_frames(file, print)
            if b'"AM"' in bytes(line.frame)[:200]
        ]
        return Timed(Found(account.bars, 1000 * account.lags.to_synced.percentiles().p99, received), seconds)

    return work


@contextmanager
def _exchange(edges: int) -> Iterator[str]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, edges), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("end")
        process.join()


def _serve(pipe: Connection, edges: int) -> None:
    from polygon_pipeline.market.bars import Channel
    from polygon_pipeline.simulator.exchange import Exchange
    from polygon_pipeline.simulator.feed import Event
    from polygon_pipeline.simulator.tickers import first_tickers

    start_ms = int(datetime(2026, 1, 26, 14, 30, tzinfo=UTC).timestamp() * 1000)
    # The vendor's documented sample, with the fields that came since.
    bar: dict[str, float | str] = {
        "v": 4110,
        "av": 9470157,
        "op": 10.4372,
        "vw": 10.4488,
        "o": 10.4488,
        "c": 10.4486,
        "h": 10.4489,
    }
    bar |= {"l": 10.4486, "a": 10.4352, "z": 685, "s": start_ms, "e": start_ms + 60_000, "dv": "4110.0"}
    bars = [json.dumps({"ev": "AM", "sym": ticker, **bar}).encode() for ticker in first_tickers(_BARS)]
    feed = [
        Event(edge * _EVERY_MS + number * _WITHIN_MS // _BARS, Channel.MINUTE, "", payload)
        for edge in range(1, edges + 1)
        for number, payload in enumerate(bars)
    ]
    # The first comes when the readers have subscribed, too.
    with Exchange([Event(0, Channel.SECOND, "", b"{}"), *feed], speed=1.0, batch_limit=200) as exchange:
        pipe.send(exchange.url)
        pipe.recv()


@contextmanager
def _readers(port: int) -> Iterator[Callable[[], list[list[float]]]]:
    """Gives a function that waits for the end, and says when each reader that reads got each frame."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_read, args=(there, port), daemon=True)
    process.start()
    here.recv()
    try:
        yield here.recv
    finally:
        process.join(10)
        process.kill()


def _read(pipe: Connection, port: int) -> None:
    import websocket

    came: list[list[float]] = [[] for _ in range(_READING)]

    def connect() -> websocket.WebSocket:
        socket = websocket.WebSocket(skip_utf8_validation=True)
        while True:
            try:
                socket.connect(f"ws://127.0.0.1:{port}/stocks")
                break
            except OSError:
                time.sleep(0.01)
        for action, params in (("auth", _TOKEN), ("subscribe", "AM.*")):
            socket.recv()
            socket.send(json.dumps({"action": action, "params": params}))
        socket.recv()
        return socket

    def read(times: list[float]) -> None:
        socket = connect()
        while True:
            opcode, payload = socket.recv_data()
            if opcode != websocket.ABNF.OPCODE_TEXT:
                return
            if b'"AM"' in payload[:200]:
                times.append(time.time())

    threads = [threading.Thread(target=read, args=(times,)) for times in came]
    pipe.send("ready")
    never = connect()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    never.shutdown()
    pipe.send(came)


def benchmark(run: Run) -> Iterator[Table]:
    edges = 15 if run.full else 5
    bars = edges * _BARS
    [port] = free_ports(1)
    with _exchange(edges) as url:
        alone = measure(collector, run, url, bars, None)
    with _exchange(edges) as url, _readers(port) as came:
        shared = measure(collector, run, url, bars, port)
        lags = sorted(1000 * lag for times in came() for lag in _lags(times, shared.result.received))
    assert alone.result.bars == shared.result.bars
    p50, p99 = (lags[int(len(lags) * share)] for share in (0.5, 0.99))
    yield Table(
        "a minute's edge relayed to three readers, one of which never reads",
        "bars",
        [("with three readers", bars, shared), ("without the relay", bars, alone)],
        [
            at_most(5, p99, f"ms from receipt to a reader, the 99th of a hundred (the median: {p50:.2f})"),
            at_most(
                1.1,
                shared.result.synced_ms / max(alone.result.synced_ms, 1e-9),
                f"times the time until synced without it ({shared.result.synced_ms:.1f} and "
                f"{alone.result.synced_ms:.1f} ms, the 99th of a hundred)",
            ),
        ],
        "the sync of the journal, which comes first, and Python's lock, for which the relay waits while the publisher "
        "decodes. While somebody listens the journal pauses 1 ms between two syncs instead of 20.",
    )


def _lags(came: list[float], received: list[float]) -> list[float]:
    assert len(came) == len(received), f"{len(came)} frames were relayed, of {len(received)}"
    return [at - since for at, since in zip(came, received, strict=True)]
