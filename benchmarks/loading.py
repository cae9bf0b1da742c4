"""What Dagster pays before any work: loading the definitions, and a run's fixed cost, beside one empty asset's project.

The rival is a project of one asset that does nothing, with the same Dagster. Each measurement is a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import data
from benchmarks.harness import Measured, Run, Table, at_most

_EMPTY = """
import dagster as dg

@dg.asset(partitions_def=dg.DailyPartitionsDefinition("2026-01-26", end_offset=1))
def empty() -> None: ...

defs = dg.Definitions([empty])
"""
_LOAD = "from {module} import defs; import dagster as dg; dg.Definitions.validate_loadable(defs)"
_RUN = """
import dagster as dg
from {module} import defs
result = defs.get_implicit_global_asset_job_def().execute_in_process(
    asset_selection=[dg.AssetKey("{asset}")], partition_key="2026-01-26", instance=dg.DagsterInstance.get())
assert result.success
"""


def benchmark(run: Run) -> Iterator[Table]:
    lake, _ = data.frames_lake(run, 1)  # a day so small that only the run itself costs
    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    (folder / "empty_project.py").write_text(_EMPTY)
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}",
        "DAGSTER_HOME": str(folder / "home"),
        "LAKE_URI": lake.uri,
        "PYTHONWARNINGS": "ignore",
    }
    repeats = 5
    ours, empty = "polygon_pipeline.definitions", "empty_project"
    loads = _contest([_LOAD.format(module=module) for module in (ours, empty)], environment, repeats)
    yield Table(
        "loading the definitions in a fresh process",
        "loads",
        [("ours", 1, loads[0]), ("one empty asset", 1, loads[1])],
        [at_most(1.5, loads[0].seconds - loads[1].seconds, "s more than one empty asset")],
        "importing dagster_aws.s3, which S3Resource needs: its package imports all of its components, 0.8 to 0.9 s. "
        "Ours is 0.1 s of it.",
    )
    runs = _contest(
        [_RUN.format(module=module, asset=asset) for module, asset in ((ours, "normalized_bars"), (empty, "empty"))],
        environment,
        repeats,
    )
    yield Table(
        "a run of one asset in a fresh process: a day of a single ticker, beside nothing at all",
        "runs",
        [("ours", 1, runs[0]), ("one empty asset", 1, runs[1])],
        [at_most(1.3, runs[0].seconds / runs[1].seconds, "times one empty asset")],
        "the same imports again, 1.3 of the 1.5 s between them; the rest is DuckDB's, obstore's and pyarrow's "
        "imports and the day itself.",
    )


def _contest(programs: list[str], environment: dict[str, str], repeats: int) -> list[Measured]:
    """Each program's median run, the programs taking turns."""
    rounds = [[_run(program, environment) for program in programs] for _ in range(repeats)]
    return [sorted(column, key=lambda measured: measured.seconds)[repeats // 2] for column in zip(*rounds, strict=True)]


def _run(program: str, environment: dict[str, str]) -> Measured:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"a process ended with status {status}, running: {program}")
    return Measured(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, None)
