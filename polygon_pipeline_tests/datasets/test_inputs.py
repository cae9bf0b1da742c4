"""A day's raw data, of this and other programs, becomes its normalized bars."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.collector.accounting import make_ledger
from polygon_pipeline.datasets.inputs import RawDay, fetch_raw, normalize_day
from polygon_pipeline.datasets.merge import Merge
from polygon_pipeline.datasets.normalize import NoBars
from polygon_pipeline.datasets.reference import ReferenceInfo
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.ledger import Account, encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import (
    ARRIVAL,
    DAY,
    NOON,
    JsonObject,
    Row,
    aggregate,
    at,
    later,
    line,
    record_line,
    reference_row,
)
from polygon_pipeline_tests.support.day_files import read, reference_file
from polygon_pipeline_tests.support.journals import journal_header


def normalize(lake: Lake, folder: Path, day: date = DAY, channel: Channel = Channel.MINUTE) -> tuple[RawDay, list[Row]]:
    scratch = folder / "scratch"
    scratch.mkdir()
    raw = normalize_day(lake, fetch_raw(lake, day, channel, scratch), folder / "out.parquet", scratch)
    return raw, read(folder / "out.parquet")


def put_record(
    lake: Lake,
    ticker: str,
    start_ms: int,
    close: float,
    channel: Channel = Channel.MINUTE,
    bar_data: JsonObject | None = None,
) -> str:
    """A record where the specification wants it; returns its key."""
    key = layout.raw_key(channel, DAY, ticker, start_ms)
    lake.put(key, record_line(ticker, start_ms, close, bar_data=bar_data))
    return key


def put_frames(lake: Lake, lines: Iterable[bytes], run: str = "RUN", day: date = DAY) -> str:
    key = layout.frames_key(day, run, 1)
    lake.put(key, archive.compress(lines))
    return key


def closes(rows: list[Row]) -> list[tuple[str, float]]:
    return [(row["ticker"], row["close"]) for row in rows]


def test_a_bucket_filled_by_another_program_is_normalized(lake: Lake, tmp_path: Path) -> None:
    put_record(lake, "SPY", NOON, 450.5, bar_data={"volume": 10.5, "vwap": None})
    put_record(lake, "BRK.B", at(19, 30), 500.0)  # the next day in UTC
    other = {"source": "mine", "extra": True, "collected_at": "2026-01-26T12:00:01-05:00"}
    indented = json.dumps(json.loads(record_line("QQQ", NOON, 20.5)) | other, indent=2)
    lake.put(layout.raw_key(Channel.MINUTE, DAY, "QQQ", NOON), indented.encode())
    lake.put("raw-data/2026-01-26/README.txt", b"hello")
    lake.put("raw-data/2026-01-26/SPY/latest.json", b"{}")
    raw, rows = normalize(lake, tmp_path)
    strays = ["raw-data/2026-01-26/README.txt", "raw-data/2026-01-26/SPY/latest.json"]
    assert raw == RawDay(frame_files=0, records=3, unreadable={}, strays=strays)
    assert closes(rows) == [("BRK.B", 500.0), ("QQQ", 20.5), ("SPY", 450.5)]
    assert [row["session"] for row in rows] == ["post", "regular", "regular"]
    assert rows[1]["received_at"] == datetime(2026, 1, 26, 17, 0, 1, tzinfo=UTC)
    assert (rows[2]["volume"], rows[2]["vwap"]) == (10.5, None)


def test_an_object_is_read_only_where_no_frame_has_its_bar(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [aggregate("SPY", c=1.0)]), line(later(1), [aggregate("SPY", c=2.0)])])
    put_record(lake, "SPY", NOON, 3.0)
    put_record(lake, "SPY", NOON + 60_000, 4.0)
    raw, rows = normalize(lake, tmp_path)
    assert raw == RawDay(frame_files=1, records=1, unreadable={})
    assert [(row["close"], row["revisions"]) for row in rows] == [(2.0, 2), (4.0, 1)]


@pytest.mark.parametrize("archived_later", [False, True])
def test_an_object_that_is_later_than_its_bars_frames_is_the_latest_revision(
    archived_later: bool, file_lake: Lake, tmp_path: Path
) -> None:
    """As when a run wrote objects alone, also where the next one archived its frames again."""
    put_frames(file_lake, [line(ARRIVAL, [aggregate("SPY", c=1.0), aggregate("QQQ", c=2.0)])])
    for ticker, close, collected_at in (("SPY", 3.0, later(60)), ("QQQ", 4.0, ARRIVAL)):
        record = record_line(ticker, NOON, close, collected_at=collected_at)
        file_lake.put(layout.raw_key(Channel.MINUTE, DAY, ticker, NOON), record)
    if archived_later:
        header = msgspec.structs.replace(journal_header(), write_frames=False)
        file_lake.put(layout.ledger_key(DAY, header.run), encode_ledger(make_ledger(header, Account(), True)))
        put_frames(file_lake, [line(later(90), [aggregate("IBM", c=5.0)])], "LATER")
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows)[-2:] == [("QQQ", 2.0), ("SPY", 3.0)]
    assert [row["revisions"] for row in rows][-2:] == [1, 2]
    assert raw.records == 1


def test_a_bar_that_was_refused_in_its_frame_may_come_from_its_object(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [aggregate("SPY", c=1.0)], refused=[0])])
    put_record(lake, "SPY", NOON, 3.0)
    _, rows = normalize(lake, tmp_path)
    assert closes(rows) == [("SPY", 3.0)]


def test_frames_of_several_runs_are_one_day(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(later(5), [aggregate("SPY", c=5.0)])], "A")
    put_frames(lake, [line(later(1), [aggregate("SPY", c=1.0), aggregate("QQQ", c=2.0)])], "B")
    put_frames(lake, [line(later(9), [aggregate("SPY", c=9.0)])], "C", date(2026, 1, 27))
    raw, rows = normalize(lake, tmp_path)
    assert raw.frame_files == 2
    assert closes(rows) == [("QQQ", 2.0), ("SPY", 5.0)]


def test_the_channels_are_kept_apart(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [aggregate("SPY", c=1.0), aggregate("SPY", ev="A", c=2.0)])])
    put_record(lake, "QQQ", NOON, 3.0)
    put_record(lake, "IBM", NOON + 1000, 4.0, Channel.SECOND)
    for channel, expected in (
        (Channel.MINUTE, [("QQQ", 3.0), ("SPY", 1.0)]),
        (Channel.SECOND, [("IBM", 4.0), ("SPY", 2.0)]),
    ):
        (tmp_path / channel).mkdir()
        _, rows = normalize(lake, tmp_path / channel, channel=channel)
        assert closes(rows) == expected


def test_a_day_without_raw_data_is_a_failure(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [{"ev": "status", "status": "connected"}])])
    with pytest.raises(NoBars, match="2026-01-26"):
        normalize(lake, tmp_path)


def test_an_object_that_cannot_be_read_is_reported_by_its_key_and_the_rest_is_made(lake: Lake, tmp_path: Path) -> None:
    put_record(lake, "GOOD", NOON, 1.0)
    broken = {
        layout.raw_key(Channel.MINUTE, DAY, name, NOON): content
        for name, content in {
            "EMPTY": b"",
            "TORN": record_line("TORN", NOON, 1.0)[:50],
            "BINARY": b"\x00\xff",
            "LIST": b"[]",
            "NAIVE": record_line("NAIVE", NOON, 1.0).replace(b"+00:00", b""),
            "TEXT": record_line("TEXT", NOON, 1.0, bar_data={"volume": "many"}),
        }.items()
    }
    for key, content in broken.items():
        lake.put(key, content)
    raw, rows = normalize(lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0)]
    assert raw.records == 1
    assert raw.unreadable.keys() == broken.keys()
    assert all(raw.unreadable.values())


def test_a_record_that_disagrees_with_its_key_is_reported_and_left_out(lake: Lake, tmp_path: Path) -> None:
    put_record(lake, "GOOD", NOON, 1.0)
    yesterday = at(12, 0, date(2026, 1, 23))
    wrong = {
        layout.raw_key(Channel.MINUTE, DAY, "SPY", NOON): record_line("QQQ", NOON, 2.0),
        layout.raw_key(Channel.MINUTE, DAY, "IBM", NOON): record_line("IBM", NOON + 60_000, 2.0),
        layout.raw_key(Channel.MINUTE, DAY, "OLD", yesterday): record_line("OLD", yesterday, 2.0),
    }
    for key, content in wrong.items():
        lake.put(key, content)
    raw, rows = normalize(lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0)]
    assert raw.unreadable.keys() == wrong.keys()
    assert all("not what the key says" in reason for reason in raw.unreadable.values())


def test_a_damaged_archive_is_reported_by_its_key_and_objects_fill_in(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [aggregate("GOOD", c=1.0)])], "GOOD")
    damaged = layout.frames_key(DAY, "BAD", 1)
    lake.put(damaged, b"no archive")
    put_record(lake, "SPY", NOON, 2.0)
    raw, rows = normalize(lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0), ("SPY", 2.0)]
    assert list(raw.unreadable) == [damaged]


def test_normalizing_twice_gives_the_same_bytes(lake: Lake, tmp_path: Path) -> None:
    for minute in range(50):
        put_record(lake, "SPY", NOON + 60_000 * minute, float(minute))
    put_frames(lake, [line(later(n), [aggregate("QQQ", NOON + 60_000 * (n % 20))]) for n in range(50)])
    seen = set()
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        normalize(lake, tmp_path / attempt)
        seen.add((tmp_path / attempt / "out.parquet").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("stamp", ["20260126T170000Z", "2026-W05-1T17:00:00Z", "2026-01-26T17:00:00,5Z"])
def test_a_record_may_have_its_times_in_any_iso_8601_format(file_lake: Lake, tmp_path: Path, stamp: str) -> None:
    put_record(file_lake, "GOOD", NOON, 1.0)
    record = json.loads(record_line("SPY", NOON, 2.0)) | {"collected_at": stamp}
    file_lake.put(layout.raw_key(Channel.MINUTE, DAY, "SPY", NOON), json.dumps(record).encode())
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0), ("SPY", 2.0)]
    assert raw.unreadable == {}


def test_a_record_with_a_fraction_of_a_second_is_reported_and_left_out(file_lake: Lake, tmp_path: Path) -> None:
    put_record(file_lake, "GOOD", NOON, 1.0)
    record = json.loads(record_line("SPY", NOON, 2.0)) | {"timestamp": "2026-01-26T17:00:00.500Z"}
    key = layout.raw_key(Channel.MINUTE, DAY, "SPY", NOON)
    file_lake.put(key, json.dumps(record).encode())
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0)]
    assert list(raw.unreadable) == [key]


def put_reference(lake: Lake, folder: Path, *rows: Row) -> None:
    file = reference_file(folder / "reference.parquet", rows, ["SPY", "QQQ"], at(20, 0))
    put_dataset(lake, "reference_bars", DAY.isoformat(), file)


def test_the_days_reference_is_merged_into_what_was_collected(lake: Lake, tmp_path: Path) -> None:
    put_frames(lake, [line(ARRIVAL, [aggregate("SPY", c=450.3)])])
    put_reference(lake, tmp_path, reference_row("SPY"), reference_row("QQQ"))
    raw, rows = normalize(lake, tmp_path)
    assert closes(rows) == [("QQQ", 450.5), ("SPY", 450.5)]
    assert raw.reference == ReferenceInfo("rest", ("SPY", "QQQ"), at(20, 0), None)
    assert (raw.merge.added, raw.merge.corrected, raw.merge.kept) == (1, 1, 0)


def test_a_day_that_was_not_collected_is_made_from_its_reference_alone(file_lake: Lake, tmp_path: Path) -> None:
    put_reference(file_lake, tmp_path, reference_row("SPY"))
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("SPY", 450.5)]
    assert (raw.frame_files, raw.records, raw.merge) == (0, 0, Merge(added=1))


def test_an_empty_reference_does_not_make_a_day(file_lake: Lake, tmp_path: Path) -> None:
    put_reference(file_lake, tmp_path)
    with pytest.raises(NoBars, match="2026-01-26"):
        normalize(file_lake, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "foreign"])
def test_a_reference_that_cannot_be_read_is_named_and_the_day_is_made_without_it(
    file_lake: Lake, tmp_path: Path, damage: str
) -> None:
    put_frames(file_lake, [line(ARRIVAL, [aggregate("SPY", c=450.3)])])
    key = layout.dataset_key("reference_bars", DAY.isoformat())
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    file_lake.put(key, b"" if damage == "empty" else (tmp_path / "foreign.parquet").read_bytes())
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("SPY", 450.3)]
    assert list(raw.unreadable) == [key]
    assert raw.reference is None


@pytest.mark.parametrize("odd", [{"volume": 1e30}, {"vwap": 1e300}, {"high": float("inf")}, {"close": float("nan")}])
def test_a_bar_of_the_reference_that_is_out_of_bounds_is_named_and_left_out(
    file_lake: Lake, tmp_path: Path, odd: Row
) -> None:
    put_reference(file_lake, tmp_path, reference_row("SPY"), reference_row("QQQ", **odd))
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("SPY", 450.5)]
    [reason] = raw.unreadable.values()
    assert "1 bars are out of bounds and left out, such as QQQ at 2026-01-26 17:00:00" in reason


@pytest.mark.parametrize(
    "odd",
    [{"volume": 1e30}, {"vwap": 1e300}, {"close": 1e9}, {"volume": 10**400}, {"volume": 10**15}],
)
@pytest.mark.fault("hostile values")
def test_a_record_with_values_out_of_bounds_is_reported_and_left_out(
    file_lake: Lake, tmp_path: Path, odd: JsonObject
) -> None:
    put_record(file_lake, "GOOD", NOON, 1.0)
    key = put_record(file_lake, "SPY", NOON, 2.0, bar_data=odd)
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0)]
    assert list(raw.unreadable) == [key]


@pytest.mark.parametrize("stamp", ["0001-01-01T00:00:00+05:00", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-05:00"])
def test_a_record_that_was_collected_at_an_impossible_time_is_reported_and_left_out(
    file_lake: Lake, tmp_path: Path, stamp: str
) -> None:
    put_record(file_lake, "GOOD", NOON, 1.0)
    record = json.loads(record_line("SPY", NOON, 2.0)) | {"collected_at": stamp}
    key = layout.raw_key(Channel.MINUTE, DAY, "SPY", NOON)
    file_lake.put(key, json.dumps(record).encode())
    raw, rows = normalize(file_lake, tmp_path)
    assert closes(rows) == [("GOOD", 1.0)]
    assert list(raw.unreadable) == [key]


def test_second_bars_have_no_reference(file_lake: Lake, tmp_path: Path) -> None:
    put_frames(file_lake, [line(ARRIVAL, [aggregate("SPY", ev="A")])])
    put_reference(file_lake, tmp_path, reference_row("QQQ"))
    raw, rows = normalize(file_lake, tmp_path, channel=Channel.SECOND)
    assert closes(rows) == [("SPY", 450.5)]
    assert raw.reference is None
