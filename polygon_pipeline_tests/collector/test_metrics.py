"""The metrics: what a run serves agrees with its ledger, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from polygon_pipeline.collector import metrics
from polygon_pipeline.collector.collector import Collector
from polygon_pipeline.lake.ledger import Ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import Fault, Faults, FaultType
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.journals import read_ledger
from polygon_pipeline_tests.support.s3_server import free_ports

_DEPLOY = Path(__file__).parents[2] / "deploy" / "grafana"
_LOG = logging.getLogger("test")
_FEED = [event(ticker, minute) for minute in range(20) for ticker in ("SPY", "BRK.B")]

Samples = dict[str, float]


def _scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            sample.name + "".join(f" {name}={value}" for name, value in sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def _collect(lake: Lake, folder: Path, port: int, look: Callable[[], bool]) -> Ledger:
    """A run with one reconnect, which ends once all is published and `look` has seen what it wants."""
    with Exchange(_FEED, speed=0, faults=Faults([Fault(FaultType.DROP, after_frames=1)])) as exchange:
        wanted = plan(exchange.url, folder / "journal", checkpoint_seconds=0.2, time_base="event")
        collector = Collector(lake, wanted, _LOG)

        def ending() -> str | None:
            now = collector.progress()
            done = now is not None and now.account.bars and not now.backlog_frames and exchange.finished.is_set()
            return "all of it is seen" if done and look() else None

        with metrics.serving(port, DAY, collector.progress, lambda: "collecting", _LOG):
            collector.run(ending, lambda _: None)
    return read_ledger(lake)


def test_what_is_served_agrees_with_the_ledger(tmp_path: Path, file_lake: Lake) -> None:
    [port] = free_ports(1)
    served: list[Samples] = []

    def look() -> bool:
        served.append(_scrape(port))
        return served[-1]["polygon_lag_seconds_count to=archive"] == served[-1]["polygon_frames_total"]

    ledger = _collect(file_lake, tmp_path, port, look)
    _assert_agreement(served[-1], ledger)
    found = served[-1]
    assert found["polygon_run_info session_date=2026-01-26"] == 1
    assert found["polygon_day_state state=collecting"] == 1
    assert (found["polygon_backlog_frames"], found["polygon_backlog_bytes"], found["polygon_store_down"]) == (0, 0, 0)
    assert found["polygon_journal_free_bytes"] > 0
    assert found["polygon_lease_age_seconds"] >= 0
    through = ledger.watermarks[Channel.MINUTE].through
    assert found["polygon_complete_through_timestamp_seconds channel=AM"] == through.timestamp() + 60
    with pytest.raises(urllib.error.URLError):
        _scrape(port)


def test_the_dashboard_asks_for_what_is_served_and_shows_all_of_it(tmp_path: Path, file_lake: Lake) -> None:
    [port] = free_ports(1)
    served: list[Samples] = []

    def look() -> bool:
        served.append(_scrape(port))
        return True

    _collect(file_lake, tmp_path, port, look)
    names = {name.split(" ")[0] for name in served[-1]}
    board = json.loads((_DEPLOY / "dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"polygon_\w+", target["expr"])
    }
    assert len(asked) > 10
    assert asked <= names
    assert names - asked == {"polygon_lag_seconds_count", "polygon_lag_seconds_sum"}
    described = set(re.findall(r"polygon_\w+", (_DEPLOY / "README.md").read_text())) - {
        "polygon_pipeline",
        "polygon_pipeline_tests",
    }
    assert described == {re.sub("_(bucket|count|sum)$", "", name) for name in names}


def test_a_port_that_is_taken_is_named_and_ends_no_run(
    tmp_path: Path, file_lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    [port] = free_ports(1)
    with metrics.serving(port, DAY, lambda: None, lambda: None, _LOG):
        assert _scrape(port) == {}
        ledger = _collect(file_lake, tmp_path, port, lambda: True)
    assert ledger.complete
    assert f"port {port} (POLYGON_METRICS_PORT)" in caplog.text


def test_without_a_port_nothing_is_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), metrics.serving(None, DAY, lambda: None, lambda: None, _LOG):
        assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed")
def test_a_real_prometheus_scrapes_a_run_and_what_it_stored_agrees_with_the_ledger(
    tmp_path: Path, file_lake: Lake
) -> None:
    port, prometheus = free_ports(2)
    stored: list[Samples] = []
    with _prometheus(tmp_path, prometheus, port):

        def look() -> bool:
            stored.append(_stored(prometheus))
            return bool(stored[-1]) and (
                stored[-1].get("polygon_lag_seconds_count to=archive") == stored[-1].get("polygon_frames_total") != 0
                and stored[-1]["polygon_bars_total"] == _scrape(port)["polygon_bars_total"]
            )

        ledger = _collect(file_lake, tmp_path, port, look)
        board = json.loads((_DEPLOY / "dashboard.json").read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                _query(prometheus, target["expr"])  # raises where Prometheus does not understand it
    _assert_agreement(stored[-1], ledger)


def _assert_agreement(found: Samples, ledger: Ledger) -> None:
    account = ledger.account
    assert account.bars >= 20
    assert len(account.connections) == 2
    assert {name: found[f"polygon_{name}_total"] for name in ("frames", "events", "bars", "quarantined")} == {
        "frames": account.frames,
        "events": account.events,
        "bars": account.bars,
        "quarantined": 0,
    }
    assert found["polygon_reconnects_total"] == found["polygon_gaps"] == len(ledger.gaps) == 1
    for to, lag in (("synced", ledger.lag.to_synced), ("object", ledger.lag.to_object)):
        assert found[f"polygon_lag_seconds_count to={to}"] == lag.count > 0
        at_most = {
            float(name.split("le=")[1].split(" ")[0]): count
            for name, count in found.items()
            if name.startswith("polygon_lag_seconds_bucket") and f"to={to}" in name
        }
        assert max(at_most.values()) == lag.count
        assert all(count >= lag.count / 2 for limit, count in at_most.items() if limit >= lag.p50)


@contextmanager
def _prometheus(folder: Path, port: int, target: int) -> Iterator[None]:
    config = (_DEPLOY / "prometheus.yml").read_text()
    assert "15s" in config
    assert "9464" in config
    (folder / "prometheus.yml").write_text(config.replace("15s", "1s").replace("9464", str(target)))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _stored(port: int) -> Samples:
    """What Prometheus has; nothing while it starts."""
    try:
        result = _query(port, '{job="polygon_collector"}')
    except OSError:
        return {}
    left_out = {"__name__", "job", "instance"}
    return {
        series["metric"]["__name__"]
        + "".join(
            f" {name}={value}" for name, value in sorted(series["metric"].items()) if name not in left_out
        ): float(series["value"][1])
        for series in result
    }


def _query(port: int, expression: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found
