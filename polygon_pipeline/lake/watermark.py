"""The watermark: up to which minute a run has everything that the stream sent of a channel.

Belongs here: the one pure function that decides what is claimed. Does not belong here: how it is kept (lake.ledger),
measuring how late bars come (collector.lateness), and telling people and programs (collector.telling, collector.relay).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

from polygon_pipeline.lake.lag import Lateness
from polygon_pipeline.lake.ledger import LATEST_DELIVERY, Account, Connection, TimeBase, Watermark
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import session

_MINUTE = timedelta(minutes=1)

# The starts of the first and the last of some minutes that follow each other.
Span = tuple[datetime, datetime]


def watermark(
    account: Account, channel: Channel, time_base: TimeBase, day: date, heard_until: datetime | None = None
) -> Watermark | None:
    """What a run can claim of a channel, or None where that is no minute yet.

    heard_until: up to when everything that the server sent is in the account; None for the last frame's arrival. day:
    the run's session, beyond whose end no minute is claimed.

    A minute is claimed when both are so:

    - One connection was there from before the minute's bars could come (minute bars: from its end on; second bars: from
      its beginning) until they had come, was heard from after that, and everything it brought until then is synced in
      the journal.
    - So much time has passed since the minute's end that 999 of 1,000 bars of the channel that this run measured had
      come by then, and 5 s at the least.

    It promises: whatever the server sent to this connection of that minute, up to then, was received and kept. It does
    not promise that the server sent everything (bar_coverage compares with the vendor's history), that a rare late bar
    does not come yet, or that no bar is revised (the account's lateness says how late revisions come). A minute without
    trades is complete with no bar.

    A gap stops it. Its minutes are never claimed, also when the watermark goes on after it: then they stand in `gaps`.
    While there is no connection it stays where it is. As more is measured a wait may grow, and a watermark of later go
    back; who tells one tells the later of the two.
    """
    wait = _wait(account.lateness.get(channel))
    spans: list[Span] = []
    for first, through in _covered(account, channel, time_base, day, heard_until, wait):
        if spans and first <= spans[-1][1] + _MINUTE:
            spans[-1] = spans[-1][0], max(spans[-1][1], through)
        else:
            spans.append((first, through))
    if not spans:
        return None
    gaps = tuple((before[1] + _MINUTE, after[0] - _MINUTE) for before, after in pairwise(spans))
    return Watermark(spans[0][0], spans[-1][1], gaps, wait.total_seconds())


def watermarks(
    account: Account, topics: Sequence[str], time_base: TimeBase, day: date, heard_until: datetime | None = None
) -> dict[Channel, Watermark]:
    """Those of a run's channels. topics: its subscriptions, such as `AM.SPY`."""
    subscribed = {topic.partition(".")[0] for topic in topics}
    found = {
        channel: watermark(account, channel, time_base, day, heard_until)
        for channel in Channel
        if channel in subscribed
    }
    return {channel: mark for channel, mark in found.items() if mark}


def _covered(
    account: Account, channel: Channel, time_base: TimeBase, day: date, heard_until: datetime | None, wait: timedelta
) -> Iterator[Span]:
    """The minutes that each connection covered, in order."""
    found = session(day)
    for number, connection in enumerate(account.connections):
        if time_base == "event":
            if connection.first_bar_ms is None or connection.last_bar_ms is None:
                continue
            # The feed starts when the run subscribes; later connections begin in the middle of a minute.
            is_first = number == 0 and found is not None
            first = found.begin if found and is_first else _minute(_moment(connection.first_bar_ms)) + _MINUTE
            until = _moment(connection.last_bar_ms) + _shortest_window(account)
        else:
            first = _minute(connection.since) + (_MINUTE if channel is Channel.SECOND else timedelta())
            until = _heard(account, connection, heard_until)
        through = _minute(until - wait - _MINUTE)
        if found:
            through = min(through, found.post_close - _MINUTE)
        if first <= through:
            yield first, through


def _heard(account: Account, connection: Connection, heard_until: datetime | None) -> datetime:
    return connection.until or heard_until or account.last_received_at or connection.since


def _wait(lateness: Lateness | None) -> timedelta:
    measured = lateness.first.percentiles().p999 if lateness else 0.0
    return max(LATEST_DELIVERY, timedelta(seconds=measured))


def _shortest_window(account: Account) -> timedelta:
    """Of the bars that an account's connections know the starts of, whatever their channel."""
    channels = {channel for counts in account.days.values() for channel in counts} or {Channel.MINUTE}
    return timedelta(milliseconds=min(channel.window_ms for channel in channels))


def _minute(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)


def _moment(start_ms: int) -> datetime:
    return datetime.fromtimestamp(start_ms / 1000, UTC)
