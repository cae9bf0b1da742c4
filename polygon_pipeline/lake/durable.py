"""Files and folders of this machine that survive a power loss, on Linux and macOS.

Belongs here: asking the operating system to keep what it was given. Does not belong here: what the files are, and when
they must be safe (collector.journal, lake.store).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


def sync_file(descriptor: int) -> None:
    """Returns when what was written to an open file is on the disk. Raises OSError."""
    if not _flush_drive(descriptor):
        getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has no fdatasync


def sync_path(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _flush_drive(descriptor):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, exist_ok: bool = False) -> None:
    """Makes a folder and those above it, so that their names survive too. Raises OSError."""
    if not folder.parent.exists():
        make_folder(folder.parent, exist_ok=True)
    existed = folder.exists()
    folder.mkdir(exist_ok=exist_ok)
    if not existed:
        sync_path(folder.parent)


def _flush_drive(descriptor: int) -> bool:
    """Whether the system has F_FULLFSYNC (macOS) and did it: there fsync leaves data in the drive's own memory."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        return False
    with contextlib.suppress(OSError):  # a file system without it, such as a network's
        fcntl.fcntl(descriptor, full_sync)
        return True
    return False
