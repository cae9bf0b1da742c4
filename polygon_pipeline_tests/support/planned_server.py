"""An HTTP server on loopback that gives planned answers and remembers what it was asked.

Belongs here: what any server may do, right or wrong. Does not belong here: what the vendor would answer.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """body: sent as JSON unless bytes. dropped: the connection ends in the middle of the body."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = {}
    dropped: bool = False


class Request(NamedTuple):
    """at: on the machine's monotonic clock. path: with the query, as sent."""

    at: float
    path: str
    headers: Mapping[str, str]


@dataclass
class PlannedServer:
    """plan: for a path without its query, the answers in turn; the last one is given again and again."""

    url: str
    plan: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    slow: float = 0.0  # up to so many seconds, at random, before a request is noticed
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.asked]

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.asked.append(request)
            answers = self.plan.get(request.path.partition("?")[0], [Answer(404)])
            return answers.pop(0) if len(answers) > 1 else answers[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def planned_server(plan: dict[str, list[Answer]] | None = None) -> Iterator[PlannedServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(random.uniform(0, planned.slow))
            answer = planned.answer(Request(time.monotonic(), self.path, dict(self.headers)))
            body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if answer.dropped else body)
            self.close_connection = answer.dropped

        def log_message(self, *_: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        planned = PlannedServer(f"http://127.0.0.1:{server.server_port}", plan or {})
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield planned
        finally:
            server.shutdown()
            thread.join()
