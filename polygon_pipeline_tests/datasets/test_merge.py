"""Of a bar's values in the stream and in the history, those received most recently are kept."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.merge import EXAMPLES, Merge
from polygon_pipeline.datasets.normalize import NoBars, Normalization
from polygon_pipeline.datasets.quality import schema_errors
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, NOON, JsonObject, Row, aggregate, at, later, line, reference_row
from polygon_pipeline_tests.support.day_files import read, reference_file


def merged_file(folder: Path, lines: Iterable[bytes], rows: Iterable[Row], reference_first: bool = False) -> Path:
    return _merge(folder, lines, rows, reference_first)[1]


def merge(folder: Path, lines: Iterable[bytes], rows: Iterable[Row]) -> tuple[Merge, list[Row]]:
    found, file = _merge(folder, lines, rows)
    return found, read(file)


def _merge(
    folder: Path, lines: Iterable[bytes], rows: Iterable[Row], reference_first: bool = False
) -> tuple[Merge, Path]:
    folder.mkdir(exist_ok=True)
    target, frames, reference = folder / "out.parquet", folder / "frames.jsonl", folder / "reference.parquet"
    frames.write_bytes(b"".join(lines))
    reference_file(reference, rows)
    with Normalization(DAY, Channel.MINUTE, folder) as normalization:
        if reference_first:
            normalization.add_reference(reference)
        if frames.stat().st_size:
            normalization.add_frames([frames])
        if not reference_first:
            normalization.add_reference(reference)
        return normalization.write(target), target


def said(event: JsonObject, seconds: float = 0) -> list[bytes]:
    return [line(later(seconds), [event])]


def test_a_bar_that_only_the_history_has_is_added(tmp_path: Path) -> None:
    row = reference_row("QQQ", at(9, 29), vwap=None, source="flat_file")
    found, [qqq, spy] = merge(tmp_path, said(aggregate()), [row])
    assert found == Merge(added=1)
    empty = dict.fromkeys(["day_open", "day_volume", "day_vwap", "average_trade_size", "otc"])
    assert qqq == {**row, **empty, "session": "pre", "revisions": 0}
    assert (spy["source"], spy["transactions"]) == ("websocket", None)
    assert schema_errors(tmp_path / "out.parquet", catalog.NORMALIZED_BARS) == []


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"received_at": later(-60)},
        {"volume": 1000.0000005},
        {"vwap": 450.30004},
        {"vwap": None},
    ],
)
def test_where_stream_and_history_agree_the_streams_row_stays_and_gets_the_transactions(
    tmp_path: Path, same: JsonObject
) -> None:
    found, [row] = merge(tmp_path, said(aggregate()), [reference_row(**same)])
    assert found == Merge()
    assert (row["source"], row["received_at"], row["vwap"], row["volume"]) == ("websocket", later(0), 450.3, 1000)
    assert (row["transactions"], row["revisions"]) == (7, 1)


@pytest.mark.parametrize(
    "different",
    [{"open": 450.26}, {"high": 450.76}, {"low": 450.1}, {"close": 450.6}, {"volume": 1000.5}, {"vwap": 450.31}],
)
def test_where_they_differ_history_received_later_wins_and_other_columns_stay_the_streams(
    tmp_path: Path, different: JsonObject
) -> None:
    found, [row] = merge(tmp_path, [*said(aggregate(c=1.0)), *said(aggregate(), 1)], [reference_row(**different)])
    assert found[:4] == (0, 1, 1, 0)
    kept = {
        "day_open": 449.5, "day_volume": 50_000, "day_vwap": 450.1, "average_trade_size": 62, "otc": False,
        "session": "regular", "revisions": 2,
    }  # fmt: skip
    assert row == {**reference_row(**different), **kept}


@pytest.mark.parametrize("seconds", [-1, 0])
def test_where_they_differ_a_revision_received_no_earlier_than_the_history_wins(tmp_path: Path, seconds: float) -> None:
    found, [row] = merge(tmp_path, said(aggregate()), [reference_row(close=450.6, received_at=later(seconds))])
    assert found[:4] == (0, 1, 0, 1)
    assert (row["source"], row["received_at"], row["close"], row["volume"]) == ("websocket", later(0), 450.5, 1000)
    assert row["transactions"] is None, "they belong to another state of the bar"


def test_a_history_without_vwap_keeps_the_streams_vwap(tmp_path: Path) -> None:
    _, [row] = merge(tmp_path, said(aggregate()), [reference_row(close=450.6, vwap=None)])
    assert (row["close"], row["vwap"]) == (450.6, 450.3)


def test_the_first_differences_are_reported_with_both_values(tmp_path: Path) -> None:
    minutes = range(EXAMPLES + 5)
    lines = [line(later(0), [aggregate(start_ms=NOON + 60_000 * n) for n in minutes])]
    rows = [reference_row(start_ms=NOON + 60_000 * n, close=450.6, received_at=later(1 - 2 * (n % 2))) for n in minutes]
    found, _ = merge(tmp_path, lines, rows)
    assert found[:4] == (0, 25, 13, 12)
    assert len(found.examples) == EXAMPLES
    same = {"open": 450.25, "high": 450.75, "low": 450.2, "volume": 1000.0, "vwap": 450.3}
    assert found.examples[1] == {
        "ticker": "SPY",
        "timestamp": "2026-01-26T17:01:00Z",
        "verdict": "kept",
        "stream": same | {"close": 450.5, "source": "websocket", "received_at": "2026-01-26T18:31:00.123456Z"},
        "reference": same | {"close": 450.6, "source": "rest", "received_at": "2026-01-26T18:30:59.123456Z"},
    }


def test_a_day_that_was_not_collected_is_made_from_the_history_and_a_day_without_either_fails(tmp_path: Path) -> None:
    _, rows = merge(tmp_path / "one", [], [reference_row("SPY")])
    assert [(row["ticker"], row["revisions"], row["source"]) for row in rows] == [("SPY", 0, "rest")]
    with pytest.raises(NoBars, match="2026-01-26"):
        merge(tmp_path / "none", [], [])


def test_second_bars_have_no_reference(tmp_path: Path) -> None:
    reference = reference_file(tmp_path / "reference.parquet", [reference_row()])
    with Normalization(DAY, Channel.SECOND, tmp_path) as normalization, pytest.raises(ValueError, match="channel A"):
        normalization.add_reference(reference)


# Against plain Python

bars = st.tuples(st.sampled_from(["SPY", "QQQ"]), st.integers(0, 2))
closes = st.sampled_from([450.3, 450.5])
vwaps = st.sampled_from([None, 450.3, 450.4])
versions = st.tuples(bars, closes, vwaps, st.integers(0, 5))


@pytest.mark.slow
@given(
    stream=st.lists(versions, min_size=1, max_size=12, unique_by=lambda version: (version[0], version[3])),
    reference=st.lists(versions, max_size=6, unique_by=lambda version: version[0]),
)
@settings(max_examples=15, deadline=None)
def test_the_merge_equals_that_of_plain_python(
    stream: list[tuple[tuple[str, int], float, float | None, int]],
    reference: list[tuple[tuple[str, int], float, float | None, int]],
) -> None:
    lines = [
        line(later(2 * second), [aggregate(name, NOON + 60_000 * minute, c=close, vw=vwap)])
        for (name, minute), close, vwap, second in stream
    ]
    rows = [
        reference_row(name, NOON + 60_000 * minute, close=close, vwap=vwap, received_at=later(2 * second + 1))
        for (name, minute), close, vwap, second in reference
    ]
    revisions = defaultdict(list)
    for bar, close, vwap, second in stream:
        revisions[bar].append((2 * second, close, vwap))
    expected: dict[tuple[str, int], list[Any]] = {}
    differing = 0
    for bar, found in revisions.items():
        second, close, vwap = max(found, key=lambda version: version[0])
        expected[bar] = [close, vwap, later(second), "websocket", None, len(found)]
    for bar, close, vwap, second in reference:
        mine = expected.get(bar)
        if mine and mine[0] == close and (mine[1] == vwap or None in (mine[1], vwap)):
            mine[4] = 7
            continue
        differing += mine is not None
        if not mine or later(2 * second + 1) > max(later(s) for s, _, _ in revisions[bar]):
            kept_vwap = vwap if vwap is not None else mine and mine[1]
            expected[bar] = [close, kept_vwap, later(2 * second + 1), "rest", 7, mine[5] if mine else 0]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged, actual = merge(folder / "first", lines, rows)
        second_time = merged_file(folder / "second", reversed(lines), rows, reference_first=True)
        assert second_time.read_bytes() == (folder / "first" / "out.parquet").read_bytes()
    columns = ("close", "vwap", "received_at", "source", "transactions", "revisions")
    assert {
        (row["ticker"], (row["timestamp"] - datetime.fromtimestamp(NOON / 1000, UTC)).seconds // 60): [
            row[name] for name in columns
        ]
        for row in actual
    } == expected
    assert len(actual) == len(expected)
    assert merged.differing == merged.corrected + merged.kept == len(merged.examples) == differing
    assert merged.added == len({bar for bar, *_ in reference} - revisions.keys())
