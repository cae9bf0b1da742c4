"""S3 behind the lake: opening it for obstore, and asking boto3 for what obstore does not tell.

Belongs here: credentials, certificates, timeouts, and whatever S3 alone has. Does not belong here: the lake's own
objects (lake.store), and what S3's errors mean (lake.errors).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.exceptions import GenericError
from obstore.store import S3Store

from polygon_pipeline.lake.errors import LakeError, NoCredentials, brief

if TYPE_CHECKING:
    import boto3
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

# obstore keeps a credential for as long as it is told here, beyond its real end if that is sooner. Told of no time at
# all it asks for each request (ten times a second at the most), and boto3 knows when to renew.
_CREDENTIAL_LIFE = timedelta(0)

# obstore retries by itself; a caller that must not give up retries around it.
_RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}


@dataclass(frozen=True)
class S3Access:
    """How to reach S3. endpoint_url: None for AWS itself. ca_bundle: certificates to trust beside the system's, PEM."""

    session: boto3.Session
    endpoint_url: str | None = None
    unsigned: bool = False
    verify_certificates: bool = True
    ca_bundle: bytes | None = None


def s3_store(bucket: str, prefix: str, access: S3Access) -> S3Store:
    """Raises LakeError for settings that cannot be, and NoCredentials."""
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


def list_objects(uri: str, access: S3Access, prefix: str, after: str | None, size: int) -> Iterator[list[ObjectMeta]]:
    """The objects below a prefix of an S3 lake, whatever they are called, from beyond `after` on."""
    with _obstores_errors(), _client(access) as client:
        bucket, root = _place(uri)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket,
            Prefix=f"{root}{prefix}",
            StartAfter=f"{root}{after or ''}",
            PaginationConfig={"PageSize": size},
        )
        for page in pages:
            if listed := page.get("Contents"):
                yield [
                    object_meta(meta["Key"].removeprefix(root), meta["Size"], meta["LastModified"]) for meta in listed
                ]


def list_folders(uri: str, access: S3Access, prefix: str) -> list[str]:
    """The folders directly below a prefix of an S3 lake, whatever they are called, each with its whole prefix."""
    with _obstores_errors(), _client(access) as client:
        bucket, root = _place(uri)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{root}{prefix}", Delimiter="/")
        return [found["Prefix"] for page in pages for found in page.get("CommonPrefixes", [])]


@contextlib.contextmanager
def _client(access: S3Access, **config: Any) -> Iterator[Any]:
    """boto3's client, for what obstore does not tell."""
    import botocore
    from botocore.config import Config

    client = access.session.client(
        "s3",
        endpoint_url=access.endpoint_url,
        region_name=access.session.region_name or "us-east-1",
        verify=None if access.verify_certificates else False,
        config=Config(**({"signature_version": botocore.UNSIGNED} if access.unsigned else {}) | config),
    )
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def _obstores_errors() -> Iterator[None]:
    """boto3's errors become obstore's."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise GenericError(str(error)) from error


def _place(uri: str) -> tuple[str, str]:
    """The bucket of an S3 lake, and what its keys begin with there."""
    parts = urlsplit(uri)
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""


def object_meta(key: str, size: int, last_modified: datetime) -> ObjectMeta:
    return {"path": key, "last_modified": last_modified, "size": size, "e_tag": None, "version": None}


@contextlib.contextmanager
def readable_settings(uri: str) -> Iterator[None]:
    """What boto3 says of its settings, such as of a profile that does not exist, as a LakeError."""
    from botocore.exceptions import BotoCoreError, CredentialRetrievalError

    try:
        yield
    except CredentialRetrievalError:  # whoever gives out credentials may be back soon
        raise
    except BotoCoreError as error:
        raise LakeError(f"{uri} cannot be reached with these AWS_* settings: {error}") from error


def bucket_region(bucket: str, access: S3Access) -> str | None:
    """S3 says it to everybody who asks, in a header that obstore does not show."""
    from botocore import UNSIGNED
    from botocore.exceptions import BotoCoreError, ClientError

    quick = {"connect_timeout": 5, "read_timeout": 10, "retries": {"max_attempts": 0}}
    with _client(access, signature_version=UNSIGNED, **quick) as client:
        try:
            answer: Mapping[str, Any] = client.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        except BotoCoreError:
            return None
    region: str | None = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return region
