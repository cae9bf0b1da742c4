"""The collector's sensors, against a real instance: what they start, what they wait for, which runs they fail."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.collector.lease import Watch, read_lease, this_machine
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import collect, sensors, supervision
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake import layout
from polygon_pipeline.market import calendar
from polygon_pipeline.settings import ConfigurationError
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.leases import ELSEWHERE, Clock, holding


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def lake_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lake").mkdir()
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    return tmp_path / "lake"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the process that looks for lost runs."""
    clock = Clock()
    monkeypatch.setattr(sensors, "_WATCH", Watch(clock))
    return clock


def _tick(instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    with dg.build_sensor_context(
        instance=instance,
        repository_def=build_defs().get_repository_def(),
        resources={"polygon": PolygonResource(), "lake": LakeResource(s3=S3Resource())},
    ) as context:
        result = sensors.market_session_sensor(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def _fail_lost_runs(instance: dg.DagsterInstance) -> str:
    with dg.build_sensor_context(instance=instance, resources={"lake": LakeResource(s3=S3Resource())}) as context:
        result = sensors.lost_runs_sensor(context)
    assert isinstance(result, dg.SkipReason)
    return result.skip_message or ""


def _look_for(minutes: int, clock: Clock, instance: dg.DagsterInstance) -> list[str]:
    """What the sensor says at each of its ticks."""
    said = []
    for _ in range(minutes * 3):
        said.append(_fail_lost_runs(instance))
        clock.wait(20)
    return said


def test_without_a_key_the_oldest_of_the_last_five_sessions_is_played_first(
    instance: dg.DagsterInstance, lake_dir: Path
) -> None:
    request = _tick(instance)
    assert isinstance(request, dg.RunRequest)
    day = calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat()
    assert request.run_key == f"simulated-{day}-1"
    assert request.tags[collect.SESSION_DATE_TAG] == day
    assert request.run_config["ops"]["collect_aggregates"]["config"] == {"session_date": day}


def test_no_second_collector_is_requested_while_one_is_queued(instance: dg.DagsterInstance, lake_dir: Path) -> None:
    job = build_defs().get_job_def("collect_aggregates")
    instance.create_run_for_job(job, tags={collect.SESSION_DATE_TAG: "2026-11-20", collect.FEED_TAG: "simulated"})
    skip = _tick(instance)
    assert isinstance(skip, dg.SkipReason)
    assert "2026-11-20" in (skip.skip_message or "")


def test_while_a_collector_is_at_work_the_tick_says_how_it_does(
    instance: dg.DagsterInstance, lake_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _started_run(instance, "2026-11-20")
    skip = _tick(instance)
    assert isinstance(skip, dg.SkipReason)
    assert (skip.skip_message or "").endswith("at work on 2026-11-20: it has no lease yet, or is about to end")
    _write_lease(lake_dir, run, expires_in=timedelta(minutes=1))
    skip = _tick(instance)
    assert isinstance(skip, dg.SkipReason)
    assert "not connected, 0 bars" in (skip.skip_message or "")
    monkeypatch.setenv("LAKE_URI", "s3://no-such-bucket")
    monkeypatch.setenv("POLYGON_API_KEY", "simulator")
    skip = _tick(instance)
    assert isinstance(skip, dg.SkipReason)
    assert "No AWS credentials" in (skip.skip_message or ""), "a lake that is away fails no tick"


def test_a_wrong_configuration_is_named_and_nothing_is_started(
    instance: dg.DagsterInstance, lake_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_CHANNELS", "T")
    with pytest.raises(ConfigurationError, match="POLYGON_CHANNELS"):  # the tick is red, and shows the sentence
        _tick(instance)


def test_a_run_whose_lease_is_not_renewed_is_reported_failed_and_the_next_attempt_starts(
    instance: dg.DagsterInstance, lake_dir: Path, clock: Clock
) -> None:
    day = calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat()
    run = _started_run(instance, day)
    _write_lease(lake_dir, run, expires_in=timedelta(days=1))  # its clock was wrong
    assert isinstance(_tick(instance), dg.SkipReason)
    said = _look_for(2, clock, instance)
    assert [number for number, text in enumerate(said) if "1" in text] == [4], "after 80 s"
    lost = instance.get_run_by_id(run.run_id)
    assert lost is not None
    assert lost.status is dg.DagsterRunStatus.FAILURE
    lease = read_lease(local_lake(lake_dir))
    assert lease
    assert supervision.was_lost(instance, lease), "its successor need not wait for so long again"
    renewed = msgspec.structs.replace(lease, renewed_at=lease.renewed_at + timedelta(seconds=1))
    assert not supervision.was_lost(instance, renewed), "it was only cut off, and is back"
    request = _tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.run_key == f"simulated-{day}-2"


def test_a_run_that_renews_its_lease_is_not_failed_whatever_its_clock_says(
    instance: dg.DagsterInstance, lake_dir: Path, clock: Clock
) -> None:
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    for minute in range(4):
        _write_lease(lake_dir, run, expires_in=timedelta(minutes=minute - 60))
        assert set(_look_for(1, clock, instance)) == {"no run is lost"}
    assert isinstance(_tick(instance), dg.SkipReason)
    alive = instance.get_run_by_id(run.run_id)
    assert alive is not None
    assert alive.status is dg.DagsterRunStatus.STARTED


def test_a_run_whose_process_is_gone_from_this_machine_is_failed_before_its_lease_expires(
    instance: dg.DagsterInstance, lake_dir: Path
) -> None:
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    host = this_machine().rpartition("/")[0]
    for machine in (f"{host}/another-container", this_machine()):
        _write_lease(lake_dir, run, expires_in=timedelta(minutes=1), machine=machine, pid=2**22 + 1)
        assert ("1" in _fail_lost_runs(instance)) == (machine == this_machine())
    assert isinstance(_tick(instance), dg.RunRequest)


@pytest.mark.fault("clock steps")
def test_a_collector_of_this_machine_goes_on_where_the_clock_is_set_forward_and_the_sensor_is_started_anew(
    instance: dg.DagsterInstance, lake_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as collector:
        _write_lease(lake_dir, run, expires_in=timedelta(minutes=1), machine=this_machine(), pid=collector.pid)
        wall = time.time
        monkeypatch.setattr(time, "time", lambda: wall() + 3600)
        monkeypatch.setattr(supervision, "_AHEAD", supervision._AHEAD + 3600)
        assert _fail_lost_runs(instance) == "no run is lost"
        collector.kill()
        collector.wait()
        assert "1" in _fail_lost_runs(instance)


def test_a_run_without_a_lease_whose_process_lives_is_not_lost(
    instance: dg.DagsterInstance, lake_dir: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store may be away: then it waits for the lease, and collects meanwhile."""
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    with monkeypatch.context() as lives:
        lives.setattr(supervision, "_process_lives", lambda *_: True)
        assert set(_look_for(5, clock, instance)) == {"no run is lost"}
    assert "1" in _fail_lost_runs(instance)
    lost = instance.get_run_by_id(run.run_id)
    assert lost is not None
    assert lost.status is dg.DagsterRunStatus.FAILURE


@pytest.mark.parametrize(("reason", "waits"), [(None, False), ("RUN_WORKER_RESTART", False), ("STEP_FAILURE", True)])
def test_runs_whose_process_was_lost_are_followed_at_once_and_those_that_fail_by_themselves_after_a_pause(
    reason: str | None, waits: bool, instance: dg.DagsterInstance, lake_dir: Path
) -> None:
    """Run monitoring finds them on Celery, Kubernetes and ECS, and gives no reason."""
    day = calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat()
    for _ in range(3):
        run = _started_run(instance, day)
        instance.report_run_failed(run, "the worker is gone")
        instance.add_run_tags(run.run_id, {"dagster/failure_reason": reason} if reason else {})
    assert isinstance(_tick(instance), dg.SkipReason if waits else dg.RunRequest)


def test_a_standby_that_waits_without_a_lease_is_not_lost_and_one_that_took_over_may_be(
    instance: dg.DagsterInstance, lake_dir: Path, clock: Clock
) -> None:
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    instance.add_run_tags(run.run_id, {supervision.STANDBY_TAG: "yes"})
    assert set(_look_for(5, clock, instance)) == {"no run is lost"}
    _write_lease(lake_dir, run, expires_in=timedelta(minutes=1))
    assert any("1" in said for said in _look_for(2, clock, instance))


def test_a_run_that_stood_by_is_lost_where_its_process_is_gone_and_another_machine_has_the_lease(
    instance: dg.DagsterInstance, lake_dir: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that comes back: else what lies on its disk would wait for that run for ever."""
    run = _started_run(instance, calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat())
    instance.add_run_tags(run.run_id, {supervision.STANDBY_TAG: "yes"})
    monkeypatch.setattr(supervision, "_process_lives", lambda *_: False)
    assert any("1" in said for said in _look_for(5, clock, instance))
    assert isinstance(_tick(instance), dg.RunRequest)


@pytest.mark.parametrize("how", ["monitored", "killed", "queued"])
def test_a_run_terminated_by_hand_is_not_started_again_however_its_end_comes(
    how: str, instance: dg.DagsterInstance, lake_dir: Path, clock: Clock
) -> None:
    """monitored: it drains for so long that run monitoring calls it canceled. killed: it is killed while it drains."""
    day = calendar.completed_sessions(datetime.now(UTC), 5)[0].isoformat()
    if how == "queued":
        tags = {collect.SESSION_DATE_TAG: day, collect.FEED_TAG: "simulated"}
        run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"), tags=tags)
        instance.report_run_canceled(run)
    else:
        run = _started_run(instance, day)
        instance.report_run_canceling(run)  # as Terminate does, before it sends the signal
    if how == "monitored":
        supervision.note_termination(instance, run.run_id)
        instance.report_run_canceled(run, message="it took too long")
    if how == "killed":
        _write_lease(lake_dir, run, expires_in=-timedelta(minutes=5))
        assert any("1" in said for said in _look_for(2, clock, instance))
    request = _tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.tags[collect.SESSION_DATE_TAG] > day, "the demo goes on with the next session"


def _started_run(instance: dg.DagsterInstance, day: str) -> dg.DagsterRun:
    job = build_defs().get_job_def("collect_aggregates")
    run = instance.create_run_for_job(job, tags={collect.SESSION_DATE_TAG: day, collect.FEED_TAG: "simulated"})
    event = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=job.name, message="started")
    instance.report_dagster_event(event, run_id=run.run_id)
    return run


def _write_lease(
    lake_dir: Path, run: dg.DagsterRun, expires_in: timedelta, machine: str = ELSEWHERE, pid: int = 1
) -> None:
    held = holding("20261120T090000Z-abc", owner=run.run_id, machine=machine, pid=pid, expires_in=expires_in)
    (lake_dir / layout.LEASE_KEY).write_bytes(msgspec.json.encode(held))
