"""Files that other processes make and remove while one looks at them."""

from __future__ import annotations

import os
from pathlib import Path


def stats(folder: Path, pattern: str) -> dict[Path, os.stat_result]:
    """The files that match. Where one of them, or a folder, is removed while it looks, it looks again."""
    while True:
        try:
            return {path: path.stat() for path in folder.glob(pattern)}
        except FileNotFoundError:
            continue
