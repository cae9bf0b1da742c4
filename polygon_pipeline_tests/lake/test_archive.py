"""The archive's and the quarantine's lines: nothing of what arrived is changed."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polygon_pipeline.lake import archive
from polygon_pipeline.lake.archive import compress, event_line, frame_line, quarantine_line, read_frames
from polygon_pipeline_tests.support.bars import moments

AT = datetime(2026, 1, 26, 18, 30, 1, 123456, tzinfo=UTC)

json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(line: bytes) -> dict[str, object]:
    """The line's content; a line is one line."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    found: dict[str, object] = json.loads(line)
    return found


def test_a_frame_stands_in_its_line_verbatim() -> None:
    payload = b'[{"ev":"AM",  "o":1.50, "dv":"7.0", "sym":"\\u0041"}]'
    line = frame_line(AT, payload, ())
    assert line == b'{"received_at": "2026-01-26T18:30:01.123456Z", "frame": ' + payload + b"}\n"


def test_refused_events_are_named_by_position() -> None:
    assert frame_line(AT, b"[1,2,3]", [0, 2]).endswith(b'"frame": [1,2,3], "refused": [0,2]}\n')


@given(moments, json_values, st.sampled_from([None, 1, "\t"]), st.lists(st.integers(0, 9)))
@example(AT, ["a\n\r\u2028b"], 1, [])
def test_a_frames_line_holds_what_arrived_in_any_layout_of_its_json(
    at: datetime, value: object, indent: int | str | None, refused: list[int]
) -> None:
    payload = json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", "\r\n").encode()
    found = read(frame_line(at, payload, refused))
    assert found.pop("frame") == value
    assert datetime.fromisoformat(str(found.pop("received_at"))) == at
    assert found == ({"refused": refused} if refused else {})


def test_a_line_that_refuses_events_of_no_array_is_left_out_with_its_reason(tmp_path: Path) -> None:
    sound = frame_line(AT, b"[1]", [])
    file = tmp_path / "archive.jsonl"
    file.write_bytes(frame_line(AT, b'"text"', [1]) + sound)
    reasons: list[str] = []
    assert [frame.accepted() for frame in read_frames(file, reasons.append)] == [b"[1]"]
    (reason,) = reasons
    assert reason.startswith("line 1 cannot be read")


def test_an_event_stands_in_its_line() -> None:
    assert read(event_line(AT, b'{"kind":"connected","detail":"x"}')) == {
        "received_at": "2026-01-26T18:30:01.123456Z",
        "event": {"kind": "connected", "detail": "x"},
    }


@given(moments, st.binary() | st.text().map(str.encode), st.text())
@example(AT, b"\xff", "not UTF-8")
@example(AT, b'[{"ev":\n', "torn")
def test_the_quarantine_keeps_any_bytes_with_their_reason(at: datetime, raw: bytes, reason: str) -> None:
    found = read(quarantine_line(at, raw, reason))
    kept = base64.b64decode(str(found["raw_base64"])) if "raw_base64" in found else str(found["raw"]).encode()
    assert kept == raw
    assert ("raw" in found) != ("raw_base64" in found)
    assert found["reason"] == reason
    assert datetime.fromisoformat(str(found["received_at"])) == at


@given(st.lists(moments, min_size=2))
def test_the_text_of_received_at_orders_arrivals(arrivals: list[datetime]) -> None:
    texts = [str(read(frame_line(at, b"[]", ()))["received_at"]) for at in sorted(arrivals)]
    assert texts == sorted(texts)
    assert len(set(texts)) == len(set(arrivals))


@given(st.lists(st.binary(max_size=100)))
def test_compressed_lines_come_back_and_the_same_lines_give_the_same_bytes(lines: list[bytes]) -> None:
    compressed = compress(iter(lines))
    assert compressed == compress(lines)
    with pa.input_stream(pa.py_buffer(compressed), compression="zstd") as content:
        assert content.read() == b"".join(lines)


def test_frames_of_the_same_kind_shrink() -> None:
    lines = [frame_line(AT + timedelta(seconds=n), b'[{"ev":"AM","sym":"SPY","o":450.25}]', ()) for n in range(1000)]
    assert len(compress(lines)) * 3 < sum(map(len, lines))


@pytest.mark.parametrize("pack", [gzip.compress, lambda content: archive.compress([content])], ids=["gzip", "zstd"])
def test_a_file_that_unpacks_to_too_much_is_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(archive, "LARGEST_UNPACKED", 3_000_000)
    file = tmp_path / ("bomb.jsonl.gz" if pack is gzip.compress else "bomb.jsonl.zst")
    file.write_bytes(pack(b"\n" * 50_000_000))
    assert file.stat().st_size < 100_000
    assert "unpacks to more than 3000000 bytes" in (archive.decompression_error(file) or "")
    errors: list[str] = []
    assert list(archive.read_frames(file, errors.append)) == []
    assert len(errors) == 1


def test_a_line_that_does_not_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_LONGEST_LINE", 2_000_000)
    good = archive.frame_line(datetime(2026, 1, 26, 18, tzinfo=UTC), b"[]", ())
    file = tmp_path / "long.jsonl"
    file.write_bytes(good + b"x" * 9_000_000)
    errors: list[str] = []
    assert len(list(archive.read_frames(file, errors.append))) == 1
    assert errors == ["line 2 has more than 2000000 bytes; it and what follows is left out"]
