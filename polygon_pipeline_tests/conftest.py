"""Fixtures that many tests share: an environment without the developer's settings, an S3 server, lakes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support import real_bars
from polygon_pipeline_tests.support.fault_matrix import fault_matrix, note_faults
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.nights import forget_first_night
from polygon_pipeline_tests.support.real_bars import RecordedBars
from polygon_pipeline_tests.support.s3_server import SeaweedFS


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings, credentials and proxies of who runs it, be they in the environment or in ~/.aws."""
    for name in list(os.environ):
        if name.startswith(("POLYGON_", "MASSIVE_", "AWS_")) or name in ("LAKE_URI", "JOURNAL_DIR", "DAGSTER_HOME"):
            monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("no_proxy", "NO_PROXY"):  # which the project adds to
        monkeypatch.setenv(name, "")
    forget_first_night()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Shows a line at the end of the test run: a proof's account, with its figures."""
    return lambda line: record_property("account", line)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what needs the S3 server. The files that take minutes and mostly wait go first, so that the others
    run beside them."""
    for item in items:
        note_faults(item)
        if isinstance(item, pytest.Function) and _needs_s3(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in ("test_dagster_dev.py", "test_outages.py", "test_web_ui.py"))


def _needs_s3(item: pytest.Function) -> bool:
    chosen = item.callspec.params.get("lake") if hasattr(item, "callspec") else None
    return "seaweedfs" in item.fixturenames or chosen == "s3"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes = ("passed", "failed", "error")
    reports = [
        report
        for outcome in outcomes
        for report in terminalreporter.stats.get(outcome, [])
        if isinstance(report, pytest.TestReport)  # a file that cannot be imported is an error without a test
    ]
    accounts = [str(line) for report in reports for name, line in report.user_properties if name == "account"]
    for title, lines in (("accounts", accounts), ("fault matrix", fault_matrix(reports))):
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """The S3 server that all tests share, each in a bucket of its own. Who stops it starts it again."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def recorded_bars(tmp_path_factory: pytest.TempPathFactory) -> RecordedBars:
    """Three days' bars of two tickers: real ones where they are at hand, and made ones otherwise."""
    return real_bars.recorded_bars(tmp_path_factory.mktemp("recorded-bars"))


@pytest.fixture
def file_lake(tmp_path: Path) -> Lake:
    return local_lake(tmp_path / "lake")


@pytest.fixture
def s3_lake(seaweedfs: SeaweedFS) -> Lake:
    return seaweedfs.lake()


@pytest.fixture(params=["file", "s3"])
def lake(request: pytest.FixtureRequest) -> Lake:
    """Either kind of lake: whatever takes this runs on both."""
    found: Lake = request.getfixturevalue(f"{request.param}_lake")
    return found
