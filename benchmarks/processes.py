"""What the processes of a `dagster dev` take, as /proc tells it, and what it keeps on disk.

Belongs here: figures of processes by their part. Does not belong here: starting them (support.dagster_dev), and what
the figures are to be (idle, soak).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from polygon_pipeline_tests.support.dagster_dev import DagsterDev

DAEMON = "daemon"
CODE_SERVER = "code server"
WEB_SERVER = "web server"
COLLECTOR = "collector"

# A process is the first whose words are in its command line. The daemon and the web server share a code server, which
# `dagster dev` starts.
_PARTS = {DAEMON: "dagster._daemon", CODE_SERVER: "dagster api grpc", WEB_SERVER: "dagster_webserver"}
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """What a process, or several together, takes now. cpu: seconds since its start, with its ended children's."""

    cpu: float = 0.0
    rss_mb: float = 0.0
    threads: int = 0
    files: int = 0


def usage_by_part(dev: DagsterDev) -> dict[str, Usage]:
    """The processes that are there, by part; runs other than the collector's are left out."""
    found: dict[str, list[int]] = {}
    for pid, line in dev.processes():
        for part, words in _PARTS.items():
            if words in line.replace(" -m ", " "):
                found.setdefault(part, []).append(pid)
                break
    if collectors := dev.collectors():
        found[COLLECTOR] = collectors
    return {part: _sum(pids) for part, pids in found.items()}


def folder_mb(folder: Path) -> float:
    """The size of all files in a folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # SQLite's own files come and go
            size += path.stat().st_size
    return size / 2**20


def _sum(pids: Iterable[int]) -> Usage:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(_usage(Path(f"/proc/{pid}")))
    return Usage(
        cpu=sum(usage.cpu for usage in found),
        rss_mb=sum(usage.rss_mb for usage in found),
        threads=sum(usage.threads for usage in found),
        files=sum(usage.files for usage in found),
    )


def _usage(process: Path) -> Usage:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    return Usage(
        cpu=sum(map(int, fields[11:15])) / _TICKS,
        rss_mb=int(status.get("VmRSS", "0 kB").split()[0]) / 1024,
        threads=int(status["Threads"]),
        files=len(list((process / "fd").iterdir())),
    )
