"""What the archive and the quarantine hold, read without the code that wrote them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

import msgspec
import pyarrow as pa

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake


class ArchivedLine(NamedTuple):
    """A line of the archive. content: the frame or the event, byte for byte as it is kept."""

    received_at: str
    is_frame: bool
    content: bytes
    refused: list[int]


class QuarantinedEntry(NamedTuple):
    """A line of the quarantine. raw: what was refused, verbatim."""

    received_at: str
    raw: bytes
    reason: str


def unpacked(content: bytes) -> bytes:
    """What a .zst file holds."""
    plain: bytes = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    return plain


def archived_lines(lake: Lake, day: date | None = None) -> Iterator[ArchivedLine]:
    """The archive's lines of a trade date, or of all, in the order of their keys."""
    for key in lake.keys(layout.frames_prefix(day) if day else "raw-frames"):
        for line in unpacked(lake.get(key) or b"").splitlines(keepends=True):
            entry = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            raw = bytes(entry.get("frame") or entry["event"])
            start = line.index(raw)
            end = line.rindex(b', "refused"') if "refused" in entry else line.rindex(b"}")  # white space is kept, too
            refused = json.loads(bytes(entry["refused"])) if "refused" in entry else []
            yield ArchivedLine(json.loads(bytes(entry["received_at"])), "frame" in entry, line[start:end], refused)


def quarantined_entries(lake: Lake, day: date | None = None) -> Iterator[QuarantinedEntry]:
    """The quarantine's lines of a trade date, or of all, in the order of their keys."""
    for key in lake.keys(layout.quarantine_prefix(day) if day else "quarantine"):
        for line in (lake.get(key) or b"").splitlines():
            entry = json.loads(line)
            raw = base64.b64decode(entry["raw_base64"]) if "raw_base64" in entry else entry["raw"].encode()
            yield QuarantinedEntry(entry["received_at"], raw, entry["reason"])
