"""The main job, end to end: real bars through a real WebSocket, the job and the assets, into a real lake."""

from __future__ import annotations

import csv
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
import pyarrow as pa
import pytest

from polygon_pipeline.collector.journal import RecordType, leftovers
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import decode_ledger
from polygon_pipeline.lake.store import Lake, S3Access, open_lake
from polygon_pipeline.market.bars import iso_seconds
from polygon_pipeline.market.calendar import trade_date
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.replay import CsvFeed
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_REAL_BARS = Path(__file__).parents[2] / "shared" / "data" / "real-bars"
_DAYS = ["2013-10-07", "2013-10-08", "2013-10-09"]
_KEY = "the-key-that-nobody-may-see-7d1f"
_DATASETS = ["normalized_bars", "bars_5m", "bars_15m", "bars_1h", "daily_bars"]

needs_real_bars = pytest.mark.skipif(not _REAL_BARS.is_dir(), reason="the real bars are not beside this checkout")


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    """A simulated exchange that replays the real bars as fast as they are read."""
    with Exchange(CsvFeed(_REAL_BARS / "minute.csv"), speed=0, key=_KEY) as exchange:
        yield exchange


@pytest.fixture
def environment(exchange: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("POLYGON_API_KEY", _KEY)
    monkeypatch.setenv("POLYGON_WEBSOCKET_URL", exchange.url)
    monkeypatch.setenv("POLYGON_TICKERS", "SPY,IBM")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    return monkeypatch


@pytest.fixture
def s3_environment(environment: pytest.MonkeyPatch, seaweedfs: SeaweedFS) -> str:
    """The same, with the lake in a bucket of SeaweedFS; returns the lake's URI."""
    uri = f"s3://{seaweedfs.new_bucket()}/lake"
    environment.setenv("LAKE_URI", uri)
    environment.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint_url)
    environment.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    environment.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return uri


def _real_bars() -> list[dict[str, str]]:
    with (_REAL_BARS / "minute.csv").open() as file:
        return list(csv.DictReader(file))


def _collect(instance: dg.DagsterInstance, **config: Any) -> dg.ExecuteInProcessResult:
    job = build_defs().get_job_def("collect_aggregates")
    run_config = {"ops": {"collect_aggregates": {"config": {"stop_after_seconds": 4, **config}}}}
    return job.execute_in_process(run_config=run_config, instance=instance)


def _materialize(instance: dg.DagsterInstance, day: str, names: list[str]) -> dg.ExecuteInProcessResult:
    job = build_defs().get_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, partition_key=day, asset_selection=[dg.AssetKey(name) for name in names]
    )


@needs_real_bars
def test_real_bars_become_objects_normalized_rows_and_daily_bars(
    environment: pytest.MonkeyPatch, tmp_path: Path, say: Callable[[str], None]
) -> None:
    lake = open_lake((tmp_path / "lake").as_uri(), _no_s3)
    with dg.instance_for_test() as instance:
        assert _collect(instance).success
        assert instance.get_materialized_partitions(dg.AssetKey("raw_bars")) == set(_DAYS)
        for day in _DAYS:
            result = _materialize(instance, day, _DATASETS)
            assert all(check.passed for check in result.get_asset_check_evaluations())
            assert len(result.get_asset_check_evaluations()) == 7
    bars = _real_bars()
    assert len(bars) == 3769
    _assert_objects(lake, bars)
    assert not list((tmp_path / "journal").iterdir())
    ledgers = [decode_ledger(lake.get(key) or b"") for key in lake.keys("ledger/")]
    assert all(ledger.complete and not ledger.imbalance and ledger.account.bars == 3769 for ledger in ledgers)

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
    _compare_with_official_days({(row[0], row[1]): row[2:] for row in daily}, say)


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


def _compare_with_official_days(daily: dict[tuple[str, str], tuple[float, ...]], say: Callable[[str], None]) -> None:
    """Open, close and SPY's volume are exact; the official high and low leave some prints out, which is shown."""
    say("real bars: the made daily bars against the official days")
    with (_REAL_BARS / "daily.csv").open() as file:
        for official in csv.DictReader(file):
            made = daily[official["ticker"], official["date"]]
            wanted = [float(official[name]) for name in ("open", "high", "low", "close", "volume")]
            differences = [round(ours - theirs, 4) for ours, theirs in zip(made, wanted, strict=True)]
            say(
                f"  {official['ticker']} {official['date']}: open {differences[0]:+g}, high {differences[1]:+.2f}, "
                f"low {differences[2]:+.2f}, close {differences[3]:+g}, volume {differences[4]:+.0f}"
            )
            assert differences[0] == 0
            assert differences[3] == 0
            assert abs(differences[1]) <= 0.1
            assert abs(differences[2]) <= 0.1
            if official["ticker"] == "SPY":
                assert differences[4] == 0


