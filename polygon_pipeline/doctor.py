"""`make doctor`: what works and what does not, a line each, with what to do.

Belongs here: what is looked at, and how the outcome is told. Does not belong here: the clients that are asked (access,
lake, polygon), and correcting anything.

Nothing is changed but one small object of the lake (layout.DOCTOR_KEY). The stream is left alone while a collector has
the lake's lease, because the vendor allows one connection. Without a key the simulator is asked in the vendor's place.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import tenacity
import urllib3
from packaging.requirements import Requirement

from polygon_pipeline import access, demo, settings
from polygon_pipeline.collector.journal import MIN_FREE_BYTES
from polygon_pipeline.collector.lease import read_lease
from polygon_pipeline.collector.telling import live_status
from polygon_pipeline.datasets import backfill_cost
from polygon_pipeline.datasets.reference_sources import duration
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief, permanent_error
from polygon_pipeline.lake.probe import ConditionIgnored, probe
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market import calendar, hours
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished, RequestRefused
from polygon_pipeline.polygon.flat_files import expected_at, look_at_flat_file
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory, connections
from polygon_pipeline.polygon.stream import StreamRefused, try_key
from polygon_pipeline.settings import ConfigurationError, Settings

_PACKAGE = "polygon-pipeline"
# A minute counts as lost where a connection was not there 5 s after its end; and S3 refuses clocks that are 15 minutes
# wrong. A Date header has no parts of a second.
_CLOCK_WARN_SECONDS, _CLOCK_FAIL_SECONDS = 2.0, 60.0
_ANSWER_SECONDS = 10.0
# A week without the lake should find room.
_WANTED_DAYS = 7
_FRAME_BYTES_PER_BAR = 230
_ASKED_WITHOUT_A_LIST = "SPY"


class Level(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


class Finding(NamedTuple):
    """One line. advice: what to do, where something is to be done and the text does not say it."""

    level: Level
    what: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what:<12} {self.text}" + (f" -> {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Backfill:
    """A range of days whose cost is asked for, both included."""

    first: date
    last: date


def examine(
    environment: Mapping[str, str],
    now: datetime,
    *,
    backfill: Backfill | None = None,
    with_stream: bool = True,
    on_step: Callable[[str], object] = lambda what: None,
) -> Iterator[Finding]:
    """Everything, as soon as it is known.

    environment: with the demo's defaults. on_step: told what is looked at next.
    """
    on_step("versions")
    yield from _versions()
    yield _calendar(now)
    try:
        wanted = settings.load(environment)
    except ConfigurationError as error:
        yield Finding(Level.FAIL, "settings", str(error))
        return
    yield _key(wanted)
    yield _disk(wanted)
    on_step("lake")
    lake, findings = _lake(wanted, now)
    yield from findings
    servers: list[str] = []
    with contextlib.ExitStack() as stack:
        on_step("REST")
        rest_url = stack.enter_context(access.rest_url(wanted))
        servers.append(rest_url)
        writable = lake if all(found.level is Level.OK for found in findings) else None
        limit = access.rest_limit(wanted, writable)
        yield from _rest(wanted, rest_url, stack, limit, settings.history_start(environment), now)
        on_step("flat files")
        yield _flat_files(wanted, now)
        on_step("stream")
        yield _stream(wanted, lake, now) if with_stream else Finding(Level.OK, "stream", "not tried (--without-stream)")
        if lake and lake.s3:
            region = lake.s3.session.region_name or "us-east-1"
            servers.append(lake.s3.endpoint_url or f"https://s3.{region}.amazonaws.com")
        if wanted.flat_files_url:
            servers.append(wanted.flat_files_url)
        on_step("clock")
        yield _clock(servers)
    if backfill:
        yield from _backfill(wanted, backfill, settings.history_start(environment), now)


def _versions() -> Iterator[Finding]:
    try:
        needed = [Requirement(text) for text in requires(_PACKAGE) or ()]
        named = f"polygon_pipeline {version(_PACKAGE)}"
    except PackageNotFoundError:
        yield Finding(Level.FAIL, "versions", "polygon_pipeline is not installed", "make dev, or pip install -e .")
        return
    wrong: list[str] = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    text = f"{named}, dagster {_version('dagster')}, Python {platform.python_version()}"
    if wrong:
        yield Finding(Level.FAIL, "versions", f"{text}; {'; '.join(wrong)}", "pip install -c constraints.txt -e .")
    else:
        yield Finding(Level.OK, "versions", f"{text}; all {len(needed)} requirements are met")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _calendar(now: datetime) -> Finding:
    upcoming = calendar.current_or_next_session(now)
    today = upcoming.date if upcoming.begin <= now else now.astimezone(NEW_YORK).date()
    found = calendar.session(today)
    open_hours = (
        f"today {calendar.clock(found.begin)} to {calendar.clock(found.post_close)} New York"
        if found
        else "no session today"
    ) + (f", the next on {upcoming.date:%A %Y-%m-%d}" if upcoming.date != today else "")
    holiday = next((day for day in calendar.closed_weekdays() if day > today), None)
    half_day = next(
        (
            day
            for day in calendar.trading_days(today, today + timedelta(days=370))
            if (session := calendar.session(day)) and session.is_early_close
        ),
        None,
    )
    return Finding(
        Level.OK,
        "calendar",
        f"{open_hours}; next holiday {holiday or 'unknown'}, next half day {half_day or 'unknown'}; {_nights()}",
    )


def _nights() -> str:
    first = hours.night_session_from()
    return f"night session from {first}" if first else f"no night session ({hours.VARIABLE} is not set)"


def _key(wanted: Settings) -> Finding:
    if not wanted.is_simulated:
        return Finding(Level.OK, "key", "POLYGON_API_KEY (or MASSIVE_API_KEY) is set: the feed is the market's")
    advice = "set POLYGON_API_KEY and POLYGON_TICKERS to collect the market" if wanted.is_demo else ""
    return Finding(Level.OK, "key", "no key of the vendor: the feed is SIMULATED", advice)


def _disk(wanted: Settings) -> Finding:
    folder = wanted.journal_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".doctor"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        text = f"JOURNAL_DIR ({folder}) cannot be written: {error.strerror}"
        return Finding(Level.FAIL, "disk", text, "name a folder that this user may write")
    free = shutil.disk_usage(folder).free
    bars = backfill_cost.WHOLE_MARKET_BARS
    if not wanted.is_whole_market:
        bars = min(bars, len(wanted.tickers) * (1_380 if hours.night_session_from() else 960))  # a session's minutes
    bars *= 60 if Channel.SECOND in wanted.channels else 1
    days = max(0, free - MIN_FREE_BYTES) / (bars * _FRAME_BYTES_PER_BAR)
    text = f"{free / 1e9:,.1f} GB free in {folder}: room for {_days(days)} of frames while the lake is away"
    if free <= MIN_FREE_BYTES:
        return Finding(Level.FAIL, "disk", text, f"free more than {MIN_FREE_BYTES >> 20} MiB: below it a run ends")
    advice = "a larger disk for JOURNAL_DIR" if days < _WANTED_DAYS else ""
    return Finding(Level.WARN if advice else Level.OK, "disk", text, advice)


def _days(days: float) -> str:
    return "more than a year" if days > 365 else f"{days:.1f} days" if days < 10 else f"{days:.0f} days"


def _lake(wanted: Settings, now: datetime) -> tuple[Lake | None, list[Finding]]:
    """The lake, where it can be read, and what is to be said of it."""
    import boto3

    try:
        lake = open_lake(wanted.lake_uri, lambda: access.s3_access(boto3.Session()))
        claimed = lake.is_claimed(wanted.feed)
        state = f"holds {wanted.feed} data" if claimed else "can be read, and is new"
        said = [Finding(Level.OK, "lake", f"{lake.uri} {state}")]
    except (*STORE_ERRORS, LakeError, ConfigurationError, ValueError) as error:  # boto3's, of a URL that is none
        return None, [Finding(Level.FAIL, "lake", _told(error, wanted.lake_uri))]
    try:
        probe(lake, f'{{"looked_at": "{now.isoformat()}"}}'.encode())
    except ConditionIgnored as error:
        advice = "use a store that keeps conditional writes: without them two collectors could hold one lease"
        said.append(Finding(Level.FAIL, "lake writes", f"the store ignores a condition: {error}", advice))
    except STORE_ERRORS as error:
        said.append(Finding(Level.FAIL, "lake writes", _told(error, wanted.lake_uri)))
    else:
        kept = "create-only and if-match are kept" if lake.is_s3 else "create-only is kept"
        said.append(Finding(Level.OK, "lake writes", f"list, get and put work; {kept}"))
    return lake, said


def _told(error: Exception, uri: str) -> str:
    if isinstance(error, LakeError | ConfigurationError):
        return str(error)
    return str(permanent_error(error, uri) or brief(error))


def _rest(
    wanted: Settings,
    url: str,
    stack: contextlib.ExitStack,
    limited: contextlib.AbstractContextManager[RateLimit],
    history_start: date,
    now: datetime,
) -> Iterator[Finding]:
    """A recent day's bars, which every plan should have, and then the first day that is a partition."""
    ticker = _ASKED_WITHOUT_A_LIST if wanted.is_whole_market else wanted.tickers[0]
    recent = calendar.completed_sessions(now, 2)[0]
    pace = f"{wanted.rest_requests_per_minute} requests a minute at the most"
    try:
        limit = stack.enter_context(limited)
        history = RestHistory(url, wanted.api_key, limit, tries=2, backoff=tenacity.wait_fixed(0.5))
        bars = sum(len(page.bars) for page in history.minute_bars(ticker, recent, recent))
    except OSError as error:
        yield Finding(Level.FAIL, "REST", f"the limit of requests cannot be kept: {error}", "see disk")
        return
    except RequestRefused as error:
        yield Finding(Level.FAIL, "entitlement", str(error))
        return
    except (HistoryRefused, NotYetPublished) as error:
        yield Finding(Level.FAIL, "REST", str(error))
        return
    except HistoryUnavailable as error:
        yield Finding(Level.FAIL, "REST", str(error), "check the network, the proxy and POLYGON_REST_URL, then again")
        return
    yield Finding(Level.OK, "REST", f"{url} takes the key; {pace} (POLYGON_REST_REQUESTS_PER_MINUTE)")
    if bars:
        yield Finding(Level.OK, "entitlement", f"{bars} minute bars of {ticker} on {recent}")
    else:
        advice = "check POLYGON_TICKERS: an unknown ticker is refused by nobody, and never sends"
        yield Finding(Level.WARN, "entitlement", f"no minute bar of {ticker} on {recent}", advice)
    oldest = next(iter(calendar.trading_days(history_start, recent)), recent)
    try:
        list(history.minute_bars(ticker, oldest, oldest))
        yield Finding(Level.OK, "history", f"the plan reaches back to {oldest} (POLYGON_HISTORY_START)")
    except (HistoryRefused, HistoryUnavailable, NotYetPublished) as error:
        advice = "set POLYGON_HISTORY_START to a day that the plan has: earlier ones cannot be repaired"
        yield Finding(Level.WARN, "history", str(error), advice)


