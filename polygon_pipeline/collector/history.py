"""The vendor's history of trading days, fetched and kept as reference_bars; and which gaps it is to repair.

Belongs here: which source serves a day, keeping what was fetched until a day is whole, and when a kept day is replaced.
Does not belong here: requests (polygon.rest, polygon.flat_files) and rows (market.reference).

A day whose flat file is due comes from there, whole market in one object. Any other day comes from REST, ticker by
ticker, and many days at a time: an answer holds some fifty of them. Every ticker's answers are kept below `staging`
until all of their days are on the lake, so that a run that was cut goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec
from obstore.store import ObjectStore

from polygon_pipeline.collector.account import SIMULATED, Gap, Ledger, decode_ledger
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.datasets import MissingDataset, fetch_dataset, put_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import reference
from polygon_pipeline.market.calendar import day_bounds_ms, session, trading_days
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import expected_at, fetch_flat_file
from polygon_pipeline.polygon.rest import Page, RestHistory, seconds_left

DATASET = "reference_bars"

# An answer holds 50,000 bars; an extended session has at most 960.
DAYS_A_REQUEST = 50
# A bar is final when its revisions are in, which takes about a quarter of an hour; and plans may be 15 minutes late.
SETTLED = timedelta(minutes=16)
# Answers kept from an earlier run are used again for so long.
_STAGED_FOR = timedelta(hours=6)
# What nobody would wait for: a whole market by a free plan's requests.
_LONGEST_SECONDS = 12 * 3600.0
_TOLD_EVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Sources:
    """Where history comes from. flat_files: the vendor's bucket, where there are credentials for it. tickers: whom to
    ask REST for, `("*",)` for whoever traded. feed: a simulated one may have a clock of its own."""

    rest: RestHistory
    flat_files: ObjectStore | None
    tickers: tuple[str, ...]
    requests_a_second: float
    staging: Path
    feed: str


class Kept(NamedTuple):
    """A day of the reference. changed: whether the lake's file was written, or said the same already."""

    day: date
    info: reference.ReferenceInfo
    changed: bool
    rows: int


class NotKept(NamedTuple):
    """A day that could not be had. problem: HistoryRefused, NotYetPublished, HistoryUnavailable or
    UnreadableReference."""

    day: date
    problem: Exception


_PROBLEMS = (HistoryRefused, HistoryUnavailable, NotYetPublished, reference.UnreadableReference)


class _Line(msgspec.Struct):
    """A page as it is staged, one a line; market.reference reads it."""

    ticker: str
    fetched_at: datetime
    bars: Sequence[msgspec.Struct]


def fetch_days(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime, tell: Callable[[str], object]
) -> Iterator[Kept | NotKept]:
    """Fetches trading days and keeps them as reference_bars, each as soon as it is whole.

    folder: an empty local folder. now: aware. tell: called with what to log, the time left among it. A day that
    cannot be had is yielded with its problem, and the others go on; store errors are raised.
    """
    by_rest = []
    for day in sorted(days):
        if sources.flat_files is None or now < expected_at(day):
            by_rest.append(day)
            continue
        try:
            yield _from_flat_file(lake, day, sources.flat_files, _new(folder, day), now)
        except _PROBLEMS as problem:
            yield NotKept(day, problem)
    for span in _spans(by_rest):
        try:
            yield from _from_rest(lake, span, sources, folder, now, tell)
        except _PROBLEMS as problem:
            if isinstance(problem, reference.UnreadableReference):
                shutil.rmtree(_staging(sources, span))  # or it would be read again, and again in vain
            yield from (NotKept(day, problem) for day in span)


def due_repairs(ledgers: Sequence[Ledger], known_until_ms: int, now: datetime) -> list[Gap]:
    """The gaps that the history can fill now: over, settled, and reaching beyond what the reference knows already."""
    clock = market_time(ledgers, now)
    return [
        gap
        for ledger in ledgers
        for gap in ledger.gaps
        if gap.first_minute
        and gap.last_minute
        and gap.last_minute + timedelta(minutes=1) + SETTLED <= clock
        and gap.last_minute.timestamp() * 1000 >= known_until_ms
    ]


