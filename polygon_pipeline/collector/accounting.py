"""Counting: what a run's frames and connection changes add to its account.

Belongs here: that counting, and the ledger made of it. Does not belong here: what is stored and how it is read
(lake.ledger).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from polygon_pipeline.collector.journal import JournalHeader
from polygon_pipeline.lake.archive import ArchivedEvent, ConnectionChange
from polygon_pipeline.lake.lag import LatenessSummary
from polygon_pipeline.lake.ledger import Account, Connection, Ledger
from polygon_pipeline.lake.watermark import watermarks
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import is_in_hours
from polygon_pipeline.polygon.messages import Aggregate, Frame
from polygon_pipeline.polygon.stream import ConnectionEvent, EventKind

_ARCHIVED: dict[EventKind, ConnectionChange] = {
    EventKind.CONNECTED: "connected",
    EventKind.SUBSCRIBED: "subscribed",
    EventKind.UNACKNOWLEDGED: "unacknowledged",
    EventKind.WARNED: "warned",
    EventKind.DISCONNECTED: "disconnected",
    EventKind.REFUSED: "refused",
}
_MOST_WARNINGS = 100


def archived(event: ConnectionEvent) -> ArchivedEvent:
    """A change of the stream's connection, as journal and archive keep it."""
    return ArchivedEvent(_ARCHIVED[event.kind], event.detail, event.retry_seconds, event.silent_seconds)


def count_frame(account: Account, frame: Frame, received_at: datetime) -> None:
    """Adds a frame. Its bars by day and channel are counted apart, for many frames at once (publisher)."""
    account.frames += 1
    account.events += frame.events
    account.bars += len(frame.aggregates)
    account.statuses += len(frame.statuses)
    account.quarantined += len(frame.refused)
    for kind in frame.other:
        account.other[kind] = account.other.get(kind, 0) + 1
    account.last_received_at = received_at
    if frame.aggregates:
        note_bars(account, frame.newest_start_ms, frame.last_start_ms)


def note_bars(account: Account, newest_start_ms: int, last_start_ms: int) -> None:
    """Adds to the connection that a frame brought bars: the newest's start, and the last's."""
    if account.connections:
        connection = account.connections[-1]
        if connection.first_bar_ms is None:
            connection.first_bar_ms = newest_start_ms
        connection.last_bar_ms = max(connection.last_bar_ms or 0, last_start_ms)


def count_outside_hours(account: Account, aggregates: Sequence[Aggregate]) -> None:
    """Adds those of many frames' bars that start outside the hours of trading."""
    outside = {start for start in {aggregate.s for aggregate in aggregates} if not is_in_hours(int(start))}
    if outside:
        account.outside_hours += sum(aggregate.s in outside for aggregate in aggregates)


def count_event(account: Account, event: ArchivedEvent, at: datetime) -> None:
    """Adds a change of the connection."""
    match event.kind:
        case "subscribed":
            account.connections.append(Connection(at))
        case "disconnected" | "refused":
            _end_connection(account, at - timedelta(seconds=event.silent_seconds or 0), event.detail)
        case "ended":
            _end_connection(account, at, event.detail)
            account.ended_by = event.detail
        case "warned" | "unacknowledged":
            account.warnings = [*account.warnings, f"{at:%Y-%m-%dT%H:%M:%SZ} {event.detail}"][-_MOST_WARNINGS:]
        case "connected":
            pass


def make_ledger(header: JournalHeader, account: Account, complete: bool) -> Ledger:
    """complete: the run is over and everything is published."""
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
        gaps=account.gaps(header.time_base),
        topics=header.topics,
        time_base=header.time_base,
        lag=account.lags.summary(),
        lateness=lateness_summary(account),
        watermarks=watermarks(account, header.topics, header.time_base, header.session_date),
    )


def lateness_summary(account: Account) -> dict[Channel, LatenessSummary]:
    """How late the account's bars came, for people."""
    return {channel: lateness.summary() for channel, lateness in sorted(account.lateness.items())}


def _end_connection(account: Account, at: datetime, cause: str) -> None:
    if account.connections and account.connections[-1].until is None:
        account.connections[-1].until = at
        account.connections[-1].ended_by = cause
