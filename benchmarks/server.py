"""A WebSocket server that sends prepared frames as fast as they are taken, in a process of its own.

Belongs here: as little work as possible, so that the client is what is measured; the simulator's exchange, which
paces and keeps the protocol, would be slower than its clients. Does not belong here: any client.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from benchmarks import data
from polygon_pipeline.market.bars import Channel


@contextlib.contextmanager
def serving(tickers: int, seed: int, bars: int, channel: Channel) -> Iterator[tuple[str, int]]:
    """The URL of a server that sends the day's first frames, at least so many bars in all, and how many it sends.

    Every connection that subscribes gets them all, and is then left open.
    """
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, tickers, seed, bars, channel))
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(parent: Connection[Any, Any], tickers: int, seed: int, wanted: int, channel: Channel) -> None:
    frames: list[bytes] = []
    bars = 0
    for _, payload, count in data.payloads(tickers, seed, channel):
        frames.append(payload)
        bars += count
        if bars >= wanted:
            break

    def handle(socket: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            socket.send(json.dumps([{"ev": "status", "status": "connected", "message": "Connected Successfully"}]))
            socket.recv()
            socket.send(json.dumps([{"ev": "status", "status": "auth_success", "message": "authenticated"}]))
            topics = json.loads(socket.recv())["params"]
            socket.send(json.dumps([{"ev": "status", "status": "success", "message": f"subscribed to: {topics}"}]))
            for frame in frames:
                socket.send(frame, text=True)
            socket.recv()

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        port = server.socket.getsockname()[1]
        parent.send((f"ws://127.0.0.1:{port}", bars))
        server.serve_forever()
