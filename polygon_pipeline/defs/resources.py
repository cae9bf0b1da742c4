"""The resources: Polygon and the lake. They build clients from the environment when asked, never at import.

Belongs here: clients and scratch space for whatever runs. Does not belong here: checking the environment (settings).

They have no configuration: whoever reaches the web server chooses a launch's, and could send the key or the bars to a
server of his own. Where they lead, the environment alone says.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from dagster_aws.s3 import S3Resource
from pydantic import PrivateAttr

from polygon_pipeline import demo, settings
from polygon_pipeline.datasets.reference_sources import Sources
from polygon_pipeline.defs.scratch import scratch_folder
from polygon_pipeline.lake.store import Lake, S3Access, open_lake
from polygon_pipeline.polygon.flat_files import BUCKET
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class PolygonResource(dg.ConfigurableResource["PolygonResource"]):
    """The vendor's feed, as the environment says."""

    def settings(self, tickers: str | None = None, channels: str | None = None) -> settings.Settings:
        """The environment's; the arguments win over POLYGON_TICKERS and POLYGON_CHANNELS.

        Raises settings.ConfigurationError.
        """
        overrides = {"POLYGON_TICKERS": tickers, "POLYGON_CHANNELS": channels}
        given = {name: value for name, value in overrides.items() if value is not None}
        return settings.load(_environment() | given)

    @contextmanager
    def history(self) -> Iterator[Sources]:
        """Where the vendor's history comes from; the built-in simulator's own where no REST URL is set.

        Raises settings.ConfigurationError. The requests' limit is kept by a file beside the journals, so that all runs
        of this machine keep it together.
        """
        wanted = self.settings()
        limit = RateLimit.per_minute(wanted.journal_dir / ".rest-limit", wanted.rest_requests_per_minute)
        with _rest_url(wanted) as url:
            yield Sources(
                rest=RestHistory(url, wanted.api_key, limit),
                flat_files=_flat_files(wanted),
                tickers=wanted.tickers,
                requests_per_second=limit.per_second,
                staging=wanted.journal_dir / ".history",
            )


def _environment() -> dict[str, str]:
    """The environment, with the demo's defaults. From now on this process asks no proxy for this machine."""
    settings.keep_proxies_off_this_machine(os.environ)
    return demo.with_defaults(os.environ)


@contextmanager
def _rest_url(wanted: settings.Settings) -> Iterator[str]:
    if wanted.rest_url is not None:
        yield wanted.rest_url
        return
    with demo.rest_server(wanted) as url:
        yield url


def _flat_files(wanted: settings.Settings) -> "ObjectStore | None":
    if wanted.flat_files_url is None:
        return None
    import boto3

    session = boto3.Session(wanted.flat_files_key_id, wanted.flat_files_secret, region_name="us-east-1")
    return open_lake(f"s3://{BUCKET}", lambda: S3Access(session, wanted.flat_files_url, ca_bundle=_ca_bundle())).store


class LakeResource(dg.ConfigurableResource["LakeResource"]):
    """Where everything is kept: LAKE_URI. Region, endpoint, profile and keys of an `s3://` lake are the S3Resource's,
    which code may set and a launch may not: it must be no resource of the definitions besides."""

    s3: S3Resource
    _scratch: Path = PrivateAttr()

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["LakeResource"]:
        with scratch_folder() as folder:
            self._scratch = folder
            yield self

    def scratch(self) -> Path:
        """A new empty local folder, removed when the run's process is done with the lake."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def open(self) -> Lake:
        """Raises LakeError or settings.ConfigurationError for a lake that cannot be as it is configured."""
        return open_lake(settings.lake_uri(_environment()), self._s3_access)

    def _s3_access(self) -> S3Access:
        import boto3

        session = boto3.Session(
            aws_access_key_id=self.s3.aws_access_key_id,
            aws_secret_access_key=self.s3.aws_secret_access_key,
            aws_session_token=self.s3.aws_session_token,
            region_name=self.s3.region_name,
            profile_name=self.s3.profile_name,
        )
        # The client knows the endpoint from the resource, AWS_ENDPOINT_URL and the profile, in boto3's order.
        region = session.region_name or "us-east-1"
        url = session.client("s3", endpoint_url=self.s3.endpoint_url, region_name=region).meta.endpoint_url
        if url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            url = None
        else:
            settings.require_private("AWS_ENDPOINT_URL", url, "https", "http")
        return S3Access(
            session=session,
            endpoint_url=url,
            unsigned=self.s3.use_unsigned_session,
            verify_certificates=self.s3.verify is not False,
            ca_bundle=_ca_bundle(),
        )


def _ca_bundle() -> bytes | None:
    """AWS_CA_BUNDLE's content. Raises settings.ConfigurationError where it cannot be read."""
    path = os.environ.get("AWS_CA_BUNDLE")
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise settings.ConfigurationError(f"AWS_CA_BUNDLE cannot be read: {error}.") from error
