"""The store behind the lake: one code path for `s3://bucket/prefix` and `file:///path`, on obstore.

Belongs here: opening a store, its credentials and timeouts, moving many objects, and which errors are permanent. Does
not belong here: keys (lake.layout) and what the objects contain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    InvalidPathError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.durable import make_folder, sync_path

if TYPE_CHECKING:
    import boto3
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

T = TypeVar("T")

# obstore raises Python's own error for a missing object, and its own for a missing bucket.
NOT_FOUND = (NotFoundError, FileNotFoundError)

# Of an error's text, in one line.
_LONGEST = 400

# What a store's faults look like: obstore's own errors, and a local disk's.
STORE_ERRORS = (BaseError, OSError)

# Small objects in flight at once. S3 answers in 20-50 ms, so 64 make some 2,000 a second, and local servers are
# saturated by fewer; more connections cost the server and gain nothing.
CONCURRENCY = 64
_SYNC_THREADS = 16

# obstore keeps a credential for as long as it is told here, beyond its real end if that is sooner. Told of no time at
# all it asks for each request (ten times a second at the most), and boto3 knows when to renew.
_CREDENTIAL_LIFE = timedelta(0)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What obstore calls a file of a local lake until it is whole.
_UNFINISHED = re.compile(r"#\d+$")

# obstore retries by itself; a caller that must not give up retries around it.
_RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}


# S3's codes, by what is to be corrected. R2 has a code of its own for a wrong region.
_WRONG_REGION = {"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "InvalidRegionName"}
_BARE = "Received redirect without LOCATION"  # obstore's word for it, which leaves the answer out
_BOTO3 = re.compile(r"An error occurred \((\w+)\) when calling the \w+ operation[^:]*: ?(.*)")
_LOGGED_OUT = ("SSOTokenLoadError", "UnauthorizedSSOTokenError")  # boto3's, where obstore asks it for credentials
_REFUSED = {"AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_REFUSED_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
# Refusals that say nothing about the credentials: this machine's clock is wrong, they have expired and their successors
# are on the way, or the service that hands them out is away.
_PASSING = ("RequestTimeTooSkewed", "RequestExpired", "ExpiredToken", "External AWS credential provider")


class LakeError(Exception):
    """The lake cannot be used as it is configured; the text says what to correct."""


class NoCredentials(LakeError):
    """No credentials were found; the service that hands them out may be away."""


class _Claim(msgspec.Struct):
    """feed.json. format: lakes from before it was kept have format 1."""

    feed: str
    format: int = 1


@dataclass(frozen=True)
class S3Access:
    """How to reach S3. endpoint_url: None for AWS itself. ca_bundle: certificates to trust beside the system's, PEM."""

    session: boto3.Session
    endpoint_url: str | None = None
    unsigned: bool = False
    verify_certificates: bool = True
    ca_bundle: bytes | None = None


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
        return _bucket_region(urlsplit(self.uri).netloc, self.s3) if self.s3 else None

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
            yield from _list_s3(self.uri, self.s3, prefix, after, size)

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
            found = _folders_s3(self.uri, self.s3, prefix)
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


def permanent_error(
    error: BaseException, uri: str, bucket_region: Callable[[], str | None] = lambda: None
) -> LakeError | None:
    """The same error as a LakeError that says what to correct, or None where it may pass by itself.

    bucket_region: asked only where the region is wrong and the answer does not say which is right.
    """
    text = str(error)
    code, message = _answered(text) or ("", "")
    if isinstance(error, NOT_FOUND) or code == "NoSuchBucket":
        advice = "does not exist. Create the bucket or correct LAKE_URI."
    elif code in _WRONG_REGION or (code == "AuthorizationHeaderMalformed" and "region" in message) or _BARE in text:
        named = re.search("<Region>(.+?)</Region>", text)
        region = named[1] if named else bucket_region() or "its own"
        advice = f"is in another region. Set AWS_DEFAULT_REGION, or the profile's region, to {region}."
    elif code.startswith("KMS.") or (code == "AccessDenied" and "kms:" in message):
        advice = (
            "is encrypted with a KMS key that cannot be used. Enable the key, and allow these credentials "
            "kms:GenerateDataKey and kms:Decrypt."
        )
    elif any(name in text for name in _LOGGED_OUT):
        advice = "cannot be reached, because the login has ended. Log in again, or give a collector a role."
    elif any(sign in text for sign in _PASSING):
        return None
    elif (
        isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        or code in _REFUSED  # a list's refusal has no class of its own
    ):
        advice = "refuses these credentials. Check AWS_* and that they may get, put and list objects there."
    else:
        return None
    return LakeError(f"{uri} {advice} ({brief(error)})")


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
        with _settings_of_boto3(uri):
            access = s3()
            return Lake(uri, _s3_store(parts.netloc, parts.path.strip("/"), access), access)
    raise LakeError(f"LAKE_URI is {uri!r}; it must be s3://bucket/prefix or file:///absolute/path.")


