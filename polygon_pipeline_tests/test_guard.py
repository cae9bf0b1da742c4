"""deploy/guard: nginx before a real dagster-webserver, asked as the UI asks and as a hostile web page would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
import websocket

from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: the guard cannot be tried here"),
]

_CONFIGURATION = Path(__file__).parents[1] / "deploy" / "guard" / "nginx.conf"
_MUTATION = "mutation { reloadWorkspace { __typename } }"


class Site:
    """The guard and the server behind it."""

    def __init__(self, port: int, unguarded_port: int) -> None:
        self.port = port
        self.host = f"127.0.0.1:{port}"
        self.unguarded = f"127.0.0.1:{unguarded_port}"
        self._pool = urllib3.PoolManager(retries=False, timeout=30)

    def post(self, **headers: str) -> int:
        """A mutation as the UI sends it, with these headers besides; the status."""
        return self._pool.request(
            "POST", f"http://{self.host}/graphql", json={"query": _MUTATION}, headers=_headers(headers)
        ).status

    def get(self, path: str, host: str | None = None, **headers: str) -> int:
        fields = {"query": _MUTATION} if "graphql" in path else {}
        return self._pool.request(
            "GET", f"http://{host or self.host}{path}", fields=fields, headers=_headers(headers)
        ).status


def _headers(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("guard")
    port, behind = free_ports(2)
    (folder / "nginx.conf").write_text(
        _CONFIGURATION.read_text().replace(":3000", f":{port}").replace(":3001", f":{behind}")
    )
    (folder / "empty.py").write_text("import dagster as dg\n\ndefs = dg.Definitions()\n")
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    server = [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(behind), "-f", "empty.py"]
    guard = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with contextlib.ExitStack() as running:
        for command in (server, guard):
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "DAGSTER_HOME": str(folder / "home")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            running.callback(process.wait, 30)
            running.callback(process.terminate)
        found = Site(port, behind)
        until(lambda: _listens(port) and _listens(behind), "both listen", seconds=120, pause=0.2)
        yield found


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_the_server_alone_executes_a_mutation_that_any_web_page_can_send(site: Site) -> None:
    """The reason for the guard: where this fails, Dagster has closed it."""
    assert site.get("/graphql", host=site.unguarded, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 200


def test_what_the_ui_sends_passes(site: Site) -> None:
    assert site.post() == 200
    assert site.post(Origin=f"http://{site.host}", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors") == 200
    assert site.get("/", Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document") == 200
    assert site.get("/server_info", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors") == 200


def test_a_link_on_another_site_opens_the_ui(site: Site) -> None:
    assert site.get("/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document") == 200


@pytest.mark.parametrize("path", ["/graphql", "//graphql", "/graphql/", "/%67raphql", "/a/../graphql"])
def test_a_mutation_by_get_is_refused_whoever_sends_it(site: Site, path: str) -> None:
    assert site.get(path) == 405
    assert site.get(path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document") == 405


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:80", "https://localhost"])
def test_another_origin_is_refused(site: Site, origin: str) -> None:
    assert site.post(Origin=origin) == 403
    assert site.post(Origin=origin, Content_Type="text/plain") == 403


def test_a_request_that_another_site_makes_is_refused(site: Site) -> None:
    for whose in ("cross-site", "same-site"):
        assert site.post(Sec_Fetch_Site=whose, Sec_Fetch_Mode="no-cors") == 403
        assert site.get("/server_info", Sec_Fetch_Site=whose, Sec_Fetch_Mode="no-cors") == 403
        assert site.get("/", Sec_Fetch_Site=whose, Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe") == 403


def test_another_host_name_is_refused(site: Site) -> None:
    assert site.post(Host="evil.example") == 403
    assert site.get("/", Host=f"evil.example:{site.port}") == 403


def test_the_uis_subscriptions_pass_and_those_of_another_site_do_not(site: Site) -> None:
    url = f"ws://{site.host}/graphql"
    with contextlib.closing(
        websocket.create_connection(url, origin=f"http://{site.host}", subprotocols=["graphql-ws"], timeout=30)
    ) as socket:
        socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(socket.recv())["type"] == "connection_ack"
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        websocket.create_connection(url, origin="http://evil.example", subprotocols=["graphql-ws"], timeout=30)
