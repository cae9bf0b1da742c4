"""What can go wrong when the vendor's history is asked for, over REST and as flat files alike, and how it is told.

Belongs here: the outcomes that callers act on differently, and the vendor's words without the key. Does not
belong here: when each of them is meant.
"""

from __future__ import annotations

from datetime import datetime


class HistoryRefused(Exception):
    """The vendor will not serve this, or not to these credentials: trying again cannot help. Says what to correct."""


class RequestRefused(HistoryRefused):
    """The vendor refuses this one request: the same may not be true of another ticker or day."""


class HistoryUnavailable(Exception):
    """The vendor could not be reached or served nothing usable, after all tries: a later run may succeed."""


class NotYetPublished(Exception):
    """The vendor does not have this yet. next_try: when to ask again (aware), or None where that is unknown."""

    def __init__(self, message: str, next_try: datetime | None = None) -> None:
        super().__init__(message)
        self.next_try = next_try


def without_key(text: str, key: str, limit: int | None = None) -> str:
    """A text that the vendor may have put the key into. limit: the characters to keep, counted without the key."""
    return text.replace(key, "…")[:limit]
