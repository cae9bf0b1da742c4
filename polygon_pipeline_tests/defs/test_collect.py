"""The collecting op: how a run that cannot succeed ends. Whole runs: test_main_job."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.simulator.exchange import Exchange


@pytest.mark.slow
def test_a_wrong_key_fails_the_run_at_once_and_names_the_variable_to_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "not-the-key")
    monkeypatch.setenv("POLYGON_TICKERS", "SPY,IBM")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    job = build_defs().get_job_def("collect_aggregates")
    run_config = {"ops": {"collect_aggregates": {"config": {"stop_after_seconds": 60}}}}
    with Exchange([], key="the-key") as exchange, dg.DagsterInstance.ephemeral() as instance:
        monkeypatch.setenv("POLYGON_WEBSOCKET_URL", exchange.url)
        with pytest.raises(dg.Failure, match="POLYGON_API_KEY") as failure:
            job.execute_in_process(run_config=run_config, instance=instance)
    assert "not-the-key" not in str(failure.value)
    assert failure.value.allow_retries is False
