"""Which causes are told now: each once, with a word when it is over, and to a receiver that was away once it is back.

Belongs here: that memory, and the decisions on it; pure. Does not belong here: what a cause is (causes), and sending
(sending).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import date, datetime, timedelta

import msgspec

from polygon_pipeline.alerts.causes import Cause, Failure, topic_of

# Who did not look for longer does not know how long anything has lasted: what was wrong may be mending itself, as after
# a restart of the machine.
_LONGEST_PAUSE = timedelta(minutes=5)
_FIRST_RETRY = timedelta(minutes=1)
_LONGEST_RETRY = timedelta(hours=1)
_MOST_WAITING = 50
_MOST_AT_ONCE = 12
# A run that failed, or a day, is spoken of for so long; who has not mended it by then has given it up.
_REMEMBERED = timedelta(days=7)


class Open(msgspec.Struct):
    """A cause that is there, or was until lately. since: when it was first seen. gone_since: None while it is there.

    calm_seconds: how long it must have been gone before it is over.
    """

    text: str
    since: datetime
    calm_seconds: float = 0.0
    told: bool = False
    gone_since: datetime | None = None


class Receiver(msgspec.Struct):
    """What waits to be sent to a receiver, oldest first. left_out: how much more there was, while it was away."""

    waiting: list[str] = msgspec.field(default_factory=list)
    left_out: int = 0
    failures: int = 0
    next_try: datetime | None = None


class Memory(msgspec.Struct):
    """All that is remembered from look to look. It holds no address of a receiver.

    since: the first look; older days and runs are nobody's news. looked_at: the last. runs_until: up to when ended runs
    are known; runs: the ids of those that ended shortly before. lease: what stood there, and since when.
    days_done: those that are complete, or given up. days_looked_at: when the others were looked at last.
    """

    since: datetime | None = None
    looked_at: datetime | None = None
    open: dict[str, Open] = msgspec.field(default_factory=dict)
    failures: dict[str, Failure] = msgspec.field(default_factory=dict)
    runs_until: datetime | None = None
    runs: list[str] = msgspec.field(default_factory=list)
    lease: str = ""
    lease_since: datetime | None = None
    days_done: list[date] = msgspec.field(default_factory=list)
    days_looked_at: datetime | None = None
    receivers: dict[str, Receiver] = msgspec.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> Memory:
        """An empty one where there is none, or none that can be read, as after an update."""
        try:
            return msgspec.json.decode(text or "{}", type=cls)
        except ValueError:
            return cls()

    def begin(self, now: datetime) -> None:
        """At the beginning of every look."""
        self.since = self.since or now
        if self.looked_at is None or now - self.looked_at > _LONGEST_PAUSE:
            self.lease_since = None
            for entry in self.open.values():
                entry.gone_since = None
                if not entry.told:
                    entry.since = now
        self.looked_at = now
        for key, entry in list(self.open.items()):
            if topic_of(key) in ("run", "day") and now - entry.since > _REMEMBERED:
                del self.open[key]
                self.failures.pop(key, None)
                if topic_of(key) == "day":
                    self.days_done.append(_day(key))

    def open_days(self) -> set[date]:
        """The days that were told."""
        return {_day(key) for key in self.open if topic_of(key) == "day"}

    def lease_unchanged(self, lease: str, now: datetime) -> timedelta:
        """For how long the lease was seen to be so, on this machine's clock: the holder's may differ."""
        if lease != self.lease or self.lease_since is None:
            self.lease, self.lease_since = lease, now
        return now - self.lease_since

    def news(self, found: Iterable[Cause], unknown: Collection[str], now: datetime) -> list[str]:
        """What is to be told now. unknown: topics of which it is not known whether their causes are still there."""
        told: list[str] = []
        there = {cause.key: cause for cause in found}
        for key, cause in there.items():
            entry = self.open.setdefault(key, Open(cause.text, now))
            entry.text, entry.calm_seconds, entry.gone_since = cause.text, cause.calm.total_seconds(), None
            if not entry.told and now - entry.since >= cause.patience:
                entry.told = True
                told.append(cause.text)
        for key, entry in list(self.open.items()):
            if key in there or topic_of(key) in unknown:
                continue
            entry.gone_since = entry.gone_since or now
            if not entry.told:
                del self.open[key]
            elif (now - entry.gone_since).total_seconds() >= entry.calm_seconds:
                del self.open[key]
                told.append(f"Over: {entry.text}")
        return told

    def queue(self, news: Iterable[str], receivers: Collection[str]) -> None:
        """Keeps news for each of these receivers; what others waited for is dropped."""
        self.receivers = {name: self.receivers.get(name, Receiver()) for name in receivers}
        for receiver in self.receivers.values():
            receiver.waiting += news
            surplus = max(0, len(receiver.waiting) - _MOST_WAITING)
            receiver.left_out += surplus
            del receiver.waiting[:surplus]

    def due(self, now: datetime) -> dict[str, list[str]]:
        """What is to be sent now, by receiver: all that waits for it, as the lines of one message."""
        return {
            name: _lines(receiver)
            for name, receiver in self.receivers.items()
            if receiver.waiting and (receiver.next_try is None or now >= receiver.next_try)
        }

    def sent(self, name: str) -> None:
        self.receivers[name] = Receiver()

    def not_sent(self, name: str, now: datetime) -> datetime:
        """Returns when it is tried again."""
        receiver = self.receivers[name]
        receiver.next_try = now + min(_FIRST_RETRY * 2 ** min(receiver.failures, 10), _LONGEST_RETRY)
        receiver.failures += 1
        return receiver.next_try


def _day(key: str) -> date:
    return date.fromisoformat(key.partition(":")[2])


def _lines(receiver: Receiver) -> list[str]:
    """The newest news, and how much more there was."""
    shown = receiver.waiting[-_MOST_AT_ONCE:]
    more = len(receiver.waiting) - len(shown) + receiver.left_out
    return [*([f"{more} more before these; Dagster shows what is wrong."] if more else []), *shown]
