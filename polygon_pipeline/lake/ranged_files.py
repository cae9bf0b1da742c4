"""A lake on S3 as DuckDB reads files: by ranges, so that a query fetches only the parts of a file that it needs.

Belongs here: the few calls of fsspec that DuckDB makes. Does not belong here: which files are read (read), and local
lakes, whose files DuckDB opens by itself.
"""

from __future__ import annotations

import threading
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import obstore
from fsspec import AbstractFileSystem
from obstore.exceptions import PreconditionError

from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError
from polygon_pipeline.lake.store import Lake

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

SCHEME = "lake"


class RangedFiles(AbstractFileSystem):  # type: ignore[misc] # it has no types
    """The objects of a lake, as `lake://KEY`. For reading alone, from any number of threads.

    An object that is replaced while it is read raises LakeError: its parts would not fit together. error: the last that
    was raised while an object was read; DuckDB passes on only its traceback, as text.
    """

    protocol = SCHEME
    cachable = False  # by fsspec, which would give one lake's objects for another's

    def __init__(self, lake: Lake) -> None:
        super().__init__()
        self._lake = lake
        self._listed: dict[str, ObjectMeta] = {}
        self.error: Exception | None = None

    def keys(self, prefix: str, after: str | None = None) -> list[str]:
        """The keys below a prefix as they are now, sorted, from beyond `after` on."""
        found = {meta["path"]: meta for page in self._lake.pages(prefix, after) for meta in page}
        self._listed |= found
        return sorted(found)

    def glob(self, path: str, **_: Any) -> list[str]:
        pattern = self._strip_protocol(path)
        if pattern in self._listed:
            return [pattern]
        folder = pattern.partition("*")[0].rpartition("/")[0]
        return [key for key in self.keys(f"{folder}/") if fnmatchcase(key, pattern)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        meta = self._meta(path)
        return {"name": meta["path"], "size": meta["size"], "type": "file"}

    def modified(self, path: str) -> datetime:
        return self._meta(path)["last_modified"]

    def open(self, path: str, mode: str = "rb", **_: Any) -> _RangedFile:
        if mode != "rb":
            raise PermissionError("the lake's files are read here, and never written")
        return _RangedFile(self, self._lake, self._meta(path))

    def _meta(self, path: str) -> ObjectMeta:
        key = self._strip_protocol(path)
        if key not in self._listed:
            self._listed[key] = obstore.head(self._lake.store, key)
        return self._listed[key]


class _RangedFile:
    """One object. Each thread has a place of its own in it: DuckDB seeks and reads in two calls."""

    def __init__(self, files: RangedFiles, lake: Lake, meta: ObjectMeta) -> None:
        self._files = files
        self._lake = lake
        self._meta = meta
        self._place = threading.local()
        self.size = meta["size"]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place.at = offset + (0, self.tell(), self.size)[whence]
        return self.tell()

    def tell(self) -> int:
        at: int = getattr(self._place, "at", 0)
        return at

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        end = self.size if size < 0 else min(start + size, self.size)
        if start >= end:
            return b""
        self._place.at = end
        options: GetOptions = {"range": (start, end)}
        if self._meta["e_tag"]:
            options["if_match"] = self._meta["e_tag"]
        try:
            return bytes(obstore.get(self._lake.store, self._meta["path"], options=options).bytes())
        except PreconditionError:
            self._files.error = LakeError(
                f"{self._lake.url(self._meta['path'])} was replaced by a newer one while it was read. Read again."
            )
            raise self._files.error from None
        except STORE_ERRORS as error:
            self._files.error = error
            raise

    def close(self) -> None:
        """Nothing is kept open."""
