"""The vendor's history in Dagster: what is materialized, skipped and failed, and what a gap asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]

from polygon_pipeline.datasets.catalog import DERIVED
from polygon_pipeline.datasets.day_state import DayState
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.defs.reference import reference_assets, repair_sensor, reported_status
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import fetch_dataset
from polygon_pipeline.lake.ledger import SESSION_OVER, Account, Connection, Gap, encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.simulator.rest_server import HistoryServer, RestFault, RestFaultType
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.ledgers import ledger_of
from polygon_pipeline_tests.support.materializing import latest_metadata, materialize

KEY = "the-key-that-nobody-may-see-91c4"
DAYS = ["2026-01-26", "2026-01-27", "2026-01-28"]
DATASETS = ["normalized_bars", *(dataset.name for dataset in DERIVED), "bar_coverage", "session_report"]
MARKET = SyntheticMarket(["AAPL", "BRK.B"])


@pytest.fixture
def lake_of_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_TICKERS", "AAPL,BRK.B")
    monkeypatch.setenv("POLYGON_REST_REQUESTS_PER_MINUTE", "6000")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    return local_lake(tmp_path / "lake")


@contextmanager
def vendor(monkeypatch: pytest.MonkeyPatch, faults: Sequence[RestFault] = ()) -> Iterator[HistoryServer]:
    with HistoryServer(MARKET.day_bars, key=KEY, faults=faults) as server:
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        yield server


@pytest.mark.parametrize(("key_id", "pool"), [("", "history"), ("an-id", "flat_files")])
def test_flat_files_have_a_pool_of_their_own_that_may_be_larger_than_that_of_rest(key_id: str, pool: str) -> None:
    environment = {"POLYGON_API_KEY": KEY, "POLYGON_FLAT_FILES_KEY_ID": key_id}
    assets = reference_assets(Project.from_environment(environment))
    assert {asset.op.pool for asset in assets} == {pool}


def test_runs_of_a_backfill_have_as_many_days_as_the_environment_says_at_the_most() -> None:
    policies = {
        key.to_user_string(): asset.backfill_policy
        for asset in build_defs(Project.from_environment({"POLYGON_DAYS_PER_RUN": "5"})).assets or ()
        if isinstance(asset, dg.AssetsDefinition) and asset.partitions_def
        for key in asset.keys
    }
    for name in ("reference_bars", "normalized_bars", "daily_bars"):
        assert policies[name] == dg.BackfillPolicy.multi_run(max_partitions_per_run=5)


@pytest.mark.slow
def test_days_that_were_not_collected_are_made_from_the_history_and_a_second_run_changes_no_file(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch) as server:
        made: list[dict[Path, bytes]] = []
        for _ in range(2):
            materialize(instance, ["reference_bars"], DAYS[0], DAYS[-1])
            assert sorted(instance.get_materialized_partitions(dg.AssetKey("reference_bars"))) == DAYS
            for day in DAYS[:2]:
                assert materialize(instance, DATASETS, day).success
            made.append({file: file.read_bytes() for file in (tmp_path / "lake" / "datasets").rglob("*.parquet")})
        assert len(made[0]) == 3 + 2 * len(DATASETS)
        assert made[0] == made[1]
        assert len(server.requests) == 2 * 2  # one a ticker, however many days
        shown = latest_metadata(instance, "bar_coverage", DAYS[0])
        assert shown["picture"].startswith("![bar_coverage of 2026-01-26](data:image/png;base64,")
        assert shown["not_collected_minutes"] == shown["traded_minutes"] > 0
        assert shown["repaired_minutes"] == shown["lost_disconnected"] == 0, "nothing was lost that was not collected"
        assert shown["day_state"] == "final"
        assert latest_metadata(instance, "normalized_bars", DAYS[0])["history"] == "rest"
    rows = pq.read_table(fetch_dataset(lake_of_history, "normalized_bars", DAYS[0], tmp_path)).to_pylist()
    history = MARKET.day_bars(date.fromisoformat(DAYS[0])).to_pylist()
    names = ("open", "high", "low", "close", "volume", "vwap", "transactions")
    assert {(row["ticker"], row["timestamp"].timestamp() * 1000): [row[name] for name in names] for row in rows} == {
        (row["ticker"], row["start_ms"]): [row[name] for name in names] for row in history
    }


@pytest.mark.slow
def test_the_vendors_day_stands_beside_ours_and_the_check_says_in_words_how_they_compare(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {("BRK.B", date.fromisoformat(DAYS[0])): {"low": 1.25}}
    with (
        dg.DagsterInstance.ephemeral() as instance,
        HistoryServer(MARKET.day_bars, key=KEY, daily_changes=changes) as server,
    ):
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        materialize(instance, ["reference_bars", "reference_daily_bars"], DAYS[0])
        result = materialize(instance, [*DATASETS, "daily_differences"], DAYS[0])
        [check] = [
            found for found in result.get_asset_check_evaluations() if found.check_name.startswith("differences")
        ]
        shown = latest_metadata(instance, "daily_differences", DAYS[0])
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.WARN
    assert "BRK.B low: ours" in str(check.metadata["unexplained"].value)
    assert shown["outcome"] == check.metadata["outcome"].value
    assert "1 differ for reasons that the minutes show, 1 in values that nothing explains" in shown["outcome"]
    rows = pq.read_table(fetch_dataset(lake_of_history, "daily_bars", DAYS[0], tmp_path)).to_pylist()
    assert all(row["official_close"] and row["official_close_source"] == "vendor_daily" for row in rows)


def test_the_vendors_own_client_lists_the_day_that_is_stored(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch) as server:
        assert materialize(instance, ["reference_daily_bars"], DAYS[0]).success
        theirs = RESTClient(KEY, base=server.url).get_grouped_daily_aggs(DAYS[0], adjusted=False, include_otc=True)
    ours = pq.read_table(fetch_dataset(lake_of_history, "reference_daily_bars", DAYS[0], tmp_path)).to_pylist()
    names = ("ticker", "open", "high", "low", "close", "volume", "vwap", "transactions")
    assert [tuple(row[name] for name in names) for row in ours] == sorted(
        tuple(getattr(day, name) for name in names) for day in theirs
    )
    assert len(ours) == 2


def test_a_day_that_the_plan_does_not_include_fails_with_the_reason(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [RestFault(RestFaultType.NOT_AUTHORIZED, times=None)]
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch, refused):
        result = materialize(instance, ["reference_bars"], DAYS[0], fails=True)
        assert not result.success
        [failure] = result.get_step_failure_events()
        text = str(failure.event_specific_data)
        assert "not in the plan" in text
        assert KEY not in text
        assert not instance.get_materialized_partitions(dg.AssetKey("reference_bars"))


def test_a_day_that_is_not_published_is_skipped(lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor knows of no trade yet, so there is no list of tickers to ask for."""
    monkeypatch.setenv("POLYGON_TICKERS", "*")
    with (
        dg.DagsterInstance.ephemeral() as instance,
        HistoryServer(lambda day: MARKET.day_bars(day).slice(0, 0), key=KEY) as server,
    ):
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        assert materialize(instance, ["reference_bars"], DAYS[0]).success
        assert not instance.get_materialized_partitions(dg.AssetKey("reference_bars"))