def read_ledgers(lake: Lake, day: date) -> list[Ledger]:
    """The accounts of all runs that got bars of a day."""
    contents = [lake.get(key) for key in lake.keys(layout.ledger_prefix(day))]
    return [decode_ledger(content) for content in contents if content]


def market_time(ledgers: Iterable[Ledger], now: datetime) -> datetime:
    """The feed's own time: now, but the newest bar's end where a simulator is on its way through a past day."""
    newest_ms = [
        connection.last_bar_ms
        for ledger in ledgers
        if ledger.feed == SIMULATED and not ledger.complete
        for connection in ledger.account.connections
        if connection.last_bar_ms
    ]
    return datetime.fromtimestamp(max(newest_ms) / 1000 + 60, UTC) if newest_ms else now


def _from_flat_file(lake: Lake, day: date, store: ObjectStore, folder: Path, now: datetime) -> Kept:
    old = _existing(lake, day, folder)
    info = reference.read_reference_info(old) if old else None
    packed, made = folder / "flat-file.csv.gz", folder / "made.parquet"
    found = fetch_flat_file(store, day, packed, known_etag=info.etag if info else None, now=now)
    if found is None:
        assert old
        assert info
        return Kept(day, info, False, reference.count_rows(old))
    reference.from_flat_file(day, packed, found.last_modified, found.etag, made, folder)
    put_dataset(lake, DATASET, day.isoformat(), made)
    return Kept(day, reference.read_reference_info(made), True, reference.count_rows(made))


def _from_rest(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime, tell: Callable[[str], object]
) -> Iterator[Kept]:
    tickers = _tickers(days, sources)
    needed = seconds_left(0, len(tickers), 0, sources.requests_a_second)
    if needed > _LONGEST_SECONDS:
        raise HistoryRefused(
            f"{len(tickers)} tickers by REST would take {_duration(needed)} for {days[0]} to {days[-1]}. Set "
            "POLYGON_FLAT_FILES_KEY_ID and POLYGON_FLAT_FILES_SECRET for the whole market, name fewer "
            "POLYGON_TICKERS, or raise POLYGON_REST_REQUESTS_PER_MINUTE to what the plan allows."
        )
    staging = _staging(sources, days)
    ledgers = read_ledgers(lake, days[-1]) if sources.feed == SIMULATED else []
    files = _stage(tickers, days, sources, staging, market_time(ledgers, now), tell)
    asked_at = market_time(ledgers, min(_asked_at(file) for file in files))
    with reference.Pages(files, tickers, folder) as pages:
        for day in days:
            scratch = _new(folder, day)
            made = scratch / "made.parquet"
            pages.write(day, _until_ms(day, asked_at), made)
            old = _existing(lake, day, scratch)
            info = reference.read_reference_info(old) if old else None
            if old and info and (info.source == "flat_file" or reference.same_bars(old, made)):
                # A flat file has the whole market, so a few tickers' answers are no replacement.
                yield Kept(day, info, False, reference.count_rows(old))
                continue
            put_dataset(lake, DATASET, day.isoformat(), made)
            yield Kept(day, reference.read_reference_info(made), True, reference.count_rows(made))
    shutil.rmtree(staging)


def _spans(days: Sequence[date]) -> Iterator[list[date]]:
    """The days, sorted, in groups that one answer each holds with all the days between."""
    span: list[date] = []
    for day in days:
        if span and len(trading_days(span[0], day)) > DAYS_A_REQUEST:
            yield span
            span = []
        span.append(day)
    if span:
        yield span


