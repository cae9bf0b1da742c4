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

import dagster as dg
from dagster_aws.s3 import S3Resource
from pydantic import PrivateAttr

from polygon_pipeline import access, settings
from polygon_pipeline.datasets.reference_sources import Sources
from polygon_pipeline.defs.scratch import scratch_folder
from polygon_pipeline.defs.supervision import launcher_elsewhere
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.polygon.rest import RestHistory


class PolygonResource(dg.ConfigurableResource["PolygonResource"]):
    """The vendor's feed, as the environment says."""

    def settings(self, tickers: str | None = None, channels: str | None = None) -> settings.Settings:
        """The environment's; the arguments win over POLYGON_TICKERS and POLYGON_CHANNELS.

        Raises settings.ConfigurationError.
        """
        overrides = {"POLYGON_TICKERS": tickers, "POLYGON_CHANNELS": channels}
        given = {name: value for name, value in overrides.items() if value is not None}
        return settings.load(access.environment() | given)

    @contextmanager
    def history(self, lake: Lake) -> Iterator[Sources]:
        """Where the vendor's history comes from; the built-in simulator's own where no REST URL is set.

        Raises settings.ConfigurationError. All runs that use this lake keep the requests' limit together.
        """
        wanted = self.settings()
        with access.rest_url(wanted) as url, access.rest_limit(wanted, lake) as limit:
            yield Sources(
                rest=RestHistory(url, wanted.api_key, limit),
                flat_files=access.flat_files(wanted),
                tickers=wanted.tickers,
                requests_per_second=limit.per_second,
            )


class LakeResource(dg.ConfigurableResource["LakeResource"]):
    """Where everything is kept: LAKE_URI. Region, endpoint, profile and keys of an `s3://` lake are the S3Resource's,
    which code may set and a launch may not: it must be no resource of the definitions besides."""

    s3: S3Resource
    _scratch: Path = PrivateAttr()
    _launcher: str | None = PrivateAttr(default=None)  # where it is one that starts runs on other machines

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator["LakeResource"]:
        self._launcher = launcher_elsewhere(context.instance) if context.instance else None
        with scratch_folder() as folder:
            self._scratch = folder
            yield self

    def scratch(self) -> Path:
        """A new empty local folder, removed when the run's process is done with the lake."""
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def open(self) -> Lake:
        """Raises LakeError or settings.ConfigurationError for a lake that cannot be as it is configured."""
        environment = access.environment()
        if self._launcher and not os.environ.get("LAKE_URI"):
            raise settings.ConfigurationError(
                f"LAKE_URI is not set, and {self._launcher} starts runs on several machines: each would get a lake of "
                "its own below its working directory. Set it to s3://bucket/prefix, the same on all of them."
            )
        settings.night_session_from(environment)  # whatever is made of the lake depends on it
        return open_lake(settings.lake_uri(environment), self._s3_access)

    def _s3_access(self) -> S3Access:
        import boto3

        session = boto3.Session(
            aws_access_key_id=self.s3.aws_access_key_id,
            aws_secret_access_key=self.s3.aws_secret_access_key,
            aws_session_token=self.s3.aws_session_token,
            region_name=self.s3.region_name,
            profile_name=self.s3.profile_name,
        )
        return access.s3_access(
            session, self.s3.endpoint_url, unsigned=self.s3.use_unsigned_session, verify=self.s3.verify is not False
        )