def _sense(instance: dg.DagsterInstance) -> dg.SensorResult | dg.SkipReason:
    resources = build_defs().resources or {}
    with dg.build_sensor_context(
        instance=instance, resources={name: resources[name] for name in ("polygon", "lake")}
    ) as context:
        result = repair_sensor(context)
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    return result


@pytest.mark.slow
def test_a_gap_requests_the_days_history_after_growing_pauses_until_it_is_materialized(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = date.fromisoformat(DAYS[0])
    moment = datetime(2026, 1, 26, 15, 30, tzinfo=UTC)
    gap = Gap(moment, moment + timedelta(minutes=3), "lost", moment, moment + timedelta(minutes=2))
    ledger = ledger_of(Account(), run="run", write_objects=False, gaps=[gap])
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch):
        assert isinstance(_sense(instance), dg.SkipReason)
        lake_of_history.put(layout.ledger_key(day, "run"), encode_ledger(ledger))
        instance.report_runless_asset_event(dg.AssetMaterialization("raw_bars", partition=DAYS[0]))
        asked = _sense(instance)
        assert isinstance(asked, dg.SensorResult)
        [request] = asked.run_requests or []
        assert request.partition_key == DAYS[0]
        assert request.asset_selection == [dg.AssetKey("reference_bars")], "the vendor's day mends no gap"
        failed = instance.create_run_for_job(build_defs().get_job_def("collect_aggregates"), tags=dict(request.tags))
        waits = _sense(instance)
        assert isinstance(waits, dg.SkipReason), "it is under way"
        instance.report_run_failed(failed)
        waits = _sense(instance)
        assert isinstance(waits, dg.SkipReason), "it has just failed"
        assert f"asked again: {DAYS[0]} from" in (waits.skip_message or "")
        materialize(instance, ["reference_bars", "reference_daily_bars"], DAYS[0])
        assert isinstance(_sense(instance), dg.SkipReason)