def _s3_store(bucket: str, prefix: str, access: S3Access) -> S3Store:
    from obstore.auth.boto3 import Boto3CredentialProvider

    client: ClientConfig = {
        "timeout": timedelta(seconds=60),
        "connect_timeout": timedelta(seconds=5),
        # Its host is this machine, which is checked where the endpoint is configured. The library follows redirects,
        # and this keeps them encrypted.
        "allow_http": (access.endpoint_url or "").lower().startswith("http://"),
        "allow_invalid_certificates": not access.verify_certificates,
    }
    if access.ca_bundle is not None:
        client["root_certificate"] = access.ca_bundle
    if not access.unsigned and access.session.get_credentials() is None:
        raise NoCredentials(
            "No AWS credentials were found for LAKE_URI. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or give the machine a role."
        )
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=access.session.region_name or "us-east-1",
            endpoint=access.endpoint_url,
            skip_signature=access.unsigned,
            credential_provider=(
                None if access.unsigned else Boto3CredentialProvider(access.session, ttl=_CREDENTIAL_LIFE)
            ),
            client_options=client,
            retry_config=_RETRY,
        )
    except ValueError as error:
        raise LakeError(f"AWS_CA_BUNDLE, or another setting of S3, is not what it must be: {brief(error)}") from error


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
                        yield _meta(key, found.st_size, _EPOCH + timedelta(microseconds=found.st_mtime_ns // 1000))


def _list_s3(uri: str, access: S3Access, prefix: str, after: str | None, size: int) -> Iterator[list[ObjectMeta]]:
    """The objects below a prefix of an S3 lake, whatever they are called, from beyond `after` on."""
    with _s3_client(access) as client:
        bucket, root = _place(uri)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket,
            Prefix=f"{root}{prefix}",
            StartAfter=f"{root}{after or ''}",
            PaginationConfig={"PageSize": size},
        )
        for page in pages:
            if listed := page.get("Contents"):
                yield [_meta(meta["Key"].removeprefix(root), meta["Size"], meta["LastModified"]) for meta in listed]


def _folders_s3(uri: str, access: S3Access, prefix: str) -> list[str]:
    with _s3_client(access) as client:
        bucket, root = _place(uri)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{root}{prefix}", Delimiter="/")
        return [found["Prefix"] for page in pages for found in page.get("CommonPrefixes", [])]


@contextlib.contextmanager
def _s3_client(access: S3Access) -> Iterator[Any]:
    """boto3's client, which gives every key its own name. Its errors become obstore's."""
    import botocore
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(signature_version=botocore.UNSIGNED) if access.unsigned else None
    client = access.session.client(
        "s3", endpoint_url=access.endpoint_url, verify=access.verify_certificates, config=config
    )
    try:
        yield client
    except (BotoCoreError, ClientError) as error:
        raise GenericError(str(error)) from error
    finally:
        client.close()


def _place(uri: str) -> tuple[str, str]:
    """The bucket of an S3 lake, and what its keys begin with there."""
    parts = urlsplit(uri)
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def _meta(key: str, size: int, last_modified: datetime) -> ObjectMeta:
    return {"path": key, "last_modified": last_modified, "size": size, "e_tag": None, "version": None}


def _encode_claim(feed: str) -> bytes:
    return msgspec.json.encode(_Claim(feed, layout.FORMAT))


def _decode_claim(content: bytes) -> _Claim | None:
    try:
        return msgspec.json.decode(content, type=_Claim)
    except (ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _settings_of_boto3(uri: str) -> Iterator[None]:
    """What boto3 says of its settings, such as of a profile that does not exist, as a LakeError."""
    from botocore.exceptions import BotoCoreError, CredentialRetrievalError

    try:
        yield
    except CredentialRetrievalError:  # whoever gives out credentials may be back soon
        raise
    except BotoCoreError as error:
        raise LakeError(f"{uri} cannot be reached with these AWS_* settings: {error}") from error


def _bucket_region(bucket: str, access: S3Access) -> str | None:
    """S3 says it to everybody who asks, in a header that obstore does not show."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(signature_version=UNSIGNED, connect_timeout=5, read_timeout=10, retries={"max_attempts": 0})
    client = access.session.client(
        "s3",
        endpoint_url=access.endpoint_url,
        region_name=access.session.region_name or "us-east-1",
        config=config,
        verify=None if access.verify_certificates else False,
    )
    try:
        answer: Mapping[str, Any] = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:
        return None
    region: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return region


def brief(error: BaseException) -> str:
    """An error in one line, in S3's own words where there are some: obstore appends its whole chain of causes."""
    text = str(error).strip()
    if answered := _answered(text):
        request = re.search(r"Error performing (\S+ [^\s?]+)", text)
        return f"{request[1] if request else 'S3'}: {': '.join(answered)}"[:_LONGEST]
    line = text.splitlines()[0][:_LONGEST] if text else type(error).__name__
    refused = _REFUSED_CERTIFICATE.search(text)
    return f"{line}: the certificate is refused ({refused[1]}; AWS_CA_BUNDLE names more to trust)" if refused else line


def _answered(text: str) -> tuple[str, str] | None:
    """The code and the message of S3's answer, within obstore's error text or boto3's."""
    found = re.search(r"<Code>([^<]+)</Code>(?:.*?<Message>([^<]*)</Message>)?", text, re.DOTALL) or _BOTO3.search(text)
    return (found[1], found[2] or "") if found else None
