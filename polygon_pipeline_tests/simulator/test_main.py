"""The simulator as a command: `python -m polygon_pipeline.simulator`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import websocket
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_its_addresses_and_ends_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "polygon_pipeline.simulator",
        "--day",
        "2026-01-26",
        "--tickers",
        "AAPL,BRK.B",
        "--flat-files",
        tmp_path.as_uri(),
        "--flat-file-days",
        "2",
    ]
    with subprocess.Popen([*command, "--speed", "0", "--key", "k"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        # If the line is never printed, the test's own timeout does not end the child process.
        guard = threading.Timer(60, process.kill)
        guard.start()
        line = process.stdout.readline()
        assert "SIMULATED" in line
        variables = dict(re.findall(r"([A-Z_]+)=(\S+)", line))
        assert variables["POLYGON_API_KEY"] == "k"
        socket = websocket.create_connection(variables["POLYGON_WEBSOCKET_URL"], timeout=20)
        assert "simulated" in socket.recv()
        history = RESTClient("k", base=variables["POLYGON_REST_URL"])
        assert len(history.get_aggs("AAPL", 1, "minute", "2026-01-23", "2026-01-23")) == 960
        assert history.get_aggs("AAPL", 1, "minute", "2026-01-26", "2026-01-26") == [], "the day has not started yet"
        assert variables["POLYGON_FLAT_FILES_URL"] == tmp_path.as_uri()
        for folder in ("minute_aggs_v1", "day_aggs_v1"):
            published = sorted((tmp_path / "us_stocks_sip" / folder).rglob("*.gz"))
            assert [path.name for path in published] == ["2026-01-23.csv.gz", "2026-01-26.csv.gz"]
        os.kill(process.pid, number)
        assert process.wait(30) == 0
        guard.cancel()
        socket.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--day", "2026-01-25"], "closed on 2026-01-25"),
        (["--replay", "nowhere.csv"], "no file nowhere.csv"),
        (["--faults", "explode=1"], "no fault 'explode'"),
    ],
)
def test_the_command_explains_invalid_arguments(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "polygon_pipeline.simulator", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