@pytest.mark.slow
def test_what_a_machine_lost_with_its_disk_is_asked_for_until_the_day_is_final(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger never gets an end. Another machine's run has collected the rest."""
    day = date.fromisoformat(DAYS[0])

    def at(clock: str) -> datetime:
        return datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=UTC)

    lost = Account(connections=[Connection(at("08:59:50"))], last_received_at=at("15:00:04"))
    rest = Account(
        connections=[Connection(at("15:04:10"), at("23:59:50") + timedelta(minutes=80), SESSION_OVER)],
        ended_by=SESSION_OVER,
    )
    for run, account in {"lost": lost, "rest": rest}.items():
        ledger = ledger_of(account, run=run, complete=run == "rest", write_objects=False)
        lake_of_history.put(layout.ledger_key(day, run), encode_ledger(ledger))
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch):
        instance.report_runless_asset_event(dg.AssetMaterialization("raw_bars", partition=DAYS[0]))
        before = reported_status(instance, lake_of_history, day, datetime.now(UTC))
        assert before == (DayState.PARTIAL, "not known, New York: 09:59-10:03", True)
        asked: list[list[str]] = []
        while isinstance(found := _sense(instance), dg.SensorResult) and len(asked) < 5:
            [request] = found.run_requests or []
            asked.append([key.to_user_string() for key in request.asset_selection or []])
            assert request.partition_key
            assert materialize(instance, asked[-1], request.partition_key).success
        assert asked == [["reference_bars"], ["reference_daily_bars"]]
        assert reported_status(instance, lake_of_history, day, datetime.now(UTC)).state is DayState.FINAL
        made = materialize(instance, ["normalized_bars", "daily_bars"], DAYS[0])
        checks = {check.check_name: check.passed for check in made.get_asset_check_evaluations()}
        assert checks["ledger_balances"], "though an account has no end"
        assert all(checks.values())
        assert latest_metadata(instance, "daily_bars", DAYS[0])["day_state"] == "final"


def test_a_lake_that_cannot_be_read_is_waited_for(lake_of_history: Lake) -> None:
    lease = lake_of_history.local_root / layout.LEASE_KEY
    lease.symlink_to(lease)  # whoever opens it gets an error
    with dg.DagsterInstance.ephemeral() as instance:
        waits = _sense(instance)
    assert isinstance(waits, dg.SkipReason)
    assert "the lake cannot be read" in (waits.skip_message or "")


@pytest.mark.slow
def test_without_a_rest_url_the_built_in_simulators_past_is_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(instance, ["reference_bars"], DAYS[0])
        assert latest_metadata(instance, "reference_bars", DAYS[0])["dagster/row_count"] > 1000
