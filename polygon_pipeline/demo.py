"""The demo: what the project does without a key. The one door to the simulator.

Belongs here: the simulated feed and its history as the project starts them, which sessions are played, how fast and
with which faults, and defaults where the environment sets nothing. Does not belong here: the simulator itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from polygon_pipeline import settings
from polygon_pipeline.collector.launching import Outcome, PastRun, Start, Wait, decide_session
from polygon_pipeline.lake.ledger import SESSION_OVER
from polygon_pipeline.market import calendar
from polygon_pipeline.settings import Settings
from polygon_pipeline.simulator.tickers import WATCH_LIST

if TYPE_CHECKING:
    from polygon_pipeline.simulator.faults import Faults
    from polygon_pipeline.simulator.synthetic import SyntheticMarket

SESSIONS = 5
_PARTITIONS = 10

# A simulated session is over in three minutes and should be seen growing.
CHECKPOINT_SECONDS = 30.0
SPEED = 320.0
_DROP = timedelta(minutes=45)  # after the opening
_REQUESTS_PER_MINUTE = "6000"


def with_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with what a simulated feed needs where it is not set: a watch list, and a lake of its own."""
    if not settings.is_simulated(environment):
        return dict(environment)
    base = Path("var/demo").resolve()
    defaults = {
        "POLYGON_TICKERS": ",".join(WATCH_LIST),
        "LAKE_URI": (base / "lake").as_uri(),
        "JOURNAL_DIR": str(base / "journal"),
    }
    if not environment.get("POLYGON_WEBSOCKET_URL"):
        # Near enough that the partitions' bar shows the days that are played.
        start = calendar.completed_sessions(datetime.now(UTC), _PARTITIONS)[0]
        defaults["POLYGON_HISTORY_START"] = start.isoformat()
    if not environment.get("POLYGON_REST_URL"):
        defaults["POLYGON_REST_REQUESTS_PER_MINUTE"] = _REQUESTS_PER_MINUTE
    return dict(environment) | {name: value for name, value in defaults.items() if not environment.get(name)}


def decide(now: datetime, loaded_at: datetime, runs: Sequence[PastRun]) -> Start | Wait:
    """Plays the last complete sessions, oldest first, a run each, then rests. The arguments are decide_live's."""
    days = calendar.completed_sessions(now, SESSIONS)
    for day in days:
        decision = decide_session(day, now, loaded_at, runs)
        done = any(run.session_date == day and run.outcome in (Outcome.SUCCEEDED, Outcome.STOPPED) for run in runs)
        if isinstance(decision, Start) or not done or any(run.outcome is Outcome.ACTIVE for run in runs):
            return decision
    stopped = sorted({str(run.session_date) for run in runs if run.outcome is Outcome.STOPPED} & {*map(str, days)})
    return Wait(
        f"the simulated sessions from {days[0]} to {days[-1]} are played"
        + (f", up to where {', '.join(stopped)} was terminated by hand" if stopped else "")
        + "; set POLYGON_API_KEY to collect the market, or launch collect_aggregates to play one again"
    )


def latest_session(now: datetime) -> date:
    """The session that is played where none is named: the last complete one."""
    return calendar.completed_sessions(now, 1)[0]


@contextmanager
def exchange(wanted: Settings, day: date) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Plays a session: the feed's URL, and a function that says why it is over, or None while it is not."""
    from polygon_pipeline.simulator.exchange import Exchange  # numpy, pyarrow and websockets: only here are they needed
    from polygon_pipeline.simulator.synthetic import SyntheticFeed

    feed = SyntheticFeed(_market(wanted), day, wanted.channels)
    with Exchange(feed, speed=SPEED, key=wanted.api_key, faults=_faults(day)) as server:
        yield server.url, lambda: SESSION_OVER if server.finished.is_set() else None


@contextmanager
def rest_server(wanted: Settings) -> Iterator[str]:
    """Serves the past of the market that exchange() plays; gives the URL."""
    from polygon_pipeline.simulator.rest_server import HistoryServer

    market = _market(wanted)
    with HistoryServer(market.day_bars, key=wanted.api_key, listings=market.listings()) as server:
        yield server.url


def _market(wanted: Settings) -> SyntheticMarket:
    """A pure function of the tickers, so that stream and history agree: a day's bars depend on no later event."""
    from polygon_pipeline.simulator.corporate_actions import weekly
    from polygon_pipeline.simulator.synthetic import SyntheticMarket

    tickers = WATCH_LIST if wanted.is_whole_market else wanted.tickers
    return SyntheticMarket(tickers, actions=weekly(tickers, datetime.now(UTC).date()))


def _faults(day: date) -> Faults:
    """What goes wrong, so that a gap and its repair are there to be seen: a connection that drops in the morning, and a
    server that is busy when the collector comes back. Some minutes of the market are lost."""
    from polygon_pipeline.simulator.faults import Fault, Faults, FaultType

    session = calendar.session(day)
    if session is None:
        return Faults()
    at_ms = int((session.open + _DROP).timestamp()) * 1000
    return Faults([Fault(FaultType.DROP, at_ms=at_ms), Fault(FaultType.AUTH_TIMEOUT, at_ms=at_ms)])
