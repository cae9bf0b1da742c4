"""Clients of the vendor and of S3 as the environment says, built when asked.

Belongs here: what a URL, a key pair or a certificate of the environment becomes. Does not belong here: checking the
variables (settings), and Dagster's resources (defs.resources).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from polygon_pipeline import demo, settings
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.lake.token import Token
from polygon_pipeline.polygon.flat_files import BUCKET
from polygon_pipeline.polygon.rate_limit import RateLimit

if TYPE_CHECKING:
    import boto3
    from obstore.store import ObjectStore


def environment() -> dict[str, str]:
    """The environment, with the demo's defaults. From now on this process asks no proxy for this machine."""
    settings.keep_proxies_off_this_machine(os.environ)
    return demo.with_defaults(os.environ)


@contextmanager
def rest_url(wanted: settings.Settings) -> Iterator[str]:
    """The history's server; the built-in simulator's own where none is set."""
    if wanted.rest_url is not None:
        yield wanted.rest_url
        return
    with demo.rest_server(wanted) as url:
        yield url


@contextmanager
def rest_limit(wanted: settings.Settings, lake: Lake | None) -> Iterator[RateLimit]:
    """The limit of REST requests, which all that use the lake keep together: by a file in a local lake, and on S3 by a
    right that one process has at a time. Without a lake: by a file beside the journals."""
    requests = wanted.rest_requests_per_minute
    if lake is None or not lake.is_s3:
        root = wanted.journal_dir if lake is None else lake.local_root
        yield RateLimit.per_minute(root / ".rest-limit", requests)
        return
    with tempfile.TemporaryDirectory() as folder:
        limit = RateLimit.per_minute(Path(folder) / "turns", requests, Token(lake, layout.REST_RIGHT_KEY))
        try:
            yield limit
        finally:
            limit.close()


def flat_files(wanted: settings.Settings) -> ObjectStore | None:
    """The vendor's bucket, or None where there are no credentials for it."""
    if wanted.flat_files_url is None:
        return None
    import boto3

    session = boto3.Session(wanted.flat_files_key_id, wanted.flat_files_secret, region_name="us-east-1")
    return open_lake(f"s3://{BUCKET}", lambda: S3Access(session, wanted.flat_files_url, ca_bundle=_ca_bundle())).store


def s3_access(
    session: boto3.Session, endpoint_url: str | None = None, unsigned: bool = False, verify: bool = True
) -> S3Access:
    """How to reach S3. endpoint_url: where it is not what AWS_ENDPOINT_URL or the profile says.

    Raises settings.ConfigurationError for an unencrypted URL, and where AWS_CA_BUNDLE cannot be read.
    """
    # The client knows the endpoint from the argument, AWS_ENDPOINT_URL and the profile, in boto3's order.
    region = session.region_name or "us-east-1"
    url: str | None = session.client("s3", endpoint_url=endpoint_url, region_name=region).meta.endpoint_url
    if url is None or url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        url = None
    else:
        settings.require_private("AWS_ENDPOINT_URL", url, "https", "http", os.environ)
    return S3Access(
        session=session,
        endpoint_url=url,
        unsigned=unsigned,
        verify_certificates=verify,
        ca_bundle=_ca_bundle(),
    )


def _ca_bundle() -> bytes | None:
    """AWS_CA_BUNDLE's content. Raises settings.ConfigurationError where it cannot be read."""
    path = os.environ.get("AWS_CA_BUNDLE")
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise settings.ConfigurationError(f"AWS_CA_BUNDLE cannot be read: {error}.") from error
