"""Alerts in Dagster: the sensor that looks at what could be wrong, and tells the receivers of the environment.

Belongs here: asking Dagster, the lake and the disks, and the sensor's cursor. Does not belong here: what is wrong
(alerts.causes), what is told (alerts.telling), and sending it (alerts.sending).
"""

import os
import re
import shutil
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import msgspec

from polygon_pipeline import settings
from polygon_pipeline.alerts import causes, sending
from polygon_pipeline.alerts.causes import Cause, EndedRun
from polygon_pipeline.alerts.telling import Memory
from polygon_pipeline.collector.lease import Holding, read_lease, this_machine
from polygon_pipeline.datasets.wording import clock
from polygon_pipeline.defs.collect import SESSION_DATE_TAG, collect_aggregates_job
from polygon_pipeline.defs.partitions import days_of
from polygon_pipeline.defs.reference import reported_status
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.settings import AlertReceivers, ConfigurationError

_RUNS_PER_TICK = 500
# A run's end may reach the storage of runs a little later than others' that ended after it.
_OVERLAP = timedelta(minutes=2)
# Who did not look for longer does not ask what failed meanwhile.
_LONGEST_LOOK_BACK = timedelta(days=1)
_DAYS_EVERY = timedelta(minutes=10)
_DAYS_REMEMBERED = 20

