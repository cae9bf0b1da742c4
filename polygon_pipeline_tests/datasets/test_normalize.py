"""From what arrived to normalized rows, compared with plain Python."""

from __future__ import annotations

import itertools
import json
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.normalize import NoBars, Normalization
from polygon_pipeline.lake import archive
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import (
    ARRIVAL,
    DAY,
    HALF_DAY,
    NOON,
    aggregate,
    at,
    later,
    line,
    moment,
    record_line,
)
from polygon_pipeline_tests.support.day_files import columns, normalize, normalized_file, read, schema

STATUS = {"ev": "status", "status": "success", "message": "subscribed to: AM.SPY"}


# From frames to rows


def test_every_field_of_a_bar_arrives_under_its_own_name(tmp_path: Path) -> None:
    assert normalize(tmp_path, [[line(ARRIVAL, [aggregate(dv="1000.5", dav="50000.25", otc=True)])]]) == [
        {
            "ticker": "SPY",
            "timestamp": moment(NOON),
            "open": 450.25,
            "high": 450.75,
            "low": 450.2,
            "close": 450.5,
            "volume": 1000.5,
            "vwap": 450.3,
            "day_open": 449.5,
            "day_volume": 50000.25,
            "day_vwap": 450.1,
            "average_trade_size": 62.0,
            "otc": True,
            "transactions": None,
            "session": "regular",
            "revisions": 1,
            "received_at": ARRIVAL,
            "source": "websocket",
        }
    ]


def test_what_the_feed_leaves_out_is_null_and_whole_volumes_are_used_without_fractional_ones(tmp_path: Path) -> None:
    [row] = normalize(tmp_path, [[line(ARRIVAL, [aggregate(op=0, vw=None, a=None, z=None, av=None)])]])
    assert row["volume"] == 1000
    assert row["otc"] is False, "the vendor leaves otc out where it is false"
    for name in ("day_open", "vwap", "day_vwap", "average_trade_size", "day_volume"):
        assert row[name] is None, name


def test_the_official_open_is_used_only_where_the_windows_own_is_absent(tmp_path: Path) -> None:
    events = [aggregate("SPY", o=None), aggregate("QQQ")]
    assert [row["open"] for row in normalize(tmp_path, [[line(ARRIVAL, events)]])] == [450.25, 449.5]


def test_the_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    file = normalized_file(tmp_path, [[line(ARRIVAL, [aggregate()])]])
    assert columns(file) == schema(catalog.NORMALIZED_BARS)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_latest_revision_wins_in_any_order_of_files(tmp_path: Path, order: tuple[int, ...]) -> None:
    files = [[line(later(n), [aggregate(c=100.0 + n)])] for n in range(3)]
    [row] = normalize(tmp_path, [files[n] for n in order])
    assert row["close"] == 102.0
    assert row["revisions"] == 3
    assert row["received_at"] == later(2)


def test_the_latest_revision_wins_within_a_file_and_within_a_frame(tmp_path: Path) -> None:
    lines = [
        line(later(2), [aggregate(c=1.0), aggregate(c=2.0), aggregate("QQQ", c=3.0)]),
        line(later(1), [aggregate(c=4.0), aggregate("QQQ", c=5.0)]),
    ]
    rows = normalize(tmp_path, [lines])
    assert [(row["ticker"], row["close"], row["revisions"]) for row in rows] == [("QQQ", 3.0, 2), ("SPY", 2.0, 3)]


def test_revisions_are_ordered_by_the_microsecond(tmp_path: Path) -> None:
    lines = [line(ARRIVAL + timedelta(microseconds=1), [aggregate(c=2.0)]), line(ARRIVAL, [aggregate(c=1.0)])]
    [row] = normalize(tmp_path, [lines])
    assert row["close"] == 2.0


def test_a_later_revision_replaces_all_of_an_earlier_one(tmp_path: Path) -> None:
    lines = [line(ARRIVAL, [aggregate(vw=1.5)]), line(later(1), [aggregate(vw=None)])]
    [row] = normalize(tmp_path, [lines])
    assert row["vwap"] is None


def test_the_same_minute_of_another_ticker_or_case_is_another_bar(tmp_path: Path) -> None:
    rows = normalize(tmp_path, [[line(ARRIVAL, [aggregate(name) for name in ("KIMpL", "KIMPL", "BRK.B", "BRK")])]])
    assert [row["ticker"] for row in rows] == ["BRK", "BRK.B", "KIMPL", "KIMpL"]


