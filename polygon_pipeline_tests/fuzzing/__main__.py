"""`make fuzz`: targets by name, or all, for some minutes each. Every finding is kept and told, and the rest goes on."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from polygon_pipeline_tests.fuzzing.running import Finding, run
from polygon_pipeline_tests.fuzzing.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz FUZZ=…", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all, if none is named")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target (default: 1)")
    parser.add_argument("--inputs", type=int, help="so many for each target, however long they take")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="for the same inputs again")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.targets if name not in TARGETS]:
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(TARGETS)}")
    found = total = 0
    print(f"seed {arguments.seed}", flush=True)
    for name in arguments.targets or TARGETS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                count = run(TARGETS[name], arguments.seed, 60 * arguments.minutes, arguments.inputs, Path(folder))
            except Finding as finding:
                found += 1
                print(finding, flush=True)
                continue
        total += count.inputs
        print(
            f"{name:12} {count.inputs:>10,} inputs  {count.accepted:>10,} accepted  {count.bytes / 2**20:8.1f} MiB  "
            f"{time.monotonic() - began:6.1f} s",
            flush=True,
        )
    print(f"{total:,} inputs, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
