"""The ledger, `ledger/YYYY-MM-DD/RUN.json`: a run's account as it is kept, and what follows from the ledgers of a day.

Belongs here: what is stored, reading it, whether it balances, and when collectors were connected. Does not belong here:
counting (collector.accounting).

    events = bars + statuses + other events + quarantined                          in every run
    bars   = objects + revisions                                                   for every day and channel
                                                                                   of a run that writes objects

objects: bars whose object did not exist before this run; revisions: bars that replaced an object's earlier revision
(or were replaced by a later one before they were written). So the objects of all runs of a day are the objects on
the lake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Literal, NamedTuple

import msgspec

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.lag import Lags, LagSummary, Lateness, LatenessSummary
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel, arrival_error
from polygon_pipeline.market.calendar import session

# Which time says what a connection covered. "processing": the clock, because a minute's bar comes within seconds of
# the minute's end. "event": the bars' own, because the feed plays a past day, faster than the clock (a simulator).
TimeBase = Literal["processing", "event"]

# Why a run ended that was there to its session's end.
SESSION_OVER = "the session is over"

_MINUTE_TOPICS = f"{Channel.MINUTE}."
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)
# A minute's bar comes within seconds of the minute's end.
LATEST_DELIVERY = timedelta(seconds=5)


class Connection(msgspec.Struct):
    """A time in which bars flowed. until: None while it lasts.

    first_bar_ms, last_bar_ms: the starts (Unix ms) of the newest bar in its first frame and of the newest of all.
    """

    since: datetime
    until: datetime | None = None
    ended_by: str = ""
    first_bar_ms: int | None = None
    last_bar_ms: int | None = None


class Gap(msgspec.Struct):
    """A time between two connections, in which bars may have been lost: nothing is replayed.

    first_minute, last_minute: the starts of the minute bars that were due in it; None where none was.
    """

    start: datetime
    end: datetime | None
    cause: str
    first_minute: datetime | None = None
    last_minute: datetime | None = None


class DayCount(msgspec.Struct):
    """The bars of one trade date and channel."""

    bars: int = 0
    objects: int = 0
    revisions: int = 0


class Account(msgspec.Struct):
    """What a run received, published so far. days: trade date, then channel. outside_hours: of the bars, those that
    start outside their trade date's session. lags, lateness: of what was published before the account was stored, so an
    archive's own come with the next."""

    frames: int = 0
    events: int = 0
    bars: int = 0
    statuses: int = 0
    other: dict[str, int] = msgspec.field(default_factory=dict)
    quarantined: int = 0
    torn_bytes: int = 0
    days: dict[date, dict[Channel, DayCount]] = msgspec.field(default_factory=dict)
    connections: list[Connection] = msgspec.field(default_factory=list)
    outside_hours: int = 0
    warnings: list[str] = msgspec.field(default_factory=list)
    last_received_at: datetime | None = None
    ended_by: str = ""
    lags: Lags = msgspec.field(default_factory=Lags)
    lateness: dict[Channel, Lateness] = msgspec.field(default_factory=dict)

    def day(self, day: date, channel: Channel) -> DayCount:
        """The count of a trade date and channel, which may be added to."""
        return self.days.setdefault(day, {}).setdefault(channel, DayCount())

    def gaps(self, time_base: TimeBase) -> list[Gap]:
        """The times between connections; the last is open while the run is not connected."""
        return [
            _gap(connection, following, time_base)
            for connection, following in zip(self.connections, [*self.connections[1:], None], strict=False)
            if connection.until and (following or not self.ended_by)
        ]

    def imbalance(self, write_objects: bool) -> list[str]:
        """What does not add up, in words; empty when the account balances."""
        errors = []
        parts = self.bars + self.statuses + sum(self.other.values()) + self.quarantined
        if self.events != parts:
            errors.append(f"{self.events} events came in, but {parts} are accounted for")
        by_day = sum(count.bars for channels in self.days.values() for count in channels.values())
        if by_day != self.bars:
            errors.append(f"{self.bars} bars came in, but {by_day} are accounted for by day")
        if write_objects:
            errors += [
                f"{day} {channel}: {count.bars} bars, but {count.objects} objects and {count.revisions} superseded "
                "revisions"
                for day, channels in self.days.items()
                for channel, count in channels.items()
                if count.bars != count.objects + count.revisions
            ]
        return errors


