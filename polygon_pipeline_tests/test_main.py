from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from polygon_pipeline.__main__ import main
from polygon_pipeline.datasets import catalog
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.day_files import dataset_file


@pytest.fixture(autouse=True)
def filled(file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lake with two tickers of a day."""
    rows = [{"ticker": "AAPL", "close": 270.5}, {"ticker": "SPY", "close": 690.0}]
    file = dataset_file(tmp_path / "daily.parquet", rows, catalog.DAILY_BARS)
    put_dataset(file_lake, "daily_bars", date(2026, 1, 26).isoformat(), file)
    monkeypatch.setenv("LAKE_URI", file_lake.uri)


QUERY = "SELECT ticker, date, close FROM daily_bars ORDER BY ticker"


def test_a_query_prints_a_table(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["query", QUERY]) == 0
    table = capfdbinary.readouterr().out.decode()
    assert "│ AAPL    │ 2026-01-26 │  270.5 │" in table


def test_a_query_prints_all_rows_as_csv_or_json(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["query", "--csv", QUERY]) == 0
    assert capfdbinary.readouterr().out == b'"ticker","date","close"\n"AAPL",2026-01-26,270.5\n"SPY",2026-01-26,690\n'
    assert main(["query", "--json", QUERY]) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert lines[1] == {"ticker": "SPY", "date": "2026-01-26", "close": 690.0}


@pytest.mark.parametrize(
    ("lake", "sql", "told"),
    [
        ("", "SELECT nothing FROM daily_bars", 'column "nothing" not found'),
        ("", "SELEC", "syntax error"),
        ("file:///nowhere/at/all", QUERY, "There is no lake at file:///nowhere/at/all"),
        ("ftp://somewhere", QUERY, "LAKE_URI is 'ftp://somewhere'"),
    ],
)
def test_an_error_is_one_line(
    lake: str, sql: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lake:
        monkeypatch.setenv("LAKE_URI", lake)
    assert main(["query", sql]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("polygon-pipeline: ")
    assert told.lower() in line.lower()


def test_a_simulated_lake_is_told_in_one_line(file_lake: Lake, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    file_lake.put(layout.FEED_KEY, b'{"feed": "simulated", "format": 1}')
    assert main(["query", "--csv", QUERY]) == 0
    [line] = capfdbinary.readouterr().err.decode().splitlines()
    assert line == f"polygon-pipeline: {file_lake.uri} holds a simulated market, not the real one."


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_command_in_peace() -> None:
    query = "SELECT range AS number FROM range(1000000)"
    command = f"{sys.executable} -m polygon_pipeline query --csv '{query}' | head -2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ('"number"\n0\n', "", 0)
