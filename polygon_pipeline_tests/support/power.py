"""A power loss, after which only what was synced is there.

Belongs here: noticing what is synced, and making what would be left. Does not belong here: what is expected of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest


class Power:
    """Remembers every file's content and every folder's names as they were when they were last synced.

    That is all that POSIX promises: a file that is synced in a folder that is not has no name after a power loss, and
    the other way round it is empty. Files are told apart by their inodes, so a rename takes the content with it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, tuple[int, bool]]] = {}
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._sync)

    def lose(self, folder: Path, left: Path) -> None:
        """Makes in `left` what a power loss would leave of a folder, which itself was there long before."""
        self._leave(folder.stat().st_ino, left)

    def _sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self._folders[found.st_ino] = {
                entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(descriptor)
            }
        else:
            # It may be open for writing only.
            self._files[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _leave(self, inode: int, path: Path) -> None:
        path.mkdir()
        for name, (entry, is_folder) in self._folders.get(inode, {}).items():
            if is_folder:
                self._leave(entry, path / name)
            else:
                (path / name).write_bytes(self._files.get(entry, b""))
