"""What became of every minute, held against plain Python; and how it is drawn."""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.coverage import LATE_SECONDS, Coverage, Shortfall, below, worst_first
from polygon_pipeline.datasets.pictures import MOST_TICKERS, heat_map
from polygon_pipeline_tests.support.bars import DAY, Row, at, history, read, reference_file

MINUTE = timedelta(minutes=1)
HALF_DAY = date(2026, 11, 27)
Minute = tuple[str, int]


def start_ms(minute: int, day: date = DAY) -> int:
    return at(4, 0, day) + 60_000 * minute


def kept(ticker: str, minute: int, kind: str) -> Row:
    """A row of normalized_bars. kind: collected, late, corrected or repaired."""
    start = datetime.fromtimestamp(start_ms(minute) / 1000, UTC)
    delay = {
        "collected": MINUTE + timedelta(seconds=LATE_SECONDS),
        "late": MINUTE + timedelta(seconds=LATE_SECONDS + 1),
    }
    return {
        "ticker": ticker,
        "timestamp": start,
        "revisions": 0 if kind == "repaired" else 2,
        "received_at": start + delay.get(kind, timedelta(days=1)),
        "source": "websocket" if kind in delay else "rest",
    }


def online(*minutes: tuple[int, int]) -> list[tuple[int, int]]:
    return [(start_ms(first), start_ms(last)) for first, last in minutes]


ALWAYS = online((0, 959))


