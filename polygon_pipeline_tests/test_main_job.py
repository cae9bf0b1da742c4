"""The main job, end to end: recorded bars through a real WebSocket, the job and the assets, into a real lake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest

from polygon_pipeline.collector.journal import RecordType, leftovers
from polygon_pipeline.datasets.catalog import DERIVED, NORMALIZED_BARS
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import decode_ledger
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.bars import iso_seconds
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.replay import CsvFeed
from polygon_pipeline_tests.support.archives import unpacked
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.materializing import materialize
from polygon_pipeline_tests.support.real_bars import RecordedBars
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

pytestmark = pytest.mark.slow

_KEY = "the-key-that-nobody-may-see-7d1f"
_DATASETS = [NORMALIZED_BARS.name, *(dataset.name for dataset in DERIVED)]


@pytest.fixture
def exchange(recorded_bars: RecordedBars) -> Iterator[Exchange]:
    """A simulated exchange that replays the recorded bars as fast as they are read."""
    with Exchange(CsvFeed(recorded_bars.minute_file), speed=0, key=_KEY) as exchange:
        yield exchange


@pytest.fixture
def environment(
    exchange: Exchange, recorded_bars: RecordedBars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    monkeypatch.setenv("POLYGON_API_KEY", _KEY)
    monkeypatch.setenv("POLYGON_WEBSOCKET_URL", exchange.url)
    monkeypatch.setenv("POLYGON_TICKERS", ",".join(recorded_bars.tickers))
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("POLYGON_HISTORY_START", "2003-09-10")
    return monkeypatch


@pytest.fixture
def s3_environment(environment: pytest.MonkeyPatch, seaweedfs: SeaweedFS) -> str:
    """The same, with the lake in a bucket of SeaweedFS; returns the lake's URI."""
    uri = f"s3://{seaweedfs.new_bucket()}/lake"
    environment.setenv("LAKE_URI", uri)
    for name, value in seaweedfs.address.environment().items():
        environment.setenv(name, value)
    return uri


