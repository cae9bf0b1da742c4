"""The job that publishes journals without a stream, and the sensor that starts it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.collector.launching import Start, Wait
from polygon_pipeline.collector.lease import Lease
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs import collect, sensors
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline_tests.support.bars import DAY, NOON, plain_bar
from polygon_pipeline_tests.support.journals import finished_journal, frame_of, read_ledger
from polygon_pipeline_tests.support.leases import holding


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def journals(file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk with a lost run's journal of the real feed, while its market is closed."""
    for name, value in {
        "LAKE_URI": file_lake.uri,
        "JOURNAL_DIR": str(tmp_path / "journal"),
        "POLYGON_API_KEY": "a-key",
        "POLYGON_TICKERS": "SPY",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sensors, "decide_live", lambda *_: Wait("the market is closed"))
    finished_journal(tmp_path / "journal", file_lake, [frame_of(plain_bar("SPY", NOON, 1))])
    return tmp_path / "journal"


def _drain(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = build_defs().get_job_def("drain_journals")
    return job.execute_in_process(instance=instance, raise_on_error=False)


def _tick(instance: dg.DagsterInstance) -> dg.RunRequest | str:
    resources = {"polygon": PolygonResource(), "lake": LakeResource(s3=S3Resource())}
    with dg.build_sensor_context(instance=instance, resources=resources) as context:
        result = sensors.leftover_journals_sensor(context)
    if isinstance(result, dg.SkipReason):
        return result.skip_message or ""
    assert isinstance(result, dg.RunRequest)
    return result


def test_the_job_publishes_what_is_left_and_the_datasets_of_its_days_follow(
    instance: dg.DagsterInstance, journals: Path, file_lake: Lake
) -> None:
    result = _drain(instance)
    assert result.success
    [made] = result.asset_materializations_for_node("publish_journals")
    assert (made.asset_key, made.partition) == (dg.AssetKey("raw_bars"), DAY.isoformat())
    assert made.metadata["bars"].value == 1
    assert read_ledger(file_lake).complete
    assert list(journals.iterdir()) == []
    assert _drain(instance).success, "with nothing left there is nothing to do"


def test_beside_a_collector_of_the_same_local_lake_the_job_fails_and_says_whose_it_is(
    instance: dg.DagsterInstance, journals: Path, file_lake: Lake
) -> None:
    at_work = Lease(file_lake, "run-002", "owner")
    at_work.acquire()
    result = _drain(instance)
    at_work.release()
    failure = result.failure_data_for_node("publish_journals")
    assert failure
    assert failure.user_failure_data
    assert "run run-002" in (failure.user_failure_data.description or "")
    assert len(list(journals.iterdir())) == 1


def test_a_journal_that_is_left_where_no_collector_is_at_work_is_asked_for_until_it_is_gone(
    instance: dg.DagsterInstance, journals: Path
) -> None:
    request = _tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert (request.run_key or "").startswith("run-001 and 0 more")
    assert _drain(instance).success
    assert _tick(instance) == "nothing is left on this disk"


def test_a_collector_at_work_or_about_to_start_publishes_what_is_left_itself(
    instance: dg.DagsterInstance, journals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as opening:
        opening.setattr(sensors, "decide_live", lambda *_: Start(DAY, 1))
        assert "about to start" in str(_tick(instance))
    tags = {collect.SESSION_DATE_TAG: DAY.isoformat(), collect.FEED_TAG: "polygon"}
    instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"), tags=tags)
    assert "is at work" in str(_tick(instance))


def test_a_drain_under_way_is_waited_for(instance: dg.DagsterInstance, journals: Path) -> None:
    instance.create_run_for_job(build_defs().get_job_def("drain_journals"))
    assert "being published" in str(_tick(instance))


def test_what_belongs_elsewhere_or_to_the_run_that_collects_is_no_reason(
    instance: dg.DagsterInstance, journals: Path, file_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding("run-001", now=datetime.now(UTC))))
    assert "or of the run that holds" in str(_tick(instance))
    monkeypatch.setenv("LAKE_URI", "s3://no-such-bucket")
    assert "the lake is away" in str(_tick(instance)), "a lake that is away fails no tick"
