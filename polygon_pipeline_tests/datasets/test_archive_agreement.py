"""A frame means the same to who receives it and to who normalizes its archive."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets.normalize import NoBars, Normalization
from polygon_pipeline.lake.archive import frame_line
from polygon_pipeline.market.bars import Bar, Channel
from polygon_pipeline.polygon.messages import decode_frame
from polygon_pipeline_tests.support.bars import JsonObject
from polygon_pipeline_tests.support.events import (
    RECEIVED_AT,
    START_MS,
    bad_events,
    encode,
    good_events,
    status_events,
    unknown_events,
)

DAY = date(2026, 1, 26)

Kept = dict[tuple[str, int], tuple[Bar, int, datetime]]


def received(payloads: list[bytes], channel: Channel) -> tuple[Kept, list[bytes]]:
    """Each bar's last revision, how many there were and when it arrived; and the archive's lines."""
    kept: Kept = {}
    revisions: Counter[tuple[str, int]] = Counter()
    lines = []
    for number, payload in enumerate(payloads):
        at = RECEIVED_AT + timedelta(milliseconds=number)
        frame = decode_frame(payload, at)
        for found, bar in frame.bars:
            if found is channel:
                key = bar.ticker, bar.start_ms
                revisions[key] += 1
                kept[key] = bar, revisions[key], at
        positions = [refused.position for refused in frame.refused]
        if None not in positions:  # a frame that is refused as a whole is kept in the quarantine alone
            lines.append(frame_line(at, payload, [position for position in positions if position is not None]))
    return kept, lines


def normalized(lines: list[bytes], channel: Channel) -> Kept:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "frames.jsonl").write_bytes(b"".join(lines))
        with Normalization(DAY, channel, folder) as normalization:
            normalization.add_frames([folder / "frames.jsonl"])
            try:
                normalization.write(folder / "out.parquet")
            except NoBars:
                return {}
            finally:
                assert normalization.unreadable == {}
        rows = pq.read_table(folder / "out.parquet").to_pylist()
    kept: Kept = {}
    for row in rows:
        start_ms = int((row["timestamp"] - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))
        prices = [row[name] for name in ("open", "high", "low", "close", "volume", "vwap")]
        kept[row["ticker"], start_ms] = Bar(row["ticker"], start_ms, *prices), row["revisions"], row["received_at"]
    return kept


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(good_events() | bad_events() | unknown_events | status_events, max_size=6), max_size=4),
    st.sampled_from(list(Channel)),
)
def test_any_frames_normalize_to_the_most_recently_received_revisions(
    frames: list[list[JsonObject]], channel: Channel
) -> None:
    payloads = [encode(events[0] if len(events) == 1 else events) for events in frames]
    kept, lines = received(payloads, channel)
    assert normalized(lines, channel) == kept


def odd_frame(tail: bytes) -> bytes:
    """A frame of one bar that ends with what no encoder would write."""
    head = b'[{"ev":"AM","sym":"SPY","vw":1.5,"o":1,"h":2,"l":1'
    usual = {"v": b"10", "c": b"1", "s": b"%d" % START_MS}
    fields = [
        b',"%b":%b' % (name.encode(), value) for name, value in usual.items() if b'"%b"' % name.encode() not in tail
    ]
    return head + b"".join(fields) + b"," + tail + b"}]"


@pytest.mark.parametrize(
    ("tail", "bars"),
    [
        (b'"z":0.5,"a":1e300', 1),
        (b'"dav":"1e999"', 1),
        (b'"new":1e400', 1),
        (b'"new":' + b"9" * 400, 1),
        (b'"new":' + b"[" * 500 + b"]" * 500, 1),
        (b'"new":"\\u0000\\u2028\\ud83d\\ude00"', 1),
        (b'"S":5,"O":9,"V":9,"Sym":"QQQ"', 1),
        (b'"dv":"00010.50"', 1),
        (b'"dv":"-0.0"', 1),
        (b'"s": 1769452200000.0', 1),
        (b'"v":18446744073709551617', 0),
        (b'"v":999999999999999', 1),
        (b'"v":1000000000000000', 0),
        (b'"dv":"999999999999999.0"', 1),
        (b'"dv":"1000000000000000"', 0),
        (b'"vw":999999999.9', 1),
        (b'"vw":1e9', 0),
        (b'"op":-1e9', 0),
        (b'"c":5e-324', 1),
        (b'"c":0.1000000000000000055511151231257827021181583404541015625', 1),
        (b'"new": 1,\r\n "r":\n[\n]\n', 1),
        (b'"a":1e400', 0),
        (b'"dv":"1_000"', 0),
        ('"dv":"\uff11"'.encode(), 0),
        (b'"sym":"QQQ"', 1),  # a repeated key: the last counts
    ],
)
def test_an_odd_frame_normalizes_to_the_bar_it_is_accepted_as_if_it_is(tail: bytes, bars: int) -> None:
    kept, lines = received([odd_frame(tail)], Channel.MINUTE)
    assert len(kept) == bars
    assert normalized(lines, Channel.MINUTE) == kept
