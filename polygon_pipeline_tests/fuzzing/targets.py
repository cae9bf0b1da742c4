"""The parsers, each with samples of what it reads and with what must hold of any input.

Belongs here: one target per parser. Does not belong here: how inputs are made (mutations).

A check returns whether the input was accepted, wholly or in part. It lets no documented error through, so that whatever
it raises is a finding.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import msgspec
import urllib3

from polygon_pipeline import settings
from polygon_pipeline.collector.relay import RelayedFrame
from polygon_pipeline.datasets.catalog import LISTINGS
from polygon_pipeline.datasets.inputs import arrival
from polygon_pipeline.datasets.listings import fetch_listing
from polygon_pipeline.datasets.normalize import NoBars, Normalization
from polygon_pipeline.datasets.reference import Pages, UnreadableReference, from_day_answer, from_flat_file, page_line
from polygon_pipeline.lake import archive
from polygon_pipeline.lake.ledger import (
    Connection,
    connected_minutes,
    decode_ledger,
    encode_ledger,
    market_time,
    missing_minutes,
    repairable_gaps,
    subscribed_tickers,
)
from polygon_pipeline.lake.records import decode_record, encode_record
from polygon_pipeline.market.bars import Bar, Channel, timestamp_error
from polygon_pipeline.market.calendar import day_bounds_ms
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import FLAT_FILE_COLUMNS, FlatFileKind
from polygon_pipeline.polygon.messages import decode_frame, decode_frames, decode_statuses
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import HistoryBar, Page, RestHistory
from polygon_pipeline_tests.fuzzing.mutations import compressed, mutated, zstd
from polygon_pipeline_tests.support import day_files
from polygon_pipeline_tests.support.bars import ARRIVAL, DAY, NOON, aggregate, at, later, line, record_line, rest_bar
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of


@dataclass(frozen=True)
class Target:
    """check: whether an input was accepted; what it raises is a finding. pack: how a sample comes in a file."""

    name: str
    samples: Sequence[bytes]
    check: Callable[[bytes, Path], bool]
    pack: Callable[[bytes], bytes] | None = None

    def make(self, source: random.Random) -> bytes:
        """A hostile input."""
        content = mutated(source, source.choice(self.samples))
        return compressed(source, content, self.pack) if self.pack else content


# Frames

_STATUS = {"ev": "status", "status": "success", "message": "subscribed to: AM.SPY"}
# As the vendor's pages have it.
_GENUINE = (
    b'[{"ev":"A","sym":"FCX","v":4989,"av":4332125,"op":75.98,"vw":78.0894,"o":78.1,"c":78.08,"h":78.125,"l":78.07,'
    b'"a":76.8404,"z":62,"s":1769452262000,"e":1769452263000,"dv":"4989.0","dav":"4332125.038360"}]'
)
_FRAMES = [
    _GENUINE,
    json.dumps([aggregate()]).encode(),
    json.dumps([_STATUS, aggregate("BRK.B"), aggregate(dv="1000.5", otc=True), {"ev": "T", "sym": "X"}]).encode(),
    json.dumps(aggregate()).encode(),
    json.dumps([_STATUS]).encode(),
    json.dumps([aggregate(f"T{n}", NOON + n * 60_000) for n in range(5)]).encode(),
]


def _relayed_frames(content: bytes, _folder: Path) -> bool:
    """What readers get is text that they can read, of what they subscribed to and nothing else."""
    frame = RelayedFrame(content)
    for bar in frame.bars:
        timestamp_error(int(bar.s), ARRIVAL)
    for topics in ({("AM", "*"), ("A", "*")}, {("AM", "SPY")}):
        relayed = frame.matching(frozenset(topics))
        if relayed is not None:
            events = msgspec.json.decode(relayed.decode(), type=list[dict[str, msgspec.Raw]])
            kinds = {msgspec.json.decode(event["ev"], type=str) for event in events}
            assert kinds
            assert kinds <= {"AM", "A"}
    return bool(frame.bars)


def _frames(content: bytes, folder: Path) -> bool:
    frame = decode_frame(content, ARRIVAL)
    assert decode_frames([content, content], [ARRIVAL, later(1)]) == [frame, frame]
    statuses = decode_statuses(content)
    assert all(status in statuses for status in frame.statuses)
    assert all(refusal.raw in content for refusal in frame.refused)
    for _, bar in frame.bars:
        _assert_keeps_its_values(bar)
    assert len(frame.arrivals(Channel.MINUTE)) + len(frame.arrivals(Channel.SECOND)) == len(frame.bars)
    return bool(frame.aggregates)


def _assert_keeps_its_values(bar: Bar) -> None:
    assert all(math.isfinite(value) for value in bar[2:7]), bar
    record = decode_record(encode_record(bar, ARRIVAL))
    data = record.bar_data
    stored = record.ticker, record.start_ms(), data.open, data.high, data.low, data.close, data.volume, data.vwap
    assert stored == bar, (stored, bar)


# Records


def _records(content: bytes, folder: Path) -> bool:
    try:
        record = decode_record(content)
    except ValueError:
        return False
    assert decode_record(msgspec.json.encode(record)) == record
    assert arrival(record).ticker == record.ticker
    assert datetime.fromisoformat(record.collected_at).tzinfo
    return True


# Ledgers


def _ledger_samples() -> list[bytes]:
    played, lived = account_of(3), account_of(2)
    for account in (played, lived):
        account.connections += [
            Connection(ARRIVAL, later(600), "the server closed", NOON, NOON + 600_000),
            Connection(later(700), None, "", NOON + 720_000, NOON + 780_000),
        ]
        account.last_received_at = later(900)
    return [
        encode_ledger(ledger_of(played, feed="simulated", topics=("AM.SPY", "A.SPY"), time_base="event")),
        encode_ledger(ledger_of(lived, topics=("AM.*",), complete=False)),
        encode_ledger(ledger_of(account_of(0))),
    ]


def _ledgers(content: bytes, folder: Path) -> bool:
    try:
        ledger = decode_ledger(content)
    except ValueError:
        return False
    assert decode_ledger(encode_ledger(ledger)) == ledger
    now = datetime(2026, 1, 27, 3, tzinfo=UTC)
    ledger.account.imbalance(ledger.write_objects)
    ledger.account.gaps("processing")
    ledger.account.gaps("event")
    market_time([ledger], now)
    subscribed_tickers([ledger])
    connected_minutes([ledger])
    missing_minutes(DAY, [ledger], now)
    repairable_gaps(DAY, [ledger], 0, timedelta(minutes=16), now)
    return True


# Archives

_ARCHIVES = [
    b"".join(line(later(number), [aggregate(start_ms=NOON + number * 60_000)]) for number in range(4)),
    line(ARRIVAL, [aggregate(), {"ev": "AM"}, _STATUS], refused=(1,)),
    line(ARRIVAL, aggregate()) + archive.event_line(ARRIVAL, b'{"kind": "connected", "detail": "host"}'),
]


def _archives(content: bytes, folder: Path) -> bool:
    file = folder / "archive.jsonl.zst"
    file.write_bytes(content)
    errors: list[str] = []
    frames = list(archive.read_frames(file, errors.append))
    for frame in frames:
        decode_frame(frame.accepted(), frame.received_at)
    archive.decompression_error(file)
    return bool(frames)


def _days(content: bytes, folder: Path) -> bool:
    """An archive with the means that a day is made with."""
    file = folder / "archive.jsonl.zst"
    file.write_bytes(content)
    with tempfile.TemporaryDirectory(dir=folder) as space, Normalization(DAY, Channel.MINUTE, Path(space)) as day:
        day.add_frames([file])
        try:
            day.write(Path(space) / "day.parquet")
        except NoBars:
            return False
    return True


# The vendor's history

_PAGES = [
    json.dumps({"status": "OK", "results": [rest_bar(NOON + n * 60_000) for n in range(3)], "next_url": None}).encode(),
    json.dumps({"status": "OK", "results": [{"T": "SPY"}, {"T": "BRK.B"}]}).encode(),
    json.dumps({"status": "OK", "resultsCount": 0}).encode(),
    json.dumps({"status": "ERROR", "error": "Unknown API Key"}).encode(),
    json.dumps({"status": "OK", "results": [], "next_url": "http://127.0.0.1:1/v2/more?cursor=x"}).encode(),
]
_HISTORY_ERRORS = (HistoryRefused, HistoryUnavailable, NotYetPublished)


def _pages(content: bytes, folder: Path) -> bool:
    history = RestHistory("http://127.0.0.1:1", "a-secret-key", RateLimit.per_minute(folder / "limit", 10**9))
    accepted = False
    for status in (200, 403):

        def answer(*_: object, status: int = status, **__: object) -> urllib3.HTTPResponse:
            return urllib3.HTTPResponse(io.BytesIO(content), status=status, preload_content=False)

        with mock.patch.object(urllib3.PoolManager, "request", answer):
            with contextlib.suppress(*_HISTORY_ERRORS):
                for page in history.minute_bars("SPY", DAY, DAY):
                    line_of_page = msgspec.json.decode(page_line(page))
                    assert msgspec.convert(line_of_page["bars"], list[HistoryBar]) == page.bars
                    accepted = True
            with contextlib.suppress(*_HISTORY_ERRORS):
                assert all(history.traded_tickers(DAY))
    return accepted


_LISTS = [
    json.dumps({"status": "OK", "results": results}).encode()
    for results in (
        [
            {"ticker": "AAPL", "execution_date": "2020-08-31", "split_from": 1, "split_to": 4, "id": "E1"},
            {"ticker": "RYCEF", "execution_date": "2020-10-27", "historical_adjustment_factor": 0},
        ],
        [{"ticker": "AAPL", "ex_dividend_date": "2025-08-11", "cash_amount": 0.26, "frequency": 4, "pay_date": ""}],
        [{"ticker": "OLD", "active": False, "delisted_utc": "2020-03-02T05:00:00Z", "cik": ""}],
        {"cik": "1", "events": [{"ticker_change": {"ticker": "FB"}, "type": "ticker_change", "date": "2012-05-18"}]},
    )
]


def _lists(content: bytes, folder: Path) -> bool:
    """Answers with splits, dividends, tickers and renames: whatever is accepted can be stored."""
    history = RestHistory("http://127.0.0.1:1", "a-secret-key", RateLimit.per_minute(folder / "limit", 10**9))
    accepted = False
    for listing in LISTINGS:

        def answer(*_: object, **__: object) -> urllib3.HTTPResponse:
            return urllib3.HTTPResponse(io.BytesIO(content), status=200, preload_content=False)

        with mock.patch.object(urllib3.PoolManager, "request", answer), contextlib.suppress(*_HISTORY_ERRORS):
            fetched = fetch_listing(listing, history, ["SPY"], DAY, DAY)
            assert fetched.table.schema.equals(listing.schema())
            accepted |= fetched.table.num_rows > 0
    return accepted


_PAGE_FILES = [
    page_line(Page("SPY", later(90_000), json.dumps([rest_bar(NOON), rest_bar(NOON + 60_000)]).encode(), True))
    + page_line(Page("BRK.B", later(90_001), b"[]", True)),
]


def _page_files(content: bytes, folder: Path) -> bool:
    """Answers of REST as they wait on the disk."""
    file = folder / "pages.jsonl.zst"
    file.write_bytes(content)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as space, Pages([file], ["SPY"], Path(space)) as pages:
            pages.write(DAY, day_bounds_ms(DAY)[1], Path(space) / "day.parquet")
    except UnreadableReference:
        return False
    return True


_FLAT_FILE = (
    ",".join(FLAT_FILE_COLUMNS)
    + f"\nSPY,1000.5,450.25,450.5,450.75,450.2,{NOON}000000,7\n"
    + f"BRK.B,1,2,3,4,5,{NOON + 60_000}000000,1\n"
).encode()


def _flat_files(content: bytes, folder: Path, kind: FlatFileKind = FlatFileKind.MINUTES) -> bool:
    file = folder / "day.csv.gz"
    file.write_bytes(content)
    with tempfile.TemporaryDirectory(dir=folder) as space:
        try:
            from_flat_file(DAY, file, later(90_000), "etag", Path(space) / "day.parquet", Path(space), kind)
        except UnreadableReference:
            return False
        if kind is FlatFileKind.DAYS:
            _assert_one_bar_a_ticker(Path(space) / "day.parquet")
    return True


def _day_files(content: bytes, folder: Path) -> bool:
    return _flat_files(content, folder, FlatFileKind.DAYS)


_DAY_ANSWERS = [
    json.dumps({"status": "OK", "results": [{"T": ticker, **rest_bar(at(16, 0))} for ticker in tickers]}).encode()
    for tickers in (["SPY", "BRK.B"], ["SPY", "SPY"], [])
]


def _day_answers(content: bytes, folder: Path) -> bool:
    history = RestHistory("http://127.0.0.1:1", "a-secret-key", RateLimit.per_minute(folder / "limit", 10**9))
    response = urllib3.HTTPResponse(io.BytesIO(content), status=200, preload_content=False)
    with (
        mock.patch.object(urllib3.PoolManager, "request", return_value=response),
        tempfile.TemporaryDirectory(dir=folder) as space,
    ):
        try:
            from_day_answer(DAY, history.daily_bars(DAY), Path(space) / "day.parquet", Path(space))
        except (UnreadableReference, *_HISTORY_ERRORS):
            return False
        _assert_one_bar_a_ticker(Path(space) / "day.parquet")
    return True


def _assert_one_bar_a_ticker(file: Path) -> None:
    rows = day_files.read(file)
    tickers = [row["ticker"] for row in rows]
    assert tickers == sorted({*tickers}, key=str.encode), tickers
    assert all(math.isfinite(row[name]) for row in rows for name in ("open", "high", "low", "close", "volume"))


# Settings: a variable a line

_ENVIRONMENTS = [
    "\n".join(f"{name}={value}" for name, value in environment.items()).encode()
    for environment in (
        {
            "POLYGON_API_KEY": "a-secret-key",
            "POLYGON_TICKERS": "SPY,BRK.B,KIMpL",
            "POLYGON_CHANNELS": "AM,A",
            "LAKE_URI": "s3://bucket/prefix",
        },
        {
            "POLYGON_TICKERS": "*",
            "POLYGON_WEBSOCKET_URL": "ws://127.0.0.1:8765/stocks",
            "POLYGON_REST_URL": "http://[::1]:80",
            "LAKE_URI": "file:///lake",
            "POLYGON_REST_REQUESTS_PER_MINUTE": "5",
            "JOURNAL_DIR": "var/journal",
        },
        {
            "POLYGON_API_KEY": "a-secret-key",
            "POLYGON_TICKERS": "SPY",
            "POLYGON_FLAT_FILES_KEY_ID": "id",
            "POLYGON_FLAT_FILES_SECRET": "secret",
            "POLYGON_FLAT_FILES_URL": "https://files.massive.com",
            "POLYGON_HISTORY_START": "2025-01-02",
            "POLYGON_NIGHT_SESSION_FROM": "2026-12-07",
            "POLYGON_WEBSOCKET_URL": "wss://delayed.massive.com/stocks",
        },
    )
]


def _settings(content: bytes, folder: Path) -> bool:
    environment = _environment(content)
    accepted = True
    readers: list[Callable[[Mapping[str, str]], object]] = [settings.load, settings.history_start]
    for read in readers:
        try:
            read(environment)
        except settings.ConfigurationError:
            accepted = False
    return accepted


def _environment(content: bytes) -> dict[str, str]:
    """As the system hands it to Python: no value has a NUL, and what is no UTF-8 is escaped."""
    text = content.replace(b"\x00", b"").decode(errors="surrogateescape")
    pairs = [entry.partition("=") for entry in text.split("\n")]
    return {name: value for name, _, value in pairs}


TARGETS = {
    target.name: target
    for target in (
        Target("frames", _FRAMES, _frames),
        Target("relayed_frames", _FRAMES, _relayed_frames),
        Target(
            "records",
            [record_line("SPY", NOON, 450.5), encode_record(Bar("SPY", NOON, 1, 2, 3, 4, 5, None), ARRIVAL)],
            _records,
        ),
        Target("ledgers", _ledger_samples(), _ledgers),
        Target("archives", _ARCHIVES, _archives, zstd),
        Target("days", _ARCHIVES, _days, zstd),
        Target("pages", _PAGES, _pages),
        Target("lists", _LISTS, _lists),
        Target("page_files", _PAGE_FILES, _page_files, zstd),
        Target("flat_files", [_FLAT_FILE], _flat_files, gzip.compress),
        Target("day_files", [_FLAT_FILE], _day_files, gzip.compress),
        Target("day_answers", _DAY_ANSWERS, _day_answers),
        Target("settings", _ENVIRONMENTS, _settings),
    )
}
