"""Runs the benchmarks: `python -m benchmarks [--full] [--write] [NAME …]`.

Without names all of them, small: about five minutes on two cores. `--full` takes the sizes that RESULTS.md reports,
some half an hour and 20 GB of disk; `--write` writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import Run, say

NAMES = (
    "collecting",
    "edge",
    "relay",
    "outage",
    "normalizing",
    "objects",
    "seconds",
    "derived",
    "reading",
    "flat_file",
    "loading",
    "backfill",
    "workers",
    "growth",
)
_HERE = Path(__file__).parent
_LIBRARIES = (
    "dagster",
    "duckdb",
    "obstore",
    "msgspec",
    "pyarrow",
    "websocket-client",
    "pandas",
    "polars",
    "orjson",
    "boto3",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compares with what a user would use instead."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all without one")
    parser.add_argument("--full", action="store_true", help="the whole market's sizes")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated data")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--folder", type=Path, default=Path("var/benchmarks"), help="for the data")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    reports = options.folder / ("reports-full" if options.full else "reports")
    reports.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scratch-") as scratch:
        run = Run(options.full, options.seed, options.folder.resolve(), Path(scratch).resolve())
        print(_machine(run))
        names = options.names or NAMES
        for number, name in enumerate(names):
            started = time.monotonic()
            say(f"{name} … ({number + 1} of {len(names)}{_left(reports, names[number:])})")
            (reports / f"{name}.md").write_text(_report(run, name))
            say(f"{name} took {time.monotonic() - started:.0f} s")
            (reports / f"{name}.seconds").write_text(f"{time.monotonic() - started:.1f}")
    if options.write:
        # Those that did not run now as they were last time.
        found = [file.read_text() for name in NAMES if (file := reports / f"{name}.md").exists()]
        introduction = (_HERE / "introduction.md").read_text().rstrip()
        (_HERE / "RESULTS.md").write_text("\n\n".join([introduction, _machine(run), *found]) + "\n")


def _report(run: Run, name: str) -> str:
    tables = []
    for table in importlib.import_module(f"benchmarks.{name}").benchmark(run):
        tables.append(table.markdown())
        print(f"\n{tables[-1]}", flush=True)
    return "\n\n".join(tables)


def _left(reports: Path, names: Sequence[str]) -> str:
    """How long these benchmarks take by their last runs here; nothing where one has not run yet."""
    last = [file for name in names if (file := reports / f"{name}.seconds").exists()]
    if len(last) < len(names):
        return ""
    return f", about {sum(float(file.read_text()) for file in last) / 60:.1f} min left"


def _machine(run: Run) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    size = "full" if run.full else "small"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {size} size, seed {run.seed}. {os.cpu_count()} cores ({platform.machine()}), "
        f"{memory:.0f} GB, Linux {platform.release()}, Python {platform.python_version()}; {libraries}."
    )


if __name__ == "__main__":
    main()
