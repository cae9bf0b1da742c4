"""Makes the datasets of trading days, one day after the other: while one is stored, the next is made already.

Belongs here: what is fetched and made for a day, in which order, and that a day's failure costs only that day. Does not
belong here: what the rows are (the datasets' modules), storing them and how they show in Dagster (defs.assets).
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.coverage import Coverage, totals, worst_first
from polygon_pipeline.datasets.day_state import DayStatus, day_status
from polygon_pipeline.datasets.differences import Differences
from polygon_pipeline.datasets.inputs import RawDay, RawInputs, fetch_raw, fetch_reference, normalize_day
from polygon_pipeline.datasets.normalize import NoBars
from polygon_pipeline.datasets.pictures import candles, market_day, session_minutes
from polygon_pipeline.datasets.pictures.canvas import Span
from polygon_pipeline.datasets.pictures.heat_map import MOST_TICKERS, heat_map
from polygon_pipeline.datasets.quality import schema_errors
from polygon_pipeline.datasets.reference import UnreadableReference, read_reference_info
from polygon_pipeline.datasets.report import Report, Reporting, day_gaps, in_real_time
from polygon_pipeline.datasets.resample import Resampling
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.lake.dataset_files import MissingDataset, fetch_dataset
from polygon_pipeline.lake.ledger import DayLedgers, Ledger, connected_minutes, read_ledgers, subscribed_tickers
from polygon_pipeline.lake.store import Lake


class WrongSchema(Exception):
    """A dataset on the lake has other columns than the catalog says: nothing is made of it."""


# One that is made and one that is fetched, beside the one that the caller has.
_DAYS_AHEAD = 2

# What is wrong with one day, and with no other. Store errors are not among them.
DAY_ERRORS = (NoBars, MissingDataset, UnreadableReference, WrongSchema, duckdb.Error, UnicodeDecodeError)


class MadeDataset(NamedTuple):
    """One dataset of one day. file: local, until another day is given. facts: what it says of itself; picture: a
    PNG; report: what the session report says of the day."""

    day: date
    dataset: Dataset
    file: Path
    status: DayStatus
    facts: dict[str, Any]
    picture: bytes | None = None
    report: Report | None = None


class FailedDay(NamedTuple):
    """A day of which a dataset could not be made. error: one of DAY_ERRORS."""

    day: date
    error: Exception


@dataclass(frozen=True)
class _Inputs:
    """What was fetched for a day. raw: where the day is normalized; bars: where it was before. vendor_day: its
    reference_daily_bars, where they are there and wanted."""

    folder: Path
    raw: RawInputs | None
    bars: Path | None
    reference: Path | None
    vendor_day: Path | None
    ledgers: DayLedgers


def make_days(
    lake: Lake,
    days: Sequence[date],
    wanted_of: Callable[[date], Sequence[Dataset]],
    folder: Path,
    now: datetime,
    live_run: Callable[[], str | None] = lambda: None,
    draw: bool = False,
) -> Iterator[MadeDataset | FailedDay]:
    """Makes datasets of one channel, day by day; the caller stores each before it asks for the next.

    While the caller stores one day, the next is made and the one after it is fetched. wanted_of: which datasets to make
    of a day, asked on this thread before anything of the day is read. folder: an empty local folder, which holds three
    days at the most. now: aware. live_run: the run that collects, if one does; asked for each day after wanted_of, so
    that a run which ends meanwhile is newer than what is known of the day. draw: with pictures of days that are over,
    which take half a second and some 100 kB a day. A day that cannot be made is given with its error, and the others go
    on; store errors are raised.
    """
    with DuckSession(folder) as session, ThreadPoolExecutor(1) as fetching, ThreadPoolExecutor(1) as making:

        def begin(day: date, wanted: Sequence[Dataset]) -> tuple[date, Future[list[MadeDataset | FailedDay]]]:
            fetched = fetching.submit(_fetch, lake, day, wanted, folder / day.isoformat())

            def make() -> list[MadeDataset | FailedDay]:
                found: list[MadeDataset | FailedDay] = []
                try:
                    inputs = fetched.result()
                    found.extend(_make(lake, session, day, wanted, inputs, now, live_run(), draw))
                except DAY_ERRORS as error:
                    found.append(FailedDay(day, error))
                return found

            return day, making.submit(make)

        # Begins a day when it is asked for.
        begun = (begin(day, wanted) for day in days if (wanted := wanted_of(day)))
        ahead = deque(islice(begun, _DAYS_AHEAD))
        try:
            while ahead:
                day, made = ahead.popleft()
                ahead.extend(islice(begun, 1))
                yield from made.result()
                shutil.rmtree(folder / day.isoformat(), ignore_errors=True)
        finally:
            for _, unused in ahead:
                unused.cancel()


def current_status(lake: Lake, day: date, folder: Path, now: datetime, live_run: str | None) -> DayStatus:
    """The state of a day as the lake has it. folder: a local folder."""
    reference = fetch_reference(lake, day, folder)
    known_until_ms = read_reference_info(reference).until_ms if reference else 0
    return day_status(day, read_ledgers(lake, day).ledgers, known_until_ms, now, live_run)


def _fetch(lake: Lake, day: date, wanted: Sequence[Dataset], folder: Path) -> _Inputs:
    folder.mkdir()
    normalized = catalog.NORMALIZED[wanted[0].channel]
    vendor_day = None
    if any(catalog.REFERENCE_DAILY_BARS in dataset.inputs for dataset in wanted):
        vendor_day = fetch_reference(lake, day, folder, dataset=catalog.REFERENCE_DAILY_BARS)
    if vendor_day is None and [*wanted] == [catalog.DAILY_DIFFERENCES]:
        raise MissingDataset(f"{day} has no {catalog.REFERENCE_DAILY_BARS.name} to hold daily_bars against")
    if normalized in wanted:
        raw = fetch_raw(lake, day, normalized.channel, folder)
        return _Inputs(folder, raw, None, raw.reference, vendor_day, read_ledgers(lake, day))
    bars = fetch_dataset(lake, normalized.name, day.isoformat(), folder)
    if errors := schema_errors(bars, normalized):
        raise WrongSchema(f"{normalized.name} of {day} cannot be used: {'; '.join(errors)}. Materialize it again.")
    reference = fetch_reference(lake, day, folder)
    return _Inputs(folder, None, bars, reference, vendor_day, read_ledgers(lake, day))


def _make(
    lake: Lake,
    session: DuckSession,
    day: date,
    wanted: Sequence[Dataset],
    inputs: _Inputs,
    now: datetime,
    live_run: str | None,
    draw: bool,
) -> Iterator[MadeDataset]:
    folder, ledgers = inputs.folder, inputs.ledgers.ledgers
    known_until_ms = read_reference_info(inputs.reference).until_ms if inputs.reference else 0
    status = day_status(day, ledgers, known_until_ms, now, live_run)
    gaps = day_gaps(day, ledgers, now, live_run)
    drawn = draw and status.is_over
    bars = inputs.bars
    if inputs.raw is not None:
        bars = folder / "normalized.parquet"
        raw = normalize_day(lake, inputs.raw, bars, session)
        facts = _normalized_facts(raw, inputs.ledgers.strays)
        picture = candles.draw(day, bars, gaps, session) if drawn else None
        yield MadeDataset(day, catalog.NORMALIZED[inputs.raw.channel], bars, status, facts, picture)
    assert bars is not None
    derived = [dataset for dataset in wanted if dataset in catalog.DERIVED]
    compared = inputs.vendor_day is not None and catalog.DAILY_DIFFERENCES in wanted
    daily = folder / f"{catalog.DAILY_BARS.name}.parquet"
    if derived or compared:
        with Resampling(day, bars, session, status.state, inputs.vendor_day) as resampling:
            if compared and catalog.DAILY_BARS not in derived:
                resampling.write(catalog.DAILY_BARS, daily)
            for dataset in derived:
                target = folder / f"{dataset.name}.parquet"
                resampling.write(dataset, target)
                is_drawn = drawn and dataset == catalog.DAILY_BARS
                picture = market_day.draw(day, target, bars, session) if is_drawn else None
                yield MadeDataset(day, dataset, target, status, {}, picture)
    if compared:
        assert inputs.vendor_day is not None
        target = folder / f"{catalog.DAILY_DIFFERENCES.name}.parquet"
        asked = _asked_tickers(ledgers, inputs.reference)
        with Differences(day, daily, inputs.vendor_day, bars, inputs.reference, asked, session) as differences:
            agreement = differences.write(target)
        yield MadeDataset(day, catalog.DAILY_DIFFERENCES, target, status, agreement.facts())
    if catalog.BAR_COVERAGE in wanted or catalog.SESSION_REPORT in wanted:
        target = folder / "coverage.parquet"
        with Coverage(
            day,
            bars,
            inputs.reference,
            connected_minutes(ledgers),
            session,
            subscribed_tickers(ledgers),
            was_collected=bool(ledgers),
            in_real_time=in_real_time(ledgers),
        ) as coverage:
            coverage.write(target)
            if catalog.BAR_COVERAGE in wanted:
                picture = _heat_map(day, coverage, target, gaps) if drawn else None
                facts = {"unreadable_ledgers": inputs.ledgers.unreadable, **totals(target)}
                yield MadeDataset(day, catalog.BAR_COVERAGE, target, status, facts, picture)
    if catalog.SESSION_REPORT in wanted:
        file = folder / "report.parquet"
        with Reporting(day, bars, inputs.reference, target, known_until_ms, session) as reporting:
            reporting.write(file, status)
            report = reporting.report(file, ledgers, gaps)
        picture = session_minutes.draw(day, bars, gaps, in_real_time(ledgers), session) if drawn else None
        yield MadeDataset(day, catalog.SESSION_REPORT, file, status, {}, picture, report)


def _asked_tickers(ledgers: Sequence[Ledger], reference: Path | None) -> Sequence[str] | None:
    """The tickers that a collector or the history was asked for; None for the whole market."""
    info = read_reference_info(reference) if reference else None
    subscribed = subscribed_tickers(ledgers) if ledgers else []
    if subscribed is None or (info and info.tickers is None and not ledgers):
        return None
    return [*subscribed, *(info.tickers or () if info else ())]


def _heat_map(day: date, coverage: Coverage, file: Path, gaps: Sequence[Span]) -> bytes:
    """The coverage of the tickers most worth a look."""
    shown = worst_first(file, MOST_TICKERS)
    return heat_map(day, coverage.minute_states(shown), coverage.market_states(), shown, gaps)


def _normalized_facts(raw: RawDay, stray_ledgers: Sequence[str]) -> dict[str, Any]:
    strays = sorted([*raw.strays, *stray_ledgers])
    return {
        "frame_files": raw.frame_files,
        "raw_objects_without_frames": raw.records,
        "history": raw.reference.source if raw.reference else "none yet",
        "bars_added_from_history": raw.merge.added,
        "bars_differing_from_history": raw.merge.differing,
        "bars_corrected_by_history": raw.merge.corrected,
        "differences": list(raw.merge.examples),
        "unreadable_objects": dict(sorted(raw.unreadable.items())[:100]),
        "left_alone": {"objects": len(strays), "first": strays[:20]},
    }
