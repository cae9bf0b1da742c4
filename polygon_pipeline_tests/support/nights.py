"""The first trade date with a night session, as a process has it from its environment.

Belongs here: setting it for a test. Does not belong here: days and bars.
"""

from __future__ import annotations

from datetime import date

import pytest

from polygon_pipeline.market import hours


def first_night(environment: pytest.MonkeyPatch, first: date | str | None) -> None:
    """Sets it, or unsets it where it is None. conftest's clean_environment forgets it before the next test."""
    environment.setenv(hours.VARIABLE, "" if first is None else str(first))
    forget_first_night()


def forget_first_night() -> None:
    """A process looks into its environment once; a test is to be as a new one."""
    hours._setting.cache_clear()
