from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline import read
from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.errors import LakeError
from polygon_pipeline.lake.ranged_files import RangedFiles
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.read import ReadError, ReadWarning
from polygon_pipeline_tests.support.actions import Dividend, Split, put_fetches
from polygon_pipeline_tests.support.bars import Row, at, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file

FRIDAY, MONDAY, TUESDAY = date(2026, 1, 23), date(2026, 1, 26), date(2026, 1, 27)
KNOWN = date(2026, 2, 1)

Put = Callable[[Dataset, date, Iterable[Row]], None]

on_s3 = pytest.mark.parametrize("lake", ["s3"], indirect=True)


@pytest.fixture
def put(lake: Lake, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Put:
    """Puts a day's rows of a dataset into the lake, which is the environment's."""
    if lake.is_s3:
        for name, value in request.getfixturevalue("seaweedfs").address.environment().items():
            monkeypatch.setenv(name, value)
    return _putting(lake, monkeypatch, tmp_path)


@pytest.fixture
def local(file_lake: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Put:
    """The same for a local lake, where nothing differs on S3."""
    return _putting(file_lake, monkeypatch, tmp_path)


def _putting(lake: Lake, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Put:
    monkeypatch.setenv("LAKE_URI", lake.uri)

    def put_rows(dataset: Dataset, day: date, rows: Iterable[Row]) -> None:
        put_dataset(lake, dataset.name, day.isoformat(), dataset_file(folder / "rows.parquet", rows, dataset))

    return put_rows


def minutes(*tickers: str, day: date = MONDAY, price: float = 100.0, count: int = 2) -> list[Row]:
    return [
        normalized_row(ticker, at(9, 30 + minute, day), open=price, high=price, low=price, close=price, vwap=price)
        for ticker in sorted(tickers)
        for minute in range(count)
    ]


def daily_row(ticker: str = "SPY", close: float | None = 100.0, **fields: object) -> Row:
    return {"ticker": ticker, "close": close, "volume": 1000.0, "day_state": "final", **fields}


def closes(found: pa.Table) -> list[float]:
    values: list[float] = found["close"].to_pylist()
    return values


def test_bars_of_tickers_come_in_order_with_their_trade_dates(put: Put) -> None:
    put(catalog.NORMALIZED_BARS, FRIDAY, minutes("AAPL", "SPY", day=FRIDAY))
    put(catalog.NORMALIZED_BARS, MONDAY, minutes("AAPL", "MSFT", "SPY"))
    put(catalog.NORMALIZED_BARS, TUESDAY, minutes("SPY", day=TUESDAY))
    found = read.bars(["SPY", "AAPL"], "2026-01-23", MONDAY)
    assert found.column_names == list(read._BAR_COLUMNS)
    assert [*zip(found["ticker"].to_pylist(), found["date"].to_pylist(), strict=True)] == [
        (ticker, day) for ticker in ("AAPL", "SPY") for day in (FRIDAY, MONDAY) for _ in range(2)
    ]
    assert found["timestamp"][0].as_py() == datetime(2026, 1, 23, 14, 30, tzinfo=UTC)
    assert read.bars("*", MONDAY).num_rows == 6 + 2


def test_every_stored_interval_can_be_read(local: Put) -> None:
    for name, dataset in read._BARS.items():
        local(dataset, MONDAY, [{"ticker": "SPY", "timestamp": datetime(2026, 1, 26, 15, tzinfo=UTC), "close": 7.0}])
        assert closes(read.bars("SPY", MONDAY, every=name)) == [7.0]  # type: ignore[arg-type]


def test_prices_are_adjusted_by_what_is_known_when_they_are_read(put: Put, lake: Lake) -> None:
    put(catalog.DAILY_BARS, FRIDAY, [daily_row(close=100.0)])
    put(catalog.DAILY_BARS, MONDAY, [daily_row(close=98.0)])
    put(catalog.DAILY_BARS, TUESDAY, [daily_row(close=49.0)])
    put_fetches(lake, KNOWN, [Split(TUESDAY, 1, 2)], [Dividend(MONDAY, 2.0)])
    raw, split, full = (read.daily("SPY", FRIDAY, adjusted=how) for how in ("none", "splits", "all"))
    assert (closes(raw), closes(split)) == ([100.0, 98.0, 49.0], [50.0, 49.0, 49.0])
    assert closes(full) == pytest.approx([49.0, 49.0, 49.0])
    assert full["volume"].to_pylist() == [2000.0, 2000.0, 1000.0]
    assert full["day_state"].to_pylist() == ["final"] * 3


def test_the_pre_market_of_a_splits_day_is_in_new_shares_already(local: Put, file_lake: Lake) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, [normalized_row("SPY", at(19, 59), close=100.0)])
    local(catalog.NORMALIZED_BARS, TUESDAY, [normalized_row("SPY", at(4, 0, TUESDAY), close=50.0)])
    put_fetches(file_lake, KNOWN, [Split(TUESDAY, 1, 2)])
    assert closes(read.bars("SPY", MONDAY, adjusted="splits")) == [50.0, 50.0]


def test_as_of_takes_the_latest_fetch_of_that_day_and_leaves_later_events_out(local: Put, file_lake: Lake) -> None:
    local(catalog.DAILY_BARS, FRIDAY, [daily_row(close=120.0)])
    put_fetches(file_lake, FRIDAY, [Split(MONDAY, 1, 2), Split(date(2026, 2, 10), 1, 10)])
    put_fetches(file_lake, TUESDAY, [Split(MONDAY, 1, 3), Split(date(2026, 2, 10), 1, 10)])

    def close(as_of: date | str | None) -> float:
        return closes(read.daily("SPY", FRIDAY, adjusted="splits", as_of=as_of))[0]

    assert [close(FRIDAY), close("2026-01-26"), close(TUESDAY), close("2026-02-10")] == [120, 60, 40, 4]
    with pytest.raises(ReadError, match="has no splits from before 2026-01-23, so what was known on 2026-01-22"):
        close("2026-01-22")


def test_adjusting_without_splits_and_dividends_says_what_to_do(local: Put) -> None:
    local(catalog.DAILY_BARS, FRIDAY, [daily_row()])
    with pytest.raises(ReadError, match="has no splits, which prices are adjusted by: materialize"):
        read.daily("SPY", FRIDAY, adjusted="all")


def test_raw_prices_are_not_given_for_adjusted_ones_where_nobody_asked_for_a_tickers_events(
    local: Put, file_lake: Lake
) -> None:
    local(catalog.DAILY_BARS, FRIDAY, [daily_row("AAPL"), daily_row("SPY")])
    put_fetches(file_lake, KNOWN, [Split(MONDAY, 1, 2)], asked_for=["MSFT", "SPY"])
    assert closes(read.daily("SPY", FRIDAY, adjusted="splits")) == [50.0]
    for tickers in ("AAPL", ["AAPL", "SPY"], "*"):
        with pytest.raises(ReadError, match="The splits of AAPL were not asked for"):
            read.daily(tickers, FRIDAY, adjusted="splits")


def test_splits_alone_need_no_dividends(local: Put, file_lake: Lake) -> None:
    local(catalog.DAILY_BARS, FRIDAY, [daily_row()])
    put_fetches(file_lake, KNOWN, [Split(MONDAY, 1, 2)], [Dividend(MONDAY, -1.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert closes(read.daily("SPY", FRIDAY, adjusted="splits")) == [50.0]


def test_a_dividend_from_before_the_first_day_that_is_there_is_no_matter(local: Put, file_lake: Lake) -> None:
    local(catalog.DAILY_BARS, TUESDAY, [daily_row()])
    put_fetches(file_lake, KNOWN, dividends=[Dividend(MONDAY, 1.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert closes(read.daily("SPY", FRIDAY, adjusted="all")) == [100.0]


def test_a_record_that_cannot_be_used_is_told(local: Put, file_lake: Lake) -> None:
    local(catalog.DAILY_BARS, FRIDAY, [daily_row()])
    put_fetches(file_lake, KNOWN, [Split(MONDAY, 0, 2), Split(MONDAY, 1, 5, ticker="OTHER")])
    with pytest.warns(ReadWarning, match="the split of SPY on 2026-01-26 is left out: split_from is 0") as warned:
        assert closes(read.daily("SPY", FRIDAY, adjusted="splits")) == [100.0]
    assert [warning.filename for warning in warned] == [__file__]


def test_pandas_and_polars_are_given_by_name(local: Put) -> None:
    local(catalog.DAILY_BARS, MONDAY, [daily_row()])
    frame = read.daily("SPY", MONDAY, to="pandas")
    assert isinstance(frame, pd.DataFrame)
    assert frame["date"].tolist() == [pd.Timestamp(MONDAY)]
    frame = read.daily("SPY", MONDAY, to="polars")
    assert isinstance(frame, pl.DataFrame)
    assert frame["date"].to_list() == [MONDAY]


def test_a_connection_has_every_dataset_as_a_view(put: Put, lake: Lake) -> None:
    put(catalog.DAILY_BARS, MONDAY, [daily_row(close=1.0)])
    put(catalog.DAILY_BARS, TUESDAY, [daily_row(close=2.0)])
    put(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    put_fetches(lake, KNOWN, [Split(MONDAY, 1, 2)])
    connection = read.connect()
    views = {name for (name,) in connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()}
    assert views == {dataset.name for dataset in (*catalog.DATASETS, *catalog.LISTINGS) if dataset.columns}
    assert connection.sql("SELECT close FROM daily_bars WHERE date = '2026-01-27'").fetchall() == [(2.0,)]
    assert connection.sql("SELECT count(*) FROM daily_bars JOIN normalized_bars USING (ticker, date)").fetchall() == [
        (2,)
    ]
    assert connection.sql("SELECT fetched, split_to FROM splits").fetchall() == [(KNOWN, 2.0)]
    assert connection.sql("SELECT * FROM bars_5m").fetchall() == []


def test_a_connection_sees_the_days_that_come_later(put: Put) -> None:
    put(catalog.DAILY_BARS, MONDAY, [daily_row()])
    connection = read.connect()
    put(catalog.DAILY_BARS, TUESDAY, [daily_row()])
    assert connection.sql("SELECT max(date) FROM daily_bars").fetchall() == [(TUESDAY,)]


def test_a_view_has_the_catalogs_columns_whichever_a_days_file_has(local: Put, file_lake: Lake, tmp_path: Path) -> None:
    """Files from before a column was added, and of other programs."""
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"close": [7], "ticker": ["SPY"], "more": [1]}), other)
    put_dataset(file_lake, "daily_bars", "2026-01-23", other)
    local(catalog.DAILY_BARS, MONDAY, [daily_row()])
    found = read.daily("SPY", FRIDAY)
    assert found.column_names == [column.name for column in catalog.DAILY_BARS.columns]
    assert found.select(["date", "close", "day_state"]).to_pylist() == [
        {"date": FRIDAY, "close": 7.0, "day_state": None},
        {"date": MONDAY, "close": 100.0, "day_state": "final"},
    ]


def test_a_dataset_of_ones_own_is_a_view_too(local: Put, file_lake: Lake, tmp_path: Path) -> None:
    own = tmp_path / "own.parquet"
    pq.write_table(pa.table({"ticker": ["SPY"], "signal": [0.5]}), own)
    put_dataset(file_lake, "my_signals", "2026-01-23", own)
    assert read.connect().sql("SELECT ticker, signal, date FROM my_signals").fetchall() == [("SPY", 0.5, FRIDAY)]


def test_a_dataset_without_a_day_is_empty(local: Put, file_lake: Lake) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    file_lake.put("datasets/daily_bars/a note", b"of somebody's")
    connection = read.connect()
    assert connection.sql("SELECT ticker, close FROM daily_bars").fetchall() == []
    assert connection.sql("SELECT count(*) FROM normalized_bars").fetchall() == [(2,)]


def test_only_the_days_asked_for_are_read(put: Put, lake: Lake) -> None:
    """The other day's file could not be."""
    put(catalog.DAILY_BARS, MONDAY, [daily_row()])
    lake.put(layout.dataset_key("daily_bars", "2026-01-23"), b"not a Parquet file")
    assert read.daily("SPY", MONDAY).num_rows == 1
    assert read.connect().sql("SELECT date FROM daily_bars WHERE date > '2026-01-25'").fetchall() == [(MONDAY,)]
    with pytest.raises(ReadError, match="2026-01-23"):
        read.daily("SPY", FRIDAY)


def test_what_is_not_there_is_an_error_that_says_so(
    local: Put, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReadError, match="has no datasets yet: `make dev` fills one"):
        read.connect()
    with pytest.raises(ReadError, match="has no normalized_bars yet: `make dev` fills one"):
        read.bars("SPY", MONDAY)
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    with pytest.raises(ReadError, match=r"no day on 2026-01-24, in .*: it has 1 from .* No session is"):
        read.bars("SPY", "2026-01-24", "2026-01-24")
    with pytest.raises(ReadError, match="no day from 2026-01-27 on"):
        read.bars("SPY", TUESDAY)
    with pytest.raises(ReadError, match=r"has no spy, in .*: it has SPY\. Tickers are in the vendor's case"):
        read.bars("spy", MONDAY)
    with pytest.warns(ReadWarning, match="has no NONE"):
        assert read.bars(["NONE", "SPY"], MONDAY).num_rows == 2
    monkeypatch.setenv("LAKE_URI", f"{file_lake.uri}-elsewhere")
    with pytest.raises(ReadError, match="There is no lake at"):
        read.connect()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"every": "2m"}, "every is '2m'; the lake has bars of 1s, 1m, 5m"),
        ({"first": "26.1.2026"}, "first is '26.1.2026'; it must be a date"),
        ({"last": "2026-01-25"}, "first is 2026-01-26, after last"),
        ({"adjusted": "yes"}, "adjusted is 'yes'"),
        ({"as_of": "2026-01-26"}, "as_of says what prices are adjusted by"),
        ({"to": "excel"}, "to is 'excel'"),
        ({"ticker": []}, "ticker is empty"),
    ],
)
def test_a_wrong_argument_is_named(local: Put, wrong: dict[str, str], told: str) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    with pytest.raises(ReadError, match=told):
        read.bars(**{"ticker": "SPY", "first": "2026-01-26", **wrong})  # type: ignore[arg-type]


@on_s3
def test_s3_that_refuses_is_told_in_the_lakes_words(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(catalog.DAILY_BARS, MONDAY, [daily_row()])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(LakeError, match="refuses these credentials"):
        read.daily("SPY", MONDAY)


@on_s3
def test_a_file_that_is_replaced_while_it_is_read_is_told_in_a_sentence(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalog.DAILY_BARS, MONDAY, [daily_row()])
    listed = RangedFiles.keys

    def list_then_replace(files: RangedFiles, *arguments: str) -> list[str]:
        found = listed(files, *arguments)
        put(catalog.DAILY_BARS, MONDAY, [daily_row(close=2.0)])
        return found

    monkeypatch.setattr(RangedFiles, "keys", list_then_replace)
    with pytest.raises(LakeError, match=r"data.parquet was replaced by a newer one while it was read. Read again.$"):
        read.daily("SPY", MONDAY)


def test_coverage_says_of_every_trading_day_what_the_lake_has(put: Put) -> None:
    put(catalog.NORMALIZED_BARS, FRIDAY, minutes("SPY", day=FRIDAY))
    put(catalog.DAILY_BARS, FRIDAY, [daily_row(day_state="complete")])
    counts = {"collected_minutes": 90, "traded_minutes": 100, "lost_disconnected": 7, "lost_connected": 3}
    rows = [{"ticker": "AAPL", **counts, "repaired_minutes": 10, "share": 1.0}]
    rows += [{"ticker": "SPY", **counts, "repaired_minutes": 0, "share": 0.9}]
    put(catalog.BAR_COVERAGE, FRIDAY, rows)
    friday, monday = read.coverage(FRIDAY, MONDAY).to_pylist()
    assert friday == {
        "date": FRIDAY,
        "is_stored": True,
        "day_state": "complete",
        "tickers": 2,
        "collected_minutes": 180,
        "traded_minutes": 200,
        "lost_minutes": 20,
        "repaired_minutes": 10,
        "share": 0.95,
    }
    assert monday == {**dict.fromkeys(friday), "date": MONDAY, "is_stored": False}
    assert read.coverage(FRIDAY, MONDAY, "SPY")["share"].to_pylist() == [0.9, None]
    with pytest.raises(ReadError, match="has no NONE"):
        read.coverage(FRIDAY, MONDAY, "NONE")


def test_a_universe_is_the_last_listing_as_of_the_day(put: Put, lake: Lake, tmp_path: Path) -> None:
    def fetch(fetched: date, *listed: tuple[date, str, bool]) -> None:
        at = datetime(fetched.year, fetched.month, fetched.day, tzinfo=UTC)
        rows = [
            {"as_of": as_of, "ticker": ticker, "active": active, "fetched_at": at} for as_of, ticker, active in listed
        ]
        file = tmp_path / "listing.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=catalog.TICKERS.schema()), file)
        lake.put(layout.listing_key("tickers", fetched), file)

    fetch(TUESDAY, (FRIDAY, "GONE", True), (FRIDAY, "SPY", True), (FRIDAY, "OLD", False), (TUESDAY, "SPY", True))
    fetch(KNOWN, (FRIDAY, "SPY", True), (FRIDAY, "LATE", True))
    assert read.universe("2026-01-26")["ticker"].to_pylist() == ["GONE", "LATE", "SPY"]
    assert read.universe(TUESDAY)["ticker"].to_pylist() == ["SPY"]
    with pytest.raises(ReadError, match="no listing of tickers as of 2026-01-22"):
        read.universe("2026-01-22")


def test_a_simulated_lake_says_so_wherever_it_is_read(local: Put, file_lake: Lake) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    file_lake.put(layout.FEED_KEY, b'{"feed": "simulated", "format": 1}')
    for reading in (read.connect, lambda: read.bars("SPY", MONDAY), lambda: read.coverage(MONDAY, MONDAY)):
        with pytest.warns(ReadWarning, match="holds a simulated market, not the real one") as warned:
            reading()
        assert [warning.filename for warning in warned] == [__file__]


def test_a_lake_of_a_newer_format_is_refused(local: Put, file_lake: Lake) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    file_lake.put(layout.FEED_KEY, b'{"feed": "polygon", "format": 99}')
    with pytest.raises(LakeError, match="Install a newer version"):
        read.bars("SPY", MONDAY)


def test_reading_a_good_lake_warns_of_nothing(local: Put) -> None:
    local(catalog.NORMALIZED_BARS, MONDAY, minutes("SPY"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read.bars("SPY", MONDAY)
