"""Scratch folders do not outlive their runs by more than a run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from polygon_pipeline.defs.scratch import scratch_folder, sweep

_HELD = """
import time
from polygon_pipeline.defs.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "large.parquet").write_bytes(b"content")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def age(folder: Path) -> None:
    """Makes a scratch folder some hours old."""
    os.utime(folder.parent / ".owner", (0, 0))


def test_a_folder_is_empty_and_gone_with_its_run(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").mkdir()
        (folder / "a" / "b").write_bytes(b"content")
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_killed_runs_folder_is_removed_by_the_next_run_and_that_of_a_living_one_is_not(temporary: Path) -> None:
    held = subprocess.Popen([sys.executable, "-c", _HELD], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout
        folder = Path(held.stdout.readline().strip())
        age(folder)
        sweep()
        assert (folder / "large.parquet").exists()
    finally:
        held.kill()
        held.communicate()
    with scratch_folder() as mine:
        assert not folder.parent.exists()
        assert list(temporary.iterdir()) == [mine.parent]


def test_a_folder_that_is_not_ours_is_left(temporary: Path) -> None:
    for name in ("polygon_pipeline-main", "polygon_pipeline-scratch-notes"):
        (temporary / name).mkdir()
        (temporary / name / "README.md").write_bytes(b"mine")
        os.utime(temporary / name, (0, 0))
    sweep()
    assert len(list(temporary.rglob("README.md"))) == 2
