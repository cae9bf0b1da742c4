"""The raw-frames archive and the quarantine: JSON lines that keep what arrived, verbatim.

Belongs here: the lines' formats, writing and reading them, and reading packed files. Does not belong here: which lines
go where (collector.publisher), or what a frame means (polygon.messages).

    {"received_at": "2026-01-26T18:30:01.123456Z", "frame": [...]}                    a frame, as received
    {"received_at": "...", "frame": [...], "refused": [0, 2]}                         events 0 and 2 are quarantined
    {"received_at": "...", "event": {"kind": "disconnected", "detail": "..."}}        a change of the connection

received_at is UTC and strictly increasing within a run, so it orders the revisions of a bar.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from polygon_pipeline.market.bars import arrival_error

# What an archived connection event may be. The words are this format's own, and stay when the stream's code changes.
ConnectionChange = Literal["connected", "subscribed", "unacknowledged", "warned", "disconnected", "refused", "ended"]

# A small file may unpack to any size. A flat file of the whole market's day has some 120 MB, an archive of ours as much
# as a journal's segment; a line holds a frame of every ticker at most.
LARGEST_UNPACKED = 2 * 1024**3
_LONGEST_LINE = 64 * 1024**2

_ZSTD_LEVEL = 1  # 3.4 times smaller at 300 MB/s; level 3 takes half as long again for 3 % less


class ArchivedEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of the connection. After a disconnect: retry_seconds, how long until the next attempt; silent_seconds:
    for how long nothing had come, where that was long."""

    kind: ConnectionChange
    detail: str
    retry_seconds: float | None = None
    silent_seconds: float | None = None


class ArchivedFrame(msgspec.Struct, frozen=True):
    """A line of a frame. frame: JSON, as received; refused: the places of its quarantined events."""

    received_at: datetime
    frame: msgspec.Raw = msgspec.Raw()
    refused: tuple[int, ...] = ()

    def accepted(self) -> bytes:
        """The frame without its quarantined events."""
        return without_events(bytes(self.frame), self.refused) if self.refused else bytes(self.frame)


_decode_line = msgspec.json.Decoder(ArchivedFrame).decode


def frame_line(received_at: datetime, payload: bytes, refused: Sequence[int]) -> bytes:
    """The archive's line of a frame. payload: JSON; line breaks between its tokens become spaces."""
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\r", b" ").replace(b"\n", b" ")
    tail = b', "refused": %b}\n' % msgspec.json.encode(refused) if refused else b"}\n"
    return b'{"received_at": "%b", "frame": %b%b' % (_stamp(received_at), payload, tail)


def without_events(payload: bytes, positions: Collection[int]) -> bytes:
    """A frame (an array, or an object that counts as one event) without the events at these positions."""
    parts = [] if payload.lstrip().startswith(b"{") else msgspec.json.decode(payload, type=list[msgspec.Raw])
    return b"[" + b",".join(bytes(part) for index, part in enumerate(parts) if index not in positions) + b"]"


def event_line(received_at: datetime, event: bytes) -> bytes:
    """The archive's line of a connection event (JSON)."""
    return b'{"received_at": "%b", "event": %b}\n' % (_stamp(received_at), event)


def quarantine_line(received_at: datetime, raw: bytes, reason: str) -> bytes:
    """The quarantine's line: `raw` verbatim as text, or as `raw_base64` where it is not UTF-8."""
    entry: dict[str, object] = {"received_at": _stamp(received_at).decode(), "reason": reason}
    try:
        entry["raw"] = raw.decode()
    except UnicodeDecodeError:
        entry["raw_base64"] = base64.b64encode(raw).decode()
    return msgspec.json.encode(entry) + b"\n"


def compress(lines: Iterable[bytes]) -> bytes:
    """One zstd frame of the lines; the same lines give the same bytes."""
    import pyarrow as pa

    compressed: bytes = pa.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(b"".join(lines), asbytes=True)
    return compressed


def read_frames_sql(frame_type: str) -> str:
    """What DuckDB reads the archives `$files` with: received_at, refused, and frame as the DuckDB type given."""
    return f"""read_json(
            $files,
            format = 'newline_delimited',
            columns = {{received_at: 'TIMESTAMPTZ', frame: '{frame_type}', refused: 'INTEGER[]'}}
        )"""


def read_frames(file: Path, on_error: Callable[[str], object]) -> Iterator[ArchivedFrame]:
    """The frames of an archive (.jsonl, .jsonl.zst), line by line; on_error gets the reason why a line is left out."""
    try:
        for number, line in enumerate(unpacked_lines(file), 1):
            yield from _read_line(number, line, on_error)
    except OSError as error:
        on_error(str(error))


def _read_line(number: int, line: bytes, on_error: Callable[[str], object]) -> Iterator[ArchivedFrame]:
    if not line.strip():
        return
    try:
        found = _decode_line(line)
        found.accepted()  # a frame that is no array has no events to leave out
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        on_error(f"line {number} cannot be read: {error}")
        return
    if reason := arrival_error(found.received_at):
        on_error(f"line {number} cannot be read: {reason}")
    elif bytes(found.frame):  # the other lines are of connection events
        yield found


def unpacked(file: Path) -> Iterator[bytes]:
    """A file's content, compressed or not, piece by piece. Raises OSError where it is damaged, cut or too large."""
    import pyarrow as pa

    left = LARGEST_UNPACKED
    with pa.input_stream(file, compression="detect") as content:
        while chunk := content.read(1 << 20):
            if (left := left - len(chunk)) < 0:
                raise OSError(f"it unpacks to more than {LARGEST_UNPACKED} bytes")
            yield chunk


def unpacked_lines(file: Path) -> Iterator[bytes]:
    """A file's lines, without their ends; the last is empty where it ends as it should. Raises OSError as unpacked()
    does, and where a line is too long."""
    rest, number = b"", 0
    for chunk in unpacked(file):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        number += len(lines)
        if len(rest) > _LONGEST_LINE:
            raise OSError(f"line {number + 1} has more than {_LONGEST_LINE} bytes; it and what follows is left out")
    yield rest


def decompression_error(file: Path) -> str | None:
    """Why a compressed file is damaged or cut short, or None if it is whole."""
    try:
        for _ in unpacked(file):
            pass
    except OSError as error:
        return str(error)
    return None


def _stamp(received_at: datetime) -> bytes:
    return received_at.isoformat(timespec="microseconds")[:26].encode() + b"Z"  # strftime takes five times as long
