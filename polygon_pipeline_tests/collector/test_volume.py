"""Which volumes a journal may be on: those whose locks another machine sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygon_pipeline.collector import journal as journal_module
from polygon_pipeline.collector.journal import Journal, JournalError, leftovers
from polygon_pipeline.collector.volume import lock_problem
from polygon_pipeline_tests.support.journals import journal_header

_ROOT = "22 1 254:0 / / rw,relatime - ext4 /dev/vda1 rw"


@pytest.mark.parametrize(
    ("mount", "problem"),
    [
        ("ext4 /dev/vdb rw", None),
        ("nfs4 fs-1.efs.eu-west-1.amazonaws.com:/ rw,vers=4.1,hard,local_lock=none", None),
        ("nfs4 server:/x rw,vers=4.1,local_lock=all", "local_lock=all"),
        ("nfs server:/x rw,vers=3,nolock,local_lock=all", "local_lock=all, nolock"),
        ("cifs //server/x rw,nobrl", "nobrl"),
        ("cifs //server/x rw", None),
        ("fuse.mountpoint-s3 mountpoint-s3 rw,user_id=0", "object store"),
        ("fuse.sshfs host:/x rw", "sshfs"),
        ("fuse.glusterfs server:volume rw,user_id=0", None),
        ("broken", None),
    ],
)
def test_a_volume_whose_locks_stay_on_this_machine_is_named(mount: str, problem: str | None) -> None:
    mounts = f"{_ROOT}\n40 22 0:40 / /mnt/a\\040volume rw,relatime shared:5 - {mount}\n"
    found = lock_problem(Path("/mnt/a volume/journal"), mounts)
    assert (found is None) == (problem is None)
    assert problem is None or (found and problem in found)
    assert lock_problem(Path("/mnt/another"), mounts) is None


def test_a_mount_that_lies_over_another_decides() -> None:
    mounts = "40 22 0:40 / /mnt rw - nfs s:/x rw,nolock\n41 40 0:41 / /mnt rw - ext4 /dev/vdc rw\n"
    assert lock_problem(Path("/mnt/journal"), mounts) is None


def test_this_machines_own_disk_is_good(tmp_path: Path) -> None:
    assert lock_problem(tmp_path) is None


def test_no_journal_is_written_nor_taken_over_where_locks_do_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "lock_problem", lambda _: "its locks do not reach other machines")
    for use in (lambda: leftovers(tmp_path), lambda: Journal(tmp_path, journal_header())):
        with pytest.raises(JournalError, match="do not reach other machines"):
            use()
    assert list(tmp_path.iterdir()) == []
