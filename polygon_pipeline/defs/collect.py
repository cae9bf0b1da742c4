"""The job and op `collect_aggregates`: the long run that collects one session.

Belongs here: Dagster's side of it - configuration, signals, materializations, the run's status. Does not belong
here: collecting (collector.collector).

Signals. Terminate, Ctrl-C and SIGTERM only set a flag, so that the collector drains and flushes; then the run ends
as canceled. Dagster's own handlers would interrupt the clean-up. A second signal ends the run at once: what is not
published waits in the journal. The job has no retry policy, because with one Terminate would start it again.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING, Self

import dagster as dg
from pydantic import Field

from polygon_pipeline import settings
from polygon_pipeline.collector import launching
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.defs.resources import LakeResource, PolygonResource, simulated_market
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel

if TYPE_CHECKING:
    from polygon_pipeline.collector.account import Gap
    from polygon_pipeline.collector.collector import Progress
    from polygon_pipeline.simulator.faults import Faults

SESSION_DATE_TAG = "polygon_pipeline/session_date"
FEED_TAG = "polygon_pipeline/feed"
STOPPED_TAG = "polygon_pipeline/stopped_by"
TERMINATED_BY_HAND = "terminate"
DEATH = "death"
FAILED_FOR_GOOD_TAG = "polygon_pipeline/failed_for_good"

RAW_ASSETS = {Channel.MINUTE: "raw_bars", Channel.SECOND: "raw_second_bars"}

# A simulated session is over in three minutes and should be seen growing.
_DEMO_SPEED = 320.0
_DEMO_DROP = timedelta(minutes=45)  # after the opening
_CHECKPOINT_SECONDS = 300.0
_DEMO_CHECKPOINT_SECONDS = 30.0
_LOOK_AT_RUN_SECONDS = 5.0

# The reasons for which a run ends as canceled.
_TERMINATED = "terminated"
_ORPHANED = "orphaned: nobody manages this run any more"

# Asked now and then whether a run is to end; gives the reason, or None.
Ending = Callable[[], str | None]


class CollectConfig(dg.Config):
    """What to collect; whatever is not set comes from the environment."""

    tickers: list[str] | None = Field(default=None, description="Symbols, or * for the whole market (POLYGON_TICKERS)")
    channels: list[str] | None = Field(default=None, description="AM, A or both (POLYGON_CHANNELS)")
    session_date: str | None = Field(
        default=None, description="YYYY-MM-DD; the current or next session, of a demo the last complete one"
    )
    stop_after_seconds: float | None = Field(default=None, gt=0, description="End then, whatever the session does")
    write_objects: bool | None = Field(
        default=None, description="One raw-data object a bar; on for a watch list, off for the whole market"
    )
    write_frames: bool = Field(default=True, description="Archive every frame in raw-frames")
    checkpoint_seconds: float | None = Field(
        default=None, gt=0, description="How often frames are archived and progress is reported (300; demo 30)"
    )


@dg.op(pool="collector")
def collect_aggregates(
    context: dg.OpExecutionContext, config: CollectConfig, polygon: PolygonResource, lake: LakeResource
) -> None:
    """Collects aggregates into the lake until the session, or `stop_after_seconds`, is over."""
    from polygon_pipeline.collector.collector import Collector, Plan
    from polygon_pipeline.lake.store import LakeError
    from polygon_pipeline.polygon.stream import StreamRefused

    with _permanent(context, settings.ConfigurationError, LakeError, StreamRefused), _Stop() as stop:
        wanted = _settings(polygon, config)
        day = _session_date(config, wanted)
        context.instance.add_run_tags(context.run_id, {SESSION_DATE_TAG: day.isoformat(), FEED_TAG: wanted.feed})
        opened = lake.open()
        context.log.info(
            f"collecting {wanted.feed} {', '.join(wanted.channels)} bars of {day} into {opened.uri}"
            + (" (SIMULATED data)" if wanted.is_simulated else "")
        )
        default_checkpoint = _DEMO_CHECKPOINT_SECONDS if wanted.is_simulated else _CHECKPOINT_SECONDS
        with _feed(wanted, day) as (url, feed_is_over):
            plan = Plan(
                owner=context.run_id,
                run=f"{datetime.now(UTC):%Y%m%dT%H%M%S}Z-{context.run_id[:8]}",
                session_date=day,
                feed=wanted.feed,
                url=url,
                key=wanted.api_key,
                topics=wanted.topics,
                journal_dir=wanted.journal_dir,
                write_objects=not wanted.is_whole_market if config.write_objects is None else config.write_objects,
                write_frames=config.write_frames,
                checkpoint_seconds=config.checkpoint_seconds or default_checkpoint,
                quiet_limit=lambda: None if wanted.is_simulated else launching.quiet_limit(datetime.now(UTC)),
            )
            ending = _first_of(
                lambda: _TERMINATED if stop.requested else None,
                _after(config.stop_after_seconds),
                feed_is_over,
                _orphaned(context),
            )
            collector = Collector(opened, plan, context.log)
            reason = collector.run(ending, lambda progress: _report(context, wanted.feed, progress))
        if reason in (_TERMINATED, _ORPHANED):
            _cancel(context, reason)
            raise dg.DagsterExecutionInterruptedError  # returning would call it a success


# Job and op share a name, which a graph between them must not have.
@dg.graph
def collect_session() -> None:
    collect_aggregates()


collect_aggregates_job = collect_session.to_job(
    name="collect_aggregates",
    executor_def=dg.in_process_executor,
    tags={"dagster/max_retries": "0"},  # the sensor starts the next attempt
    description="Collects one session's aggregates. Started by market_session_sensor, or by hand.",
)


def _settings(polygon: PolygonResource, config: CollectConfig) -> settings.Settings:
    overrides = {}
    if config.tickers is not None:
        overrides["tickers"] = ",".join(config.tickers)
    if config.channels is not None:
        overrides["channels"] = ",".join(config.channels)
    return polygon.settings(**overrides)


def _session_date(config: CollectConfig, wanted: settings.Settings) -> date:
    now = datetime.now(UTC)
    if config.session_date is not None:
        try:
            return date.fromisoformat(config.session_date)
        except ValueError as error:
            raise settings.ConfigurationError(f"session_date is {config.session_date!r}, not YYYY-MM-DD.") from error
    if wanted.websocket_url is None:
        return calendar.completed_sessions(now, 1)[0]
    return calendar.current_or_next_session(now - launching.REVISIONS).date


@contextlib.contextmanager
def _feed(wanted: settings.Settings, day: date) -> Iterator[tuple[str, Ending]]:
    """The feed's URL, and a function that says why it is over, or None. Where no URL is set, a simulator is started."""
    if wanted.websocket_url is not None:
        end = launching.session_end(day)
        yield wanted.websocket_url, lambda: "the session is over" if datetime.now(UTC) >= end else None
        return
    from polygon_pipeline.simulator.exchange import Exchange
    from polygon_pipeline.simulator.synthetic import SyntheticFeed

    feed = SyntheticFeed(simulated_market(wanted), day, wanted.channels)
    with Exchange(feed, speed=_DEMO_SPEED, key=wanted.api_key, faults=_demo_faults(day)) as exchange:
        yield exchange.url, lambda: "the simulated session is over" if exchange.finished.is_set() else None


