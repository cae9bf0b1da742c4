"""The vendor's history fetched, kept and used for repair: by a real server, a real stream and both kinds of lake."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.collector.collector import Collector
from polygon_pipeline.datasets import reference_sources, staged_answers
from polygon_pipeline.datasets.catalog import REFERENCE_BARS, REFERENCE_DAILY_BARS
from polygon_pipeline.datasets.coverage import Coverage, State
from polygon_pipeline.datasets.inputs import fetch_raw, normalize_day
from polygon_pipeline.datasets.reference import Pages, read_reference_info
from polygon_pipeline.datasets.reference_sources import (
    FetchedDay,
    Sources,
    UnfetchedDay,
    fetch_daily_days,
    fetch_days,
)
from polygon_pipeline.lake import archive, layout
from polygon_pipeline.lake.dataset_files import fetch_dataset, put_dataset
from polygon_pipeline.lake.ledger import (
    SESSION_OVER,
    Account,
    Connection,
    connected_minutes,
    encode_ledger,
    read_ledgers,
    repairable_gaps,
    subscribed_tickers,
)
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.revisions import settled_after
from polygon_pipeline.polygon.errors import HistoryRefused, NotYetPublished
from polygon_pipeline.polygon.messages import decode_frame
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline.simulator.daily import DailyChanges, daily_bars
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import Fault, Faults, FaultType
from polygon_pipeline.simulator.feed import Omitting
from polygon_pipeline.simulator.flat_files import daily_flat_file, flat_file, publish
from polygon_pipeline.simulator.rest_server import History, HistoryServer, RestFault, RestFaultType, corrected
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY, at
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.ledgers import ledger_of
from polygon_pipeline_tests.support.nights import first_night
from polygon_pipeline_tests.support.waiting import until

WEEK = calendar.trading_days(date(2026, 1, 26), date(2026, 1, 30))
LATER = datetime(2026, 3, 2, 12, tzinfo=UTC)
TICKERS = ("AAPL", "BRK.B", "KIMpL", "TCEHY")
MARKET = SyntheticMarket(TICKERS)
KEY = "a-key"

Bars = dict[tuple[str, int], tuple[Any, ...]]
_VALUES = ("open", "high", "low", "close", "volume", "vwap")


class Vendor:
    """A history server and what a collector needs to ask it."""

    def __init__(self, folder: Path, server: HistoryServer) -> None:
        self.server = server
        self._limit = RateLimit(folder / "limit", 100, 1.0)

    def sources(self, tickers: Sequence[str] = TICKERS, flat_files: Lake | None = None) -> Sources:
        rest = RestHistory(self.server.url, KEY, self._limit)
        store = flat_files.store if flat_files else None
        return Sources(rest, store, tuple(tickers), self._limit.per_second)

    @property
    def asked(self) -> list[str]:
        return [request.path for request in self.server.requests]


@contextmanager
def vendor(folder: Path, history: History = MARKET.day_bars, faults: Sequence[RestFault] = ()) -> Iterator[Vendor]:
    with HistoryServer(history, key=KEY, faults=faults) as server:
        yield Vendor(folder, server)


def fetched(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime = LATER
) -> list[FetchedDay | UnfetchedDay]:
    scratch = folder / f"scratch-{len(list(folder.iterdir()))}"
    scratch.mkdir()
    results = []
    for result in fetch_days(lake, days, sources, scratch, now, lambda _: None):
        if isinstance(result, FetchedDay) and result.is_new:
            put_dataset(lake, REFERENCE_BARS.name, result.day.isoformat(), result.file)
        results.append(result)
    return results


def bars_of(file: Path) -> Bars:
    rows = pq.read_table(file).to_pylist()
    return {
        (row["ticker"], int(row["timestamp"].timestamp() * 1000)): tuple(row[name] for name in _VALUES) for row in rows
    }


def truth(day: date = DAY, history: History = MARKET.day_bars) -> Bars:
    rows = history(day).to_pylist()
    return {(row["ticker"], row["start_ms"]): tuple(row[name] for name in _VALUES) for row in rows}


def reference(lake: Lake, day: date, folder: Path) -> Path:
    return fetch_dataset(lake, REFERENCE_BARS.name, day.isoformat(), folder)


# Fetching


def test_a_week_over_rest_is_one_request_per_ticker_and_equals_the_vendors_history(lake: Lake, tmp_path: Path) -> None:
    with vendor(tmp_path) as vendor_:
        results = fetched(lake, WEEK, vendor_.sources(), tmp_path)
        assert len(vendor_.asked) == len(TICKERS)
    assert [(result.day, isinstance(result, FetchedDay) and result.is_new) for result in results] == [
        (day, True) for day in WEEK
    ]
    for day in WEEK:
        assert bars_of(reference(lake, day, tmp_path)) == truth(day)


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_history_of_a_night_is_fetched_from_the_evening_before_on(
    is_flat: bool, file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_night(monkeypatch, WEEK[1])
    market = SyntheticMarket(TICKERS)
    flat_files = local_lake(tmp_path / "flat") if is_flat else None
    if flat_files:
        for day in WEEK[1:3]:
            publish(flat_files.store, day, flat_file(market.day_bars(day)))
    with vendor(tmp_path, market.day_bars) as vendor_:
        fetched(file_lake, WEEK[1:3], vendor_.sources(flat_files=flat_files), tmp_path)
        assert len(vendor_.asked) == (0 if is_flat else len(TICKERS))
    for day in WEEK[1:3]:
        found, expected = bars_of(reference(file_lake, day, tmp_path)), truth(day, market.day_bars)
        assert found.keys() == expected.keys()
        assert all(found[bar][:5] == values[:5] for bar, values in expected.items())
        first = min(start_ms for _, start_ms in expected)
        assert at(21, 0, day - timedelta(days=1)) <= first < at(22, 0, day - timedelta(days=1))


def test_a_second_fetch_changes_no_file(file_lake: Lake, tmp_path: Path) -> None:
    with vendor(tmp_path) as vendor_:
        fetched(file_lake, WEEK, vendor_.sources(), tmp_path)
        before = {day: reference(file_lake, day, tmp_path).read_bytes() for day in WEEK}
        results = fetched(file_lake, WEEK, vendor_.sources(), tmp_path, LATER + timedelta(days=1))
    assert not any(isinstance(result, FetchedDay) and result.is_new for result in results)
    assert {day: reference(file_lake, day, tmp_path).read_bytes() for day in WEEK} == before


def test_a_ticker_that_the_vendor_refuses_costs_only_itself(file_lake: Lake, tmp_path: Path) -> None:
    refused = RestFault(RestFaultType.NOT_AUTHORIZED, path="/AAPL/", times=None)
    for _ in range(2):  # the second finds the others' answers
        said: list[str] = []
        with vendor(tmp_path, faults=[refused]) as vendor_:
            (tmp_path / "scratch").mkdir(exist_ok=True)
            [day] = fetch_days(file_lake, [DAY], vendor_.sources(), tmp_path / "scratch", LATER, said.append)
        assert isinstance(day, FetchedDay)
        assert list(day.refused) == ["AAPL"]
        assert day.info.tickers == tuple(sorted({*TICKERS} - {"AAPL"}))
        assert {ticker for ticker, _ in bars_of(day.file)} == {*TICKERS} - {"AAPL"}
        assert any("1 of 4 tickers are refused" in line and "AAPL" in line for line in said)


def test_answers_of_a_run_that_never_went_on_are_given_up_after_six_hours(file_lake: Lake, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for day, hours in ((date(2020, 1, 2), 7), (date(2020, 1, 6), 5)):
        key = f"{layout.staging_prefix(day, day)}0000.jsonl.zst"
        file_lake.put(key, b"answers")
        os.utime(file_lake.local_root / key, (now.timestamp() - 3600 * hours,) * 2)
    with vendor(tmp_path) as vendor_:
        fetched(file_lake, [DAY], vendor_.sources(), tmp_path, now)
    assert staged(file_lake) == ["history-staging/2020-01-06_2020-01-06/0000.jsonl.zst"]


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "middle"])
def test_a_reference_on_the_lake_that_cannot_be_read_is_replaced_and_costs_no_other_day(
    file_lake: Lake, tmp_path: Path, damage: str
) -> None:
    with vendor(tmp_path) as vendor_:
        fetched(file_lake, WEEK, vendor_.sources(TICKERS), tmp_path)
        whole = reference(file_lake, WEEK[1], tmp_path).read_bytes()
        stored = file_lake.local_root / layout.dataset_key(REFERENCE_BARS.name, WEEK[1].isoformat())
        if damage == "foreign":
            pq.write_table(pq.read_table(stored, partitioning=None).drop_columns(["open"]), stored)
        else:
            middle = whole[:100] + bytes(4000) + whole[4100:]
            stored.write_bytes({"empty": b"", "cut": whole[:-20], "middle": middle}[damage])
        days = fetched(file_lake, WEEK, vendor_.sources(TICKERS), tmp_path)
        assert [isinstance(day, FetchedDay) and day.is_new for day in days] == [day == WEEK[1] for day in WEEK]
    assert bars_of(reference(file_lake, WEEK[1], tmp_path)) == truth(WEEK[1])


def staged(lake: Lake) -> list[str]:
    """The keys of the answers that wait on the lake."""
    return [meta["path"] for page in lake.pages(layout.STAGING_ROOT) for meta in page if meta["size"]]


def staged_tickers(lake: Lake) -> set[str]:
    parts = [pa.CompressedInputStream(pa.BufferReader(lake.get(key)), "zstd").read() for key in staged(lake)]
    return {msgspec.json.decode(line)["ticker"] for part in parts for line in part.splitlines()}


def test_a_failed_run_is_continued_with_the_missing_tickers(lake: Lake, tmp_path: Path) -> None:
    faults = [RestFault(RestFaultType.NEXT_URL_OF_ANOTHER_HOST, path="/TCEHY/")]
    with vendor(tmp_path, faults=faults) as vendor_:
        cut = fetched(lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
        assert all(isinstance(result, UnfetchedDay) and isinstance(result.problem, HistoryRefused) for result in cut)
        asked = len(vendor_.asked)
        results = fetched(lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
        again = vendor_.asked[asked:]
    assert all(isinstance(result, FetchedDay) for result in results)
    assert any("/TCEHY/" in path for path in again)
    assert len(again) < len(TICKERS)
    assert bars_of(reference(lake, DAY, tmp_path)) == truth()
    assert staged(lake) == []


def fetch_and_keep_at_once(url: str, lake: Path, folder: Path) -> None:
    staged_answers._KEEP_SECONDS = 0.0
    sources = Sources(RestHistory(url, KEY, RateLimit(folder / "limit", 100, 1.0)), None, TICKERS, 100.0)
    list(fetch_days(local_lake(lake), WEEK, sources, folder, datetime.now(UTC), lambda _: None))


def test_a_fetch_whose_machine_is_lost_goes_on_where_it_was_on_another(file_lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    hangs = RestFault(RestFaultType.SLOW, path="/TCEHY/", seconds=60)
    with vendor(tmp_path, faults=[hangs]) as vendor_:
        arguments = vendor_.server.url, file_lake.local_root, tmp_path / "lost"
        lost = multiprocessing.get_context("spawn").Process(target=fetch_and_keep_at_once, args=arguments)
        lost.start()
        until(lambda: len(staged_tickers(file_lake)) == len(TICKERS) - 1, "the others' answers are on the lake", 60)
        lost.kill()
        lost.join()
        shutil.rmtree(tmp_path / "lost")
        asked = len(vendor_.asked)
        results = fetched(file_lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
        assert ["/TCEHY/" in path for path in vendor_.asked[asked:]] == [True]
    assert all(isinstance(result, FetchedDay) for result in results)
    assert [bars_of(reference(file_lake, day, tmp_path)) for day in WEEK] == [truth(day) for day in WEEK]
    assert staged(file_lake) == []


@pytest.mark.parametrize("damage", ["cut", "no object", "no zone", "deep"])
def test_answers_on_the_lake_that_cannot_be_read_are_asked_for_again(
    file_lake: Lake, tmp_path: Path, damage: str
) -> None:
    now = datetime.now(UTC).isoformat()
    line = {
        "cut": reference_line(now),
        "no object": b"[]",
        "no zone": reference_line(now[:19]),
        "deep": reference_line(now, b"[" * 10_000 + b"]" * 10_000),
    }[damage]
    content = archive.compress([line + b"\n"])
    file_lake.put(
        f"{layout.staging_prefix(WEEK[0], WEEK[-1])}0000.jsonl.zst", content[: -4 if damage == "cut" else None]
    )
    with vendor(tmp_path) as vendor_:
        fetched(file_lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
        assert len(vendor_.asked) == len(TICKERS)
    assert bars_of(reference(file_lake, DAY, tmp_path)) == truth()
    assert staged(file_lake) == []


def test_answers_on_the_lake_whose_bars_cannot_be_read_fail_one_attempt_alone(file_lake: Lake, tmp_path: Path) -> None:
    line = reference_line(datetime.now(UTC).isoformat(), b'[{"t": "noon"}]')
    file_lake.put(f"{layout.staging_prefix(WEEK[0], WEEK[-1])}0000.jsonl.zst", archive.compress([line + b"\n"]))
    with vendor(tmp_path) as vendor_:
        failed = fetched(file_lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
        again = fetched(file_lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC))
    assert all(isinstance(result, UnfetchedDay) for result in failed)
    assert all(isinstance(result, FetchedDay) for result in again)
    assert bars_of(reference(file_lake, DAY, tmp_path)) == truth()


def reference_line(fetched_at: str, bars: bytes = b"[]") -> bytes:
    return msgspec.json.encode({"ticker": "AAPL", "fetched_at": fetched_at, "bars": msgspec.Raw(bars)})


def test_a_lake_that_takes_no_answers_for_a_while_ends_no_fetch(
    file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_answers, "_KEEP_SECONDS", 0.0)
    root = file_lake.local_root / layout.STAGING_ROOT
    root.write_bytes(b"")  # no folder can be made there
    said: list[str] = []
    with vendor(tmp_path) as vendor_:
        results = list(fetch_days(file_lake, WEEK, vendor_.sources(), tmp_path, datetime.now(UTC), said.append))
    assert all(isinstance(result, FetchedDay) for result in results)
    assert any("does not take what was fetched so far" in line for line in said)


def test_days_that_are_years_apart_are_requested_separately(file_lake: Lake, tmp_path: Path) -> None:
    days = [date(2016, 1, 26), DAY]
    with vendor(tmp_path) as vendor_:
        results = fetched(file_lake, days, vendor_.sources(("AAPL",)), tmp_path)
        assert len(vendor_.asked) == 2
    assert [result.day for result in results if isinstance(result, FetchedDay)] == days


def test_a_request_asks_for_a_month_at_the_most(file_lake: Lake, tmp_path: Path) -> None:
    run = calendar.trading_days(date(2025, 11, 3), date(2026, 1, 2))  # with three holidays
    days = [run[0], run[20], run[-1]]  # the days between are asked for with them
    with vendor(tmp_path, lambda day: MARKET.day_bars(DAY).slice(0, 0)) as vendor_:
        fetched(file_lake, days, vendor_.sources(("AAPL",)), tmp_path)
        asked = [[date.fromisoformat(text) for text in re.findall(r"\d{4}-\d\d-\d\d", p)] for p in vendor_.asked]
    assert all(last - first < timedelta(days=31) for first, last in asked)
    assert asked == [[run[0], run[20]], [run[-1], run[-1]]]


def test_the_whole_market_by_rest_is_every_ticker_that_traded_over_the_counter_too(
    file_lake: Lake, tmp_path: Path
) -> None:
    with vendor(tmp_path) as vendor_:
        [result] = fetched(file_lake, [DAY], vendor_.sources(("*",)), tmp_path)
    assert isinstance(result, FetchedDay)
    assert set(result.info.tickers or ()) == set(TICKERS)


def test_more_tickers_than_the_plan_can_fetch_in_time_are_refused_and_the_error_names_flat_files(
    file_lake: Lake, tmp_path: Path
) -> None:
    with vendor(tmp_path) as vendor_:
        free = replace(vendor_.sources([f"T{n}" for n in range(4000)]), requests_per_second=5 / 60)
        [result] = fetched(file_lake, [DAY], free, tmp_path)
        assert not vendor_.asked
    assert isinstance(result, UnfetchedDay)
    assert "13.3 h" in str(result.problem)
    assert "POLYGON_FLAT_FILES_KEY_ID" in str(result.problem)


# Flat files


def test_a_flat_file_is_fetched_once_and_again_after_it_was_replaced(
    s3_lake: Lake, file_lake: Lake, tmp_path: Path
) -> None:
    publish(s3_lake.store, DAY, flat_file(MARKET.day_bars(DAY)))
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources(flat_files=s3_lake)
        results = [fetched(file_lake, [DAY], sources, tmp_path)[0] for _ in range(2)]
        bar = MARKET.day_bars(DAY).slice(0, 1).to_pylist()[0]
        changes: Any = {(bar["ticker"], bar["start_ms"]): {"volume": 12345.0}}
        publish(s3_lake.store, DAY, flat_file(corrected(MARKET.day_bars, changes)(DAY)))
        results.append(fetched(file_lake, [DAY], sources, tmp_path)[0])
        assert not vendor_.asked
    assert [isinstance(result, FetchedDay) and result.is_new for result in results] == [True, False, True]
    rows = bars_of(reference(file_lake, DAY, tmp_path))
    assert rows[bar["ticker"], bar["start_ms"]][4] == 12345.0
    assert len(rows) == len(truth())


def test_a_flat_file_that_is_published_early_is_used_and_before_it_is_there_the_day_comes_by_rest(
    file_lake: Lake, tmp_path: Path
) -> None:
    files = local_lake(tmp_path / "files")
    night = datetime(2026, 1, 27, 4, tzinfo=UTC)
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources(("AAPL",), flat_files=files)
        results = fetched(file_lake, [DAY], sources, tmp_path, night)
        publish(files.store, DAY, flat_file(MARKET.day_bars(DAY)))
        results += fetched(file_lake, [DAY], sources, tmp_path, night)
        assert len(vendor_.asked) == 1
    assert [result.info.source for result in results if isinstance(result, FetchedDay)] == ["rest", "flat_file"]


# The vendor's day


def fetched_daily(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime = LATER
) -> list[FetchedDay | UnfetchedDay]:
    scratch = folder / f"scratch-{len(list(folder.iterdir()))}"
    scratch.mkdir()
    results = []
    for result in fetch_daily_days(lake, days, sources, scratch, now, lambda _: None):
        if isinstance(result, FetchedDay) and result.is_new:
            put_dataset(lake, REFERENCE_DAILY_BARS.name, result.day.isoformat(), result.file)
        results.append(result)
    return results


def true_days(day: date = DAY) -> list[dict[str, Any]]:
    found = calendar.session(day)
    assert found
    rows: list[dict[str, Any]] = daily_bars(MARKET.day_bars(day), found).to_pylist()
    return rows


def test_a_week_of_the_vendors_days_is_a_request_a_day_and_a_second_fetch_changes_nothing(
    file_lake: Lake, tmp_path: Path
) -> None:
    with vendor(tmp_path) as vendor_:
        results = [fetched_daily(file_lake, WEEK, vendor_.sources(), tmp_path) for _ in range(2)]
        assert len(vendor_.asked) == 2 * len(WEEK)
    news = [[isinstance(result, FetchedDay) and result.is_new for result in of_run] for of_run in results]
    assert news == [[True] * len(WEEK), [False] * len(WEEK)]
    for day in WEEK:
        rows = pq.read_table(fetch_dataset(file_lake, REFERENCE_DAILY_BARS.name, day.isoformat(), tmp_path)).to_pylist()
        names = ("ticker", *_VALUES, "transactions")  # what trades over the counter is among them
        assert [[row[name] for name in names] for row in rows] == [
            [row[name] for name in names] for row in true_days(day)
        ]
        assert {(row["date"], row["source"]) for row in rows} == {(day, "rest")}


def test_a_day_that_is_not_over_or_that_the_vendor_does_not_have_yet_is_told_as_such_and_not_stored(
    file_lake: Lake, tmp_path: Path
) -> None:
    evening = datetime(2026, 1, 27, 1, tzinfo=UTC)  # the end of after hours
    with vendor(tmp_path, lambda day: MARKET.day_bars(day).slice(0, 0)) as vendor_:
        [early] = fetched_daily(file_lake, [DAY], vendor_.sources(), tmp_path, evening)
        assert not vendor_.asked
        [late] = fetched_daily(file_lake, [DAY], vendor_.sources(), tmp_path, evening + settled_after())
        assert len(vendor_.asked) == 1
    for result, next_try in (
        (early, evening + settled_after()),
        (late, evening + settled_after() + timedelta(hours=1)),
    ):
        assert isinstance(result, UnfetchedDay)
        assert isinstance(result.problem, NotYetPublished)
        assert result.problem.next_try == next_try
    assert not file_lake.keys("datasets/")


def test_the_vendors_day_comes_from_flat_files_where_there_are_credentials_and_a_replaced_one_says_so(
    file_lake: Lake, tmp_path: Path
) -> None:
    files = local_lake(tmp_path / "files")
    found = calendar.session(DAY)
    assert found
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources(flat_files=files)
        results = fetched_daily(file_lake, [DAY], sources, tmp_path)
        corrections: list[DailyChanges] = [{}, {("AAPL", DAY): {"close": 1.25}}]
        for changes in corrections:
            content = daily_flat_file(daily_bars(MARKET.day_bars(DAY), found, changes), DAY)
            publish(files.store, DAY, content, "day_aggs_v1")
            results += fetched_daily(file_lake, [DAY], sources, tmp_path)
        results += fetched_daily(file_lake, [DAY], sources, tmp_path)
        assert not vendor_.asked
    missing, *others = results
    assert isinstance(missing, UnfetchedDay)
    assert "day_aggs_v1" in str(missing.problem)
    assert [(other.is_new, other.is_replacement) for other in others if isinstance(other, FetchedDay)] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    rows = pq.read_table(fetch_dataset(file_lake, REFERENCE_DAILY_BARS.name, DAY.isoformat(), tmp_path)).to_pylist()
    assert (rows[0]["ticker"], rows[0]["close"], rows[0]["vwap"], rows[0]["source"]) == (
        "AAPL",
        1.25,
        None,
        "flat_file",
    )


def test_many_flat_files_say_how_far_they_are_and_how_long_it_takes_still(
    file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_sources, "_REPORT_EVERY_SECONDS", 0.0)
    files = local_lake(tmp_path / "files")
    for day in WEEK[:2]:
        publish(files.store, day, flat_file(MARKET.day_bars(day)))
    (tmp_path / "scratch").mkdir()
    said: list[str] = []
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources(flat_files=files)
        list(fetch_days(file_lake, WEEK[:2], sources, tmp_path / "scratch", LATER, said.append))
    assert [text.partition(",")[0] for text in said] == [
        "1 of 2 flat files are fetched",
        "2 of 2 flat files are fetched",
    ]
    assert said[-1].endswith("about 0 s left")


def test_a_day_without_a_due_flat_file_comes_from_rest_and_a_late_one_gives_the_time_of_the_next_try(
    s3_lake: Lake, file_lake: Lake, tmp_path: Path
) -> None:
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources(flat_files=s3_lake)
        evening = datetime(2026, 1, 27, 2, tzinfo=UTC)
        [result] = fetched(file_lake, [DAY], sources, tmp_path, evening)
        assert isinstance(result, FetchedDay)
        assert result.info.source == "rest"
        [late] = fetched(file_lake, [DAY], sources, tmp_path, datetime(2026, 1, 27, 17, tzinfo=UTC))
    assert isinstance(late, UnfetchedDay)
    assert isinstance(late.problem, NotYetPublished)
    assert late.problem.next_try == datetime(2026, 1, 27, 18, tzinfo=UTC)


def test_bars_of_a_few_tickers_do_not_replace_a_flat_file(s3_lake: Lake, file_lake: Lake, tmp_path: Path) -> None:
    publish(s3_lake.store, DAY, flat_file(MARKET.day_bars(DAY)))
    with vendor(tmp_path) as vendor_:
        fetched(file_lake, [DAY], vendor_.sources(flat_files=s3_lake), tmp_path)
        [result] = fetched(file_lake, [DAY], vendor_.sources(("AAPL",)), tmp_path)
    assert isinstance(result, FetchedDay)
    assert not result.is_new
    assert len(bars_of(reference(file_lake, DAY, tmp_path))) == len(truth())


# Repair


def test_of_a_past_day_that_a_simulator_is_playing_only_what_it_has_played_is_fetched(
    file_lake: Lake, tmp_path: Path
) -> None:
    account = Account(connections=[Connection(LATER, last_bar_ms=at(10, 16))])
    ledger = ledger_of(account, run="r", feed="simulated", complete=False)
    file_lake.put(layout.ledger_key(DAY, "r"), encode_ledger(ledger))
    with vendor(tmp_path) as vendor_:
        sources = vendor_.sources()
        [partial] = fetched(file_lake, [DAY], sources, tmp_path)
        ledger.complete = True
        file_lake.put(layout.ledger_key(DAY, "r"), encode_ledger(ledger))
        rows = len(bars_of(reference(file_lake, DAY, tmp_path)))
        [whole] = fetched(file_lake, [DAY], sources, tmp_path)
    assert isinstance(partial, FetchedDay)
    assert isinstance(whole, FetchedDay)
    assert partial.info.until_ms == at(10, 1)
    assert len(bars_of(reference(file_lake, DAY, tmp_path))) == len(truth()) > rows > 0


# The whole way: what the simulator planned is what the coverage says.

QUIET = "QUIET"
DROPPED_AT = at(10, 15)
# Long after the collector is back.
AFTERNOON = at(15, 0)


def _collect(lake: Lake, folder: Path, exchange: Exchange) -> None:
    wanted = plan(
        exchange.url,
        folder / "journal",
        feed="simulated",
        key=KEY,
        topics=[f"AM.{ticker}" for ticker in (*TICKERS, QUIET)],
        write_objects=False,
        time_base="event",
    )
    over = lambda: SESSION_OVER if exchange.finished.is_set() else None  # noqa: E731
    Collector(lake, wanted, logging.getLogger("quiet")).run(over, lambda _: None)


@pytest.mark.slow
def test_coverage_equals_the_plan_minute_by_minute_and_repaired_bars_equal_the_vendors_history(
    file_lake: Lake, tmp_path: Path, say: Any
) -> None:
    planned = truth()
    afternoon = sorted(key for key in planned if AFTERNOON <= key[1] < AFTERNOON + 40 * 60_000)
    omitted = set(afternoon[::9]) | {key for key in afternoon if key[0] == "AAPL"} - set(afternoon[::7])
    changes: Any = {
        key: {"close": planned[key][2], "volume": planned[key][4] + 1} for key in sorted(planned)[100:400:20]
    }
    history = corrected(MARKET.day_bars, changes)
    faults = Faults([Fault(FaultType.DROP, at_ms=DROPPED_AT), Fault(FaultType.AUTH_TIMEOUT, at_ms=DROPPED_AT)])
    feed = Omitting(SyntheticFeed(MARKET, DAY, (Channel.MINUTE,)), lambda e: (e.ticker, e.start_ms) in omitted)
    with Exchange(feed, speed=6000, key=KEY, faults=faults, record=True) as exchange:
        _collect(file_lake, tmp_path, exchange)
    received: Bars = {}
    for served in exchange.served:
        for frame in served.frames:
            for _, bar in decode_frame(frame.payload, LATER).bars:
                received[bar.ticker, bar.start_ms] = (*bar[2:6], float(bar.volume), bar.vwap)

    ledgers, unreadable, _ = read_ledgers(file_lake, DAY)
    assert unreadable == {}
    assert len(repairable_gaps(DAY, ledgers, 0, settled_after(), LATER)) == 1
    with vendor(tmp_path, history) as vendor_:
        fetched(file_lake, [DAY], vendor_.sources((*TICKERS, QUIET)), tmp_path)
    known = read_reference_info(reference(file_lake, DAY, tmp_path))
    assert repairable_gaps(DAY, ledgers, known.until_ms, settled_after(), LATER) == []

    normalized = tmp_path / "normalized.parquet"
    normalize_day(file_lake, fetch_raw(file_lake, DAY, Channel.MINUTE, tmp_path), normalized, tmp_path)
    assert bars_of(normalized) == truth(DAY, history)

    connected, subscribed = connected_minutes(ledgers), subscribed_tickers(ledgers)
    kept = reference(file_lake, DAY, tmp_path)
    with Coverage(DAY, normalized, kept, connected, tmp_path, subscribed) as coverage:
        states = coverage.minute_states().to_pylist()
        coverage.write(tmp_path / "coverage.parquet")
    opened = at(4, 0)
    found = {(row["ticker"], opened + 60_000 * row["minute"]): row for row in states}
    expected = truth(DAY, history)
    assert len(found) == 960 * len((*TICKERS, QUIET))
    lost = set(expected) - set(received)
    for key, row in found.items():
        if key in received:
            state = State.COLLECTED if received[key] == expected[key] else State.CORRECTED
        else:
            state = State.REPAIRED if key in lost else State.NO_TRADE
        assert row["state"] == state, key
        if key in lost:
            assert row["connected"] is (key in omitted), key
    rows = {row["ticker"]: row for row in pq.read_table(tmp_path / "coverage.parquet").to_pylist()}
    for ticker in (*TICKERS, QUIET):
        mine = {key for key in lost if key[0] == ticker}
        assert rows[ticker]["lost_connected"] == len(mine & omitted)
        assert rows[ticker]["lost_disconnected"] == len(mine - omitted)
        assert rows[ticker]["repaired_minutes"] == len(mine)
        assert rows[ticker]["traded_minutes"] == sum(key[0] == ticker for key in expected)
        assert rows[ticker]["collected_minutes"] == sum(key[0] == ticker for key in received)
    assert rows[QUIET]["share"] is None
    corrections = sum(row["state"] == State.CORRECTED for row in states)
    assert lost - omitted
    assert omitted <= lost
    assert corrections >= len([key for key in changes if key in received])
    say(
        f"coverage: {len(found):,} minutes as planned: {len(lost - omitted)} lost while disconnected, "
        f"{len(omitted)} while connected, {corrections} corrected; {len(expected):,} repaired bars equal the vendor's "
        "history"
    )


def test_a_partial_history_repairs_what_it_reaches_and_a_revision_received_later_still_wins(
    file_lake: Lake, tmp_path: Path
) -> None:
    """put_dataset of an intraday reference: what it does not know stays unknown."""
    key = min(planned for planned in truth() if planned[0] == "AAPL")
    bar = dict(zip(("o", "h", "l", "c", "v", "vw"), truth()[key], strict=True))
    asked = datetime.fromtimestamp(key[1] / 1000, UTC) + timedelta(minutes=30)
    page = {"ticker": "AAPL", "fetched_at": asked, "bars": [{"t": key[1], **bar}, {"t": key[1] + 60_000, **bar}]}
    (tmp_path / "page.jsonl").write_bytes(msgspec.json.encode(page) + b"\n")
    made = tmp_path / "made.parquet"
    with Pages([tmp_path / "page.jsonl"], ["AAPL"], tmp_path) as pages:
        pages.write(DAY, key[1] + 120_000, made)
    put_dataset(file_lake, REFERENCE_BARS.name, DAY.isoformat(), made)
    event = {"ev": "AM", "sym": "AAPL", "s": key[1], **bar, "c": bar["l"]}
    line = archive.frame_line(asked + timedelta(minutes=1), msgspec.json.encode([event]), ())
    file_lake.put(layout.frames_key(DAY, "run", 1), archive.compress([line]))
    normalized = tmp_path / "normalized.parquet"
    raw = normalize_day(file_lake, fetch_raw(file_lake, DAY, Channel.MINUTE, tmp_path), normalized, tmp_path)
    rows = pq.read_table(normalized).to_pylist()
    assert [(row["close"], row["source"]) for row in rows] == [(bar["l"], "websocket"), (bar["c"], "rest")]
    assert (raw.merge.added, raw.merge.kept) == (1, 1)
