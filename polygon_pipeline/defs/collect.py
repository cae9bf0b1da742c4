"""The job and op `collect_aggregates`: the long run that collects one session.

Belongs here: Dagster's side of it - configuration, materializations, how the run ends. Does not belong here: collecting
(collector.collector), signals and lost processes (defs.supervision).

Terminate, Ctrl-C and SIGTERM only set a flag, so that the collector drains and flushes; then the run ends as canceled.
Dagster's own handlers would interrupt the clean-up. A second signal ends the run at once: what is not published waits
in the journal. The job has no retry policy, because with one Terminate would start it again.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial

import dagster as dg
from pydantic import BaseModel, Field, ValidationError

from polygon_pipeline import demo
from polygon_pipeline.collector import launching, metrics, telling
from polygon_pipeline.collector.collector import Collector, Plan, Progress
from polygon_pipeline.collector.relay import RelayAccess
from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.wording import clock
from polygon_pipeline.defs.reference import reported_status
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.defs.supervision import (
    STANDBY_TAG,
    STOPPED_TAG,
    TERMINATED_BY_HAND,
    PatientLog,
    Reports,
    StopRequest,
    note_termination,
    orphan_watch,
    report_canceling,
    was_lost,
)
from polygon_pipeline.lake.errors import LakeError, NoCredentials
from polygon_pipeline.lake.lag import Lateness, revisions_came
from polygon_pipeline.lake.ledger import SESSION_OVER, Account, Gap
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.revisions import collected_after, revised_for
from polygon_pipeline.polygon.stream import StreamRefused
from polygon_pipeline.settings import ConfigurationError, Settings

SESSION_DATE_TAG = "polygon_pipeline/session_date"
FEED_TAG = "polygon_pipeline/feed"
FAILED_FOR_GOOD_TAG = "polygon_pipeline/failed_for_good"

_CHECKPOINT_SECONDS = 300.0
# How long a run waits at its end for Dagster's storage to take its last reports.
_PATIENCE_SECONDS = 120.0

# The reasons for which a run ends as canceled.
_TERMINATED = "terminated"
_ORPHANED = "orphaned: no Dagster process manages this run any more"

# Asked now and then whether a run is to end; gives the reason, or None.
Ending = Callable[[], str | None]


class CollectConfig(BaseModel):
    """What to collect; whatever is not set comes from the environment."""

    tickers: list[str] | None = Field(default=None, description="Symbols, or * for the whole market (POLYGON_TICKERS)")
    channels: list[str] | None = Field(default=None, description="AM, A or both (POLYGON_CHANNELS)")
    session_date: str | None = Field(
        default=None, description="YYYY-MM-DD; the current or next session, of a demo the last complete one"
    )
    stop_after_seconds: float | None = Field(default=None, gt=0, description="End then, whatever the session does")
    write_objects: bool | None = Field(
        default=None, description="One raw-data object per bar; on for a watch list, off for the whole market"
    )
    write_frames: bool = Field(default=True, description="Archive every frame in raw-frames")
    standby: bool | None = Field(
        default=None, description="While another machine collects, wait, and take over when it is gone"
    )
    checkpoint_seconds: float | None = Field(
        default=None, gt=0, description="How often frames are archived and progress is reported (300; demo 30)"
    )


# Longer than a drain that makes progress; what is not published then waits in the journal.
_GRACE_SECONDS = 1800
# Of no effect but on Kubernetes: the run's pod has the volume of the journals (deploy/kubernetes/collector.yaml).
_ON_KUBERNETES = {
    "pod_spec_config": {
        "termination_grace_period_seconds": _GRACE_SECONDS,
        "volumes": [{"name": "journal", "persistent_volume_claim": {"claim_name": "polygon-journal"}}],
    },
    "container_config": {
        "volume_mounts": [{"name": "journal", "mount_path": "/var/lib/polygon/journal"}],
    },
}

# Written out, because a text of a dg.Config may also be {"env": NAME} at launch: the run would show that variable.
_CONFIG_SCHEMA = {
    name: dg.Field(dg.Noneable(kind), is_required=False, description=CollectConfig.model_fields[name].description)
    for name, kind in {
        "tickers": [str],
        "channels": [str],
        "session_date": str,
        "stop_after_seconds": float,
        "write_objects": bool,
        "write_frames": bool,
        "checkpoint_seconds": float,
        "standby": bool,
    }.items()
}


@dg.op(pool="collector", config_schema=_CONFIG_SCHEMA)
def collect_aggregates(context: dg.OpExecutionContext, polygon: PolygonResource, lake: LakeResource) -> None:
    """Collects aggregates into the lake until the session, or `stop_after_seconds`, is over."""
    with _permanent(context, ValidationError, ConfigurationError, LakeError, StreamRefused), StopRequest() as stop:
        config = CollectConfig(**{name: value for name, value in context.op_config.items() if value is not None})
        wanted = _settings(polygon, config)
        day = _session_date(config, wanted)
        context.instance.add_run_tags(context.run_id, {SESSION_DATE_TAG: day.isoformat(), FEED_TAG: wanted.feed})
        opened = lake.open()
        context.log.info(
            f"collecting {wanted.feed} {', '.join(wanted.channels)} bars of {day} into {opened.uri}"
            + (" (SIMULATED data)" if wanted.is_simulated else "")
        )
        with _feed(wanted, day) as (url, feed_is_over):
            is_orphan = orphan_watch(context.instance, context.run)
            ending = _first_of(
                lambda: _terminated(context, stop),
                _after(config.stop_after_seconds),
                feed_is_over,
                lambda: _ORPHANED if is_orphan() else None,
            )
            log, reports = PatientLog(context.log), Reports(context.log_event)
            plan = replace(
                _plan(context.run_id, wanted, config, day, url), was_lost=partial(was_lost, context.instance)
            )
            if plan.standby:
                context.instance.add_run_tags(context.run_id, {STANDBY_TAG: "yes"})
            collector = Collector(opened, plan, log)
            state = _WatchedState(context.instance, opened, day)
            stood: list[Progress] = []

            def on_checkpoint(progress: Progress) -> None:
                stood[:] = [progress]
                _report(reports, wanted, progress)
                if wanted.metrics_port is not None:
                    state.look()

            with metrics.serving(wanted.metrics_port, day, collector.progress, lambda: state.known, log):
                reason = collector.run(ending, on_checkpoint)
            reports.send(_PATIENCE_SECONDS)
        [progress] = stood  # the last report is of the run's end
        if reason not in (_TERMINATED, _ORPHANED):
            log.info(telling.summary(progress, day, wanted.tickers, wanted.time_base))
            return
        # Returning would call it a success. A step that fails while its run is being canceled ends it as canceled too,
        # and shows a sentence where an interruption shows its stack twice.
        run = report_canceling(context.instance, context.run_id, reason)
        if run and run.status is dg.DagsterRunStatus.CANCELING:
            by_hand = run.tags.get(STOPPED_TAG) == TERMINATED_BY_HAND
            raise dg.Failure(
                telling.farewell(progress, day, wanted.tickers, wanted.time_base, by_hand, datetime.now(UTC)),
                allow_retries=False,
            )
        raise dg.DagsterExecutionInterruptedError


# Job and op share a name, which a graph between them must not have.
@dg.graph
def collect_session() -> None:
    collect_aggregates()


collect_aggregates_job = collect_session.to_job(
    name="collect_aggregates",
    executor_def=dg.in_process_executor,
    tags={
        "dagster/max_retries": "0",  # the sensor starts the next attempt
        "dagster/priority": "10",  # before everything that is queued
        "dagster-celery/queue": "collector",  # where its place is, on Celery
        "dagster-k8s/config": _ON_KUBERNETES,
    },
    description="Collects one session's aggregates. Started by market_session_sensor, or by hand.",
)


def _settings(polygon: PolygonResource, config: CollectConfig) -> Settings:
    overrides = {}
    if config.tickers is not None:
        overrides["tickers"] = ",".join(config.tickers)
    if config.channels is not None:
        overrides["channels"] = ",".join(config.channels)
    return polygon.settings(**overrides)


def _session_date(config: CollectConfig, wanted: Settings) -> date:
    now = datetime.now(UTC)
    if config.session_date is not None:
        try:
            return date.fromisoformat(config.session_date)
        except ValueError as error:
            raise ConfigurationError(f"session_date is {config.session_date!r}, not YYYY-MM-DD.") from error
    if wanted.is_demo:
        return demo.latest_session(now)
    return calendar.current_or_next_session(now - collected_after()).date


def _plan(run_id: str, wanted: Settings, config: CollectConfig, day: date, url: str) -> Plan:
    return Plan(
        owner=run_id,
        run=f"{datetime.now(UTC):%Y%m%dT%H%M%S}Z-{run_id[:8]}",
        session_date=day,
        feed=wanted.feed,
        url=url,
        key=wanted.api_key,
        topics=wanted.topics,
        journal_dir=wanted.journal_dir,
        write_objects=not wanted.is_whole_market if config.write_objects is None else config.write_objects,
        write_frames=config.write_frames,
        checkpoint_seconds=config.checkpoint_seconds
        or wanted.checkpoint_seconds
        or (demo.CHECKPOINT_SECONDS if wanted.is_simulated else _CHECKPOINT_SECONDS),
        quiet_limit=lambda: None if wanted.is_simulated else launching.quiet_limit(datetime.now(UTC)),
        time_base=wanted.time_base,
        standby=wanted.standby if config.standby is None else config.standby,
        relay=RelayAccess(wanted.relay_port, wanted.relay_token) if wanted.relay_port and wanted.relay_token else None,
    )


@contextlib.contextmanager
def _feed(wanted: Settings, day: date) -> Iterator[tuple[str, Ending]]:
    """The feed's URL, and a function that says why it is over, or None."""
    if wanted.websocket_url is None:
        with demo.exchange(wanted, day) as feed:
            yield feed
        return
    end = launching.session_end(day)
    yield wanted.websocket_url, lambda: SESSION_OVER if datetime.now(UTC) >= end else None