def _demo_faults(day: date) -> "Faults":
    """What goes wrong in the demo, so that a gap and its repair are there to be seen: a connection that drops in the
    morning, and a server that is busy when the collector comes back. Some minutes of the market are lost."""
    from polygon_pipeline.simulator.faults import Fault, Faults, Kind

    session = calendar.session(day)
    if session is None:
        return Faults()
    at_ms = int((session.open + _DEMO_DROP).timestamp()) * 1000
    return Faults([Fault(Kind.DROP, at_ms=at_ms), Fault(Kind.AUTH_TIMEOUT, at_ms=at_ms)])


class _Stop:
    """Turns the first SIGINT or SIGTERM into a flag and lets the second through; a context manager."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise dg.DagsterExecutionInterruptedError
        self.requested = True


def _first_of(*reasons: Ending) -> Ending:
    return lambda: next((found for reason in reasons if (found := reason())), None)


def _after(seconds: float | None) -> Ending:
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    return lambda: f"stop_after_seconds ({seconds:g}) are over" if time.monotonic() >= deadline else None


def _orphaned(context: dg.OpExecutionContext) -> Ending:
    """Says so when nobody manages this process any more: it would go on collecting beside its successor.

    That is when its run was ended from outside (the sensor took it for dead, say), or when the process that
    launched it is gone. A run started on the command line may outlive its shell.
    """
    parent = os.getppid() if context.run.remote_job_origin else None
    looked = time.monotonic()
    ours = {dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING}

    def orphaned() -> str | None:
        nonlocal looked
        if parent is not None and os.getppid() != parent:
            return _ORPHANED
        if time.monotonic() < looked + _LOOK_AT_RUN_SECONDS:
            return None
        looked = time.monotonic()
        run = context.instance.get_run_by_id(context.run_id)
        return _ORPHANED if run is None or run.status not in ours else None

    return orphaned


def _report(context: dg.OpExecutionContext, feed: str, progress: "Progress") -> None:
    """Materializes the raw assets of every trading day that got bars."""
    account = progress.account
    for day in sorted(progress.dates):
        if not trading_days.has_partition_key(day.isoformat()):
            context.log.warning(f"{day} is not a trading day; its bars are on the lake, but it has no partition")
            continue
        for channel, count in sorted(account.days[day].items()):
            context.log_event(
                dg.AssetMaterialization(
                    RAW_ASSETS[channel],
                    partition=day.isoformat(),
                    metadata={
                        "feed": feed,
                        "bars": count.bars,
                        "objects": count.objects,
                        "revisions": count.revisions,
                        "tickers": progress.tickers,
                        "frames": account.frames,
                        "bars_per_second": round(account.bars / max(progress.elapsed_seconds, 1e-9), 1),
                        "quarantined": account.quarantined,
                        "reconnects": max(0, len(account.connections) - 1),
                        "gaps": dg.MetadataValue.json([_shown(gap) for gap in account.gaps(feed)]),
                        "last_received_at": str(account.last_received_at),
                        "backlog_bytes": progress.backlog_bytes,
                        "unpublished_seconds": round(progress.unpublished_seconds, 1),
                        "imbalance": dg.MetadataValue.json(account.imbalance(write_objects=False)),
                    },
                )
            )


def _shown(gap: "Gap") -> dict[str, str]:
    end = f"{gap.last_minute:%H:%M} UTC" if gap.last_minute else "now"
    minutes = f"{gap.first_minute:%H:%M} to {end}" if gap.first_minute else "none"
    return {"start": str(gap.start), "end": str(gap.end or "now"), "cause": gap.cause, "minute_bars_due": minutes}


def _cancel(context: dg.OpExecutionContext, reason: str) -> None:
    """Lets the interruption that follows end the run as canceled; without it Dagster would call it a failure.

    Somebody who terminates a run wants it to stay ended, and so it is tagged; a process that is told to end by a
    signal alone goes on with the next start of Dagster.
    """
    run = context.instance.get_run_by_id(context.run_id)
    if run is None or run.is_finished:
        return
    if run.status is dg.DagsterRunStatus.CANCELING:
        context.instance.add_run_tags(context.run_id, {STOPPED_TAG: TERMINATED_BY_HAND})
    else:
        context.instance.report_run_canceling(run, message=f"The collector ends: {reason}.")


@contextlib.contextmanager
def _permanent(context: dg.OpExecutionContext, *errors: type[Exception]) -> Iterator[None]:
    """Marks the run where these errors end it: the sensor does not try again what cannot help."""
    try:
        yield
    except errors as error:
        context.instance.add_run_tags(context.run_id, {FAILED_FOR_GOOD_TAG: type(error).__name__})
        raise dg.Failure(str(error), allow_retries=False) from error
