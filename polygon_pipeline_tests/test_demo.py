"""What the project does without a key: its defaults, and which sessions it plays."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline import demo
from polygon_pipeline.collector.launching import Outcome, PastRun, Wait
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.lake import layout
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, trade_date
from polygon_pipeline.settings import load
from polygon_pipeline_tests.support.bars import DAY, record_line
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.materializing import materialize
from polygon_pipeline_tests.support.past_runs import past_runs
from polygon_pipeline_tests.support.real_bars import RecordedBars

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


def test_values_that_are_set_are_kept(tmp_path: Path) -> None:
    environment = {"POLYGON_TICKERS": "SPY", "LAKE_URI": tmp_path.as_uri(), "JOURNAL_DIR": str(tmp_path)}
    found = load(demo.with_defaults(environment))
    assert (found.tickers, found.lake_uri, found.journal_dir) == (("SPY",), tmp_path.as_uri(), tmp_path)


def test_with_a_key_nothing_is_set() -> None:
    assert demo.with_defaults(REAL) == REAL


def test_simulated_and_real_defaults_share_no_folder() -> None:
    simulated, real = load(demo.with_defaults({})), load(demo.with_defaults(REAL))
    assert simulated.lake_uri != real.lake_uri
    assert simulated.journal_dir != real.journal_dir


def test_the_built_in_simulator_has_a_high_request_limit_and_another_server_the_free_plans() -> None:
    assert load(demo.with_defaults({})).rest_requests_per_minute == 6000
    assert load(demo.with_defaults({"POLYGON_REST_URL": "http://127.0.0.1:1"})).rest_requests_per_minute == 5


# Whose lake


@pytest.mark.slow
def test_a_lake_that_another_program_filled_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded_bars: RecordedBars
) -> None:
    lake = local_lake(tmp_path / "lake")
    bars = recorded_bars.bars()[:60]
    for bar in bars:
        start_ms = int(bar["start_ms"])
        key = layout.raw_key(Channel.MINUTE, trade_date(start_ms), bar["ticker"], start_ms)
        lake.put(key, record_line(bar["ticker"], start_ms, float(bar["close"])))
    before = {key: lake.get(key) for key in lake.keys("")}
    assert len(before) == 60
    for name, value in {
        "LAKE_URI": lake.uri,
        "JOURNAL_DIR": str(tmp_path / "journal"),
        "POLYGON_TICKERS": bars[0]["ticker"],
        "POLYGON_HISTORY_START": "2026-01-01",
    }.items():
        monkeypatch.setenv(name, value)
    day = trade_date(int(bars[0]["start_ms"])).isoformat()
    config = {"ops": {"collect_aggregates": {"config": {"session_date": day, "stop_after_seconds": 30}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(dg.Failure, match="holds data of another program"):
            build_defs().get_job_def("collect_aggregates").execute_in_process(run_config=config, instance=instance)
        assert not materialize(instance, ["reference_bars"], day, fails=True).success
    assert {key: lake.get(key) for key in lake.keys("")} == before


# Which sessions are played

_moments = st.integers(0, 11 * 86_400).map(
    lambda seconds: datetime(2026, 1, 23, tzinfo=UTC) + timedelta(seconds=seconds)
)


@given(data=st.data(), now=_moments)
def test_the_demo_plays_its_sessions_in_order_and_then_waits(data: st.DataObject, now: datetime) -> None:
    runs: list[PastRun] = []
    played = []
    for _ in range(4 * demo.SESSIONS):
        decision = demo.decide(now, now, runs)
        if isinstance(decision, Wait):
            break
        assert decision.attempt == 1 + sum(run.session_date == decision.session_date for run in runs)
        attempts = decision.attempt
        ends = [Outcome.SUCCEEDED, Outcome.STOPPED, *([Outcome.INTERRUPTED, Outcome.FAILED] if attempts == 1 else [])]
        outcome = data.draw(st.sampled_from(ends))
        runs.insert(0, PastRun(decision.session_date, outcome, now))
        if outcome in (Outcome.SUCCEEDED, Outcome.STOPPED):
            played.append(decision.session_date)
    assert played == completed_sessions(now, demo.SESSIONS)
    assert isinstance(decision, Wait)
    assert "are played" in decision.reason


@given(data=st.data(), now=_moments, loaded_at=_moments)
def test_nothing_is_played_beside_an_active_run(data: st.DataObject, now: datetime, loaded_at: datetime) -> None:
    days = [DAY, DAY - timedelta(days=3), DAY + timedelta(days=1), *completed_sessions(now, 2)]
    runs = data.draw(past_runs(now, days, active=True))
    assert isinstance(demo.decide(now, loaded_at, runs), Wait)