def _flat_files(wanted: Settings, now: datetime) -> Finding:
    try:
        store = access.flat_files(wanted)
        if store is None:
            if wanted.is_whole_market:
                advice = "set POLYGON_FLAT_FILES_KEY_ID and _SECRET: by REST a day of the whole market takes hours"
                return Finding(Level.WARN, "flat files", "not set", advice)
            return Finding(Level.OK, "flat files", "not set: the history comes by REST, ticker by ticker")
        due = [day for day in calendar.completed_sessions(now, 7) if expected_at(day) <= now]
        size = look_at_flat_file(store, due[-1], now)
        return Finding(Level.OK, "flat files", f"the file of {due[-1]} can be read ({size / 1e6:,.1f} MB)")
    except NotYetPublished as error:
        return Finding(Level.WARN, "flat files", str(error), "look again in an hour")
    except HistoryUnavailable as error:
        return Finding(Level.FAIL, "flat files", str(error), "check the network, the proxy and POLYGON_FLAT_FILES_URL")
    except (HistoryRefused, ConfigurationError, LakeError) as error:
        return Finding(Level.FAIL, "flat files", str(error))


def _stream(wanted: Settings, lake: Lake | None, now: datetime) -> Finding:
    if lake is None:
        text = "not tried: without the lake it is not known whether a collector has the account's one connection"
        return Finding(Level.WARN, "stream", text, "correct the lake first")
    try:
        holding = read_lease(lake)
    except STORE_ERRORS as error:
        return Finding(Level.WARN, "stream", f"not tried: the lease cannot be read ({brief(error)})")
    if holding and not holding.is_free(now):
        text = "not tried: a collector has the account's one connection"
        return Finding(Level.OK, "stream", f"{text} ({live_status(holding, now)})")
    try:
        with _stream_url(wanted, now) as url:
            problem = try_key(url, wanted.api_key)
    except StreamRefused as error:
        return Finding(Level.FAIL, "stream", str(error))
    if problem:
        return Finding(Level.FAIL, "stream", problem, "check the network, the proxy and POLYGON_WEBSOCKET_URL")
    return Finding(Level.OK, "stream", f"{url} takes the key; nothing was subscribed")


