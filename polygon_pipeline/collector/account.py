"""A run's account: what came in, what became of it, and when it was connected. It balances, or something is wrong.

Belongs here: counting, balancing, and the ledger made of it. Does not belong here: where the ledger is kept.

    events = bars + statuses + other events + quarantined                          in every run
    bars   = objects + revisions                                                   for every day and channel
                                                                                   of a run that writes objects

objects: bars whose object did not exist before this run; revisions: bars that replaced an object's earlier revision
(or were replaced by a later one before they were written). So the objects of all runs of a day are the objects on
the lake.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import msgspec

from polygon_pipeline.collector.journal import JournalHeader
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon.messages import Frame
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind

SIMULATED = "simulated"

_MINUTE = timedelta(minutes=1)
_LATEST_DELIVERY = timedelta(seconds=5)


class Connected(msgspec.Struct):
    """A time in which bars flowed. until: None while it lasts.

    first_bar_ms, last_bar_ms: the starts (Unix ms) of the newest bar in its first frame and of the newest of all, which
    are the market's time where a simulator runs through a day faster than the clock.
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
    """The bars of one session date and channel."""

    bars: int = 0
    objects: int = 0
    revisions: int = 0


class Account(msgspec.Struct):
    """What a run received, published so far. days: session date, then channel."""

    frames: int = 0
    events: int = 0
    bars: int = 0
    statuses: int = 0
    other: dict[str, int] = msgspec.field(default_factory=dict)
    quarantined: int = 0
    torn_bytes: int = 0
    days: dict[date, dict[Channel, DayCount]] = msgspec.field(default_factory=dict)
    connections: list[Connected] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)
    last_received_at: datetime | None = None
    ended_by: str = ""

    def add_frame(self, frame: Frame, received_at: datetime) -> None:
        self.frames += 1
        self.events += frame.events
        self.bars += len(frame.aggregates)
        self.statuses += len(frame.statuses)
        self.quarantined += len(frame.refused)
        for kind in frame.other:
            self.other[kind] = self.other.get(kind, 0) + 1
        self.last_received_at = received_at
        if frame.aggregates and self.connections:
            connection = self.connections[-1]
            if connection.first_bar_ms is None:
                connection.first_bar_ms = int(max(aggregate.s for aggregate in frame.aggregates))
            connection.last_bar_ms = max(connection.last_bar_ms or 0, int(frame.aggregates[-1].s))

    def day(self, day: date, channel: Channel) -> DayCount:
        return self.days.setdefault(day, {}).setdefault(channel, DayCount())

    def add_event(self, event: ConnectionEvent, at: datetime) -> None:
        match event.kind:
            case EventKind.SUBSCRIBED:
                self.connections.append(Connected(at))
            case EventKind.DISCONNECTED | EventKind.REFUSED:
                self._end_connection(at, event.detail)
            case EventKind.ENDED:
                self._end_connection(at, event.detail)
                self.ended_by = event.detail
            case EventKind.WARNED | EventKind.UNACKNOWLEDGED:
                self.warnings = [*self.warnings, f"{at:%Y-%m-%dT%H:%M:%SZ} {event.detail}"][-100:]
            case EventKind.CONNECTED:
                pass

    def gaps(self, feed: str = "polygon") -> list[Gap]:
        """The times between connections; the last is open while the run is not connected."""
        return [
            _gap(connection, following, feed)
            for connection, following in zip(self.connections, [*self.connections[1:], None], strict=False)
            if connection.until and (following or not self.ended_by)
        ]

    def imbalance(self, write_objects: bool) -> list[str]:
        """What does not add up, in words; empty when the account balances."""
        faults = []
        parts = self.bars + self.statuses + sum(self.other.values()) + self.quarantined
        if self.events != parts:
            faults.append(f"{self.events} events came in, but {parts} are accounted for")
        by_day = sum(count.bars for channels in self.days.values() for count in channels.values())
        if by_day != self.bars:
            faults.append(f"{self.bars} bars came in, but {by_day} are accounted for by day")
        if write_objects:
            for day, channels in self.days.items():
                for channel, count in channels.items():
                    if count.bars != count.objects + count.revisions:
                        faults.append(
                            f"{day} {channel}: {count.bars} bars, but {count.objects} objects and "
                            f"{count.revisions} superseded revisions"
                        )
        return faults

    def _end_connection(self, at: datetime, cause: str) -> None:
        if self.connections and self.connections[-1].until is None:
            self.connections[-1].until = at
            self.connections[-1].ended_by = cause


def _gap(connection: Connected, following: Connected | None, feed: str) -> Gap:
    """The gap after an ended connection."""
    assert connection.until
    start, end = connection.until, following.since if following else None
    if feed == SIMULATED:
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
    # A minute's bar comes within seconds of the minute's end.
    earliest = disconnected - _MINUTE - _LATEST_DELIVERY
    first = earliest.replace(second=0, microsecond=0)
    return first + _MINUTE if first < earliest else first


def _last_lost(connected: datetime) -> datetime:
    """The last minute whose bar may have come too early for a connection that began then."""
    return (connected - _MINUTE).replace(second=0, microsecond=0)


class Ledger(msgspec.Struct):
    """The account as it is kept on the lake, `ledger/YYYY-MM-DD/RUN.json`. complete: the run is over and published."""

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


def make_ledger(header: JournalHeader, account: Account, complete: bool) -> Ledger:
    return Ledger(
        run=header.run,
        feed=header.feed,
        session_date=header.session_date,
        started_at=header.started_at,
        complete=complete,
        write_objects=header.write_objects,
        write_frames=header.write_frames,
        imbalance=account.imbalance(header.write_objects),
        account=account,
        gaps=account.gaps(header.feed),
        topics=header.topics,
    )


def encode_ledger(ledger: Ledger) -> bytes:
    return msgspec.json.format(msgspec.json.encode(ledger), indent=2)


def decode_ledger(content: bytes) -> Ledger:
    return msgspec.json.decode(content, type=Ledger)


def connected_minutes(ledgers: Iterable[Ledger]) -> list[tuple[int, int]]:
    """The minutes whose bars must have reached some run: (first, last) starts in Unix ms, both included, in order.

    Whatever is outside was lost on no connection: before the first run, in every run's gap, after the last. A minute
    that is in one run's gap and not in another's is inside. A connection without an end, of a run that goes on or
    died, counts to the last frame that the ledger knows of.
    """
    found: list[tuple[datetime, datetime]] = []
    for ledger in ledgers:
        if not _of_minutes(ledger.topics):
            continue
        for connection in ledger.account.connections:
            if ledger.feed == SIMULATED:
                # The first and the last minute of a connection may have come in part.
                begin, end = _minute(connection.first_bar_ms), _minute(connection.last_bar_ms)
                if begin is None or end is None:
                    continue
                first, last = begin + _MINUTE, end - _MINUTE
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
    topics = {topic for ledger in ledgers for topic in ledger.topics or ("AM.*",) if topic.startswith("AM.")}
    return None if "AM.*" in topics else sorted(topic.removeprefix("AM.") for topic in topics)


def _of_minutes(topics: Iterable[str]) -> bool:
    """Whether a run asked for minute bars; ledgers of old do not say, and most did."""
    listed = list(topics)
    return not listed or any(topic.startswith("AM.") for topic in listed)
