"""Runs as Celery tasks, on the workers of several machines: the launcher of deploy/celery.

Belongs here: what Dagster's own launcher for Celery lacks. Does not belong here: when a collector counts as lost, which
its lease says (collector.launching). Nothing of the project imports this: deploy/celery/dagster.yaml names it.

Dagster's launcher ends the task of a run that is terminated without a word to Dagster; the run then ends as if its
process had got a signal, and the collector is started again. And it asks the result backend alone, where nothing ever
says that a machine is gone: its runs stay STARTED for ever, with their places in the queue.
"""

import time
from datetime import timedelta
from typing import Any

from dagster import DagsterRun
from dagster_celery.launcher import (  # type: ignore[attr-defined] # Dagster's own module of these is private
    CeleryRunLauncher,
    CheckRunHealthResult,
    WorkerStatus,
)
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG

from polygon_pipeline.collector.lease import Watch

# A worker that lost the broker finds it again within half a minute.
UNHELD = timedelta(seconds=60)
_COLLECTOR = "collect_aggregates"
# The workers are asked once for all runs of a round of run monitoring, and given so long to answer.
_ROUND_SECONDS = 5.0
_ANSWER_SECONDS = 3.0


class WatchingCeleryRunLauncher(CeleryRunLauncher):
    """Reports a run canceling before its task is ended, and fails one whose task no worker holds.

    Where the broker is away its errors pass through: run monitoring logs them, and fails no run.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._watch = Watch()
        self._held: set[str] = set()
        self._asked = float("-inf")

    def terminate(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        return super().terminate(run_id)

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        found = super().check_run_worker_health(run)
        if found.status is WorkerStatus.FAILED:  # as when a worker's process was killed
            return found
        is_held = run.tags[DAGSTER_CELERY_TASK_ID_TAG] in self._held_tasks()
        unchanged = self._watch.unchanged(run.run_id, is_held)
        if is_held or unchanged < UNHELD or run.job_name == _COLLECTOR:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, f"no worker has held its task for {UNHELD.seconds} s")

    def _held_tasks(self) -> set[str]:
        if time.monotonic() - self._asked > _ROUND_SECONDS:
            answers = self.celery.control.inspect(timeout=_ANSWER_SECONDS).active() or {}
            self._held = {task["id"] for tasks in answers.values() for task in tasks}
            self._asked = time.monotonic()
        return self._held
