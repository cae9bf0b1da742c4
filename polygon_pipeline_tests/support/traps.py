"""Traps: the store fails, or the process is killed, at one chosen operation.

Belongs here: faults of obstore's functions, before the work or after it (an answer that is lost), and kills at these
and at any operation on files. Does not belong here: faults in transit to a real server (faulty_s3).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Trap:
    """Strikes at the n-th operation of its sort, and at some more from there. Armed by armed() only."""

    sort: str  # "store" or "file"
    effect: str  # "before" and "after" fail the operation; "kill before" and "kill after" end the process
    countdown: int
    times: int = 1
    thread: int = 0
    folder: str = ""
    struck: bool = False

    def due(self, sort: str) -> bool:
        if sort != self.sort:
            return False
        self.countdown -= 1
        due = -self.times <= self.countdown < 0
        self.struck |= due
        return due


_trap: Trap | None = None
_FILE_EVENTS = {"os.remove", "os.rename", "os.rmdir"}


def _watch_files(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: it is asked before a file is opened for writing, renamed or removed, and its error prevents it."""
    trap = _trap
    if trap is None or trap.sort != "file" or threading.get_ident() != trap.thread:
        return
    is_ours = event in _FILE_EVENTS or (event == "open" and str(arguments[0]).startswith(trap.folder))
    if is_ours and trap.due("file"):
        raise Killed


sys.addaudithook(_watch_files)


def _strike(effect: str) -> None:
    raise Killed if effect.startswith("kill") else GenericError("the store failed, as planned by the test")


@contextlib.contextmanager
def armed(trap: Trap | None, folder: Path) -> Iterator[None]:
    """Puts a trap around obstore's functions, and around the operations of this thread on files in the folder."""
    global _trap
    if trap is None:
        yield
        return

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            due = trap.due("store")
            if due and "before" in trap.effect:
                _strike(trap.effect)
            result = function(*arguments, **options)
            if due:
                _strike(trap.effect)
            return result

        return call

    def around_async(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **options: Any) -> Any:
            due = trap.due("store")
            if due and "before" in trap.effect:
                _strike(trap.effect)
            result = await function(*arguments, **options)
            if due:
                _strike(trap.effect)
            return result

        return call

    trap.thread, trap.folder = threading.get_ident(), str(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("put", "get", "list"):
            patch.setattr(obstore, name, around(getattr(obstore, name)))
        for name in ("put_async", "get_async"):
            patch.setattr(obstore, name, around_async(getattr(obstore, name)))
        patch.setattr(asyncio, "sleep", functools.partial(asyncio.sleep, 0))  # a pause would only cost time here
        _trap = trap
        try:
            yield
        finally:
            _trap = None


def was_killed(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(was_killed(inner) for inner in error.exceptions)
    return isinstance(error, Killed)