@needs_real_bars
def test_the_command_line_collects_and_normalizes_into_s3(
    s3_environment: str, seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    home = tmp_path / "dagster-home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    config = tmp_path / "collect.yaml"
    config.write_text("ops: {collect_aggregates: {config: {stop_after_seconds: 6}}}\n")
    module = ["-m", "polygon_pipeline.definitions"]
    _dagster(home, "job", "execute", *module, "-j", "collect_aggregates", "-c", str(config))
    _dagster(home, "asset", "materialize", *module, "--select", "normalized_bars", "--partition", "2013-10-08")
    lake = open_lake(s3_environment, seaweedfs.access)
    assert len(lake.keys("raw-data/")) == 3769
    made = tmp_path / "made.parquet"
    made.write_bytes(lake.get(layout.dataset_key("normalized_bars", "2013-10-08")) or b"")
    with duckdb.connect() as connection:
        counted = connection.execute(f"SELECT ticker, count(*) FROM '{made}' GROUP BY ALL ORDER BY ALL").fetchall()
    assert counted == [("IBM", 424), ("SPY", 828)]


@needs_real_bars
def test_objects_and_frames_can_each_be_switched_off(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lake = open_lake((tmp_path / "lake").as_uri(), _no_s3)
    with dg.instance_for_test() as instance:
        assert _collect(instance, write_objects=False).success
        assert lake.keys("raw-data/") == []
        assert lake.keys("raw-frames/")
        for key in lake.keys("raw-frames/"):
            (tmp_path / "lake" / key).unlink()
    # The feed is over, so a second exchange sends it again.
    with Exchange(CsvFeed(_REAL_BARS / "minute.csv"), speed=0) as again, dg.instance_for_test() as instance:
        environment.setenv("POLYGON_WEBSOCKET_URL", again.url)
        assert _collect(instance, write_frames=False).success
        assert len(lake.keys("raw-data/")) == 3769
        assert lake.keys("raw-frames/") == []
        assert _materialize(instance, "2013-10-07", ["normalized_bars"]).success


def test_a_wrong_key_fails_the_run_at_once_and_says_which_variable_to_mend(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("POLYGON_API_KEY", "not-the-key")
    with dg.instance_for_test() as instance, pytest.raises(dg.Failure, match="POLYGON_API_KEY") as failure:
        _collect(instance, stop_after_seconds=60)
    assert "not-the-key" not in str(failure.value)


def test_a_day_without_raw_bars_fails_with_a_sentence_and_is_not_retried(environment: pytest.MonkeyPatch) -> None:
    with dg.instance_for_test() as instance, pytest.raises(dg.Failure, match="no raw bars of 2013-10-10") as failure:
        _materialize(instance, "2013-10-10", ["normalized_bars"])
    assert failure.value.allow_retries is False


@needs_real_bars
def test_the_key_is_in_no_log_event_ledger_journal_error_or_url(
    environment: pytest.MonkeyPatch, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """Of a run that goes well, and of one whose key is refused."""
    printed = _collect_by_command(environment, tmp_path)
    with Exchange(CsvFeed(_REAL_BARS / "minute.csv"), speed=0, key="another-key") as strict:
        environment.setenv("POLYGON_WEBSOCKET_URL", strict.url)
        environment.setenv("LAKE_URI", (tmp_path / "refused").as_uri())
        printed += _collect_by_command(environment, tmp_path)
    assert b"POLYGON_API_KEY" in printed, "the refusal is among what was searched"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = [path for path in files if _KEY.encode() in _plain(path)]
    assert found == []
    assert _KEY.encode() not in printed
    say(f"secrets: {len(files):,} files and {len(printed):,} printed bytes searched, the key in none")


@needs_real_bars
def test_a_second_signal_ends_a_run_at_once_and_the_journal_keeps_what_came(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("LAKE_URI", "s3://nowhere/lake")
    for name, value in _DEAD_S3.items():
        environment.setenv(name, value)
    process = subprocess.Popen(_collect_command(environment, tmp_path), stdout=subprocess.DEVNULL)
    journal = tmp_path / "journal"
    _until(lambda: any(_frames_in(folder) for folder in journal.glob("2*")), "frames are in the journal")
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
    if path.suffix != ".zst":
        return content
    with pa.input_stream(path, compression="zstd") as stream:
        plain: bytes = stream.read()
    return plain


def _frames_in(folder: Path) -> bool:
    return any(path.stat().st_size > 100_000 for path in folder.glob("*.segment"))


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.2)


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


def _no_s3() -> S3Access:
    raise AssertionError("this lake is local")
