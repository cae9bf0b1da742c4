"""Fixtures of the scenarios: the machines' network, and S3 in it.

`make test` imports this file too, without the packages of the extra `cluster`: nothing here may need them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from polygon_pipeline_tests.cluster.machines import S3, make_network, remove_network
from polygon_pipeline_tests.support.s3_server import SeaweedFS


@pytest.fixture
def network() -> Iterator[None]:
    assert os.geteuid() == 0, "namespaces need root: make cluster"
    make_network()
    yield
    remove_network()


@pytest.fixture
def s3(network: None, tmp_path: Path) -> Iterator[SeaweedFS]:
    server = SeaweedFS(tmp_path / "s3", S3)
    try:
        server.start()
        yield server
    finally:
        server.stop()
