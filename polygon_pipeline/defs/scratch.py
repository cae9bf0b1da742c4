"""A run's scratch folder: removed at its end, or by the next run where the process was killed.

Belongs here: whose a folder is. Does not belong here: what is put there.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "polygon_pipeline-scratch-"
_OWNER = ".owner"
# Between making the owner's file and locking it.
_NEW_SECONDS = 60.0


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty local folder, removed at the end with everything in it. Those of killed processes are removed first."""
    sweep()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name, Path(name, _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)  # which ends with the process, however that ends
        made = Path(name, "run")
        made.mkdir()
        yield made


def sweep() -> None:
    """Removes this user's scratch folders that no process owns any more. One without an owner's file is not ours."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = owner.stat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _NEW_SECONDS:
                shutil.rmtree(owner.parent, ignore_errors=True)
