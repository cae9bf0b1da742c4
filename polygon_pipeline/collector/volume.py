"""Whether locks on the journal's volume reach every machine that mounts it.

Belongs here: what the system says of a mount. Does not belong here: the locks (collector.journal).

A journal is published by who has its lock (flock). On one machine that always holds. On a volume that several mount,
such as EFS, it holds where the file system passes locks on to its server, as NFS does by itself since Linux 2.6.12; and
not where it was mounted without that, or where the volume is an object store that has no locks at all.
"""

from __future__ import annotations

from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")

_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "nfs4": {"nolock", "local_lock=flock", "local_lock=all"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}
_OBJECT_STORES = {"s3fs", "mountpoint-s3", "gcsfuse", "goofys", "geesefs", "rclone", "blobfuse", "blobfuse2"}


def lock_problem(folder: Path, mounts: str | None = None) -> str | None:
    """Why a lock in this folder may not be seen by another machine; None where it is, or where nobody else mounts it.

    mounts: as /proc/self/mountinfo has them; None for this machine's. Systems without it say nothing.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return None
    place = folder.resolve()
    best, kind, options = -1, "", set[str]()
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 6 or len(described) < 3:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= best:  # a later mount lies over an earlier one
            best, kind, options = len(point.parts), described[0], {*described[2].split(","), *fields[5].split(",")}
    name = kind.removeprefix("fuse.")
    if name in _OBJECT_STORES:
        return f"{name} is an object store without locks and without synced appends: name a disk or an NFS volume"
    if name == "sshfs":
        return "sshfs keeps locks on the machine that takes them: name a disk, or an NFS or GlusterFS volume"
    if wrong := sorted(options & _LOCAL_LOCKS.get(kind, set())):
        named = ", ".join(wrong)
        return f"{kind} is mounted with {named}, so that its locks do not reach other machines: mount it without"
    return None
