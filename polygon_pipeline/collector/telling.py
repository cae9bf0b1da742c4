"""How a run stands and how it ended, in sentences for people. Times are New York's.

Belongs here: the words for a run's progress, its end, and the status in its lease. Does not belong here: the figures
(accounting, collector, lease), and where the sentences are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

from polygon_pipeline.collector.collector import Progress
from polygon_pipeline.collector.lease import Holding
from polygon_pipeline.lake.ledger import Account, Gap, TimeBase, Watermark
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import clock, session

_NAMED_GAPS = 3
# What is on its way to the lake does not wait.
_ON_ITS_WAY_SECONDS = 5.0


def standing(progress: Progress, bars: int, wanted: Sequence[str], time_base: TimeBase, now: datetime) -> str:
    """How a run stands: `14:42 New York: 8,910 bars, 12 of 12 tickers, 1 gap, complete through 14:40, nothing waits`.

    bars: those the sentence is about, of one trade date and channel. wanted: the tickers, `*` for the whole market. The
    time is the market's: of a past day that is played, the newest bar's.
    """
    account = progress.account
    gaps = account.gaps(time_base)
    parts = [f"{bars:,} bars", _tickers(progress.tickers, wanted), _counted(len(gaps), "gap")]
    if account.quarantined:
        parts.append(f"{account.quarantined:,} quarantined")
    if gaps and gaps[-1].end is None:
        parts.append(f"not connected ({gaps[-1].cause})")
    parts += _complete(progress.watermarks)
    parts.append(_waiting(progress.backlog_bytes, progress.unpublished_seconds, progress.store_fault))
    parts += _disk_only(progress.disk_only_seconds)
    return f"{clock(_market_time(account, time_base, now))} New York: {', '.join(parts)}"


def summary(progress: Progress, day: date, wanted: Sequence[str], time_base: TimeBase) -> str:
    """What a run that ended by itself has collected. day: its session."""
    account = progress.account
    return (
        f"Collected {day}: {account.bars:,} bars, {_tickers(progress.tickers, wanted)}, "
        f"{_gaps(account.gaps(time_base))}. {_safe(progress)} It ended because {account.ended_by}."
    )


def farewell(
    progress: Progress, day: date, wanted: Sequence[str], time_base: TimeBase, by_hand: bool, now: datetime
) -> str:
    """What is safe and what is not collected when a run is ended before its session. by_hand: terminated in the UI, so
    that it stays ended; otherwise its process was told to end, and the next start of Dagster goes on."""
    account = progress.account
    at = _market_time(account, time_base, now)
    said = [
        f"{'Terminated by hand' if by_hand else 'Stopped'} at {clock(at)} New York.",
        f"{account.bars:,} bars, {_tickers(progress.tickers, wanted)}, {_gaps(account.gaps(time_base))}.",
        _safe(progress),
    ]
    found = session(day)
    if found and at < found.post_close:
        until = clock(found.post_close)
        said.append(f"Not collected: what the market of {day} does from now until {until}.")
        said.append(
            "It stays ended; launch collect_aggregates to go on. What is missed comes from the vendor's history."
            if by_hand
            else "The next start of Dagster goes on. What is missed meanwhile comes from the vendor's history."
        )
    return " ".join(said)


def live_status(holding: Holding | None, now: datetime) -> str:
    """What the lease says of the collector at work."""
    if holding is None or holding.is_free(now):
        return "it has no lease yet, or is about to end"
    status = holding.status
    parts = [
        "connected" if status.connected else "not connected",
        f"{status.bars:,} bars",
        f"{status.bars_per_second:g} a second",
        *([f"the last came at {clock(status.last_bar, seconds=True)} New York"] if status.last_bar else []),
        _counted(status.gaps, "gap"),
        *_complete(status.watermarks),
        _waiting(status.backlog_bytes, status.unpublished_seconds, status.store_fault),
        *_disk_only(status.disk_only_seconds),
    ]
    return f"{', '.join(parts)}; said {max(0.0, (now - holding.renewed_at).total_seconds()):.0f} s ago"


def _market_time(account: Account, time_base: TimeBase, now: datetime) -> datetime:
    newest_ms = max((connection.last_bar_ms or 0 for connection in account.connections), default=0)
    if time_base == "event" and newest_ms:
        return datetime.fromtimestamp(newest_ms / 1000, UTC) + timedelta(minutes=1)
    return now


def _tickers(seen: int, wanted: Sequence[str]) -> str:
    return f"{seen:,} tickers" if "*" in wanted else f"{seen:,} of {len(wanted):,} tickers"


def _gaps(gaps: Sequence[Gap]) -> str:
    times = [
        f"{clock(gap.first_minute)} to {clock(gap.last_minute)}" for gap in gaps if gap.first_minute and gap.last_minute
    ]
    named = ", ".join(times[:_NAMED_GAPS]) + (f" and {len(times) - _NAMED_GAPS} more" if times[_NAMED_GAPS:] else "")
    return _counted(len(gaps), "gap") + (f" ({named} New York)" if named else "")


def _complete(watermarks: Mapping[Channel, Watermark]) -> list[str]:
    """Up to where a run is complete; of several channels, the one that is behind."""
    return [f"complete through {clock(min(mark.through for mark in watermarks.values()))}"] if watermarks else []


def _safe(progress: Progress) -> str:
    if not progress.backlog_bytes:
        return "Everything that was received is on the lake."
    return (
        f"{_size(progress.backlog_bytes)} of what was received wait in the journal on this machine, and the next start "
        "here publishes them."
    )


def _waiting(backlog_bytes: int, seconds: float, fault: str | None) -> str:
    if not backlog_bytes or (seconds < _ON_ITS_WAY_SECONDS and not fault):
        return "nothing waits"
    return f"{_size(backlog_bytes)} wait on disk, for {seconds:.0f} s" + (f" ({fault})" if fault else "")


def _disk_only(seconds: float) -> list[str]:
    """What would be lost with the disk; bars may be objects already, their frames are not archived."""
    return [f"{seconds:.0f} s of frames on this disk only"] if seconds >= _ON_ITS_WAY_SECONDS else []


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