@contextlib.contextmanager
def _stream_url(wanted: Settings, now: datetime) -> Iterator[str]:
    if wanted.websocket_url is not None:
        yield wanted.websocket_url
        return
    with demo.exchange(wanted, demo.latest_session(now)) as (url, _):
        yield url


def _clock(servers: Sequence[str]) -> Finding:
    offsets = {server: offset for server in servers if (offset := _seconds_behind(server)) is not None}
    if not offsets:
        text = "no server that was asked said its time"
        return Finding(Level.WARN, "clock", text, "make sure that this machine's clock is set by NTP")
    server, offset = max(offsets.items(), key=lambda found: abs(found[1]))
    if abs(offset) <= _CLOCK_WARN_SECONDS:
        return Finding(Level.OK, "clock", f"agrees with {', '.join(offsets)} to {_CLOCK_WARN_SECONDS:.0f} s")
    relation = "behind" if offset > 0 else "ahead of"
    return Finding(
        Level.FAIL if abs(offset) > _CLOCK_FAIL_SECONDS else Level.WARN,
        "clock",
        f"{abs(offset):,.0f} s {relation} {server}",
        "set it by NTP (timedatectl set-ntp true): what a connection covered is judged by it",
    )


def _seconds_behind(server: str) -> float | None:
    """How far this machine's clock is behind a server's Date header; None where it says none. No key is sent."""
    try:
        with connections(server, timeout=urllib3.Timeout(_ANSWER_SECONDS), retries=False) as pool:
            asked = time.time()
            answer = pool.request("GET", f"{server}/", preload_content=False)
            answered = time.time()
            answer.close()
        said = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (urllib3.exceptions.HTTPError, KeyError, ValueError):
        return None
    # Its second began up to a second before, while the request was under way.
    if said > answered:
        return said - answered
    return min(0.0, said + 1 - asked)


