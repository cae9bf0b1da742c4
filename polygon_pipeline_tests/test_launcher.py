"""The launcher for Celery: what it does where Dagster's own does nothing, and when that does it itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import pytest
from dagster_celery.launcher import CeleryRunLauncher

from polygon_pipeline import launcher as launcher_module
from polygon_pipeline.collector.lease import Watch
from polygon_pipeline.definitions import defs
from polygon_pipeline.launcher import WatchingCeleryRunLauncher
from polygon_pipeline_tests.support.leases import Clock

_TASK = "a-task"
_STARTED = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name="catch_up", message="started")


@contextmanager
def _instance(launcher: type[CeleryRunLauncher]) -> Iterator[dg.DagsterInstance]:
    config = {"broker": "memory://", "backend": "cache+memory://"}
    named = {"module": launcher.__module__, "class": launcher.__name__, "config": config}
    with dg.instance_for_test(overrides={"run_launcher": named}) as instance:
        yield instance


def _started(instance: dg.DagsterInstance, job: str = "catch_up") -> dg.DagsterRun:
    tags = {"dagster-celery/task_id": _TASK}
    run = instance.create_run_for_job(defs.resolve_job_def(job), tags=tags)
    instance.report_dagster_event(_STARTED, run_id=run.run_id)
    found = instance.get_run_by_id(run.run_id)
    assert found
    return found


class Workers:
    """What the workers answer. held: the tasks that they are at; an error where the broker is away."""

    def __init__(self) -> None:
        self.held: list[str] | Exception = [_TASK]
        self.clock = Clock()

    def active(self) -> dict[str, list[dict[str, str]]] | None:
        if isinstance(self.held, Exception):
            raise self.held
        return {"a-worker": [{"id": task} for task in self.held]} if self.held else None

    def inspect(self, **_: object) -> Workers:
        return self


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(launcher_module, "Watch", lambda: Watch(workers.clock))
    monkeypatch.setattr(launcher_module, "_ROUND_SECONDS", -1.0)
    monkeypatch.setattr("celery.app.control.Control.inspect", property(lambda _: workers.inspect))
    return workers


def _looks(instance: dg.DagsterInstance, run: dg.DagsterRun, workers: Workers, seconds: int) -> list[str]:
    """What run monitoring is told, every 20 seconds."""
    said = []
    for _ in range(seconds // 20):
        said.append(instance.run_launcher.check_run_worker_health(run).status.value)
        workers.clock.wait(20)
    return said


def test_a_run_is_canceling_before_its_task_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector asks for its run's status when the signal comes, and stays ended where it is canceling."""
    with _instance(WatchingCeleryRunLauncher) as instance:
        run = _started(instance)
        seen: list[dg.DagsterRunStatus] = []
        _on_revoke(monkeypatch, lambda: seen.append(_status(instance, run)))
        assert instance.run_launcher.terminate(run.run_id)
        assert seen == [dg.DagsterRunStatus.CANCELING]
        instance.report_run_canceled(run)
        assert not instance.run_launcher.terminate(run.run_id), "it has ended"
        assert not instance.run_launcher.terminate("no-such-run")
        assert len(seen) == 1


def test_a_run_whose_task_no_worker_has_held_for_a_minute_is_failed(workers: Workers) -> None:
    with _instance(WatchingCeleryRunLauncher) as instance:
        run = _started(instance)
        assert set(_looks(instance, run, workers, 200)) == {"RUNNING"}
        workers.held = ["another-task"]
        assert _looks(instance, run, workers, 100) == ["RUNNING", "RUNNING", "RUNNING", "FAILED", "FAILED"]
        workers.held = [_TASK]
        assert set(_looks(instance, run, workers, 40)) == {"RUNNING"}


def test_while_the_broker_is_away_no_run_is_failed_nor_for_a_minute_after(workers: Workers) -> None:
    with _instance(WatchingCeleryRunLauncher) as instance:
        run = _started(instance)
        workers.held = []
        assert _looks(instance, run, workers, 40) == ["RUNNING", "RUNNING"]
        workers.held = OSError("the broker is away")
        for _ in range(10):
            with pytest.raises(OSError, match="away"):
                _looks(instance, run, workers, 20)
            workers.clock.wait(20)
        workers.held = []  # no worker has found it again yet
        assert _looks(instance, run, workers, 60) == ["RUNNING", "RUNNING", "RUNNING"]


def test_the_collector_is_judged_by_its_lease_alone(workers: Workers) -> None:
    with _instance(WatchingCeleryRunLauncher) as instance:
        run = _started(instance, "collect_aggregates")
        workers.held = []
        assert set(_looks(instance, run, workers, 400)) == {"RUNNING"}


def test_dagsters_own_launcher_still_lacks_what_ours_adds(monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    """Where this fails, Dagster has learned it: take that part out of polygon_pipeline/launcher.py, or all of it."""
    with _instance(CeleryRunLauncher) as instance:
        run = _started(instance)
        seen: list[dg.DagsterRunStatus] = []
        _on_revoke(monkeypatch, lambda: seen.append(_status(instance, run)))
        instance.run_launcher.terminate(run.run_id)
        assert seen == [dg.DagsterRunStatus.STARTED], "terminate() says that the run is canceling"
        instance.run_launcher.celery.backend.store_result(_TASK, None, "STARTED")  # type: ignore[attr-defined]
        workers.held = []
        assert set(_looks(instance, run, workers, 400)) == {"RUNNING"}, "it sees that no worker holds the task"


def _on_revoke(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    def revoke(*_: Any, **__: Any) -> None:
        happens()

    monkeypatch.setattr("celery.result.AsyncResult.revoke", revoke)


def _status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found
    return found.status
