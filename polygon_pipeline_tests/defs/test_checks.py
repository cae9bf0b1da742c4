"""The asset checks: which fail, what they name, and which are left out. The rules themselves: datasets/test_quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import Dataset
from polygon_pipeline.datasets.day_state import DayState, DayStatus
from polygon_pipeline.datasets.making import MadeDataset
from polygon_pipeline.datasets.quality import ROW_RULES
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.assets import dataset_assets
from polygon_pipeline.defs.checks import LEAST_SHARE, DayResult, as_check_results, check_day, summary
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.dataset_files import fetch_dataset, put_dataset
from polygon_pipeline.lake.ledger import encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, NOON, Row, moment, normalized_row, reference_row
from polygon_pipeline_tests.support.day_files import dataset_file, read, reference_file
from polygon_pipeline_tests.support.lakes import put_raw_bars
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of
from polygon_pipeline_tests.support.materializing import PROJECT, materialize
from polygon_pipeline_tests.support.planned_day import PlannedDay

RULES = {"schema", *ROW_RULES, "every_object_readable", "ledger_balances"}


def evaluate(
    lake: Lake, dataset: Dataset, file: Path, facts: dict[str, Any] | None = None, least_share: float = LEAST_SHARE
) -> dict[str, DayResult]:
    """What the checks say of DAY, by rule."""
    status = DayStatus(DayState.COMPLETE, "", True)
    results = list(check_day(lake, MadeDataset(DAY, dataset, file, status, facts or {}), least_share))
    assert {result.asset for result in results} == {dataset.name}
    return {result.rule: result for result in results}


def values(result: DayResult) -> dict[str, Any]:
    return result.metadata


def check_bars(
    lake: Lake, folder: Path, rows: Iterable[Row], facts: dict[str, Any] | None = None
) -> dict[str, DayResult]:
    return evaluate(lake, catalog.NORMALIZED_BARS, dataset_file(folder / "bars.parquet", rows), facts)


def failed(found: Mapping[str, DayResult]) -> set[str]:
    return {name for name, result in found.items() if not result.passed}


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
    assert shown["broken_rows"] == 1
    [example] = shown["examples"]
    assert example.startswith("BAD 2026-01-26 17:00")
    assert values(found["one_row_a_bar"]) == {"broken_rows": 0, "examples": []}


def test_a_file_without_a_column_fails_the_schema_and_the_other_rules_are_left_out(
    file_lake: Lake, tmp_path: Path
) -> None:
    wanted = catalog.NORMALIZED_BARS.schema()
    schema = wanted.remove(wanted.get_field_index("vwap"))
    file = tmp_path / "bars.parquet"
    pq.write_table(pa.Table.from_pylist([normalized_row("BAD", volume=-5.0)], schema=schema), file)
    found = evaluate(file_lake, catalog.NORMALIZED_BARS, file)
    assert found.keys() == failed(found) == {"schema"}
    assert values(found["schema"]) == {"errors": ["vwap double is missing"]}


def test_an_object_that_could_not_be_read_fails_its_rule_and_is_named(file_lake: Lake, tmp_path: Path) -> None:
    unreadable = {"raw-data/2026-01-26/SPY/2026-01-26T17:00:00Z.json": "not JSON"}
    found = check_bars(file_lake, tmp_path, [normalized_row()], {"unreadable_objects": unreadable})
    assert failed(found) == {"every_object_readable"}
    assert values(found["every_object_readable"]) == {
        "unreadable_objects": ["raw-data/2026-01-26/SPY/2026-01-26T17:00:00Z.json: not JSON"]
    }


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


@pytest.mark.parametrize(
    ("live", "state", "passes"),
    [("RUN", DayState.COMPLETE, True), (None, DayState.COMPLETE, False), (None, DayState.FINAL, True)],
)
def test_an_account_without_an_end_fails_unless_its_run_lives_or_the_history_is_merged(
    live: str | None, state: DayState, passes: bool, file_lake: Lake, tmp_path: Path
) -> None:
    if live:
        file_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding(live)))
    file_lake.put(layout.ledger_key(DAY, "RUN"), encode_ledger(ledger_of(account_of(0), complete=False)))
    file = dataset_file(tmp_path / "bars.parquet", [normalized_row()])
    made = MadeDataset(DAY, catalog.NORMALIZED_BARS, file, DayStatus(state, "", True), {})
    balances = {result.rule: result for result in check_day(file_lake, made)}["ledger_balances"]
    assert balances.passed == passes
    assert values(balances)["unfinished"] == ["RUN"]
    assert passes or "nobody collects in its name" in values(balances)["errors"][0]


def test_second_bars_are_checked_against_their_own_objects(file_lake: Lake, tmp_path: Path) -> None:
    account = account_of(0)
    count = account.day(DAY, Channel.SECOND)
    account.events = account.bars = count.bars = count.objects = 1
    file_lake.put(layout.ledger_key(DAY, "RUN"), encode_ledger(ledger_of(account)))
    file = dataset_file(tmp_path / "bars.parquet", [normalized_row()], catalog.NORMALIZED_SECOND_BARS)
    found = evaluate(file_lake, catalog.NORMALIZED_SECOND_BARS, file)
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
    file = PlannedDay(tmp_path / "day", bars, traded).file()
    [found] = evaluate(file_lake, catalog.BAR_COVERAGE, file, least_share=least_share or LEAST_SHARE).values()
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
    assert short.metadata["worst"].value == "QQQ: 1 of 100 minutes"


def _is_kept(row: Row) -> bool:
    return bool(row["ticker"] == "SPY" or row["timestamp"] == moment(NOON))


def _of_coverage(result: dg.ExecuteInProcessResult) -> list[dg.AssetCheckEvaluation]:
    evaluations = result.get_asset_check_evaluations()
    return [evaluation for evaluation in evaluations if evaluation.check_name == "traded_minutes_are_there"]


# Over the days of a run


KEY = dg.AssetCheckKey(dg.AssetKey("daily_bars"), "day_is_complete")


def of_day(passed: bool, severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR) -> list[DayResult]:
    return [DayResult("daily_bars", "day_is_complete", passed, {"state": "partial"}, severity)]


def over_days(*results: list[DayResult]) -> list[dg.AssetCheckResult]:
    days = {DAY + timedelta(days=number): result for number, result in enumerate(results)}
    return list(as_check_results(days, [KEY]))


def test_a_check_passes_where_every_day_of_the_run_does_and_names_the_days_that_do_not() -> None:
    [passed] = over_days(of_day(True), of_day(True))
    assert (passed.passed, passed.metadata["days"].value) == (True, "2 days, 2026-01-26 to 2026-01-27")
    assert passed.metadata["failed_days"].value == "none"
    assert passed.description == "holds for 2 days, 2026-01-26 to 2026-01-27"
    [short] = over_days(of_day(True), of_day(False))
    assert (short.passed, short.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert short.metadata["failed_days"].value == "2026-01-27"
    assert short.description == "fails for 2026-01-27"


def test_of_many_days_that_fail_some_are_named_and_the_others_counted() -> None:
    [result] = over_days(*[of_day(False)] * 25)
    assert (result.description or "").endswith(", 2026-02-14 and 5 more")


def test_a_day_whose_session_runs_is_a_warning() -> None:
    [warned] = over_days(of_day(False, dg.AssetCheckSeverity.WARN))
    assert (warned.passed, warned.severity) == (False, dg.AssetCheckSeverity.WARN)
    [failed_] = over_days(of_day(False, dg.AssetCheckSeverity.WARN), of_day(False))
    assert failed_.severity is dg.AssetCheckSeverity.ERROR


def test_a_check_of_no_day_says_nothing() -> None:
    assert over_days() == []


def test_a_days_checks_fit_into_one_line() -> None:
    assert summary([*of_day(True), *of_day(False)]) == "1 of 2 passed; failed: day_is_complete"
    assert summary(of_day(True)) == "1 of 1 passed"


@pytest.mark.slow
def test_a_check_can_be_run_again_by_itself(file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE_URI", file_lake.uri)
    key = dg.AssetCheckKey(dg.AssetKey("normalized_bars"), "volume_not_negative")
    selection = dg.AssetSelection.checks(key)
    with dg.DagsterInstance.ephemeral() as instance:
        for day in ("2026-01-26", "2026-01-27"):
            put_dataset(file_lake, "normalized_bars", day, dataset_file(tmp_path / "bars.parquet", [normalized_row()]))
            instance.report_runless_asset_event(dg.AssetMaterialization("normalized_bars", partition=day))
        graph = build_defs(PROJECT).get_repository_def().asset_graph
        job = dg.define_asset_job("checks", selection=selection).resolve(asset_graph=graph)
        definitions = dg.Definitions(
            assets=dataset_assets(PROJECT), jobs=[job], resources=dict(build_defs(PROJECT).resources or {})
        )
        result = definitions.get_job_def("checks").execute_in_process(instance=instance)
    [evaluation] = result.get_asset_check_evaluations()
    assert (evaluation.check_name, evaluation.passed) == ("volume_not_negative", True)
    assert evaluation.metadata["days"].value == "2 days, 2026-01-26 to 2026-01-27"


@pytest.mark.parametrize(
    ("state", "is_over", "passed", "severity"),
    [
        (DayState.COLLECTING, False, False, dg.AssetCheckSeverity.WARN),
        (DayState.PARTIAL, False, False, dg.AssetCheckSeverity.WARN),
        (DayState.PARTIAL, True, False, dg.AssetCheckSeverity.ERROR),
        (DayState.COMPLETE, True, True, dg.AssetCheckSeverity.ERROR),
        (DayState.FINAL, True, True, dg.AssetCheckSeverity.ERROR),
    ],
)
def test_a_day_that_is_not_complete_warns_while_its_session_runs_and_fails_after_it(
    state: DayState, is_over: bool, passed: bool, severity: dg.AssetCheckSeverity, file_lake: Lake, tmp_path: Path
) -> None:
    made = MadeDataset(DAY, catalog.DAILY_BARS, tmp_path, DayStatus(state, "why", is_over), {})
    [result] = check_day(file_lake, made)
    assert (result.passed, result.severity) == (passed, severity)
    assert result.metadata == {"state": str(state), "detail": "why"}