def test_rows_are_sorted_by_ticker_and_time(tmp_path: Path) -> None:
    bars = [aggregate(name, NOON + 60_000 * n) for name in ("C", "A", "B") for n in (2, 0, 1)]
    rows = normalize(tmp_path, [[line(ARRIVAL, [bar])] for bar in bars])
    keys = [(row["ticker"], row["timestamp"]) for row in rows]
    assert len(keys) == 9
    assert keys == sorted(keys)


def test_refused_events_are_left_out_by_their_position(tmp_path: Path) -> None:
    events = [aggregate(c=-1.0), aggregate("QQQ"), aggregate("IBM", v=None), aggregate(c=5.0)]
    rows = normalize(tmp_path, [[line(ARRIVAL, events, refused=[0, 2])]])
    assert [(row["ticker"], row["close"], row["revisions"]) for row in rows] == [("QQQ", 450.5, 1), ("SPY", 5.0, 1)]


def test_a_refused_volume_that_is_no_number_does_not_affect_other_events(tmp_path: Path) -> None:
    rows = normalize(tmp_path, [[line(ARRIVAL, [aggregate(dv="many"), aggregate("QQQ", dv="7.5")], refused=[0])]])
    assert [(row["ticker"], row["volume"]) for row in rows] == [("QQQ", 7.5)]


def test_a_bare_object_is_a_frame_of_one_and_can_be_refused(tmp_path: Path) -> None:
    lines = [line(ARRIVAL, aggregate("SPY")), line(ARRIVAL, aggregate("QQQ"), refused=[0]), line(ARRIVAL, STATUS)]
    assert [row["ticker"] for row in normalize(tmp_path, [lines])] == ["SPY"]


def test_other_kinds_of_events_and_fields_of_other_types_are_ignored(tmp_path: Path) -> None:
    trade = {"ev": "T", "sym": 7, "s": {"a": 1}, "o": [1], "v": "much", "c": ["12", 7], "dv": {}, "otc": "no"}
    quote = {"ev": "Q", "s": "soon", "z": 1e300, "x": {"ev": "AM", "sym": "NESTED"}}
    odd = [trade, aggregate("QQQ", av=None, dav={"?": 1}, x={"deep": [1, {"er": None}]}), quote]
    lines = [
        line(ARRIVAL, [*odd, STATUS]),
        archive.event_line(ARRIVAL, b'{"kind": "disconnected", "detail": "x"}'),
        line(ARRIVAL, []),
    ]
    [row] = normalize(tmp_path, [lines])
    assert (row["ticker"], row["close"], row["day_volume"]) == ("QQQ", 450.5, None)


REFUSED = [
    {"z": "many"},
    {"a": [1]},
    {"av": {}},
    {"otc": "?"},
    {"v": 1e30},
    {"vw": 1e300},
    {"h": 1e9},
    {"op": 1e9},
    {"dv": "1,234"},
    {"dv": "1000000000000000"},
    {"o": None, "op": None},
    {"c": None},
]


@pytest.mark.parametrize("odd", REFUSED)
def test_an_event_that_was_refused_is_no_bar_of_the_archive_either(tmp_path: Path, odd: dict[str, Any]) -> None:
    [row] = normalize(tmp_path, [[line(ARRIVAL, [aggregate("QQQ", **odd), aggregate("SPY")], refused=[0])]])
    assert row["ticker"] == "SPY"


@pytest.mark.parametrize("odd", REFUSED)
@pytest.mark.fault("hostile values")
def test_an_event_that_the_decoder_refuses_is_left_out_of_the_archive_and_named(
    tmp_path: Path, odd: dict[str, Any]
) -> None:
    content = line(ARRIVAL, [aggregate("QQQ", **odd), aggregate("SPY")])
    unreadable, tickers, bad = damaged(tmp_path, content)
    assert tickers == ["GOOD", "SPY"]
    assert "left out" in unreadable[bad]


