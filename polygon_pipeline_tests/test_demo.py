"""What the project does without a key: its defaults, and which sessions it plays."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygon_pipeline import demo
from polygon_pipeline.settings import load

REAL = {"POLYGON_API_KEY": "a-key", "POLYGON_TICKERS": "SPY"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("environment", [{}, {"LAKE_URI": "", "JOURNAL_DIR": "", "POLYGON_TICKERS": ""}])
def test_without_a_key_a_watch_list_fills_a_demo_lake(environment: dict[str, str], tmp_path: Path) -> None:
    found = load(demo.with_defaults(environment))
    assert len(found.tickers) > 1
    assert found.lake_uri == (tmp_path / "var/demo/lake").as_uri()
    assert found.journal_dir == tmp_path / "var/demo/journal"


def test_what_is_set_is_kept(tmp_path: Path) -> None:
    environment = {"POLYGON_TICKERS": "SPY", "LAKE_URI": tmp_path.as_uri(), "JOURNAL_DIR": str(tmp_path)}
    found = load(demo.with_defaults(environment))
    assert (found.tickers, found.lake_uri, found.journal_dir) == (("SPY",), tmp_path.as_uri(), tmp_path)


def test_with_a_key_nothing_is_set() -> None:
    assert demo.with_defaults(REAL) == REAL


def test_simulated_and_real_defaults_share_no_folder() -> None:
    simulated, real = load(demo.with_defaults({})), load(demo.with_defaults(REAL))
    assert simulated.lake_uri != real.lake_uri
    assert simulated.journal_dir != real.journal_dir


def test_the_built_in_simulator_is_asked_without_a_plans_limit_and_another_with_it() -> None:
    assert load(demo.with_defaults({})).rest_requests_per_minute == 6000
    assert load(demo.with_defaults({"POLYGON_REST_URL": "http://127.0.0.1:1"})).rest_requests_per_minute == 5
