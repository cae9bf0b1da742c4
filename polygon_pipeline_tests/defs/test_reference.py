"""The vendor's history in Dagster: what is materialized, skipped and failed, and what a gap asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import dagster as dg
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.reference import repair_sensor
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import fetch_dataset, put_dataset
from polygon_pipeline.lake.ledger import Account, Gap, Ledger, encode_ledger
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.simulator.rest_server import HistoryServer, RestFault, RestFaultType
from polygon_pipeline.simulator.synthetic import SyntheticMarket

KEY = "the-key-that-nobody-may-see-91c4"
DAYS = ["2026-01-26", "2026-01-27", "2026-01-28"]
DATASETS = ["normalized_bars", "bars_5m", "bars_15m", "bars_1h", "daily_bars", "bar_coverage"]
MARKET = SyntheticMarket(["AAPL", "BRK.B"])


@pytest.fixture
def lake_of_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_TICKERS", "AAPL,BRK.B")
    monkeypatch.setenv("POLYGON_REST_REQUESTS_PER_MINUTE", "6000")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    return open_lake((tmp_path / "lake").as_uri(), lambda: NotImplemented)


@contextmanager
def vendor(monkeypatch: pytest.MonkeyPatch, faults: Sequence[RestFault] = ()) -> Iterator[HistoryServer]:
    with HistoryServer(MARKET.day_bars, key=KEY, faults=faults) as server:
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        yield server


def materialize(
    instance: dg.DagsterInstance, names: Sequence[str], first: str, last: str | None = None, fails: bool = False
) -> dg.ExecuteInProcessResult:
    job = build_defs().resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(name) for name in names]
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last or first}
    return job.execute_in_process(
        asset_selection=keys,
        instance=instance,
        raise_on_error=not fails,
        **({"partition_key": first} if last is None else {"tags": tags}),
    )


def metadata(instance: dg.DagsterInstance, name: str, day: str) -> dict[str, Any]:
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(name), asset_partitions=[day])
    [record] = instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization
    return {key: value.value for key, value in record.asset_materialization.metadata.items()}


def test_days_nobody_collected_are_made_from_the_history_alone_and_a_second_time_changes_no_file(
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
        shown = metadata(instance, "bar_coverage", DAYS[0])
        assert shown["picture"].startswith("![coverage of 2026-01-26](data:image/png;base64,")
        assert shown["repaired_minutes"] == shown["traded_minutes"] == shown["lost_disconnected"]
        assert metadata(instance, "normalized_bars", DAYS[0])["history"] == "rest"
    rows = pq.read_table(fetch_dataset(lake_of_history, "normalized_bars", DAYS[0], tmp_path)).to_pylist()
    history = MARKET.day_bars(date.fromisoformat(DAYS[0])).to_pylist()
    names = ("open", "high", "low", "close", "volume", "vwap", "transactions")
    assert {(row["ticker"], row["timestamp"].timestamp() * 1000): [row[name] for name in names] for row in rows} == {
        (row["ticker"], row["start_ms"]): [row[name] for name in names] for row in history
    }


def test_a_day_that_the_plan_lacks_fails_with_the_reason(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [RestFault(RestFaultType.NOT_AUTHORIZED)]
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch, refused):
        result = materialize(instance, ["reference_bars"], DAYS[0], fails=True)
        assert not result.success
        [failure] = result.get_step_failure_events()
        text = str(failure.event_specific_data)
        assert "not in the plan" in text
        assert KEY not in text
        assert not instance.get_materialized_partitions(dg.AssetKey("reference_bars"))


def test_a_day_that_is_not_published_is_skipped_and_says_so(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has traded yet by the vendor's word, so there is no list of whom to ask for."""
    monkeypatch.setenv("POLYGON_TICKERS", "*")
    with (
        dg.DagsterInstance.ephemeral() as instance,
        HistoryServer(lambda day: MARKET.day_bars(day).slice(0, 0), key=KEY) as server,
    ):
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        assert materialize(instance, ["reference_bars"], DAYS[0]).success
        assert not instance.get_materialized_partitions(dg.AssetKey("reference_bars"))


def test_the_check_fails_where_traded_minutes_are_missing_and_names_the_ticker(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch):
        materialize(instance, ["reference_bars"], DAYS[0])
        [whole] = _coverage_checks(materialize(instance, DATASETS, DAYS[0]))
        assert whole.passed
        # As if the history had come after the datasets were made, of which one ticker had hardly anything.
        file = fetch_dataset(lake_of_history, "normalized_bars", DAYS[0], Path(mkdtemp()))
        rows = pq.read_table(file)
        pq.write_table(rows.filter(pc.or_(pc.equal(rows["ticker"], "AAPL"), pc.equal(rows["session"], "pre"))), file)
        put_dataset(lake_of_history, "normalized_bars", DAYS[0], file)
        [short] = _coverage_checks(materialize(instance, ["bar_coverage"], DAYS[0]))
        assert not short.passed
        worst: Any = short.metadata["worst"].value
        assert [named.partition(":")[0] for named in worst] == ["BRK.B"]


def _coverage_checks(result: dg.ExecuteInProcessResult) -> list[dg.AssetCheckEvaluation]:
    return [check for check in result.get_asset_check_evaluations() if check.asset_key.path == ["bar_coverage"]]


def _sense(instance: dg.DagsterInstance) -> dg.SensorResult | dg.SkipReason:
    resources = build_defs().resources or {}
    with dg.build_sensor_context(
        instance=instance, resources={name: resources[name] for name in ("polygon", "lake", "s3")}
    ) as context:
        result = repair_sensor(context)
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    return result


def test_a_gap_asks_once_for_the_days_history_and_the_history_answers_it(
    lake_of_history: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = date.fromisoformat(DAYS[0])
    moment = datetime(2026, 1, 26, 15, 30, tzinfo=UTC)
    gap = Gap(moment, moment + timedelta(minutes=3), "lost", moment, moment + timedelta(minutes=2))
    ledger = Ledger("run", "polygon", day, moment, True, False, True, [], Account(), [gap])
    with dg.DagsterInstance.ephemeral() as instance, vendor(monkeypatch):
        assert isinstance(_sense(instance), dg.SkipReason)
        lake_of_history.put(layout.ledger_key(day, "run"), encode_ledger(ledger))
        instance.report_runless_asset_event(dg.AssetMaterialization("raw_bars", partition=DAYS[0]))
        asked = _sense(instance)
        assert isinstance(asked, dg.SensorResult)
        assert [request.partition_key for request in asked.run_requests or []] == [DAYS[0]]
        materialize(instance, ["reference_bars"], DAYS[0])
        assert isinstance(_sense(instance), dg.SkipReason)


def test_without_a_rest_url_the_built_in_simulators_past_is_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(instance, ["reference_bars"], DAYS[0])
        assert metadata(instance, "reference_bars", DAYS[0])["dagster/row_count"] > 1000