class Watermark(msgspec.Struct, frozen=True):
    """Complete from the minute that starts at `first` through the one that starts at `through`, but for `gaps`; what
    that promises, lake.watermark says.

    gaps: the minutes between the two that are not claimed, as (first, last) starts, in order. waited_seconds: how long
    after a minute's end its bars were waited for.
    """

    first: datetime
    through: datetime
    gaps: tuple[tuple[datetime, datetime], ...]
    waited_seconds: float


class Ledger(msgspec.Struct):
    """complete: the run is over and published. topics: its subscriptions, such as `AM.SPY`. lag, lateness: the
    account's for people, in seconds. watermarks: of what is published, by channel."""

    run: str
    feed: str
    session_date: date
    started_at: datetime
    complete: bool
    write_objects: bool
    write_frames: bool
    imbalance: list[str]
    account: Account
    gaps: list[Gap]
    topics: tuple[str, ...] = ()
    time_base: TimeBase | None = None
    lag: LagSummary = LagSummary()
    lateness: dict[Channel, LatenessSummary] = msgspec.field(default_factory=dict)
    watermarks: dict[Channel, Watermark] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.time_base is None:  # ledgers from before it was kept; only simulators played past days
            self.time_base = "event" if self.feed == "simulated" else "processing"


class DayLedgers(NamedTuple):
    """The accounts of all runs that got bars of a day. unreadable: the keys of others, each with the reason; strays:
    keys that are no ledger's, and were left alone."""

    ledgers: list[Ledger]
    unreadable: dict[str, str]
    strays: list[str]


class Balance(NamedTuple):
    """A day's account over all its runs. unfinished: those whose ledger is not complete, the one under way among them.
    objects_on_lake beyond objects_counted are other writers'."""

    errors: list[str]
    runs: int
    unfinished: list[str]
    bars: int
    quarantined: int
    gaps: int
    objects_counted: int
    objects_on_lake: int


def encode_ledger(ledger: Ledger) -> bytes:
    return msgspec.json.format(msgspec.json.encode(ledger), indent=2)


def decode_ledger(content: bytes) -> Ledger:
    """Raises ValueError (msgspec's errors are) for what is no ledger."""
    try:
        ledger = msgspec.json.decode(content, type=Ledger)
        errors = [error for moment in _moments(ledger) if (error := arrival_error(moment))]
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if errors:
        raise ValueError(errors[0])
    return ledger


def read_ledgers(lake: Lake, day: date) -> DayLedgers:
    """Reads the ledgers of a day; one that cannot be read is named and costs only itself. Raises the store's errors."""
    found = DayLedgers([], {}, [])
    for key in lake.keys(layout.ledger_prefix(day)):
        try:
            found.ledgers.append(decode_ledger(lake.get(key) or b""))
        except ValueError as error:
            if layout.is_ledger_key(key):
                found.unreadable[key] = str(error)
            else:
                found.strays.append(key)
    return found


def reconcile(lake: Lake, day: date, channel: Channel) -> Balance:
    """Compares a day's ledgers with its raw-data; a day without ledgers (another writer's) balances."""
    ledgers, unreadable, _ = read_ledgers(lake, day)
    errors = [f"{lake.url(key)} cannot be read: {reason}" for key, reason in unreadable.items()]
    for ledger in ledgers:
        errors += [f"{ledger.run}: {error}" for error in ledger.account.imbalance(ledger.write_objects)]
    counts = _day_counts(ledgers, day, channel)
    counted = sum(count.objects for count in counts)
    on_lake = sum(layout.parse_raw_key(key) is not None for key in lake.keys(layout.raw_prefix(channel, day)))
    if on_lake < counted:
        errors.append(f"the ledgers count {counted} objects, but only {on_lake} are on the lake")
    return Balance(
        errors=errors,
        runs=len(ledgers),
        unfinished=[ledger.run for ledger in ledgers if not ledger.complete],
        bars=sum(count.bars for count in counts),
        quarantined=sum(ledger.account.quarantined for ledger in ledgers),
        gaps=sum(len(ledger.gaps) for ledger in ledgers),
        objects_counted=counted,
        objects_on_lake=on_lake,
    )