@pytest.mark.parametrize("odd", [None, 5, "AM", [{}], [None], [1], ["AM"], [[aggregate("NESTED")]]])
def test_what_is_no_event_is_left_out_of_the_archive_and_named(tmp_path: Path, odd: object) -> None:
    unreadable, tickers, bad = damaged(tmp_path, line(ARRIVAL, odd) + line(ARRIVAL, [aggregate("SPY", c=None)]))
    assert tickers == ["GOOD"]
    assert "left out" in unreadable[bad]
    assert "1 more" in unreadable[bad]


@pytest.mark.parametrize(
    "stamp",
    [
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+05:00",
        "9999-12-31T23:59:59Z",
        "infinity",
        "-infinity",
        "2026-01-26T18:31:00",
        "",
    ],
)
def test_a_line_that_arrived_at_an_impossible_time_is_left_out_and_named(tmp_path: Path, stamp: str) -> None:
    impossible = line(ARRIVAL, [aggregate("QQQ")]).replace(b"2026-01-26T18:31:00.123456Z", stamp.encode())
    # The frame that DuckDB cannot read has the decoder read the file.
    for other in ([aggregate("SPY")], aggregate("SPY")):
        unreadable, tickers, bad = damaged(tmp_path, impossible + line(ARRIVAL, other))
        if stamp != "2026-01-26T18:31:00" or isinstance(other, dict):
            assert tickers == ["GOOD", "SPY"]
            assert "line 1" in unreadable[bad]


def test_only_the_channels_own_bars_are_taken(tmp_path: Path) -> None:
    events = [aggregate("SPY"), aggregate("QQQ", NOON + 7_000, ev="A"), aggregate("IBM", ev="am")]
    lines = [[line(ARRIVAL, events)]]
    assert [row["ticker"] for row in normalize(tmp_path / "m", lines)] == ["SPY"]
    [second] = normalize(tmp_path / "s", lines, channel=Channel.SECOND)
    assert (second["ticker"], second["timestamp"]) == ("QQQ", moment(NOON + 7_000))


def test_a_bar_of_another_day_in_the_same_frame_is_left_out(tmp_path: Path) -> None:
    days = [aggregate("OLD", at(0, 0) - 60_000), aggregate("FIRST", at(0, 0)), aggregate("LAST", at(23, 59))]
    events = [*days, aggregate("NEXT", at(23, 59) + 60_000)]
    assert [row["ticker"] for row in normalize(tmp_path, [[line(ARRIVAL, events)]])] == ["FIRST", "LAST"]


