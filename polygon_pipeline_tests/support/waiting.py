"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, seconds: float = 60, pause: float = 0.05) -> T:
    """Asks until the answer is true, and returns it. Only a failing test waits that long.

    what: what is waited for, for the message. pause: seconds between two questions.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"it took more than {seconds:.0f} s until {what}")
        time.sleep(pause)
    return found