class Day:
    """The files that coverage is made of. bars: kinds of kept() by ticker and minute; traded: None for no reference."""

    def __init__(
        self,
        folder: Path,
        bars: dict[Minute, str],
        traded: Iterable[Minute] | None = None,
        *,
        tickers: Sequence[str] | None = None,
        until: int = 960,
        connected: Sequence[tuple[int, int]] = ALWAYS,
        subscribed: Sequence[str] | None = None,
        day: date = DAY,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.day, self.folder, self.connected, self.subscribed = day, folder, connected, subscribed
        self.normalized = folder / "normalized.parquet"
        rows = [kept(ticker, minute, kind) for (ticker, minute), kind in sorted(bars.items())]
        pq.write_table(pa.Table.from_pylist(rows, schema=catalog.NORMALIZED_BARS.schema()), self.normalized)
        self.reference = None
        if traded is not None:
            found = [history(ticker, start_ms(minute)) for ticker, minute in traded]
            self.reference = reference_file(folder / "reference.parquet", found, tickers, start_ms(until))

    def file(self) -> Path:
        target = self.folder / "coverage.parquet"
        with self._coverage() as coverage:
            coverage.write(target)
        return target

    def rows(self) -> dict[str, Row]:
        return {row["ticker"]: row for row in read(self.file())}

    def states(self, tickers: Sequence[str] | None = None) -> pa.Table:
        with self._coverage() as coverage:
            return coverage.minute_states(tickers)

    def _coverage(self) -> Coverage:
        return Coverage(self.day, self.normalized, self.reference, self.connected, self.folder, self.subscribed)


def told(day: Day, *minutes: int) -> list[str]:
    """The states of these minutes of SPY."""
    return [row["state"] for row in day.states(["SPY"]).to_pylist() if row["minute"] in minutes]


def test_every_state_has_its_minute(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("SPY", 1): "corrected", ("SPY", 2): "repaired", ("SPY", 10): "collected"}
    traded = [("SPY", minute) for minute in range(5)]
    day = Day(tmp_path, bars, traded, until=9, connected=online((0, 3)))
    assert told(day, 0, 1, 2, 3, 4, 5, 8, 9, 10) == [
        "collected",
        "corrected",
        "repaired",
        "lost_connected",
        "lost_disconnected",
        "no_trade",
        "no_trade",
        "unknown",
        "collected",
    ]
    assert day.rows()["SPY"] == {
        "ticker": "SPY",
        "date": DAY,
        "expected_minutes": 960,
        "regular_minutes": 390,
        "collected_minutes": 3,
        "traded_minutes": 5,
        "lost_disconnected": 1,
        "lost_connected": 2,
        "repaired_minutes": 1,
        "corrected_minutes": 1,
        "late_minutes": 0,
        "unexpected_minutes": 0,
        "unknown_minutes": 950,
        "longest_gap_minutes": 3,
        "share": 0.6,
    }


def test_the_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    columns = [(field.name, field.type) for field in pq.read_schema(Day(tmp_path, {("SPY", 0): "late"}).file())]
    assert columns == [(field.name, field.type) for field in catalog.BAR_COVERAGE.schema()]


def test_without_a_reference_nothing_is_lost_and_nothing_certain(tmp_path: Path) -> None:
    day = Day(tmp_path, {("SPY", 0): "collected", ("SPY", 1): "late"}, connected=[], subscribed=["QQQ"])
    spy, quiet = day.rows()["SPY"], day.rows()["QQQ"]
    assert (spy["collected_minutes"], spy["late_minutes"], spy["unknown_minutes"]) == (2, 1, 958)
    assert (spy["traded_minutes"], spy["share"], spy["lost_disconnected"], spy["unexpected_minutes"]) == (
        None,
        None,
        0,
        0,
    )
    assert quiet["unknown_minutes"] == 960


def test_a_reference_of_some_tickers_says_nothing_of_the_others(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("IBM", 0): "collected"}
    rows = Day(tmp_path, bars, [], tickers=["SPY", "QQQ"]).rows()
    assert [rows[name]["traded_minutes"] for name in ("IBM", "QQQ", "SPY")] == [None, 0, 0]
    assert [rows[name]["unexpected_minutes"] for name in ("IBM", "QQQ", "SPY")] == [0, 0, 1]
    assert [rows[name]["unknown_minutes"] for name in ("IBM", "QQQ", "SPY")] == [959, 0, 0]
    assert [rows[name]["share"] for name in ("IBM", "QQQ", "SPY")] == [None, None, None]


def test_a_ticker_that_was_not_subscribed_was_never_connected(tmp_path: Path) -> None:
    rows = Day(tmp_path, {("SPY", 1): "repaired"}, [("SPY", 1), ("IBM", 1)], subscribed=["SPY"]).rows()
    assert (rows["SPY"]["lost_connected"], rows["SPY"]["lost_disconnected"]) == (1, 0)
    assert (rows["IBM"]["lost_connected"], rows["IBM"]["lost_disconnected"]) == (0, 1)


def test_the_longest_gap_is_of_consecutive_minutes(tmp_path: Path) -> None:
    lost = [0, 1, 5, 6, 7, 9, 958, 959]
    bars = {("SPY", 6): "repaired", ("SPY", 8): "collected"}
    assert Day(tmp_path, bars, [("SPY", minute) for minute in [*lost, 8]]).rows()["SPY"]["longest_gap_minutes"] == 3


def test_a_half_day_expects_fewer_minutes_and_a_holiday_cannot_be_covered(tmp_path: Path) -> None:
    # Its files hold another day's bars, which are none of its minutes.
    day = Day(tmp_path, {("SPY", 1): "collected"}, day=HALF_DAY, connected=[])
    row = day.rows()["SPY"]
    assert [row[name] for name in ("date", "expected_minutes", "regular_minutes", "collected_minutes")] == [
        HALF_DAY,
        780,
        210,
        0,
    ]
    with pytest.raises(ValueError, match="2026-01-25 is not a trading day"):
        Day(tmp_path, {("SPY", 1): "collected"}, day=date(2026, 1, 25)).file()


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    bars = {(f"T{n % 50}", n): "collected" for n in range(900)}
    first, second = (Day(tmp_path / name, bars, bars.keys()).file().read_bytes() for name in ("a", "b"))
    assert first == second


# Against plain Python

spots = st.tuples(st.sampled_from(["AAA", "BBB", "CCC"]), st.sampled_from([0, 1, 2, 3, 4, 329, 330, 719, 720, 959]))
edges = st.integers(-2, 8) | st.sampled_from([329, 330, 500, 959, 970])
some_tickers = st.none() | st.lists(st.sampled_from(["AAA", "BBB", "DDD"]), unique=True)


@given(
    bars=st.dictionaries(spots, st.sampled_from(["collected", "late", "corrected", "repaired"]), max_size=15),
    traded=st.none() | st.sets(spots, max_size=15),
    tickers=some_tickers,
    until=st.sampled_from([0, 2, 330, 960]),
    runs=st.lists(st.tuples(edges, edges), max_size=3),
    subscribed=some_tickers,
)
@settings(max_examples=25, deadline=None)
def test_the_classification_is_what_plain_python_makes_of_it(
    bars: dict[Minute, str],
    traded: set[Minute] | None,
    tickers: list[str] | None,
    until: int,
    runs: list[tuple[int, int]],
    subscribed: list[str] | None,
) -> None:
    known = {
        (ticker, minute)
        for ticker in ("AAA", "BBB", "CCC", "DDD")
        for minute in range(until)
        if traded is not None and (tickers is None or ticker in tickers)
    }
    traded = None if traded is None else traded & known
    names = {ticker for ticker, _ in bars} | {ticker for ticker, _ in traded or ()} | set(subscribed or ())
    names |= set(tickers or () if traded is not None else ())
    expected = {}
    connected = set()
    for spot in ((ticker, minute) for ticker in names for minute in range(960)):
        if any(first <= spot[1] <= last for first, last in runs) and (subscribed is None or spot[0] in subscribed):
            connected.add(spot)
        if kind := bars.get(spot):
            expected[spot] = "collected" if kind == "late" else kind
        elif traded and spot in traded:
            expected[spot] = "lost_connected" if spot in connected else "lost_disconnected"
        else:
            expected[spot] = "no_trade" if spot in known else "unknown"

    with tempfile.TemporaryDirectory() as name:
        day = Day(
            Path(name), bars, traded, tickers=tickers, until=until, connected=online(*runs), subscribed=subscribed
        )
        states = {(row["ticker"], row["minute"]): row for row in day.states().to_pylist()}
        rows = day.rows()
    assert {spot: row["state"] for spot, row in states.items()} == expected
    assert {spot for spot, row in states.items() if row["connected"]} == connected
    assert {spot: row["traded"] for spot, row in states.items() if row["traded"] is not None} == {
        spot: spot in (traded or ()) for spot in known if spot[0] in names
    }

    assert rows.keys() == names
    for ticker, row in rows.items():
        mine = {minute: state for (name, minute), state in expected.items() if name == ticker}
        counts = Counter(mine.values())
        unrepaired = counts["lost_connected"] + counts["lost_disconnected"]
        lost = [minute for minute, state in mine.items() if state == "repaired" or state.startswith("lost")]
        runs_of_lost = [len(list(run)) for _, run in groupby(enumerate(lost), key=lambda pair: pair[1] - pair[0])]
        spots_known = [minute for name, minute in known if name == ticker]
        minutes_traded = {minute for name, minute in traded or () if name == ticker}
        traded_count = len(minutes_traded)
        had = [minute for minute, state in mine.items() if state in ("collected", "corrected")]
        assert row["expected_minutes"] == 960 == (
            row["collected_minutes"] + row["lost_connected"] + row["lost_disconnected"]
            + counts["no_trade"] + row["unknown_minutes"]
        )  # fmt: skip
        assert row["collected_minutes"] == len(had)
        assert row["repaired_minutes"] == counts["repaired"]
        assert row["corrected_minutes"] == counts["corrected"]
        assert row["late_minutes"] == sum(kind == "late" for (name, _), kind in bars.items() if name == ticker)
        assert row["unknown_minutes"] == counts["unknown"]
        assert row["lost_connected"] == sum((ticker, minute) in connected for minute in lost)
        assert row["longest_gap_minutes"] == max(runs_of_lost, default=0)
        assert row["traded_minutes"] == (traded_count if spots_known else None)
        assert row["unexpected_minutes"] == len(set(had) & set(spots_known) - minutes_traded)
        assert row["share"] == ((traded_count - unrepaired) / traded_count if traded_count else None)


# Who came off worst, and the picture


def test_the_tickers_below_a_share_are_named_worst_first(tmp_path: Path) -> None:
    traded = [(name, minute) for name in ("AAA", "BBB", "CCC", "DDD") for minute in range(10)]
    missing = {"AAA": 1, "BBB": 4, "CCC": 0, "DDD": 4}
    bars = {(name, minute): "repaired" if minute == 9 else "collected" for name, minute in traded}
    bars = {(name, minute): kind for (name, minute), kind in bars.items() if minute >= missing[name]}
    file = Day(tmp_path, bars | {("EEE", 900): "collected"}, traded, tickers=["AAA", "BBB", "CCC", "DDD"]).file()
    worse = [Shortfall("BBB", 0.6, 10, 6), Shortfall("DDD", 0.6, 10, 6)]
    assert below(file, 0.9) == worse
    assert below(file, 0.95) == [*worse, Shortfall("AAA", 0.9, 10, 9)]
    assert worst_first(file, 4) == ["BBB", "DDD", "AAA", "CCC"]
    assert worst_first(file, 9)[-1] == "EEE"


def test_the_picture_has_a_pixel_a_minute_and_a_colour_a_state(tmp_path: Path) -> None:
    bars = {("SPY", 0): "collected", ("SPY", 1): "corrected", ("SPY", 2): "repaired", ("QQQ", 9): "collected"}
    day = Day(tmp_path, bars, [("SPY", m) for m in range(5)], until=9, connected=online((0, 3)))
    png = heat_map(DAY, day.states(), ["SPY", "QQQ"])
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    spy, qqq = ([picture.getpixel((88 + minute, 56 + 14 * row + 6)) for minute in range(960)] for row in (0, 1))
    colours = [spy[0], spy[1], spy[2], spy[3], spy[4], spy[5], spy[20]]
    assert len(set(colours)) == 7
    assert qqq[:9] == [spy[5]] * 9, "no trade"
    assert qqq[9:11] == [spy[0], spy[20]], "collected, then unknown"


def test_the_picture_of_a_full_day_is_small_and_of_too_many_tickers_refused(tmp_path: Path) -> None:
    names = [f"T{n}" for n in range(MOST_TICKERS)]
    bars = {
        (name, minute): "collected" for row, name in enumerate(names) for minute in range(row % 7, 960, 2 + row % 5)
    }
    states = Day(tmp_path, bars, [], until=500).states()
    assert len(heat_map(DAY, states, names)) < 60_000
    with pytest.raises(ValueError, match="41 tickers"):
        heat_map(DAY, states, [*names, "MORE"])