def _first_of(*reasons: Ending) -> Ending:
    return lambda: next((found for reason in reasons if (found := reason())), None)


def _terminated(context: dg.OpExecutionContext, stop: StopRequest) -> str | None:
    if not stop.received:
        return None
    note_termination(context.instance, context.run_id)
    return _TERMINATED


def _after(seconds: float | None) -> Ending:
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    return lambda: f"stop_after_seconds ({seconds:g}) are over" if time.monotonic() >= deadline else None


def _report(reports: Reports, wanted: Settings, progress: Progress) -> None:
    """Materializes the raw assets of every trading day that got bars."""
    account, now = progress.account, datetime.now(UTC)
    for day in sorted(progress.dates):
        if calendar.session(day) is None:
            continue  # its bars are on the lake, but it has no partition
        for channel, count in sorted(account.days[day].items()):
            reports.add(
                dg.AssetMaterialization(
                    catalog.RAW[channel].name,
                    description=telling.standing(progress, count.bars, wanted.tickers, wanted.time_base, now),
                    partition=day.isoformat(),
                    metadata={
                        "feed": wanted.feed,
                        "bars": count.bars,
                        "objects": count.objects,
                        "revisions": count.revisions,
                        "revisions_came": _revisions_came(account, channel),
                        "tickers": progress.tickers,
                        "frames": account.frames,
                        "bars_per_second": round(account.bars / max(progress.elapsed_seconds, 1e-9), 1),
                        "quarantined": account.quarantined,
                        "reconnects": max(0, len(account.connections) - 1),
                        "gaps": dg.MetadataValue.json([_as_text(gap) for gap in account.gaps(wanted.time_base)]),
                        "last_received_at": str(account.last_received_at),
                        "backlog_bytes": progress.backlog_bytes,
                        "unpublished_seconds": round(progress.unpublished_seconds, 1),
                        "disk_only_seconds": round(progress.disk_only_seconds, 1),
                        "imbalance": dg.MetadataValue.json(account.imbalance(write_objects=False)),
                    },
                )
            )
    reports.send()