def _backfill(wanted: Settings, asked: Backfill, history_start: date, now: datetime) -> Iterator[Finding]:
    complete = calendar.completed_sessions(now, 1)[0]
    days = calendar.trading_days(asked.first, min(asked.last, complete))
    if not days:
        text = f"no complete trading day from {asked.first} to {asked.last}"
        yield Finding(Level.FAIL, "backfill", text, f"name days from {calendar.FIRST_SESSION} to {complete}")
        return
    by_flat_files = wanted.flat_files_url is not None
    tickers = None if wanted.is_whole_market else len(wanted.tickers)
    cost = backfill_cost.estimate(days, tickers, by_flat_files, wanted.rest_requests_per_minute)
    source = "flat files" if by_flat_files else f"REST, {wanted.rest_requests_per_minute} requests a minute"
    of = "the whole market" if by_flat_files or tickers is None else f"{tickers} tickers"
    yield Finding(
        Level.OK,
        "backfill",
        f"{days[0]} to {days[-1]}: {cost.days:,} days of {of} by {source}: about {cost.requests:,} requests, "
        f"{_size(cost.fetched_bytes)} and {duration(cost.fetch_seconds)} to fetch, {duration(cost.make_seconds)} to "
        "make the datasets",
    )
    dollars = ""
    if wanted.lake_uri.lower().startswith("s3://"):
        dollars = (
            f", {cost.puts:,} PUTs and LISTs: ${cost.dollars_once:,.2f} once and ${cost.dollars_a_month:,.2f} a month "
            "at AWS's prices of November 2026 (us-east-1)"
        )
    yield Finding(Level.OK, "backfill", f"about {_size(cost.stored_bytes)} in {wanted.lake_uri}{dollars}")
    if cost.is_refused:
        yield Finding(
            Level.FAIL,
            "backfill",
            "it would be refused: by REST one round over all tickers takes longer than half a day",
            "set POLYGON_FLAT_FILES_*, name fewer POLYGON_TICKERS, or raise POLYGON_REST_REQUESTS_PER_MINUTE",
        )
    if days[0] < history_start:
        yield Finding(
            Level.FAIL,
            "backfill",
            f"the partitions begin on {history_start}",
            f"set POLYGON_HISTORY_START={days[0]} and restart Dagster",
        )


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each finding; returns 1 where something fails."""
    parser = argparse.ArgumentParser(
        prog="python -m polygon_pipeline.doctor",
        description="Says what works and what does not. Exits with 1 when something fails.",
    )
    parser.add_argument(
        "--backfill",
        metavar="FIRST[:LAST]",
        type=_parse_backfill,
        help="say what the history of these days costs",
    )
    parser.add_argument(
        "--without-stream",
        action="store_true",
        help="leave the stream alone: the account's one connection is used by a collector of another lake",
    )
    options = parser.parse_args(arguments)
    shows_steps = sys.stderr.isatty()

    def on_step(what: str) -> None:
        if shows_steps:
            sys.stderr.write(f"\r\x1b[K…     {what}")
            sys.stderr.flush()

    failed = False
    for finding in examine(
        access.environment(),
        datetime.now(UTC),
        backfill=options.backfill,
        with_stream=not options.without_stream,
        on_step=on_step,
    ):
        if shows_steps:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
        failed = failed or finding.level is Level.FAIL
    return 1 if failed else 0


def _parse_backfill(text: str) -> Backfill:
    first, _, last = text.partition(":")
    return Backfill(date.fromisoformat(first), date.fromisoformat(last) if last else date.max)


if __name__ == "__main__":
    sys.exit(main())
