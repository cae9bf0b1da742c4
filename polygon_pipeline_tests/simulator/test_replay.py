"""Replays: recorded bars are sent unchanged, and fields that were not recorded are left out."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pytest

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.replay import CsvFeed, FramesFeed, replay
from polygon_pipeline_tests.support.client import collect
from polygon_pipeline_tests.support.real_bars import RecordedBars

HEADER = "ticker,start_ms,open,high,low,close,volume"

FIRST = '{"ev":"AM","sym":"GTE","v":4110,"vw":0.4488,"s":1610144640000,"e":1610144700000}'
SECOND = '{"ev":"A", "sym":"BRK.B", "o":1e2, "s":1610144701000}'
ARCHIVE = f"""\
{{"received_at": "2021-01-08T22:24:59.000Z", "event": "connected"}}
{{"received_at": "2021-01-08T22:25:00.250Z", "frame": [{{"ev":"status","status":"success"}}, {FIRST}, {SECOND}]}}
{{"received_at": "2021-01-08T22:25:00.100Z", "frame": {FIRST}}}
{{"received_at": "2021-01-08T22:25:01.000Z", "frame": [17, {{"ev":"T","sym":"GTE"}}]}}
"""


def write(path: Path, text: str) -> Path:
    with pa.output_stream(path, compression="detect") as stream:
        stream.write(text.encode())
    return path


def test_recorded_bars_are_received_over_the_socket_as_they_are_in_the_file(recorded_bars: RecordedBars) -> None:
    with Exchange(CsvFeed(recorded_bars.minute_file), speed=0) as exchange:
        received, _ = collect(exchange, "AM.*")
    rows = sorted(recorded_bars.bars(), key=lambda row: int(row["start_ms"]))
    assert len(received) == len(rows) == exchange.sent
    volumes: dict[object, int] = defaultdict(int)
    for event, row in zip(received, rows, strict=True):
        start_ms = int(row["start_ms"])
        key = row["ticker"], calendar.trade_date(start_ms)
        volumes[key] += int(row["volume"])
        assert event == {
            "ev": "AM",
            "sym": row["ticker"],
            "v": int(row["volume"]),
            "av": volumes[key],
            "o": float(row["open"]),
            "c": float(row["close"]),
            "h": float(row["high"]),
            "l": float(row["low"]),
            "s": start_ms,
            "e": start_ms + 60_000,
        }


def test_the_bars_of_a_file_are_sent_in_order_when_their_windows_end(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bars.csv",
        f"{HEADER},note\nB,61000,1,1,1,1,2.5,x\nB,60000,1,1,1,1,1,\nA,60000,1,1,1,1,1,",
    )
    events = list(CsvFeed(path, Channel.SECOND))
    assert [(event.emit_ms, event.ticker) for event in events] == [(61000, "B"), (61000, "A"), (62000, "B")]
    assert [json.loads(event.payload)["av"] for event in events] == [1, 1, 3.5]


@pytest.mark.parametrize(
    "text",
    ["ticker,start_ms,open\nA,60000,1", f"{HEADER}\nA,60000,1,1,1,1,many", f"{HEADER}\nA,60000,1,1,1,1,"],
)
def test_the_error_for_an_invalid_file_has_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"bars\.csv"):
        list(CsvFeed(write(tmp_path / "bars.csv", text)))


@pytest.mark.parametrize("name", ["frames.jsonl", "frames.jsonl.zst"])
def test_an_archives_aggregates_are_sent_verbatim_at_the_times_they_were_received(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ARCHIVE)
    events = list(FramesFeed([path, path]))[:3]
    assert [event.payload.decode() for event in events] == [FIRST, SECOND, FIRST]
    assert [(event.channel, event.ticker) for event in events] == [
        ("AM", "GTE"),
        ("A", "BRK.B"),
        ("AM", "GTE"),
    ]
    assert [event.emit_ms for event in events] == [1610144700250] * 3, (
        "a clock that was set back does not change the order"
    )
    assert len(list(FramesFeed([path, path]))) == 6


def test_an_archive_is_received_over_the_socket(tmp_path: Path) -> None:
    with Exchange(replay([write(tmp_path / "frames.jsonl.zst", ARCHIVE)]), speed=0) as exchange:
        received, _ = collect(exchange, "AM.*,A.BRK.B")
    assert received == [json.loads(text) for text in (FIRST, SECOND, FIRST)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"frame": []}', "line 2: there is a frame but no received_at"),
        ('{"received_at": "2021-01-08T22:25:00", "frame": []}', "line 2: .*timezone"),
        ('{"received_at": "2021-01-08T22:25:00Z", "fra', "line 2: "),
    ],
)
def test_the_error_for_an_invalid_line_has_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "frames.jsonl", f'{{"event": "connected"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"frames\.jsonl, {message}"):
        list(FramesFeed([path]))


def test_the_error_for_a_damaged_archive_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "frames.jsonl.zst"
    path.write_bytes(b"not zstd at all")
    with pytest.raises(ValueError, match=r"frames\.jsonl\.zst"):
        list(FramesFeed([path]))
