"""The asset checks: which fail, what they name, and which are left out. The rules themselves: datasets/test_quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.quality import ROW_RULES
from polygon_pipeline.defs.assets import UNREADABLE_OBJECTS
from polygon_pipeline.defs.checks import normalized_checks, traded_minutes_are_there
from polygon_pipeline.defs.partitions import trading_days
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import fetch_dataset, put_dataset
from polygon_pipeline.lake.ledger import encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, NOON, Row, moment, normalized_row, reference_row
from polygon_pipeline_tests.support.day_files import dataset_file, read, reference_file
from polygon_pipeline_tests.support.lakes import put_raw_bars
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of
from polygon_pipeline_tests.support.materializing import materialize
from polygon_pipeline_tests.support.planned_day import PlannedDay

RULES = {"schema", *ROW_RULES, "every_object_readable", "ledger_balances"}


def evaluate(
    lake: Lake,
    dataset: Dataset,
    checks: dg.AssetChecksDefinition,
    metadata: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, dg.AssetCheckEvaluation]:
    """What the checks say of DAY on the lake. metadata: of the materialization before them."""

    @dg.asset(name=dataset.name, partitions_def=trading_days)
    def made() -> dg.MaterializeResult[Any]:
        return dg.MaterializeResult(metadata=metadata)

    result = dg.materialize(
        [made, checks],
        partition_key=DAY.isoformat(),
        instance=dg.DagsterInstance.ephemeral(),
        resources={"lake": LakeResource(s3=S3Resource(), uri=lake.uri)},
        run_config=config,
    )
    assert result.success, "a check that fails does not fail its run"
    evaluations = result.get_asset_check_evaluations()
    assert {evaluation.partition for evaluation in evaluations} <= {DAY.isoformat()}
    return {evaluation.check_name: evaluation for evaluation in evaluations}


def values(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in evaluation.metadata.items()}


def check_bars(
    lake: Lake, folder: Path, rows: Iterable[Row], metadata: Mapping[str, Any] | None = None
) -> dict[str, dg.AssetCheckEvaluation]:
    file = dataset_file(folder / "bars.parquet", rows)
    put_dataset(lake, "normalized_bars", DAY.isoformat(), file)
    return evaluate(lake, catalog.NORMALIZED_BARS, normalized_checks[0], metadata)


def failed(found: Mapping[str, dg.AssetCheckEvaluation]) -> set[str]:
    return {name for name, evaluation in found.items() if not evaluation.passed}


def test_valid_bars_pass_every_rule(file_lake: Lake, tmp_path: Path) -> None:
    found = check_bars(file_lake, tmp_path, [normalized_row("SPY"), normalized_row("QQQ")])
    assert found.keys() == RULES
    assert failed(found) == set()


def test_a_row_that_breaks_a_rule_fails_that_rule_alone_and_is_named(file_lake: Lake, tmp_path: Path) -> None:
    rows = [normalized_row("BAD", volume=-5.0), normalized_row("GOOD")]
    found = check_bars(file_lake, tmp_path, rows)
    assert found.keys() == RULES
    assert failed(found) == {"volume_not_negative"}
    shown = values(found["volume_not_negative"])
    assert shown["rows"] == 1
    [example] = shown["examples"]
    assert example.startswith("BAD 2026-01-26 17:00")
    assert values(found["one_row_a_bar"]) == {"rows": 0, "examples": []}


@pytest.mark.xfail(strict=True, reason="the step fails: Dagster takes the checks that are left out for missing outputs")
def test_a_file_without_a_column_fails_the_schema_and_the_other_rules_are_left_out(
    file_lake: Lake, tmp_path: Path
) -> None:
    wanted = catalog.NORMALIZED_BARS.schema()
    schema = wanted.remove(wanted.get_field_index("vwap"))
    file = tmp_path / "bars.parquet"
    pq.write_table(pa.Table.from_pylist([normalized_row("BAD", volume=-5.0)], schema=schema), file)
    put_dataset(file_lake, "normalized_bars", DAY.isoformat(), file)
    found = evaluate(file_lake, catalog.NORMALIZED_BARS, normalized_checks[0])
    assert found.keys() == failed(found) == {"schema"}
    assert values(found["schema"]) == {"errors": ["vwap double is missing"]}


def test_an_object_that_could_not_be_read_fails_its_rule_and_is_named(file_lake: Lake, tmp_path: Path) -> None:
    unreadable = {"raw-data/2026-01-26/SPY/2026-01-26T17:00:00Z.json": "not JSON"}
    found = check_bars(file_lake, tmp_path, [normalized_row()], {UNREADABLE_OBJECTS: unreadable})
    assert failed(found) == {"every_object_readable"}
    assert values(found["every_object_readable"]) == {"objects": list(unreadable)}


@pytest.mark.parametrize(("objects_on_lake", "passes"), [(3, True), (4, True), (2, False)])
def test_a_ledger_that_counts_more_objects_than_there_are_fails(
    objects_on_lake: int, passes: bool, file_lake: Lake, tmp_path: Path
) -> None:
    file_lake.put(layout.ledger_key(DAY, "RUN"), encode_ledger(ledger_of(account_of(3))))
    put_raw_bars(file_lake, DAY, "SPY", minutes=objects_on_lake)
    found = check_bars(file_lake, tmp_path, [normalized_row()])
    assert failed(found) == (set() if passes else {"ledger_balances"})
    shown = values(found["ledger_balances"])
    assert (shown["objects_counted"], shown["objects_on_lake"], shown["bars"]) == (3, objects_on_lake, 3)
    assert shown["errors"] == ([] if passes else ["the ledgers count 3 objects, but only 2 are on the lake"])


def test_a_ledger_whose_account_does_not_add_up_fails_and_the_run_is_named(file_lake: Lake, tmp_path: Path) -> None:
    account = account_of(0)
    account.events = 7
    file_lake.put(layout.ledger_key(DAY, "RUN"), encode_ledger(ledger_of(account)))
    found = check_bars(file_lake, tmp_path, [normalized_row()])
    assert failed(found) == {"ledger_balances"}
    assert values(found["ledger_balances"])["errors"] == ["RUN: 7 events came in, but 0 are accounted for"]


def test_second_bars_are_checked_against_their_own_objects(file_lake: Lake, tmp_path: Path) -> None:
    account = account_of(0)
    count = account.day(DAY, Channel.SECOND)
    account.events = account.bars = count.bars = count.objects = 1
    file_lake.put(layout.ledger_key(DAY, "RUN"), encode_ledger(ledger_of(account)))
    file = dataset_file(tmp_path / "bars.parquet", [normalized_row()], catalog.NORMALIZED_SECOND_BARS)
    put_dataset(file_lake, "normalized_second_bars", DAY.isoformat(), file)
    found = evaluate(file_lake, catalog.NORMALIZED_SECOND_BARS, normalized_checks[1])
    assert found.keys() == RULES
    assert failed(found) == {"ledger_balances"}
    assert values(found["ledger_balances"])["objects_counted"] == 1


# The share of traded minutes


@pytest.mark.parametrize(
    ("least_share", "worst"),
    [
        (None, ["BBB: 6 of 10 minutes", "AAA: 9 of 10 minutes"]),
        (0.9, ["BBB: 6 of 10 minutes"]),
        (0.6, []),
    ],
)
def test_tickers_below_the_least_share_of_traded_minutes_fail_and_are_named_worst_first(
    least_share: float | None, worst: list[str], file_lake: Lake, tmp_path: Path
) -> None:
    traded = [(ticker, minute) for ticker in ("AAA", "BBB", "CCC") for minute in range(10)]
    missing = {"AAA": 1, "BBB": 4, "CCC": 0}
    bars = {(ticker, minute): "collected" for ticker, minute in traded if minute >= missing[ticker]}
    put_dataset(file_lake, "bar_coverage", DAY.isoformat(), PlannedDay(tmp_path / "day", bars, traded).file())
    name = traded_minutes_are_there.check_key.name
    config = {} if least_share is None else {"ops": {f"bar_coverage_{name}": {"config": {"least_share": least_share}}}}
    [found] = evaluate(file_lake, catalog.BAR_COVERAGE, traded_minutes_are_there, config=config).values()
    assert found.passed == (not worst)
    assert values(found) == {"tickers_below": len(worst), "least_share": least_share or 0.99, "worst": worst}


@pytest.mark.slow
def test_the_check_of_a_day_passes_when_its_lost_minutes_are_repaired_and_fails_when_they_are_not(
    file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAKE_URI", file_lake.uri)
    day = DAY.isoformat()
    minutes = [(ticker, NOON + 60_000 * minute) for ticker in ("SPY", "QQQ") for minute in range(100)]
    known = reference_file(tmp_path / "reference.parquet", [reference_row(*minute) for minute in minutes])
    put_dataset(file_lake, "reference_bars", day, known)
    with dg.DagsterInstance.ephemeral() as instance:
        [whole] = _of_coverage(materialize(instance, ["normalized_bars", "bar_coverage"], day))
        assert whole.passed
        # As if the history had come after the bars were made, of which one ticker had hardly any.
        kept = [row for row in read(fetch_dataset(file_lake, "normalized_bars", day, tmp_path)) if _is_kept(row)]
        put_dataset(file_lake, "normalized_bars", day, dataset_file(tmp_path / "kept.parquet", kept))
        [short] = _of_coverage(materialize(instance, ["bar_coverage"], day))
    assert not short.passed
    assert values(short)["worst"] == ["QQQ: 1 of 100 minutes"]


def _is_kept(row: Row) -> bool:
    return bool(row["ticker"] == "SPY" or row["timestamp"] == moment(NOON))


def _of_coverage(result: dg.ExecuteInProcessResult) -> list[dg.AssetCheckEvaluation]:
    return [check for check in result.get_asset_check_evaluations() if check.asset_key.path == ["bar_coverage"]]
