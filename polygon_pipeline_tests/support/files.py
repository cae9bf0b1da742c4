"""Files that other processes make and remove while one looks at them."""

from __future__ import annotations

import os
from pathlib import Path


def stats(folder: Path, pattern: str) -> dict[Path, os.stat_result]:
    """What is there, all of it at one time. Where a file or a folder is removed meanwhile, it looks again."""
    while True:
        try:
            return {path: path.stat() for path in folder.glob(pattern)}
        except FileNotFoundError:
            continue