_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
_ASSET_JOB = "__ASSET_JOB"  # Dagster's, for assets that are materialized by hand
_WILL_RETRY_TAG = "dagster/will_retry"
_VARIABLE = re.compile(r"\b(?:POLYGON|MASSIVE|LAKE|JOURNAL|AWS)_[A-Z_]+\b")


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
    description="Tells POLYGON_ALERT_WEBHOOK and POLYGON_ALERT_TO what is wrong, once, and when it is over.",
)
def alerts_sensor(
    context: dg.SensorEvaluationContext, polygon: PolygonResource, lake: LakeResource
) -> dg.SensorResult | dg.SkipReason:
    receivers = settings.alert_receivers(os.environ)
    if not receivers:
        return dg.SkipReason("nobody is to be told: neither POLYGON_ALERT_WEBHOOK nor POLYGON_ALERT_SMTP_URL is set")
    settings.keep_proxies_off_this_machine(os.environ)
    now, memory = _now(), Memory.parse(context.cursor)
    memory.begin(now)
    opened, found, unknown = _look(context.instance, polygon, lake, memory, now)
    news = memory.news(found, unknown, now)
    senders = _senders(receivers, f"polygon_pipeline, {opened.uri if opened else 'no lake'}")
    memory.queue(news, senders)
    problems = _send(memory, senders, now)
    for problem in problems:
        context.log.warning(problem)
    told = [entry.text for entry in memory.open.values() if entry.told]
    return dg.SensorResult(
        cursor=msgspec.json.encode(memory).decode(),
        skip_reason="; ".join([" ".join(told) or "nothing is wrong", *problems]),
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _look(
    instance: dg.DagsterInstance, polygon: PolygonResource, lake: LakeResource, memory: Memory, now: datetime
) -> tuple[Lake | None, list[Cause], set[str]]:
    """The lake, what is wrong, and the topics of which that is not known."""
    found: list[Cause] = []
    opened: Lake | None = None
    holding: Holding | None = None
    disks: dict[str, Path] = {"Dagster's storage": Path(instance.root_directory)}
    memory.failures = causes.failures_after(memory.failures, _ended_runs(instance, memory, now), now)
    try:
        disks["JOURNAL_DIR"] = polygon.settings().journal_dir
        opened = lake.open()
        if not opened.is_s3:
            disks["the lake"] = opened.local_root
        holding = read_lease(opened)
        found += [*_of_lease(memory, holding, now), *_of_days(instance, opened, memory, now)]
        unknown: set[str] = set()
    except ConfigurationError as error:
        # Its text quotes the value, which may be a secret in the wrong place: the names alone are told.
        names = ", ".join(dict.fromkeys(_VARIABLE.findall(str(error)))) or "A variable"
        text = f"The configuration cannot work: {names}. market_session_sensor's last tick says what would."
        found.append(Cause("configuration:", text))
        unknown = {"collector", "day", "lake"}
    except (*STORE_ERRORS, LakeError):
        memory.lease_since = None  # the holder cannot renew it either
        found.append(causes.of_lake(opened.uri if opened else None))
        unknown = {"collector", "day"}
    memory.failures = causes.without_replaced(memory.failures, collect_aggregates_job.name, holding)
    found += causes.of_failures(memory.failures)
    found += causes.of_disks(_free(disks), memory.open)
    found += causes.of_disks(_free_elsewhere(holding), memory.open, "collector")
    return opened, found, unknown


def _of_lease(memory: Memory, holding: Holding | None, now: datetime) -> list[Cause]:
    lease = f"{holding.run} {holding.renewed_at.isoformat()} {holding.released}" if holding else ""
    unchanged = memory.lease_unchanged(lease, now)
    return causes.of_collector(holding, unchanged, not settings.is_simulated(os.environ), now)


def _of_days(instance: dg.DagsterInstance, lake: Lake, memory: Memory, now: datetime) -> list[Cause]:
    """What of the days is wrong; between two looks at them, what was. Raises the store's errors."""
    if memory.days_looked_at and now - memory.days_looked_at < _DAYS_EVERY:
        return [Cause(key, entry.text) for key, entry in memory.open.items() if causes.topic_of(key) == "day"]
    found = []
    for day in sorted({*causes.days_due(memory.since or now, now), *memory.open_days()} - {*memory.days_done}):
        if cause := causes.of_day(day, reported_status(instance, lake, day, now)):
            found.append(cause)
        else:
            memory.days_done = [*memory.days_done, day][-_DAYS_REMEMBERED:]
    memory.days_looked_at = now
    return found


def _ended_runs(instance: dg.DagsterInstance, memory: Memory, now: datetime) -> list[EndedRun]:
    """The runs that ended since the last look, in order; at the first look, none."""
    after = memory.runs_until
    if after is None or now - after > _LONGEST_LOOK_BACK:
        memory.runs_until, memory.runs = now + _OVERLAP, []
        return []
    after -= _OVERLAP
    records = instance.get_run_records(
        dg.RunsFilter(statuses=_ENDED, updated_after=after),
        limit=_RUNS_PER_TICK,
        order_by="update_timestamp",
        ascending=True,
    )
    # A run of old times is updated too, by a tag say.
    recent = [record for record in records if (record.end_time or 0) > after.timestamp()]
    ended = [_as_ended(record.dagster_run) for record in recent if record.dagster_run.run_id not in memory.runs]
    memory.runs = [record.dagster_run.run_id for record in recent]
    until = now if len(records) < _RUNS_PER_TICK else records[-1].update_timestamp
    memory.runs_until = max(after + _OVERLAP, until)
    return [run for run in ended if run]


def _as_ended(run: dg.DagsterRun) -> EndedRun | None:
    """None for a failure that Dagster tries again by itself."""
    if not run.is_success and run.tags.get(_WILL_RETRY_TAG) == "true":
        return None
    assets = frozenset(key.to_user_string() for key in run.asset_selection or ())
    session_date = run.tags.get(SESSION_DATE_TAG)
    try:
        days = [date.fromisoformat(session_date)] if session_date else days_of(run.tags)
    except ValueError:  # somebody's own asset, whose partitions are no days
        days = []
    job = "assets" if run.job_name == _ASSET_JOB else run.job_name
    return EndedRun(run.run_id, job, assets, frozenset(days), run.is_success)


def _free(disks: dict[str, Path]) -> dict[str, int]:
    """What each disk has left; a folder that is not there has none."""
    free: dict[str, int] = {}
    known: set[int] = set()
    for name, path in disks.items():
        if path.exists() and (device := path.stat().st_dev) not in known:
            known.add(device)
            free[f"{name} ({path})"] = shutil.disk_usage(path).free
    return free


def _free_elsewhere(holding: Holding | None) -> dict[str, int]:
    """The same of the collector's disk, where it runs on another machine."""
    if holding is None or holding.released or holding.machine == this_machine():
        return {}
    left = holding.status.journal_free_bytes
    return {} if left is None else {f"JOURNAL_DIR on {holding.machine.split('/')[0]}": left}


def _senders(receivers: AlertReceivers, title: str) -> dict[str, Callable[[list[str]], None]]:
    """How each receiver that is set is told."""
    found: dict[str, Callable[[list[str]], None]] = {}
    if url := receivers.webhook:
        found["webhook"] = lambda texts: sending.post(url, "\n".join([title, *texts]))
    if smtp_url := receivers.smtp_url:
        found["mail"] = lambda texts: sending.mail(
            smtp_url,
            receivers.sender,
            receivers.recipients,
            f"{title}: {texts[0]}" if len(texts) == 1 else f"{title}: {len(texts)} messages",
            "\n".join(texts),
        )
    return found


def _send(memory: Memory, senders: dict[str, Callable[[list[str]], None]], now: datetime) -> list[str]:
    """Sends what is due; returns what did not go, and when it is tried again."""
    problems = []
    for name, texts in memory.due(now).items():
        try:
            senders[name](texts)
            memory.sent(name)
        except sending.NotSent as error:
            problems.append(f"{len(texts)} messages wait, as {error}; next try {clock(memory.not_sent(name, now))}")
    return problems
