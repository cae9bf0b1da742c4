"""The hours of trading, in New York time: the one table that knows them, and from which day each of them holds.

Belongs here: the times of day, and the first trade date with a night session. Does not belong here: which days have a
session (market.calendar).

    overnight   21:00 the evening before - 04:00    from the trade date in POLYGON_NIGHT_SESSION_FROM on
    pre         04:00 - 09:30
    regular     09:30 - 16:00, or 13:00 on half days
    post        from there to 20:00, or 17:00 on half days

The week is planned to run from Sunday 21:00 to Friday 20:00, with a pause from 20:00 to 21:00 that parts two trade
dates. The clock changes on a Sunday at 02:00, when there is no session: every session with a night has 23
hours, 20 on half days.
"""

from __future__ import annotations

import functools
import os
from datetime import date, time, timedelta

PRE_MARKET_OPEN = time(4)
REGULAR_OPEN = time(9, 30)
CLOSE = time(16)
EARLY_CLOSE = time(13)
AFTER_HOURS = timedelta(hours=4)
NIGHT_OPEN = time(21)

VARIABLE = "POLYGON_NIGHT_SESSION_FROM"

# No US market that reports to the tape trades at night before that trade date, a session. Up to there a bar is filed
# under its New York date; from there on a bar that comes at night is filed under the session that the night belongs to,
# whether nights are expected yet or not: so no two programs, and no two settings, name a bar's day differently.
EARLIEST_NIGHT = date(2026, 12, 1)


def night_session_from() -> date | None:
    """The first trade date with a night session; None while it is not known.

    It is read where it is used, so that no process can forget it. A value that is no date counts as not set: whoever
    opens the lake or the feed names it (settings).
    """
    return _setting()[0]


def has_night(day: date) -> bool:
    """Whether a session on that date begins on the evening before."""
    first = night_session_from()
    return first is not None and day >= first


def filed_by_night_from() -> date:
    """The first trade date that begins at 21:00 of the evening before; the dates before it are New York's.

    Only a simulated feed has one before EARLIEST_NIGHT.
    """
    return _setting()[1]


@functools.cache  # every bar's date is asked for, and to look into the environment takes ten times as long
def _setting() -> tuple[date | None, date]:
    try:
        first = date.fromisoformat(os.environ.get(VARIABLE, "").strip())
    except ValueError:
        return None, EARLIEST_NIGHT
    return first, min(first, EARLIEST_NIGHT)
