"""What is installed is what runs: the wheel has all it needs, outside the repository too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]

# A session on a holiday would need its closures.json; a type checker looks for py.typed.
_CODE = """
from datetime import date
from importlib.resources import files
import polygon_pipeline, polygon_pipeline.launcher
from polygon_pipeline.definitions import defs
from polygon_pipeline.market.calendar import session
for name in ("py.typed", "market/closures.json"):
    assert files("polygon_pipeline").joinpath(name).is_file(), name
assert session(date(2012, 10, 29)) is None, "Hurricane Sandy"
assert defs.get_repository_def().has_job("collect_aggregates")
print(polygon_pipeline.__file__)
"""


@pytest.mark.slow
def test_the_definitions_load_from_the_wheel_alone_outside_the_repository(tmp_path: Path) -> None:
    source, wheels, installed = (tmp_path / name for name in ("source", "wheels", "installed"))
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(_ROOT / name, source)
    shutil.copytree(_ROOT / "polygon_pipeline", source / "polygon_pipeline")
    _run([*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)], tmp_path)
    [wheel] = wheels.iterdir()
    _run([*_PIP, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], tmp_path)
    folders = {path.name for path in installed.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert folders == {"polygon_pipeline", "bin"}, "the package, its command, and nothing beside them"
    where = _run([sys.executable, "-P", "-c", _CODE], tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)


def _run(command: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
