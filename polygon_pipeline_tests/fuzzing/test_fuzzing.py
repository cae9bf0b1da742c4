"""Every parser keeps its word on hostile inputs: those that once broke one, and new ones for a second each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from polygon_pipeline_tests.fuzzing.mutations import mutated
from polygon_pipeline_tests.fuzzing.running import FINDINGS, Finding, check, run
from polygon_pipeline_tests.fuzzing.targets import TARGETS, Target

pytestmark = pytest.mark.fault("hostile inputs")

_SEED = 11  # the same inputs in every run, so that a change is judged by itself
_SECONDS = 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_returns_a_value_or_raises_its_own_error(
    name: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    count = run(TARGETS[name], _SEED, _SECONDS, None, tmp_path)
    say(f"fuzzing {name}: {count.inputs:,} hostile inputs (seed {_SEED}), {count.accepted:,} accepted, 0 findings")


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_themselves_are_accepted(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    samples = [target.pack(sample) if target.pack else sample for sample in target.samples]
    assert any([check(target, sample, tmp_path) for sample in samples])


@pytest.mark.parametrize("file", sorted(FINDINGS.glob("*/*")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_once_broke_a_parser_does_not_again(file: Path, tmp_path: Path) -> None:
    check(TARGETS[file.parent.name], file.read_bytes(), tmp_path)


def test_a_finding_is_kept_and_told_with_its_input_and_seed(tmp_path: Path) -> None:
    def broken(content: bytes, folder: Path) -> bool:
        if b"NaN" in content:
            raise KeyError("an error of no parser")
        return True

    target = Target("frames", [b'{"a": 1}'], broken)
    with pytest.raises(Finding, match=r"KeyError.*\n.*seed 5, kept as") as found:
        run(target, 5, 60, None, tmp_path, tmp_path)
    (kept,) = (tmp_path / "frames").iterdir()
    assert repr(kept.read_bytes()) in str(found.value)


def test_a_seed_gives_the_same_inputs_again() -> None:
    sample = TARGETS["frames"].samples[0]
    one, other = ([mutated(source, sample) for _ in range(200)] for source in (random.Random(3), random.Random(3)))
    assert one == other
    assert len(set(one)) > 150
