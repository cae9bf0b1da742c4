"""How long bars are revised after their end: one setting, from which every waiting time follows.

Belongs here: that setting, and the waiting times. Does not belong here: how late revisions really come, which the
collector measures (collector.lateness) and the ledger keeps, beside this figure.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta

VARIABLE = "POLYGON_REVISION_MINUTES"

# What the vendor says, "about 15 minutes".
USUAL_MINUTES = 15
LONGEST_MINUTES = 240

# A request for history takes a while, and plans may be 15 minutes late.
_BEFORE_HISTORY = timedelta(minutes=1)
# What is on its way at the end is waited for.
_BEFORE_THE_END = timedelta(minutes=5)


def revised_for() -> timedelta:
    """It is read where it is used, so that no process can forget it. A value that is none counts as not set: whoever
    opens the feed names it (settings)."""
    return timedelta(minutes=parsed(os.environ.get(VARIABLE, "")) or USUAL_MINUTES)


def settled_after() -> timedelta:
    """How long after its end a bar of the vendor's history is final."""
    return revised_for() + _BEFORE_HISTORY


def collected_after() -> timedelta:
    """How long after the market's close its stream is still collected."""
    return revised_for() + _BEFORE_THE_END


def parsed(text: str) -> int | None:
    """The setting's value in minutes, or None where it is none."""
    text = text.strip()
    found = int(text) if re.fullmatch("[0-9]{1,3}", text) else 0
    return found if 1 <= found <= LONGEST_MINUTES else None