def test_frames_are_read_compressed_or_plain_and_over_several_calls(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"
    plain.write_bytes(line(ARRIVAL, [aggregate("SPY", c=1.0)]))
    packed.write_bytes(archive.compress([line(later(1), [aggregate("SPY", c=2.0)])]))
    with Normalization(DAY, Channel.MINUTE, tmp_path) as normalization:
        normalization.add_frames([packed])
        normalization.add_frames([])
        normalization.add_frames([plain])
        normalization.write(tmp_path / "out.parquet")
    [row] = read(tmp_path / "out.parquet")
    assert (row["close"], row["revisions"]) == (2.0, 2)


@pytest.mark.parametrize(
    ("day", "hour", "minute", "part"),
    [
        (DAY, 4, 0, "pre"),
        (DAY, 9, 29, "pre"),
        (DAY, 9, 30, "regular"),
        (DAY, 15, 59, "regular"),
        (DAY, 16, 0, "post"),
        (DAY, 19, 30, "post"),  # the next day in UTC
        (HALF_DAY, 12, 59, "regular"),
        (HALF_DAY, 13, 0, "post"),
        (HALF_DAY, 16, 59, "post"),
        (date(2026, 7, 6), 9, 29, "pre"),
        (date(2026, 7, 6), 15, 59, "regular"),
    ],
)
def test_a_bar_is_in_the_part_of_the_session_it_starts_in(
    tmp_path: Path, day: date, hour: int, minute: int, part: str
) -> None:
    [row] = normalize(tmp_path, [[line(ARRIVAL, [aggregate(start_ms=at(hour, minute, day))])]], day=day)
    assert row["session"] == part


def shuffled_file(folder: Path, lines: list[bytes], files: int, seed: int) -> Path:
    """The lines in any order, dealt to so many files."""
    dealt: list[list[bytes]] = [[] for _ in range(files)]
    shuffled = random.Random(seed).sample(lines, len(lines))
    for number, text in enumerate(shuffled):
        dealt[number % files].append(text)
    return normalized_file(folder, dealt)


def test_the_same_frames_give_the_same_bytes_in_any_order_and_number_of_files(tmp_path: Path) -> None:
    choice = random.Random(1)
    lines = [
        line(
            later(n),
            [
                aggregate(choice.choice("ABCDEF") * 3, NOON + 60_000 * choice.randrange(30), c=choice.uniform(1, 9))
                for _ in range(choice.randrange(1, 6))
            ],
        )
        for n in range(600)
    ]
    bytes_seen = {shuffled_file(tmp_path / str(n), lines, n, seed=n).read_bytes() for n in range(1, 6)}
    assert len(bytes_seen) == 1


# Damage


def damaged(folder: Path, content: bytes, name: str = "bad.jsonl") -> tuple[dict[Path, str], list[str], Path]:
    """What is said of the damaged file, and the tickers that could be made of it and a sound one beside it."""
    bad, good = folder / name, folder / "good.jsonl.zst"
    bad.write_bytes(content)
    good.write_bytes(archive.compress([line(ARRIVAL, [aggregate("GOOD")])]))
    with Normalization(DAY, Channel.MINUTE, folder) as normalization:
        normalization.add_frames([bad, good])
        normalization.write(folder / "out.parquet")
        unreadable = normalization.unreadable
    rows = read(folder / "out.parquet")
    assert all(row["revisions"] == 1 for row in rows), "nothing is added twice"
    return unreadable, [row["ticker"] for row in rows], bad


def test_a_damaged_line_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    first, second = line(ARRIVAL, [aggregate("AAA")]), line(ARRIVAL, [aggregate("BBB")])
    content = first + b'{"received_at": "2026-01-26T18:3\xff\n' + second
    unreadable, tickers, bad = damaged(tmp_path, content)
    assert list(unreadable) == [bad]
    assert unreadable[bad]
    assert tickers == ["AAA", "BBB", "GOOD"]


def test_an_incomplete_last_line_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    content = line(ARRIVAL, [aggregate("AAA")]) + line(ARRIVAL, [aggregate("BBB")])[:-20]
    _, tickers, bad = damaged(tmp_path, content)
    assert tickers == ["AAA", "GOOD"]
    # Beside other files DuckDB skips it without an error, one time in ten.
    with Normalization(DAY, Channel.MINUTE, tmp_path) as normalization:
        normalization.add_frames([bad])
        normalization.write(tmp_path / "out.parquet")
        assert list(normalization.unreadable) == [bad]


@pytest.mark.parametrize("bars", [100, 5000])
def test_an_archive_cut_short_is_reported_and_the_others_are_used(tmp_path: Path, bars: int) -> None:
    whole = archive.compress(line(later(n), [aggregate(f"T{n}")]) for n in range(bars))
    unreadable, tickers, bad = damaged(tmp_path, whole[: len(whole) // 2], "bad.jsonl.zst")
    assert "GOOD" in tickers
    assert list(unreadable) == [bad]


def test_a_frame_is_read_by_the_decoder_where_duckdb_cuts_its_error_message_within_a_character(tmp_path: Path) -> None:
    for length in range(12):
        status = {"ev": "status", "status": "x" * length + "\N{LINEAR B SYLLABLE B008 A}" * 20}
        bare = archive.frame_line(ARRIVAL, json.dumps(status, ensure_ascii=False).encode(), ())
        [row] = normalize(tmp_path / str(length), [[bare, line(ARRIVAL, [aggregate()])]])
        assert row["ticker"] == "SPY"


@pytest.mark.parametrize("content", [b"\x00" * 100, b"no archive"])
def test_a_file_that_is_no_archive_is_reported(tmp_path: Path, content: bytes) -> None:
    unreadable, tickers, bad = damaged(tmp_path, content, "bad.jsonl.zst")
    assert list(unreadable) == [bad]
    assert tickers == ["GOOD"]


@pytest.mark.parametrize("day", [DAY, date(2026, 1, 25)])
def test_a_day_without_bars_is_a_failure_and_leaves_no_file(tmp_path: Path, day: date) -> None:
    other_day = line(ARRIVAL, [aggregate(start_ms=at(12, 0, date(2026, 1, 23))), STATUS])
    with pytest.raises(NoBars, match=str(day)):
        normalize(tmp_path, [[other_day]], day=day)
    assert not (tmp_path / "normalized.parquet").exists()


def test_bars_of_a_day_without_a_session_are_no_dataset(tmp_path: Path) -> None:
    sunday = date(2026, 1, 25)
    with pytest.raises(NoBars, match="not a trading day"):
        normalize(tmp_path, [[line(ARRIVAL, [aggregate(start_ms=at(12, 0, sunday))])]], day=sunday)


def test_a_folder_may_have_an_apostrophe_in_its_name(tmp_path: Path) -> None:
    assert len(normalize(tmp_path / "the vendor's", [[line(ARRIVAL, [aggregate()])]])) == 1


# Records beside frames


def test_only_records_that_no_frame_covers_are_wanted(tmp_path: Path) -> None:
    files = [[line(ARRIVAL, [aggregate("SPY", NOON), aggregate("QQQ", NOON)], refused=[1])]]
    wanted = {("SPY", NOON), ("SPY", NOON + 60_000), ("QQQ", NOON), ("spy", NOON)}
    (tmp_path / "0.jsonl").write_bytes(b"".join(files[0]))
    with Normalization(DAY, Channel.MINUTE, tmp_path) as normalization:
        assert normalization.uncovered(wanted) == sorted(wanted)
        normalization.add_frames([tmp_path / "0.jsonl"])
        assert normalization.uncovered(wanted) == sorted(wanted - {("SPY", NOON)})
        assert normalization.uncovered([]) == []


def test_records_are_added_to_what_the_frames_have(tmp_path: Path) -> None:
    records = record_line("QQQ", NOON, 20.5, bar_data={"volume": 10.25})
    records += record_line("IBM", at(19, 59), 30.5, bar_data={"vwap": None})
    rows = normalize(tmp_path, [[line(ARRIVAL, [aggregate("SPY")])]], records)
    assert [(row["ticker"], row["close"], row["session"]) for row in rows] == [
        ("IBM", 30.5, "post"),
        ("QQQ", 20.5, "regular"),
        ("SPY", 450.5, "regular"),
    ]
    ibm, qqq, _ = rows
    assert (qqq["volume"], qqq["vwap"], ibm["vwap"]) == (10.25, 2.0, None)
    assert qqq["timestamp"] == moment(NOON)
    assert qqq["received_at"] == ARRIVAL.replace(microsecond=123_000), "a record has milliseconds"
    unknown = ("day_open", "day_volume", "day_vwap", "average_trade_size", "otc", "transactions")
    assert [qqq[name] for name in unknown] == [None] * 6


def test_records_alone_make_a_day_and_those_of_another_day_are_left_out(tmp_path: Path) -> None:
    other_day = record_line("OLD", at(0, 0) - 60_000, 1.0) + record_line("NEXT", at(0, 0, date(2026, 1, 27)), 1.0)
    file = normalized_file(tmp_path, [], other_day + record_line("SPY", NOON, 20.5))
    assert [row["ticker"] for row in read(file)] == ["SPY"]
    assert columns(file) == schema(catalog.NORMALIZED_BARS)


def test_a_genuine_frame_is_normalized_field_by_field(tmp_path: Path) -> None:
    """The genuine frame of 2026-09-08, as it was received."""
    payload = (
        b'[{"ev":"A","sym":"FCX","v":4989,"av":4332125,"op":75.98,"vw":78.0894,"o":78.1,"c":78.08,"h":78.125,'
        b'"l":78.07,"a":76.8404,"z":62,"s":1788877043000,"e":1788877044000,"dv":"4989.0","dav":"4332125.038360"}]'
    )
    received_at = datetime(2026, 9, 8, 15, 37, 24, 5, tzinfo=UTC)
    [row] = normalize(
        tmp_path, [[archive.frame_line(received_at, payload, ())]], day=date(2026, 9, 8), channel=Channel.SECOND
    )
    event = json.loads(payload)[0]
    names = {"open": "o", "high": "h", "low": "l", "close": "c", "volume": "v", "vwap": "vw", "day_open": "op"}
    assert {name: row[name] for name in names} == {name: event[field] for name, field in names.items()}
    assert (row["day_volume"], row["day_vwap"]) == (4332125.03836, 76.8404)
    assert row["average_trade_size"] == 62
    assert row["session"] == "regular"
    assert row["received_at"] == received_at
