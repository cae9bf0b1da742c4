"""A proxy in front of an S3 server that has the faults of networks and of S3, on request.

Belongs here: faults in transit, seeded or scripted. Does not belong here: the server itself (s3_server), and what an
outage of it does: that is done by stopping it.

The request goes on unchanged: its signature covers the Host header, which names the proxy and which the server takes.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_BROKEN = (OSError, asyncio.IncompleteReadError)
_LONGEST_DELAY = 0.3
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Fault(StrEnum):
    """What may happen to a request."""

    DELAY = "delay"
    RESET = "reset"  # before the server has seen it
    LOST_RESPONSE = "lost response"  # after the server has done it
    SLOW_DOWN = "503 SlowDown"
    INTERNAL_ERROR = "500 InternalError"
    FORBIDDEN = "403 AccessDenied"
    SKEWED = "403 RequestTimeTooSkewed"
    EXPIRED = "400 ExpiredToken"


_ANSWERS = {
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.INTERNAL_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.FORBIDDEN: (403, "AccessDenied", "Access Denied"),
    Fault.SKEWED: (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
    Fault.EXPIRED: (400, "ExpiredToken", "The provided token has expired."),
}


class _Order(NamedTuple):
    """A fault for the next request whose method and path contain these."""

    fault: Fault
    method: str
    path: str


class FaultyS3:
    """The proxy; a context manager around its serving.

    rates: how probable each fault is, at most one a request; may be changed at any time. only: a part of the paths
    that rates hold for. seed: for the choice. counts: how often each fault has happened. requests: how many came in.
    """

    def __init__(self, upstream_url: str, rates: Mapping[Fault, float] | None = None, seed: int = 0) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = parts.hostname, parts.port
        self.rates = dict(rates or {})
        self.only = ""
        self.counts: Counter[Fault] = Counter()
        self.requests = 0
        self._random = random.Random(seed)
        self._orders: list[_Order] = []
        self._port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="faulty-s3", daemon=True)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def order(self, fault: Fault, times: int = 1, method: str = "", path: str = "") -> None:
        """The next so many requests whose method and path contain these meet the fault, whatever the rates."""
        self._orders += [_Order(fault, method, path)] * times

    @property
    def orders_left(self) -> int:
        return len(self._orders)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            tasks.add(task)
            try:
                await self._handle(reader, writer)
            except asyncio.CancelledError:
                writer.transport.abort()
            finally:
                tasks.discard(task)

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, with one of its own to the server."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head, body = await _read_message(reader)
                self.requests += 1
                method, path = head.split(b" ", 2)[:2]
                fault = self._choose(method.decode(), path.decode())
                if fault is Fault.DELAY:
                    await asyncio.sleep(self._random.uniform(0, _LONGEST_DELAY))
                elif fault is Fault.RESET:
                    break
                elif fault in _ANSWERS:
                    writer.write(_answer(*_ANSWERS[fault], with_body=method != b"HEAD"))
                    await writer.drain()
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream)
                upstream[1].write(head + body)
                answer, content = await _read_message(upstream[0], answers=method)
                if fault is Fault.LOST_RESPONSE:
                    break
                writer.write(answer + content)
                await writer.drain()
        except _BROKEN:  # the client is done, or the server is down: the other side sees a broken connection
            pass
        finally:
            for peer in (writer, upstream[1] if upstream else None):
                if peer:
                    _reset(peer)

    def _choose(self, method: str, path: str) -> Fault | None:
        for number, order in enumerate(self._orders):
            if order.method in method and order.path in path:
                del self._orders[number]
                self.counts[order.fault] += 1
                return order.fault
        if self.only not in path:
            return None
        at = self._random.random()
        for fault, rate in self.rates.items():
            at -= rate
            if at < 0:
                self.counts[fault] += 1
                return fault
        return None


def lake_behind(proxy: FaultyS3, server: SeaweedFS) -> Lake:
    """A lake in a bucket of its own that is reached through the proxy."""
    session = server.address.session()
    return open_lake(f"s3://{server.new_bucket()}/lake", lambda: S3Access(session, proxy.endpoint_url))


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _read_message(reader: asyncio.StreamReader, answers: bytes | None = None) -> tuple[bytes, bytes]:
    """A request, or the response that answers such a method: its head and its body, both as they came."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if answers is None or b" 100 " not in head[:13]:
            break
    headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if answers == b"HEAD" or (answers and head.split(b" ", 2)[1] in (b"204", b"304")):
        return head, b""
    if b"chunked" not in headers.get(b"transfer-encoding", b""):
        return head, await reader.readexactly(int(headers.get(b"content-length", b"0")))
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        chunk = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        body += size + chunk
        if len(chunk) == 2:
            return head, body


def _answer(status: int, code: str, message: str, with_body: bool) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + (body if with_body else "")).encode()
