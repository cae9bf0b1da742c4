"""How the three clients connect: which proxy they use, and which certificates they trust."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tenacity
from dagster_aws.s3 import S3Resource

from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake import s3
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, brief
from polygon_pipeline.polygon.errors import HistoryUnavailable
from polygon_pipeline.polygon.flat_files import fetch_flat_file
from polygon_pipeline.polygon.rate_limit import RateLimit
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline.polygon.stream import EventKind
from polygon_pipeline.settings import ConfigurationError
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.scripted import Watched
from polygon_pipeline_tests.support.tls_server import TlsServer, tls_server


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "a-secret-key")
    monkeypatch.setenv("POLYGON_TICKERS", "SPY")
    monkeypatch.setenv("LAKE_URI", "s3://bucket/lake")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    monkeypatch.setitem(s3._RETRY, "max_retries", 0)


class Listener:
    """It remembers how every connection to it began, and ends it."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                with connection:
                    self.heard.append(connection.recv(2000))
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture
def listeners() -> Iterator[Callable[[], Listener]]:
    opened: list[Listener] = []

    def new() -> Listener:
        opened.append(Listener())
        return opened[-1]

    yield new
    for listener in opened:
        listener.close()


def ask_stream(host: str, secure: bool) -> None:
    PolygonResource().settings()
    with Watched(f"{'wss' if secure else 'ws'}://{host}/stocks") as watched:
        watched.next(EventKind.DISCONNECTED)


def ask_rest(host: str, secure: bool, folder: Path) -> None:
    PolygonResource().settings()
    url = f"{'https' if secure else 'http'}://{host}"
    history = RestHistory(url, "a-secret-key", RateLimit(folder / "limit", 1000, 1.0), backoff=tenacity.wait_none())
    with pytest.raises(HistoryUnavailable):
        history.traded_tickers(DAY)


def ask_lake(host: str, secure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{'https' if secure else 'http'}://{host}")
    with pytest.raises(STORE_ERRORS):
        LakeResource(s3=S3Resource()).open().get("feed.json")


Ask = Callable[..., None]


@pytest.fixture(params=["stream", "rest", "lake"])
def ask(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Makes one of the clients ask a host, over TLS or not."""
    clients: dict[str, Ask] = {
        "stream": ask_stream,
        "rest": lambda host, secure: ask_rest(host, secure, tmp_path),
        "lake": lambda host, secure: ask_lake(host, secure, monkeypatch),
    }
    return clients[request.param]


def set_proxies(proxy: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://someone:a-secret-word@127.0.0.1:{proxy.port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("secure", [False, True])
def test_this_machine_is_asked_without_a_proxy(
    host: str, secure: bool, ask: Ask, listeners: Callable[[], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, server = listeners(), listeners()
    set_proxies(proxy, monkeypatch)
    ask(f"{host}:{server.port}", secure)
    assert server.heard
    assert not proxy.heard


def test_another_machine_is_asked_through_the_proxy_of_https(
    ask: Ask, listeners: Callable[[], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = listeners()
    set_proxies(proxy, monkeypatch)
    ask("market.example", True)
    assert proxy.heard[0].startswith(b"CONNECT market.example:443 ")
    assert b"basic" in proxy.heard[0].lower()
    assert b"a-secret-key" not in b"".join(proxy.heard)


@pytest.mark.parametrize("excluded", ["market.example", ".example", "*"])
def test_a_host_of_no_proxy_is_asked_without_it(
    excluded: str, ask: Ask, listeners: Callable[[], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = listeners()
    set_proxies(proxy, monkeypatch)
    monkeypatch.setenv("NO_PROXY", excluded)
    ask("market.example", True)
    assert not proxy.heard


# Certificates


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[TlsServer]:
    with tls_server(tmp_path) as server:
        yield server


def test_a_bundle_of_the_environment_is_trusted_by_the_lake(tls: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", tls.url)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tls.certificate))
    assert LakeResource(s3=S3Resource()).open().get("anything") == b"{}"


def test_a_refused_certificate_is_named(tls: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", tls.url)
    with pytest.raises(STORE_ERRORS) as refused:
        LakeResource(s3=S3Resource()).open().get("anything")
    assert "the certificate is refused (UnknownIssuer; AWS_CA_BUNDLE" in brief(refused.value)


@pytest.mark.parametrize(("content", "error"), [(None, ConfigurationError), (b"no certificate", LakeError)])
def test_a_bundle_that_is_none_is_named(
    content: bytes | None, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_bytes(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with pytest.raises(error, match="AWS_CA_BUNDLE"):
        LakeResource(s3=S3Resource()).open()


def test_a_refused_certificate_of_the_flat_files_is_named(
    tls: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_FLAT_FILES_URL", tls.url)
    monkeypatch.setenv("POLYGON_FLAT_FILES_KEY_ID", "an-id")
    monkeypatch.setenv("POLYGON_FLAT_FILES_SECRET", "another-secret")
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))

    def fetch() -> None:
        with PolygonResource().history(local_lake(tmp_path / "lake")) as sources:
            assert sources.flat_files
            fetch_flat_file(sources.flat_files, DAY, tmp_path / "day", known_etag=None, now=datetime.now(UTC))

    with pytest.raises(HistoryUnavailable, match="the certificate is refused"):
        fetch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tls.certificate))
    fetch()
    assert (tmp_path / "day").read_bytes() == b"{}"


def test_the_certificates_of_ssl_cert_file_are_trusted_by_the_stream_and_the_history(
    tls: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = RateLimit(tmp_path / "limit", 1000, 1.0)
    history = RestHistory(tls.url, "a-secret-key", limit, backoff=tenacity.wait_none())
    with pytest.raises(HistoryUnavailable, match="certificate"):
        history.traded_tickers(DAY)
    with Watched(tls.url.replace("https://", "wss://")) as watched:
        assert "certificate verify failed" in watched.next(EventKind.DISCONNECTED).detail
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    assert RestHistory(tls.url, "a-secret-key", limit).traded_tickers(DAY) == []
    with Watched(tls.url.replace("https://", "wss://")) as watched:
        assert "Handshake status 200" in watched.next(EventKind.DISCONNECTED).detail


@pytest.mark.fault("redirects")
def test_a_redirect_does_not_lead_s3_to_an_unencrypted_server(
    tmp_path: Path, listeners: Callable[[], Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = listeners()
    with tls_server(tmp_path, leads_to=f"http://127.0.0.1:{other.port}/") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(server.certificate))
        with pytest.raises(STORE_ERRORS):
            LakeResource(s3=S3Resource()).open().get("anything")
    assert not other.heard
