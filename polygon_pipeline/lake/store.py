"""The store behind the lake: one code path for `s3://bucket/prefix` and `file:///path`, on obstore.

Belongs here: opening a store, its objects one by one and by the thousand, and whose lake it is. Does not belong here:
keys (lake.layout), what S3 alone has (lake.s3), what errors mean (lake.errors), and what the objects contain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    InvalidPathError,
)
from obstore.store import LocalStore

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.durable import make_folder, sync_path
from polygon_pipeline.lake.errors import NOT_FOUND, STORE_ERRORS, LakeError, permanent_error
from polygon_pipeline.lake.s3 import (
    S3Access,
    bucket_region,
    list_folders,
    list_objects,
    object_meta,
    readable_settings,
    s3_store,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

# Small objects in flight at once. S3 answers in 20-50 ms, so 64 make some 2,000 a second, and local servers are
# saturated by fewer; more connections cost the server and gain nothing.
CONCURRENCY = 64
_SYNC_THREADS = 16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What obstore calls a file of a local lake until it is whole.
_UNFINISHED = re.compile(r"#\d+$")


class _Claim(msgspec.Struct):
    """feed.json. format: lakes from before it was kept have format 1."""

    feed: str
    format: int = 1


@dataclass(frozen=True)
class Lake:
    """A lake's root: an object store and the URI that people know it by. s3: how to reach one on S3."""

    uri: str
    store: ObjectStore
    s3: S3Access | None = field(default=None, repr=False)

    @property
    def is_s3(self) -> bool:
        return self.uri.lower().startswith("s3://")

    @property
    def local_root(self) -> Path:
        """The folder of a `file://` lake."""
        return Path(unquote(urlsplit(self.uri).path))

    def url(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def bucket_region(self) -> str | None:
        """The region of an S3 lake's bucket, or None where nobody says it."""
        return bucket_region(urlsplit(self.uri).netloc, self.s3) if self.s3 else None

    def put(self, key: str, content: bytes | Path) -> None:
        """Writes one object, atomically: readers see the old one or the new one, and it survives a power loss."""
        obstore.put(self.store, key, content)
        self.sync([key])

    def sync(self, keys: Iterable[str]) -> None:
        """Makes objects of a local lake survive a power loss; its store leaves the time to the operating system.

        Objects that are not there any more are left out. Does nothing on S3, which answers when an object is safe.
        """
        if self.is_s3:
            return
        files = [self.local_root / key for key in keys]
        folders = {folder for file in files for folder in file.parents if folder.is_relative_to(self.local_root)}

        def sync(path: Path) -> None:
            with contextlib.suppress(FileNotFoundError):
                sync_path(path)

        # Side by side they share the file system's commits: 500 new objects in as many folders take 0.06 s with 16
        # threads and 0.15 s with one. Syncing the whole disk takes 0.01 s, and waits for everybody else's files.
        with ThreadPoolExecutor(_SYNC_THREADS) as threads:
            list(threads.map(sync, [*files, *folders]))

    def get(self, key: str) -> bytes | None:
        """The object's content, or None if there is none."""
        try:
            return bytes(obstore.get(self.store, key).bytes())
        except NOT_FOUND:
            return None

    def keys(self, prefix: str) -> list[str]:
        """All keys below a prefix, sorted; those of other programs may be such that they cannot be got."""
        return sorted({meta["path"] for page in self.pages(prefix) for meta in page})

    def pages(self, prefix: str, after: str | None = None, size: int = 1000) -> Iterator[Sequence[ObjectMeta]]:
        """The objects below a prefix, `size` at a time; on S3 in the order of their keys, from beyond `after` on.

        obstore gives up a listing with an error where it meets a key that it has no name for, such as `A//B`: others
        must not wait until that is removed. The rest is then listed without it, in its own spelling.
        """
        if not self.is_s3:
            files = _walk(self.local_root, prefix)  # no slower than obstore, which gives up here too
            while found := list(islice(files, size)):
                yield found
            return
        try:
            for page in obstore.list(self.store, prefix, offset=after, chunk_size=size):
                yield page
                after = page[-1]["path"]
        except (InvalidPathError, ValueError):  # the second where such a key is `after` itself
            assert self.s3
            yield from list_objects(self.uri, self.s3, prefix, after, size)

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders directly below a prefix, sorted."""
        if not self.is_s3:
            with contextlib.suppress(FileNotFoundError):
                return sorted(entry.name for entry in os.scandir(self.local_root / prefix) if entry.is_dir())
            return []
        try:
            found = obstore.list_with_delimiter(self.store, prefix)["common_prefixes"]
        except InvalidPathError:
            assert self.s3
            found = list_folders(self.uri, self.s3, prefix)
        return sorted(folder.removesuffix("/").rpartition("/")[2] for folder in found)

    def modified(self, prefix: str) -> dict[str, datetime]:
        """The keys below a prefix, sorted, and when each was last written, by the store's own clock."""
        found = {meta["path"]: meta["last_modified"] for page in self.pages(prefix) for meta in page}
        return dict(sorted(found.items()))

    def get_many(self, keys: Sequence[str], use: Callable[[str, bytes], object]) -> None:
        """Fetches many objects, many at a time, and calls `use(key, content)` for each, in no order."""

        async def fetch(key: str) -> None:
            result = await obstore.get_async(self.store, key)
            use(key, bytes(await result.bytes_async()))

        asyncio.run(for_each(keys, fetch))

    def claim(self, feed: str) -> None:
        """Says which feed fills this lake ("polygon" or "simulated"), once and for all, and proves that it can be read.

        A lake that another program fills has data and says nothing; real data may be added to it, simulated never.
        Raises LakeError where another feed's data is kept here, where that is not known, where the lake's format is
        newer than this program knows, or where the store refuses the credentials.
        """
        try:
            content = self.get(layout.FEED_KEY)
            if content is None:
                content = self._claim_first(feed)
        except STORE_ERRORS as error:
            raise permanent_error(error, self.uri, self.bucket_region) or error from error
        self._require_claim(content, feed)

    def is_claimed(self, feed: str) -> bool:
        """Whether the lake says already that this feed fills it; nothing is written. Raises as claim() does."""
        content = self.get(layout.FEED_KEY)
        if content is not None:
            self._require_claim(content, feed)
        return content is not None

    def feed(self) -> str | None:
        """Which feed fills this lake, or None where nobody says it. Raises LakeError where its format is too new."""
        content = self.get(layout.FEED_KEY)
        found = None if content is None else _decode_claim(content)
        if content is None or found is None:
            return None
        self._require_claim(content, found.feed)
        return found.feed

    def _require_claim(self, content: bytes, feed: str) -> None:
        found = _decode_claim(content)
        if found is None:
            raise LakeError(
                f"{self.url(layout.FEED_KEY)} says which feed fills the lake, and cannot be read. Nothing was changed. "
                f"Look at what the lake holds, and replace that object by {_encode_claim('polygon').decode()} if it is "
                f"real data, or by {_encode_claim('simulated').decode()} if it is simulated."
            )
        if found.feed != feed:
            raise LakeError(
                f"{self.uri} holds another feed's data ({found.feed}), and this collector's is {feed}. Simulated and "
                "real data are never mixed: point LAKE_URI at another place."
            )
        if found.format > layout.FORMAT:
            raise LakeError(
                f"{self.uri} has format {found.format}, and this program knows formats up to {layout.FORMAT}. "
                "Install a newer version of polygon_pipeline."
            )

    def _claim_first(self, feed: str) -> bytes:
        """Writes the claim where there is none; returns the one that is there then, whoever was first."""
        if feed == "simulated" and (held := self._first_data()):
            raise LakeError(
                f"{self.uri} holds data of another program ({held}), and this collector's is simulated. Simulated and "
                "real data are never mixed: point LAKE_URI at another place."
            )
        content = _encode_claim(feed)
        try:
            obstore.put(self.store, layout.FEED_KEY, content, mode="create")
        except AlreadyExistsError:
            return self.get(layout.FEED_KEY) or b""
        if not self.is_s3:
            self.sync([layout.FEED_KEY])
        return content

    def _first_data(self) -> str | None:
        """The key of some data that the lake holds, or None; folders' markers are none."""
        for root in layout.DATA_ROOTS:
            for page in self.pages(root):
                for meta in page:
                    if meta["size"]:
                        return meta["path"]
        return None


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Awaits work(item) for every item, CONCURRENCY at a time. The first error ends the others and is raised."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def open_lake(uri: str, s3: Callable[[], S3Access]) -> Lake:
    """Opens `s3://bucket[/prefix]` or `file:///path`. s3 is asked for access only where it is needed.

    Raises LakeError for another scheme, and where there are no credentials, such as for a profile that does not exist.
    Nothing is read or written, but a local folder is made.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and not parts.netloc and uri.startswith("file:///"):
        root = Path(unquote(parts.path))
        make_folder(root, exist_ok=True)
        return Lake(uri, LocalStore(root))
    if parts.scheme == "s3" and parts.netloc:
        with readable_settings(uri):
            access = s3()
            return Lake(uri, s3_store(parts.netloc, parts.path.strip("/"), access), access)
    raise LakeError(f"LAKE_URI is {uri!r}; it must be s3://bucket/prefix or file:///absolute/path.")


def _walk(root: Path, prefix: str) -> Iterator[ObjectMeta]:
    """The files below a prefix of a local lake, whatever they are called, in no order."""
    folders = [str(root / prefix)]
    start = len(os.path.join(root, ""))
    while folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif not _UNFINISHED.search(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat()
                        key = os.fsencode(entry.path[start:]).decode(errors="backslashreplace")
                        yield object_meta(
                            key, found.st_size, _EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000)
                        )


def _encode_claim(feed: str) -> bytes:
    return msgspec.json.encode(_Claim(feed, layout.FORMAT))


def _decode_claim(content: bytes) -> _Claim | None:
    try:
        return msgspec.json.decode(content, type=_Claim)
    except (ValueError, RecursionError):
        return None