def objects_counted(lake: Lake, day: date, channel: Channel) -> int:
    """The objects that the day's ledgers count; one that cannot be read counts none. Raises the store's errors."""
    return sum(count.objects for count in _day_counts(read_ledgers(lake, day).ledgers, day, channel))


def connected_minutes(ledgers: Sequence[Ledger]) -> list[tuple[int, int]]:
    """The minutes whose bars must have reached some run: (first, last) starts in Unix ms, both included, in order.

    Whatever is outside was lost on no connection: before the first run, in every run's gap, after the last. A minute
    that is in one run's gap and not in another's is inside. A connection without an end, of a run that goes on or
    is lost, counts to the last frame that the ledger knows of.
    """
    found: list[tuple[datetime, datetime]] = []
    # A feed that plays a past day starts with its first run, which may be a lost one whose ledger knows of no bar.
    feed_began = min((_subscribed_at(of) for of in ledgers if not of.complete or _has_bars(of)), default=None)
    for ledger in ledgers:
        if not _of_minutes(ledger.topics):
            continue
        for connection in ledger.account.connections:
            if ledger.time_base == "event":
                played = _played_minutes(ledger, connection, began=_subscribed_at(ledger) == feed_began)
                if played is None:
                    continue
                first, last = played
            else:
                until = connection.until or ledger.account.last_received_at or connection.since
                first, last = _last_lost(connection.since) + _MINUTE, _first_lost(until) - _MINUTE
            if first <= last:
                found.append((first, last))
    merged: list[tuple[datetime, datetime]] = []
    for first, last in sorted(found):
        if merged and first <= merged[-1][1] + _MINUTE:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return [(int(first.timestamp()) * 1000, int(last.timestamp()) * 1000) for first, last in merged]


def subscribed_tickers(ledgers: Iterable[Ledger]) -> list[str] | None:
    """The tickers whose minute bars some run asked for, sorted; None for the whole market."""
    topics = {topic for ledger in ledgers for topic in ledger.topics or (f"{_MINUTE_TOPICS}*",)}
    tickers = {topic.removeprefix(_MINUTE_TOPICS) for topic in topics if topic.startswith(_MINUTE_TOPICS)}
    return None if "*" in tickers else sorted(tickers)


def market_time(ledgers: Iterable[Ledger], now: datetime) -> datetime:
    """The feed's own time: now, but the newest bar's end where a run plays through a past day.

    The last run is that one, if it goes on; an earlier one whose ledger has no end is lost.
    """
    played = sorted((ledger for ledger in ledgers if ledger.time_base == "event"), key=_subscribed_at)
    if not played or played[-1].complete:
        return now
    newest_ms = [
        connection.last_bar_ms
        for ledger in played
        for connection in ledger.account.connections
        if connection.last_bar_ms
    ]
    return datetime.fromtimestamp(max(newest_ms) / 1000 + 60, UTC) if newest_ms else now


def missing_minutes(
    day: date, ledgers: Sequence[Ledger], until: datetime, live_run: str | None = None
) -> list[tuple[datetime, datetime]]:
    """The minutes of a session that reached no run, as (first, last) starts, both included, in order.

    Between runs and after a run's early end as much as between two connections of one. until: minutes that end later
    are left out. live_run: the run that collects now; what comes after its last frame is not missing yet.
    """
    found = session(day)
    if found is None:
        return []
    end = min(found.post_close, until)
    connected = [
        (datetime.fromtimestamp(first / 1000, UTC), datetime.fromtimestamp(last / 1000, UTC))
        for first, last in connected_minutes(ledgers)
    ]
    if any(ledger.run == live_run for ledger in ledgers) and connected:
        end = min(end, connected[-1][1] + _MINUTE)
    missing: list[tuple[datetime, datetime]] = []
    start = found.begin
    for first, last in [*connected, (end, end)]:
        if start + _MINUTE <= min(first, end):
            last_missing = (min(first, end) - _MINUTE).replace(second=0, microsecond=0)
            missing.append((start, last_missing))
        start = max(start, last + _MINUTE)
    return missing


