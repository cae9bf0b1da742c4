"""The collecting op: how a run that cannot succeed ends. Whole runs: test_main_job."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import dagster as dg
import pytest

from polygon_pipeline import demo
from polygon_pipeline.collector import launching
from polygon_pipeline.collector.collector import Plan
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import collect
from polygon_pipeline.defs.partitions import URGENT
from polygon_pipeline.defs.supervision import STOPPED_TAG, TERMINATED_BY_HAND, StopRequest
from polygon_pipeline.settings import load
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.feeds import event
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.waiting import until


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


@pytest.mark.parametrize(("channels", "for_good"), [("AM", False), ("T", True)])
def test_a_run_that_finds_no_credentials_is_tried_again_and_one_whose_configuration_is_wrong_is_not(
    channels: str, for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"LAKE_URI": "s3://bucket", "POLYGON_API_KEY": "a-key", "POLYGON_TICKERS": "SPY"}
    for name, value in {**environment, "POLYGON_CHANNELS": channels}.items():
        monkeypatch.setenv(name, value)
    job = build_defs().get_job_def("collect_aggregates")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        run = instance.get_run_by_id(result.run_id)
    assert run
    assert not result.success
    assert (collect.FAILED_FOR_GOOD_TAG in run.tags) == for_good


def test_a_termination_by_hand_is_noted_when_it_comes_and_not_when_the_run_has_drained() -> None:
    stop = StopRequest()
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"))
        context = cast(dg.OpExecutionContext, SimpleNamespace(instance=instance, run_id=run.run_id))
        assert collect._terminated(context, stop) is None
        instance.report_run_canceling(run)
        stop.received = True
        assert collect._terminated(context, stop) == "terminated"
        noted = instance.get_run_by_id(run.run_id)
    assert noted
    assert noted.tags[STOPPED_TAG] == TERMINATED_BY_HAND


@pytest.mark.slow
def test_a_run_that_is_terminated_by_hand_ends_canceled_and_says_what_is_safe_and_what_is_not_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "simulator")
    monkeypatch.setenv("POLYGON_TICKERS", "SPY,IBM")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    run_config = {"ops": {"collect_aggregates": {"config": {"session_date": DAY.isoformat()}}}}
    feed = [event(ticker, minute) for minute in range(5) for ticker in ("SPY", "IBM")]
    with Exchange(feed, speed=0) as exchange, dg.DagsterInstance.ephemeral() as instance:

        class Terminated(StopRequest):
            """Terminate is pressed when the feed has played."""

            @property
            def received(self) -> bool:
                [run] = instance.get_runs()
                if exchange.finished.is_set() and run.status is dg.DagsterRunStatus.STARTED:
                    instance.report_run_canceling(run)
                return exchange.finished.is_set()

            @received.setter
            def received(self, _: bool) -> None: ...

        monkeypatch.setattr(collect, "StopRequest", Terminated)
        monkeypatch.setattr(launching, "session_end", lambda _: datetime.max.replace(tzinfo=UTC))
        monkeypatch.setenv("POLYGON_WEBSOCKET_URL", exchange.url)
        job = build_defs().get_job_def("collect_aggregates")
        result = job.execute_in_process(run_config=run_config, instance=instance, raise_on_error=False)
        [run] = instance.get_runs()
        checkpoint = instance.get_latest_materialization_event(dg.AssetKey("raw_bars"))
        ended = next(entry for entry in result.all_events if entry.event_type_value == "PIPELINE_CANCELED")
    assert run.status is dg.DagsterRunStatus.CANCELED
    assert run.tags[STOPPED_TAG] == TERMINATED_BY_HAND
    failure = result.failure_data_for_node("collect_aggregates")
    assert failure
    assert failure.user_failure_data
    assert failure.user_failure_data.description == (
        "Terminated by hand at 09:35 New York. 10 bars, 2 of 2 tickers, no gaps. Everything that was received is on "
        "the lake. Not collected: what the market of 2026-01-26 does from now until 20:00. It stays ended; launch "
        "collect_aggregates to go on. What is missed comes from the vendor's history."
    )
    assert "Error" not in str(ended.event_specific_data), "the run's end shows no stack"
    assert checkpoint
    assert checkpoint.get_dagster_event().message == (
        "09:35 New York: 10 bars, 2 of 2 tickers, no gaps, complete through 09:33, nothing waits"
    )


def test_a_live_feed_judges_silence_by_the_market_and_a_simulated_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "quiet_limit", lambda _: 5.0)

    def plan_of(**environment: str) -> Plan:
        wanted = load({"POLYGON_TICKERS": "SPY", **environment})
        return collect._plan("run-id", wanted, collect.CollectConfig(), DAY, "ws://127.0.0.1:1")

    live, simulated = plan_of(POLYGON_API_KEY="a-key"), plan_of()
    assert (live.quiet_limit(), live.time_base) == (5.0, "processing")
    assert (simulated.quiet_limit(), simulated.time_base) == (None, "event")


@pytest.mark.slow
def test_with_a_port_the_run_serves_its_figures_and_the_days_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [port] = free_ports(1)
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("POLYGON_METRICS_PORT", str(port))
    monkeypatch.setattr(demo, "SPEED", 10_000.0)
    served: list[str] = []

    def scrape() -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=9) as answer,
        ):
            served.append(answer.read().decode())
        return bool(served) and "polygon_day_state" in served[-1]

    scraping = threading.Thread(target=until, args=(scrape, "the day's state is served"))
    scraping.start()
    job = build_defs().get_job_def("collect_aggregates")
    config = {"stop_after_seconds": 8.0, "checkpoint_seconds": 0.3}
    with dg.DagsterInstance.ephemeral() as instance:
        run_config = {"ops": {"collect_aggregates": {"config": config}}}
        assert job.execute_in_process(run_config=run_config, instance=instance).success
    scraping.join()
    assert 'polygon_day_state{state="' in served[-1]
    assert "polygon_bars_total" in served[-1]


def test_the_collector_goes_before_every_other_run_and_beside_none_of_its_own() -> None:
    job = build_defs().get_job_def("collect_aggregates")
    others = [other.tags for other in build_defs().get_repository_def().get_all_jobs() if other.name != job.name]
    assert int(job.tags["dagster/priority"]) > max(int(tags.get("dagster/priority", 0)) for tags in others)
    assert int(job.tags["dagster/priority"]) > int(URGENT["dagster/priority"])
    assert collect.collect_aggregates.pool == "collector"
