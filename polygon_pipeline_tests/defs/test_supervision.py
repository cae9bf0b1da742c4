"""Processes of runs: which one is alive, and whose it is."""

from __future__ import annotations

import subprocess
import sys
import time

from polygon_pipeline.defs import supervision


def test_a_killed_process_or_one_started_after_the_run_is_not_the_runs_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = time.time()
        assert supervision._is_alive(process.pid, began + 1)
        assert not supervision._is_alive(process.pid, began - 3600), "the id is another's by now"
        process.kill()
        time.sleep(0.2)
        assert not supervision._is_alive(process.pid, began + 1), "it waits for its parent to look"
    assert not supervision._is_alive(process.pid, began + 1)
