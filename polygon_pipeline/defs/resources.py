"""The resources: Polygon and the lake. They hold configuration and build clients when asked, never at import.

Belongs here: what Dagster configures, on top of the environment. Does not belong here: checking it (settings).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from dagster_aws.s3 import S3Resource
from pydantic import Field, PrivateAttr

from polygon_pipeline import demo, settings
from polygon_pipeline.datasets.reference_sources import Sources
from polygon_pipeline.lake.store import Lake, S3Access, open_lake
from polygon_pipeline.polygon.flat_files import BUCKET
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class PolygonResource(dg.ConfigurableResource["PolygonResource"]):
    """The vendor's feed. Whatever is not set here comes from the environment (the variable each field names)."""

    websocket_url: str | None = Field(default=None, description="POLYGON_WEBSOCKET_URL")
    rest_url: str | None = Field(default=None, description="POLYGON_REST_URL")
    tickers: str | None = Field(default=None, description="POLYGON_TICKERS: comma-separated, * for the whole market")
    channels: str | None = Field(default=None, description="POLYGON_CHANNELS: AM, A or AM,A")

    def settings(self, tickers: str | None = None, channels: str | None = None) -> settings.Settings:
        """What is set here or else in the environment; the arguments win over both.

        Raises settings.ConfigurationError. The API key is read from POLYGON_API_KEY alone, and never shown.
        """
        overrides = {
            "POLYGON_WEBSOCKET_URL": self.websocket_url,
            "POLYGON_REST_URL": self.rest_url,
            "POLYGON_TICKERS": self.tickers if tickers is None else tickers,
            "POLYGON_CHANNELS": self.channels if channels is None else channels,
        }
        return settings.load(_environment(overrides))

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


def _environment(overrides: dict[str, str | None]) -> dict[str, str]:
    """The environment, with what a resource is configured with and with the demo's defaults."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return demo.with_defaults({**os.environ, **given})


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
    return open_lake(f"s3://{BUCKET}", lambda: S3Access(session, wanted.flat_files_url)).store


class LakeResource(dg.ConfigurableResource["LakeResource"]):
    """Where everything is kept. Region, endpoint, profile and keys of an `s3://` lake are the S3Resource's."""

    s3: S3Resource
    uri: str | None = Field(default=None, description="LAKE_URI: s3://bucket/prefix or file:///path")
    _scratch: Path = PrivateAttr()

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["LakeResource"]:
        with tempfile.TemporaryDirectory(prefix="polygon_pipeline-") as folder:
            self._scratch = Path(folder)
            yield self

    def scratch(self) -> Path:
        """A new empty local folder, removed when the run's process is done with the lake."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def open(self) -> Lake:
        """Raises LakeError or settings.ConfigurationError for a lake that cannot be as it is configured."""
        return open_lake(settings.lake_uri(_environment({"LAKE_URI": self.uri})), self._s3_access)

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
        )
