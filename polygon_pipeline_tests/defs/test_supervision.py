"""Processes of runs: which one is alive and whose it is, and how one goes on while Dagster's storage is away."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import supervision


@pytest.mark.parametrize("proc", [True, False][: 2 if shutil.which("ps") else 1])
def test_a_killed_process_or_one_started_after_the_run_is_not_the_runs_process(
    proc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no /proc, and asks ps."""
    if not proc:
        monkeypatch.setattr(supervision, "_PROC", tmp_path / "none")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = time.time()
        assert supervision._is_alive(process.pid, began + 1)
        assert not supervision._is_alive(process.pid, began - 3600), "the id is another's by now"
        process.kill()
        time.sleep(0.2)
        assert not supervision._is_alive(process.pid, began + 1), "it waits for its parent to look"
    assert not supervision._is_alive(process.pid, began + 1)


@pytest.mark.fault("clock steps")
def test_a_clock_that_is_set_forward_makes_no_process_younger_than_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = time.time
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = time.time()
        monkeypatch.setattr(time, "time", lambda: wall() + 3600)
        assert supervision._is_alive(process.pid, began + 1)
        process.kill()
        process.wait()
        assert not supervision._is_alive(process.pid, began + 1)


@pytest.mark.parametrize(("elapsed", "age"), [("00:05", 5), ("02:03:04", 7384), ("11-02:03:04", 957784)])
def test_without_proc_a_processs_age_is_what_ps_says(
    elapsed: str, age: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ps").write_text(f"#!/bin/sh\necho ' Ss   {elapsed}'\n")
    (tmp_path / "ps").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(supervision, "_PROC", tmp_path / "none")
    assert supervision._from_ps(1) == ("Ss", age)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert supervision._is_alive(os.getpid(), 0.0), "without ps there is only the id"


class Away(Exception):
    """Dagster's storage does not answer."""


class Storage:
    """Dagster's storage, which is away for the first so many calls."""

    def __init__(self, away: int) -> None:
        self.away = away
        self.taken: list[tuple[str | None, object]] = []

    def take(self, event: dg.AssetMaterialization) -> None:
        if self.away:
            self.away -= 1
            raise Away
        self.taken.append((event.partition, event.metadata["bars"].value))


def _event(partition: str, bars: int) -> dg.AssetMaterialization:
    return dg.AssetMaterialization("raw_bars", partition=partition, metadata={"bars": bars})


def test_reports_wait_while_dagsters_storage_is_away_and_only_the_last_of_a_day_is_sent() -> None:
    storage = Storage(away=2)
    reports = supervision.Reports(storage.take)
    for bars in (1, 2):
        reports.add(_event("2026-01-26", bars))
        reports.send()
    assert storage.taken == []
    reports.add(_event("2026-01-27", 3))
    reports.send()
    assert storage.taken == [("2026-01-26", 2), ("2026-01-27", 3)]
    reports.send()
    assert len(storage.taken) == 2


def test_the_last_reports_of_a_run_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_RETRY_SECONDS", 0.01)
    storage = Storage(away=3)
    reports = supervision.Reports(storage.take)
    reports.add(_event("2026-01-26", 1))
    reports.send(patience_seconds=5.0)
    assert storage.taken == [("2026-01-26", 1)]


def test_a_log_that_cannot_be_stored_goes_to_the_terminal_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(logging.Logger):
        def log(self, *_: object, **__: object) -> None:
            raise Away("the database is locked")

    supervision.PatientLog(Broken("broken")).warning("the connection was lost")
    assert "the connection was lost" in caplog.text
    assert "the database is locked" in caplog.text


def test_a_termination_is_noted_at_the_end_where_dagsters_storage_was_away_when_it_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"))
        instance.report_run_canceling(run)

        def away(*_: object) -> None:
            raise Away

        with monkeypatch.context() as context:
            context.setattr(instance, "add_run_tags", away)
            supervision.note_termination(instance, run.run_id)
        instance.report_run_canceled(run)  # by run monitoring, while it drained
        supervision.report_canceling(instance, run.run_id, "terminated")
        ended = instance.get_run_by_id(run.run_id)
    assert ended
    assert ended.tags[supervision.STOPPED_TAG] == supervision.TERMINATED_BY_HAND
    assert ended.status is dg.DagsterRunStatus.CANCELED


def test_a_run_whose_status_cannot_be_read_is_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_LOOK_AT_RUN_SECONDS", 0.0)
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"))
        is_orphan = supervision.orphan_watch(instance, run)
        assert is_orphan(), "it was never started"

        def away(_: str) -> None:
            raise Away

        monkeypatch.setattr(instance, "get_run_by_id", away)
        assert not is_orphan()


def test_a_run_whose_end_was_asked_for_and_that_got_no_signal_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher's broker was away when it was terminated. The signal comes before the second look otherwise."""
    monkeypatch.setattr(supervision, "_LOOK_AT_RUN_SECONDS", 0.0)
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"))
        started = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=run.job_name, message="started")
        instance.report_dagster_event(started, run_id=run.run_id)
        is_orphan = supervision.orphan_watch(instance, run)
        assert [is_orphan(), is_orphan()] == [False, False]
        instance.report_run_canceling(run)
        assert [is_orphan(), is_orphan()] == [False, True]