def _stage(
    tickers: Sequence[str],
    days: Sequence[date],
    sources: Sources,
    staging: Path,
    now: datetime,
    tell: Callable[[str], object],
) -> list[Path]:
    """Fetches every ticker's answers into a file of its own, unless an earlier run has; returns the files.

    Answers that an earlier run got before the last day was over are not used: there is more by now.
    """
    staging.mkdir(parents=True, exist_ok=True)
    staged = {file.name.partition("@")[0]: file for file in staging.glob("*.jsonl")}
    for name, file in list(staged.items()):
        asked_at = _asked_at(file)
        if now - asked_at > _STAGED_FOR or not _is_over(days[-1], min(asked_at, now)):
            file.unlink()
            del staged[name]
    missing = [ticker for ticker in tickers if _name(ticker) not in staged]
    if staged and missing:
        tell(f"{len(staged)} of {len(tickers)} tickers were fetched by an earlier run that was cut")
    lines: dict[str, list[bytes]] = {}
    first_asked: dict[str, datetime] = {}
    told = time.monotonic()

    def use(page: Page) -> None:
        line = _Line(page.ticker, page.fetched_at, page.bars)
        lines.setdefault(page.ticker, []).append(msgspec.json.encode(line) + b"\n")
        asked_at = first_asked.setdefault(page.ticker, page.fetched_at)
        if page.is_last:
            name = _name(page.ticker)
            part = staging / f"{name}.part"
            part.write_bytes(b"".join(lines.pop(page.ticker)))
            staged[name] = part.rename(staging / f"{name}@{int(asked_at.timestamp() * 1000)}.jsonl")

    def progress(done: int, total: int, seconds: float) -> None:
        nonlocal told
        if done == total or time.monotonic() - told >= _TOLD_EVERY_SECONDS:
            told = time.monotonic()
            tell(f"{days[0]} to {days[-1]}: {done} of {total} tickers fetched, about {_duration(seconds)} left")

    if missing:
        pace = _duration(seconds_left(0, len(missing), 0, sources.requests_a_second))
        tell(f"asking REST for {len(missing)} tickers from {days[0]} to {days[-1]}: {pace} at the plan's pace")
        sources.rest.fetch_many(missing, days[0], days[-1], use, progress)
    return [staged[_name(ticker)] for ticker in tickers]


def _tickers(days: Sequence[date], sources: Sources) -> list[str]:
    if sources.tickers != ("*",):
        return sorted(sources.tickers)
    traded = {ticker for day in days for ticker in sources.rest.traded_tickers(day)}
    if not traded:
        raise NotYetPublished(f"The vendor does not say yet who traded from {days[0]} to {days[-1]}.")
    return sorted(traded)


def _until_ms(day: date, asked_at: datetime) -> int:
    """Before which start a day's bars are known that were asked for then."""
    if _is_over(day, asked_at):
        return day_bounds_ms(day)[1]
    settled = asked_at - SETTLED
    return int(settled.replace(second=0, microsecond=0).timestamp()) * 1000


def _is_over(day: date, asked_at: datetime) -> bool:
    """Whether all of a day's bars were final when they were asked for."""
    found = session(day)
    return found is None or found.post_close + SETTLED <= asked_at


def _existing(lake: Lake, day: date, folder: Path) -> Path | None:
    try:
        return fetch_dataset(lake, DATASET, day.isoformat(), folder)
    except MissingDataset:
        return None


def _new(folder: Path, day: date) -> Path:
    """An empty folder for a day; the one before is removed, so that a long range needs no more disk than a day."""
    for old in folder.glob("day-*"):
        shutil.rmtree(old)
    made = folder / f"day-{day}"
    made.mkdir()
    return made


def _staging(sources: Sources, days: Sequence[date]) -> Path:
    return sources.staging / f"{days[0]}_{days[-1]}"


def _name(ticker: str) -> str:
    return quote(ticker, safe="")


def _asked_at(file: Path) -> datetime:
    """When the first of a staged file's answers was asked for, which its name says."""
    return datetime.fromtimestamp(int(file.stem.rpartition("@")[2]) / 1000, UTC)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