def repairable_gaps(
    day: date,
    ledgers: Sequence[Ledger],
    known_until_ms: int,
    settled_after: timedelta,
    now: datetime,
    live_run: str | None = None,
) -> list[tuple[datetime, datetime]]:
    """The gaps that the vendor's history can fill now: over and settled, and reaching beyond what is known already.

    known_until_ms: bars that start before this (Unix ms) are in the day's reference. settled_after: how long after a
    minute's end its bar may still be revised.
    """
    clock = market_time(ledgers, now)
    return [
        (first, last)
        for first, last in missing_minutes(day, ledgers, clock, live_run)
        if last + _MINUTE + settled_after <= clock and last.timestamp() * 1000 >= known_until_ms
    ]


def _subscribed_at(ledger: Ledger) -> datetime:
    """When a run subscribed the first time, or when it started where that is not known. A standby waits between."""
    return ledger.account.connections[0].since if ledger.account.connections else ledger.started_at


def _has_bars(ledger: Ledger) -> bool:
    return any(connection.last_bar_ms for connection in ledger.account.connections)


def _played_minutes(ledger: Ledger, connection: Connection, began: bool) -> tuple[datetime, datetime] | None:
    """The minutes that a connection of a run in event time covered whole, or None where it brought no bar.

    began: whether the feed started when the run subscribed, so that it has everything before its first bar.
    """
    begin, end = _minute(connection.first_bar_ms), _minute(connection.last_bar_ms)
    played = session(ledger.session_date)
    if begin is None or end is None or played is None:
        return None
    # The feed ends with the session. Between, the first and the last minute of a connection may have come in part.
    connections = ledger.account.connections
    is_first, is_last = connection is connections[0], connection is connections[-1]
    first = played.begin if is_first and began else begin + _MINUTE
    last = end - _MINUTE
    if is_last and ledger.account.ended_by == SESSION_OVER:
        last = played.post_close - _MINUTE
    return first, last


def _moments(ledger: Ledger) -> Iterator[datetime]:
    """The times in a ledger that anything is computed from."""
    yield ledger.started_at
    if ledger.account.last_received_at:
        yield ledger.account.last_received_at
    for connection in ledger.account.connections:
        yield connection.since
        if connection.until:
            yield connection.until
        for start_ms in (connection.first_bar_ms, connection.last_bar_ms):
            if start_ms is not None:
                yield _EPOCH + timedelta(milliseconds=start_ms)


def _day_counts(ledgers: Iterable[Ledger], day: date, channel: Channel) -> list[DayCount]:
    counts = (ledger.account.days.get(day, {}).get(channel) for ledger in ledgers)
    return [count for count in counts if count]


def _gap(connection: Connection, following: Connection | None, time_base: TimeBase) -> Gap:
    """The gap after an ended connection."""
    assert connection.until
    start, end = connection.until, following.since if following else None
    if time_base == "event":
        first = _minute(connection.last_bar_ms)
        last = _minute(following.first_bar_ms) if following else None
    else:
        first, last = _first_lost(start), _last_lost(end) if end else None
    if first is None or (last is not None and last < first):
        return Gap(start, end, connection.ended_by)
    return Gap(start, end, connection.ended_by, first, last)


def _minute(start_ms: int | None) -> datetime | None:
    return None if start_ms is None else datetime.fromtimestamp(start_ms // 60_000 * 60, UTC)


def _first_lost(disconnected: datetime) -> datetime:
    """The first minute whose bar may have come too late for a connection that ended then."""
    earliest = disconnected - _MINUTE - LATEST_DELIVERY
    first = earliest.replace(second=0, microsecond=0)
    return first + _MINUTE if first < earliest else first


def _last_lost(connected: datetime) -> datetime:
    """The last minute whose bar may have come too early for a connection that began then."""
    return (connected - _MINUTE).replace(second=0, microsecond=0)


def _of_minutes(topics: Iterable[str]) -> bool:
    """Whether a run asked for minute bars; ledgers from before topics were kept do not say, and most did."""
    listed = list(topics)
    return not listed or any(topic.startswith(_MINUTE_TOPICS) for topic in listed)
