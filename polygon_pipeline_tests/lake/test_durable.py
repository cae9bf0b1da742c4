"""Syncing files and folders, with what each system has for it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from polygon_pipeline.lake.durable import make_folder, sync_file, sync_path
from polygon_pipeline_tests.support.power import Power


def test_without_fdatasync_as_on_macos_a_file_is_synced_by_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch)
    monkeypatch.delattr(os, "fdatasync")
    with (tmp_path / "a").open("wb", buffering=0) as file:
        file.write(b"kept")
        sync_file(file.fileno())
    sync_path(tmp_path)
    power.lose(tmp_path, tmp_path / "left")
    assert (tmp_path / "left" / "a").read_bytes() == b"kept"


@pytest.mark.parametrize("refused", [False, True])
def test_the_drives_own_memory_is_flushed_where_the_system_can_and_fsync_is_the_next_best(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def control(_descriptor: int, command: int) -> None:
        asked.append(command)
        if refused:
            raise OSError(errno.ENOTSUP, "not on this file system")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: asked.append("fsync"))
    sync_path(tmp_path)
    assert asked == ([51, "fsync"] if refused else [51])


def test_new_folders_survive_a_power_loss_with_all_those_above_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    power = Power(monkeypatch)
    make_folder(tmp_path / "a" / "b" / "c")
    (tmp_path / "a" / "b" / "unsynced").mkdir()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a" / "b" / "c")
    power.lose(tmp_path, tmp_path / "left")
    assert (tmp_path / "left" / "a" / "b" / "c").is_dir()
    assert not (tmp_path / "left" / "a" / "b" / "unsynced").exists()
