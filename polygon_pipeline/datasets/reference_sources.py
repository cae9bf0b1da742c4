"""Fetches the vendor's history of trading days: from flat files or REST, each day as soon as it is whole.

Belongs here: which source serves a day, and whether what was fetched differs from what the lake has. Does not belong
here: requests (polygon.rest, polygon.flat_files), what waits until a day is whole (datasets.staged_answers), rows
(datasets.reference), and storing the result (defs.writer).

A day whose flat file is there or due comes from there, whole market in one object. Any other day comes from REST,
ticker by ticker, and a month at a time: more per request has gaps, by the vendor's word. Every ticker's answers are
kept until all of their days are stored, so that another run goes on where one was cut, on another machine too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from polygon_pipeline.datasets import reference
from polygon_pipeline.datasets.catalog import REFERENCE_BARS, REFERENCE_DAILY_BARS
from polygon_pipeline.datasets.inputs import fetch_reference
from polygon_pipeline.datasets.staged_answers import StagedAnswers, answers_of, sweep
from polygon_pipeline.lake.errors import STORE_ERRORS, brief
from polygon_pipeline.lake.ledger import market_time, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import day_bounds_ms, session
from polygon_pipeline.market.hours import filed_by_night_from
from polygon_pipeline.market.revisions import settled_after
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import FlatFileKind, expected_at, fetch_flat_file, published_files
from polygon_pipeline.polygon.rest import Page, RestHistory, seconds_left

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Calendar days that one request asks for, as the vendor advises against gaps. An answer could hold 50 trading
# days, or 36 with nights.
_SPAN = timedelta(days=31)
# Trading days in that.
DAYS_PER_REQUEST = 21
# Answers kept from an earlier run are used again for so long.
_STAGED_FOR = timedelta(hours=6)
# Longer than anyone would wait for: a whole market by a free plan's requests.
LONGEST_SECONDS = 12 * 3600.0
_REPORT_EVERY_SECONDS = 30.0
# A day that the vendor has not yet is asked for again after so long.
_LATE_RETRY = timedelta(hours=1)
OF_KIND = {FlatFileKind.MINUTES: REFERENCE_BARS, FlatFileKind.DAYS: REFERENCE_DAILY_BARS}
_NAMED = 5


@dataclass(frozen=True)
class Sources:
    """Where history comes from. flat_files: the vendor's bucket, where there are credentials for it. tickers: which to
    ask REST for, `("*",)` for all that traded."""

    rest: RestHistory
    flat_files: ObjectStore | None
    tickers: tuple[str, ...]
    requests_per_second: float


class FetchedDay(NamedTuple):
    """A day of the reference. file: local, until the next day is asked for. is_new: whether it says something else than
    the lake's file, or the lake has none: then it is to be stored. refused: the tickers that the vendor refused, each
    with the reason. published_at: when a new flat file was put there; is_replacement: whether in place of one that we
    had."""

    day: date
    file: Path
    info: reference.ReferenceInfo
    is_new: bool
    refused: Mapping[str, str] = MappingProxyType({})
    published_at: datetime | None = None
    is_replacement: bool = False


class UnfetchedDay(NamedTuple):
    """A day that could not be fetched. problem: HistoryRefused, NotYetPublished, HistoryUnavailable or
    UnreadableReference."""

    day: date
    problem: Exception


_PROBLEMS = (HistoryRefused, HistoryUnavailable, NotYetPublished, reference.UnreadableReference)


def fetch_days(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime, report: Callable[[str], object]
) -> Iterator[FetchedDay | UnfetchedDay]:
    """Fetches trading days, each as soon as it is whole. The caller stores a new one before it asks for the next.

    folder: an empty local folder. now: aware. report: called with what to log, the time left among it. A day that
    cannot be fetched is given with its problem, and the others go on; store errors are raised.
    """
    sweep(lake, now, _STAGED_FOR)
    by_file = _by_file(days, sources.flat_files, now)
    by_rest = [day for day in sorted(days) if day not in by_file]
    began = reported = time.monotonic()
    for done, day in enumerate(by_file, 1):
        assert sources.flat_files
        try:
            yield _from_flat_file(lake, day, sources.flat_files, _new(folder, day), now)
        except _PROBLEMS as problem:
            yield UnfetchedDay(day, problem)
        if time.monotonic() - reported >= _REPORT_EVERY_SECONDS:
            reported = time.monotonic()
            left = duration((reported - began) / done * (len(by_file) - done))
            report(f"{done} of {len(by_file)} flat files are fetched, about {left} left")
    for span in _spans(by_rest):
        try:
            yield from _from_rest(lake, span, sources, folder, now, report)
        except _PROBLEMS as problem:
            yield from (UnfetchedDay(day, problem) for day in span)


def _by_file(days: Sequence[date], store: ObjectStore | None, now: datetime) -> list[date]:
    """The days whose flat file is there or should be, in order."""
    if store is None:
        return []
    early = [day for day in days if now < expected_at(day) and _is_over(day, now)]
    listed: Collection[date] = ()
    with suppress(HistoryRefused, HistoryUnavailable):  # then they come by REST
        listed = published_files(store, early)
    return [day for day in sorted(days) if day in listed or now >= expected_at(day)]


def fetch_daily_days(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime, report: Callable[[str], object]
) -> Iterator[FetchedDay | UnfetchedDay]:
    """Fetches the vendor's day bars of trading days, as fetch_days fetches the minutes: from flat files where there are
    credentials for them, else one request a day for the whole market."""
    for day in sorted(days):
        scratch = _new(folder, day)
        try:
            if sources.flat_files is not None:
                yield _from_flat_file(lake, day, sources.flat_files, scratch, now, FlatFileKind.DAYS)
            else:
                yield _day_from_rest(lake, day, sources.rest, scratch, now, report)
        except _PROBLEMS as problem:
            yield UnfetchedDay(day, problem)


def _day_from_rest(
    lake: Lake, day: date, rest: RestHistory, folder: Path, now: datetime, report: Callable[[str], object]
) -> FetchedDay:
    found = session(day)
    if found and not _is_over(day, market_time(read_ledgers(lake, day).ledgers, now)):
        raise NotYetPublished(
            f"{day} is not over, so the vendor has no bar of it yet.", found.post_close + settled_after()
        )
    answer = rest.daily_bars(day)
    if answer.refused:
        report(f"{day}: {len(answer.refused)} day bars are left out, such as {answer.refused[0]}")
    if not answer.bars:
        raise NotYetPublished(f"The vendor has no day bars of {day} yet.", now + _LATE_RETRY)
    made = folder / "made.parquet"
    reference.from_day_answer(day, answer, made, folder)
    old = fetch_reference(lake, day, folder, dataset=REFERENCE_DAILY_BARS)
    if old and reference.same_bars(old, made, REFERENCE_DAILY_BARS):
        return FetchedDay(day, old, reference.read_reference_info(old, REFERENCE_DAILY_BARS), is_new=False)
    return FetchedDay(day, made, reference.read_reference_info(made, REFERENCE_DAILY_BARS), is_new=True)


def _from_flat_file(
    lake: Lake,
    day: date,
    store: ObjectStore,
    folder: Path,
    now: datetime,
    kind: FlatFileKind = FlatFileKind.MINUTES,
) -> FetchedDay:
    dataset = OF_KIND[kind]
    # One that cannot be read is as good as none: it is replaced.
    old = fetch_reference(lake, day, folder, dataset=dataset)
    info = reference.read_reference_info(old, dataset) if old else None
    packed, made = folder / "flat-file.csv.gz", folder / "made.parquet"
    known_etag = info.etag if info else None
    found = fetch_flat_file(store, day, packed, known_etag=known_etag, now=now, kind=kind)
    if found is None:
        assert old
        assert info
        return FetchedDay(day, old, info, is_new=False)
    reference.from_flat_file(day, packed, found.last_modified, found.etag, made, folder, kind)
    return FetchedDay(
        day,
        made,
        reference.read_reference_info(made, dataset),
        is_new=True,
        published_at=found.last_modified,
        is_replacement=known_etag is not None,
    )


def _from_rest(
    lake: Lake, days: Sequence[date], sources: Sources, folder: Path, now: datetime, report: Callable[[str], object]
) -> Iterator[FetchedDay]:
    tickers = _tickers(days, sources)
    needed = seconds_left(0, len(tickers), 0, sources.requests_per_second)
    if needed > LONGEST_SECONDS:
        raise HistoryRefused(
            f"{len(tickers)} tickers by REST would take {duration(needed)} for {days[0]} to {days[-1]}. Set "
            "POLYGON_FLAT_FILES_KEY_ID and POLYGON_FLAT_FILES_SECRET for the whole market, name fewer "
            "POLYGON_TICKERS, or raise POLYGON_REST_REQUESTS_PER_MINUTE to what the plan allows."
        )
    ledgers = read_ledgers(lake, days[-1]).ledgers
    with answers_of(lake, days, folder) as answers:
        refused = _ask(tickers, days, sources, answers, market_time(ledgers, now), report)
        served = [ticker for ticker in tickers if ticker not in refused]
        asked_at = market_time(ledgers, min(answers.asked_at[ticker] for ticker in served))
        with reference.Pages(answers.files(), served, folder) as pages:
            for day in days:
                scratch = _new(folder, day)
                made = scratch / "made.parquet"
                pages.write(day, _until_ms(day, asked_at), made)
                old = fetch_reference(lake, day, scratch)
                info = reference.read_reference_info(old) if old else None
                if old and info and (info.source == "flat_file" or reference.same_bars(old, made)):
                    # A flat file has the whole market, so a few tickers' answers are no replacement.
                    yield FetchedDay(day, old, info, is_new=False, refused=refused)
                    continue
                yield FetchedDay(day, made, reference.read_reference_info(made), is_new=True, refused=refused)


def _spans(days: Sequence[date]) -> Iterator[list[date]]:
    """The days, sorted, in groups that one request each asks for with all the days between."""
    span: list[date] = []
    for day in days:
        if span and day - span[0] >= _SPAN:
            yield span
            span = []
        span.append(day)
    if span:
        yield span


def _ask(
    tickers: Sequence[str],
    days: Sequence[date],
    sources: Sources,
    answers: StagedAnswers,
    now: datetime,
    report: Callable[[str], object],
) -> dict[str, str]:
    """Fetches the answers for every ticker, unless an earlier run has; returns why tickers have none.

    Answers that an earlier run got before the last day was over are not used: there is more by now.
    """
    answers.resume(lambda asked_at: now - asked_at <= _STAGED_FOR and _is_over(days[-1], min(asked_at, now)))
    missing = [ticker for ticker in tickers if ticker not in answers.asked_at]
    if not missing:
        return {}
    is_served = len(missing) < len(tickers)
    if is_served:
        report(f"{len(tickers) - len(missing)} of {len(tickers)} tickers were fetched by an earlier run that was cut")
    reported = time.monotonic()

    def use(page: Page) -> None:
        if page.refused:
            report(f"{page.ticker}: {len(page.refused)} bars are left out, such as {page.refused[0]}")
        answers.add(page)

    def keep(at_once: bool = False) -> None:
        try:
            answers.keep(at_once)
        except STORE_ERRORS as error:  # only a run that is cut would need it
            report(f"the lake does not take what was fetched so far, asking on: {brief(error)}")

    def progress(done: int, total: int, seconds: float) -> None:
        nonlocal reported
        keep()
        if done == total or time.monotonic() - reported >= _REPORT_EVERY_SECONDS:
            reported = time.monotonic()
            report(f"{days[0]} to {days[-1]}: {done} of {total} tickers fetched, about {duration(seconds)} left")

    pace = duration(seconds_left(0, len(missing), 0, sources.requests_per_second))
    report(f"asking REST for {len(missing)} tickers from {days[0]} to {days[-1]}: {pace} at the plan's pace")
    first, last = _range(days)
    try:
        refused = sources.rest.fetch_many(missing, first, last, use, progress, is_served)
    except BaseException:
        keep(at_once=True)
        raise
    if refused:
        named = "; ".join(f"{ticker}: {reason}" for ticker, reason in [*refused.items()][:_NAMED])
        report(f"{len(refused)} of {len(tickers)} tickers are refused, and the others are used. {named}")
    return refused


def _tickers(days: Sequence[date], sources: Sources) -> list[str]:
    if sources.tickers != ("*",):
        return sorted(sources.tickers)
    traded = {ticker for day in days for ticker in sources.rest.traded_tickers(day)}
    if not traded:
        raise NotYetPublished(f"The vendor does not say yet which tickers traded from {days[0]} to {days[-1]}.")
    return sorted(traded)


def _range(days: Sequence[date]) -> tuple[date | int, date | int]:
    """From when to when REST is asked for the bars of these days, both included. The vendor's dates are New York's."""
    if days[-1] < filed_by_night_from():
        return days[0], days[-1]
    return day_bounds_ms(days[0])[0], day_bounds_ms(days[-1])[1] - 1


def _until_ms(day: date, asked_at: datetime) -> int:
    """Before which start a day's bars are known that were asked for then."""
    if _is_over(day, asked_at):
        return day_bounds_ms(day)[1]
    settled = asked_at - settled_after()
    return int(settled.replace(second=0, microsecond=0).timestamp()) * 1000


def _is_over(day: date, asked_at: datetime) -> bool:
    """Whether all of a day's bars were final when they were asked for."""
    found = session(day)
    return found is None or found.post_close + settled_after() <= asked_at


def _new(folder: Path, day: date) -> Path:
    """An empty folder for a day; the one before is removed, so that a long range needs no more disk than a day."""
    for old in folder.glob("day-*"):
        shutil.rmtree(old)
    made = folder / f"day-{day}"
    made.mkdir()
    return made


def duration(seconds: float) -> str:
    """For people: `40 s`, `12 min`, `10.0 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