def _revisions_came(account: Account, channel: Channel) -> str:
    """How late, beside how long they are waited for: the evidence for POLYGON_REVISION_MINUTES."""
    lateness = account.lateness.get(channel, Lateness())
    return revisions_came(lateness.summary(), revised_for())


class _WatchedState:
    """A day's state for the metrics. known: as it was when it was looked at; None where that could not be told."""

    def __init__(self, instance: dg.DagsterInstance, lake: Lake, day: date) -> None:
        self._instance = instance
        self._lake = lake
        self._day = day
        self.known: str | None = None

    def look(self) -> None:
        try:
            self.known = str(reported_status(self._instance, self._lake, self._day, datetime.now(UTC)).state)
        except Exception:  # noqa: BLE001 whatever is away, the lake or Dagster's storage: that ends no run
            self.known = None


def _as_text(gap: Gap) -> dict[str, str]:
    end = clock(gap.last_minute) if gap.last_minute else "now"
    minutes = f"{calendar.clock(gap.first_minute)} to {end}" if gap.first_minute else "none"
    return {"start": str(gap.start), "end": str(gap.end or "now"), "cause": gap.cause, "minute_bars_due": minutes}


@contextlib.contextmanager
def _permanent(context: dg.OpExecutionContext, *errors: type[Exception]) -> Iterator[None]:
    """Marks the run where these errors end it: the sensor tries again only what may have passed by itself."""
    try:
        yield
    except errors as error:
        if not isinstance(error, NoCredentials):
            context.instance.add_run_tags(context.run_id, {FAILED_FOR_GOOD_TAG: type(error).__name__})
        raise dg.Failure(str(error), allow_retries=False) from None  # it says all there is to correct