def _collect(instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    job = build_defs().get_job_def("collect_aggregates")
    run_config = {"ops": {"collect_aggregates": {"config": {"stop_after_seconds": 4, **config}}}}
    return job.execute_in_process(run_config=run_config, instance=instance)


def test_recorded_bars_become_objects_normalized_rows_and_daily_bars(
    environment: pytest.MonkeyPatch, recorded_bars: RecordedBars, tmp_path: Path, say: Callable[[str], None]
) -> None:
    lake = local_lake(tmp_path / "lake")
    days = recorded_bars.days
    with dg.instance_for_test() as instance:
        assert _collect(instance).success
        assert instance.get_materialized_partitions(dg.AssetKey("raw_bars")) == set(days)
        for day in days:
            result = materialize(instance, _DATASETS, day)
            checks = {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
            assert checks.pop("day_is_complete") is False, "a replay is over in seconds: no collector was there all day"
            assert len(checks) == 7
            assert all(checks.values())
    bars = recorded_bars.bars()
    assert len(days) == 3
    assert len(bars) > 1000
    _assert_objects(lake, bars)
    assert not list((tmp_path / "journal").iterdir())
    ledgers = [decode_ledger(lake.get(key) or b"") for key in lake.keys("ledger/")]
    assert all(ledger.complete and not ledger.imbalance and ledger.account.bars == len(bars) for ledger in ledgers)

    datasets = tmp_path / "lake" / "datasets"
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.execute(
            "SELECT ticker, epoch_ms(timestamp), open, high, low, close, volume, revisions, source "
            f"FROM read_parquet('{datasets}/normalized_bars/*/data.parquet') ORDER BY ALL"
        ).fetchall()
        daily = connection.execute(
            "SELECT ticker, CAST(date AS VARCHAR), open, high, low, close, volume "
            f"FROM read_parquet('{datasets}/daily_bars/*/data.parquet')"
        ).fetchall()
    prices = ("open", "high", "low", "close", "volume")
    assert rows == sorted(
        (bar["ticker"], int(bar["start_ms"]), *(float(bar[name]) for name in prices), 1, "websocket") for bar in bars
    )
    _compare_with_official_days(recorded_bars, {(row[0], row[1]): row[2:] for row in daily}, say)


def _assert_objects(lake: Lake, bars: list[dict[str, str]]) -> None:
    keys = lake.keys("raw-data/")
    expected = {}
    for bar in bars:
        start_ms = int(bar["start_ms"])
        day = trade_date(start_ms).isoformat()
        expected[f"raw-data/{day}/{bar['ticker']}/{iso_seconds(start_ms)}.json"] = bar
    assert keys == sorted(expected)
    content: dict[str, bytes] = {}
    lake.get_many(keys, content.__setitem__)
    for key, bar in expected.items():
        record = json.loads(content[key])
        collected_at = datetime.fromisoformat(record.pop("collected_at"))
        assert abs((datetime.now(UTC) - collected_at).total_seconds()) < 3600
        assert record == {
            "source": "polygon_websocket",
            "ticker": bar["ticker"],
            "timestamp": iso_seconds(int(bar["start_ms"])),
            "bar_data": {
                "open": float(bar["open"]),
                "high": float(bar["high"]),
                "low": float(bar["low"]),
                "close": float(bar["close"]),
                "volume": int(bar["volume"]),
                "vwap": None,
            },
        }


def _compare_with_official_days(
    recorded_bars: RecordedBars, daily: dict[tuple[str, str], tuple[float, ...]], say: Callable[[str], None]
) -> None:
    """Open and close are exact; real official highs and lows, and some volumes, leave trades out, which is shown."""
    official_days = recorded_bars.official_days()
    assert len(official_days) == len(recorded_bars.days) * len(recorded_bars.tickers)
    say(f"{'real' if recorded_bars.is_real else 'made'} bars: the daily bars against the official days")
    for official in official_days:
        made = daily[official["ticker"], official["date"]]
        wanted = [float(official[name]) for name in ("open", "high", "low", "close", "volume")]
        differences = [round(ours - theirs, 4) for ours, theirs in zip(made, wanted, strict=True)]
        say(
            f"  {official['ticker']} {official['date']}: open {differences[0]:+g}, high {differences[1]:+.2f}, "
            f"low {differences[2]:+.2f}, close {differences[3]:+g}, volume {differences[4]:+.0f}"
        )
        assert differences[0] == 0
        assert differences[3] == 0
        assert abs(differences[1]) <= recorded_bars.extremes_tolerance
        assert abs(differences[2]) <= recorded_bars.extremes_tolerance
        if official["ticker"] in recorded_bars.tickers_with_exact_volume:
            assert differences[4] == 0


def test_the_command_line_collects_and_normalizes_into_s3(
    s3_environment: str, recorded_bars: RecordedBars, seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    day = recorded_bars.days[1]
    home = tmp_path / "dagster-home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    config = tmp_path / "collect.yaml"
    config.write_text("ops: {collect_aggregates: {config: {stop_after_seconds: 6}}}\n")
    module = ["-m", "polygon_pipeline.definitions"]
    _dagster(home, "job", "execute", *module, "-j", "collect_aggregates", "-c", str(config))
    _dagster(home, "asset", "materialize", *module, "--select", "normalized_bars", "--partition", day)
    lake = open_lake(s3_environment, seaweedfs.access)
    assert len(lake.keys("raw-data/")) == len(recorded_bars.bars())
    made = tmp_path / "made.parquet"
    made.write_bytes(lake.get(layout.dataset_key("normalized_bars", day)) or b"")
    with duckdb.connect() as connection:
        counted = connection.execute(f"SELECT ticker, count(*) FROM '{made}' GROUP BY ALL ORDER BY ALL").fetchall()
    assert counted == recorded_bars.counts(day)


def test_objects_and_frames_can_each_be_switched_off(
    environment: pytest.MonkeyPatch, recorded_bars: RecordedBars, tmp_path: Path
) -> None:
    lake = local_lake(tmp_path / "lake")
    with dg.instance_for_test() as instance:
        assert _collect(instance, write_objects=False).success
        assert lake.keys("raw-data/") == []
        assert lake.keys("raw-frames/")
        for key in lake.keys("raw-frames/"):
            (tmp_path / "lake" / key).unlink()
    # The feed is over, so a second exchange sends it again.
    with Exchange(CsvFeed(recorded_bars.minute_file), speed=0) as again, dg.instance_for_test() as instance:
        environment.setenv("POLYGON_WEBSOCKET_URL", again.url)
        assert _collect(instance, write_frames=False).success
        assert len(lake.keys("raw-data/")) == len(recorded_bars.bars())
        assert lake.keys("raw-frames/") == []
        assert materialize(instance, ["normalized_bars"], recorded_bars.days[0]).success


def test_the_key_is_in_no_log_event_ledger_journal_error_or_url(
    environment: pytest.MonkeyPatch, recorded_bars: RecordedBars, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """Of a run that goes well, and of one whose key is refused."""
    printed = _collect_by_command(environment, tmp_path)
    with Exchange(CsvFeed(recorded_bars.minute_file), speed=0, key="another-key") as strict:
        environment.setenv("POLYGON_WEBSOCKET_URL", strict.url)
        environment.setenv("LAKE_URI", (tmp_path / "refused").as_uri())
        printed += _collect_by_command(environment, tmp_path)
    assert b"POLYGON_API_KEY" in printed, "the refusal is among what was searched"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = [path for path in files if _KEY.encode() in _plain(path)]
    assert found == []
    assert _KEY.encode() not in printed
    say(f"secrets: {len(files):,} files and {len(printed):,} printed bytes searched, the key in none")


def test_a_second_signal_ends_a_run_at_once_and_the_journal_keeps_what_was_received(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LAKE_URI", "s3://nowhere/lake")
    for name, value in _DEAD_S3.items():
        environment.setenv(name, value)
    process = subprocess.Popen(_collect_command(environment, tmp_path), stdout=subprocess.DEVNULL)
    journal = tmp_path / "journal"
    until(lambda: any(_frames_in(folder) for folder in journal.glob("2*")), "frames are in the journal")
    process.send_signal(signal.SIGTERM)
    time.sleep(3)
    assert process.poll() is None, "the first signal drains, and the lake is down"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    (left,) = leftovers(journal)
    frames = sum(1 for record in left.read(1, 0, left.end_of(1)[0]) if record.kind is RecordType.FRAME)
    left.release()
    assert frames > 3, "more than the three statuses of the handshake"


# An S3 that answers nothing: its port is closed.
_DEAD_S3 = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def _collect_by_command(environment: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    command = _collect_command(environment, tmp_path)
    result = subprocess.run(command, capture_output=True, timeout=120, check=False)
    return result.stdout + result.stderr


def _collect_command(environment: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    home = tmp_path / "dagster-home"
    home.mkdir(exist_ok=True)
    environment.setenv("DAGSTER_HOME", str(home))
    config = tmp_path / "collect.yaml"
    config.write_text("ops: {collect_aggregates: {config: {stop_after_seconds: 5}}}\n")
    command = ["job", "execute", "-m", "polygon_pipeline.definitions", "-j", "collect_aggregates", "-c", str(config)]
    return [sys.executable, "-m", "dagster", *command]


def _plain(path: Path) -> bytes:
    content = path.read_bytes()
    return unpacked(content) if path.suffix == ".zst" else content


def _frames_in(folder: Path) -> bool:
    return any(path.stat().st_size > 100_000 for path in folder.glob("*.segment"))


def _dagster(home: Path, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dagster", *arguments],
        env={**os.environ, "DAGSTER_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
