"""Runs a target on random inputs for a time, or until it finds something.

Belongs here: the loop, its limits, and keeping what was found. Does not belong here: targets and mutations.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from polygon_pipeline_tests.fuzzing.targets import Target

FINDINGS = Path(__file__).parent / "findings"

# An input takes milliseconds at the most; these are for what has no end.
_LONGEST_SECONDS = 20.0
_MOST_MEMORY = 2 * 1024**3


class Finding(Exception):
    """An input that a parser did not treat as documented."""


@dataclass
class Count:
    """What a run tried. accepted: inputs of which the parser took something."""

    inputs: int = 0
    accepted: int = 0
    bytes: int = 0


def run(
    target: Target, seed: int, seconds: float, inputs: int | None, folder: Path, findings: Path = FINDINGS
) -> Count:
    """Tries inputs for so many seconds, or so many inputs. folder: for files.

    Raises Finding, with the input in a file of its own in findings. A seed gives the same inputs in the same order.
    """
    source = random.Random(f"{seed} {target.name}")
    count, until = Count(), time.monotonic() + seconds
    while time.monotonic() < until if inputs is None else count.inputs < inputs:
        content = target.make(source)
        count.inputs += 1
        count.bytes += len(content)
        try:
            count.accepted += check(target, content, folder)
        except Exception as error:
            kept = findings / target.name / sha256(content).hexdigest()[:16]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
            raise Finding(
                f"{target.name}: {type(error).__name__}: {str(error)[:500]}\n"
                f"input {count.inputs:,} of seed {seed}, kept as {kept}:\n{content[:2000]!r}"
            ) from error
    return count


def check(target: Target, content: bytes, folder: Path) -> bool:
    """Tries one input; raises whatever is wrong with the parser."""
    began = time.monotonic()
    accepted = target.check(content, folder)
    if time.monotonic() - began > _LONGEST_SECONDS:
        raise TimeoutError(f"it took more than {_LONGEST_SECONDS:.0f} s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if memory > _MOST_MEMORY:
        raise MemoryError(f"the process has used {memory:,} bytes")
    return accepted
