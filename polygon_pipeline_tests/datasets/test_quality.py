"""Each rule is broken by a row that breaks it, and by nothing else."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.quality import ROW_RULES, check_rows, schema_errors
from polygon_pipeline_tests.support.bars import DAY, HALF_DAY, Row, at, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file


def broken(folder: Path, *rows: Row, day: date = DAY) -> dict[str, int]:
    """How many rows break each rule that is broken; two sound rows are always there too."""
    sound = [normalized_row("AAA"), normalized_row("BBB")]
    verdicts = check_rows(dataset_file(folder / "bars.parquet", [*sound, *rows]), day)
    assert verdicts.keys() == ROW_RULES.keys()
    for verdict in verdicts.values():
        assert len(verdict.examples) == min(verdict.broken, 3)
    return {rule: verdict.broken for rule, verdict in verdicts.items() if verdict.broken}


def test_valid_rows_break_no_rule(tmp_path: Path) -> None:
    first, last = normalized_row("SPY", at(4, 0)), normalized_row("SPY", at(19, 59))
    equal = normalized_row("QQQ", open=5.0, high=5.0, low=5.0, close=5.0, volume=0.0)
    assert broken(tmp_path, first, last, equal) == {}


def test_the_vendors_vwap_may_lie_outside_the_prices_or_be_missing(tmp_path: Path) -> None:
    assert broken(tmp_path, normalized_row("SPY", vwap=99.0), normalized_row("QQQ", vwap=None)) == {}


@pytest.mark.parametrize(
    ("rule", "row"),
    [
        ("prices_in_range", normalized_row("SPY", open=12.5)),
        ("prices_in_range", normalized_row("SPY", close=12.5)),
        ("prices_in_range", normalized_row("SPY", open=8.5)),
        ("prices_in_range", normalized_row("SPY", close=8.5)),
        ("prices_in_range", normalized_row("SPY", high=8.0)),
        ("prices_in_range", normalized_row("SPY", low=13.0)),
        ("prices_in_range", normalized_row("SPY", open=None)),
        ("prices_in_range", normalized_row("SPY", high=None)),
        ("prices_in_range", normalized_row("SPY", low=None)),
        ("prices_in_range", normalized_row("SPY", close=None)),
        ("volume_not_negative", normalized_row("SPY", volume=-1.0)),
        ("volume_not_negative", normalized_row("SPY", volume=None)),
        ("inside_the_session", normalized_row("SPY", at(3, 59))),
        ("inside_the_session", normalized_row("SPY", at(20, 0))),
    ],
)
def test_a_row_breaks_its_rule_and_only_it(tmp_path: Path, rule: str, row: Row) -> None:
    assert broken(tmp_path, row) == {rule: 1}


@pytest.mark.parametrize("field", ["open", "high", "low", "close"])
def test_a_price_that_is_nan_is_out_of_range(tmp_path: Path, field: str) -> None:
    assert broken(tmp_path, normalized_row("SPY") | {field: float("nan")}) == {"prices_in_range": 1}


def test_two_rows_of_one_bar_break_the_rule_of_one_row_per_bar(tmp_path: Path) -> None:
    rows = [normalized_row("SPY"), normalized_row("SPY", close=10.0), normalized_row("SPY", at(12, 1))]
    assert broken(tmp_path, *rows) == {"one_row_a_bar": 2}


def test_after_an_early_close_the_session_ends_at_five(tmp_path: Path) -> None:
    rows = [normalized_row("SPY", at(16, 59, HALF_DAY)), normalized_row("SPY", at(17, 0, HALF_DAY))]
    # The two sound rows are of another day, so they are outside of this one.
    assert broken(tmp_path, *rows, day=HALF_DAY) == {"inside_the_session": 3}


def test_examples_name_the_bar(tmp_path: Path) -> None:
    rows = [normalized_row(ticker, volume=-5.0) for ticker in ("EEE", "DDD", "CCC", "BBB")]
    verdict = check_rows(dataset_file(tmp_path / "bars.parquet", rows), DAY)["volume_not_negative"]
    assert verdict.broken == 4
    assert [example.split()[0] for example in verdict.examples] == ["BBB", "CCC", "DDD"]
    assert all("2026-01-26 17:00" in example and "-5" in example for example in verdict.examples)


def test_a_day_without_a_session_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2026-01-25 is not a trading day"):
        broken(tmp_path, day=date(2026, 1, 25))


def faults(folder: Path, schema: pa.Schema) -> list[str]:
    file = folder / "bars.parquet"
    pq.write_table(schema.empty_table(), file)
    return schema_errors(file, catalog.NORMALIZED_BARS)


def test_the_schema_has_no_faults_against_itself(tmp_path: Path) -> None:
    assert faults(tmp_path, catalog.NORMALIZED_BARS.schema()) == []


def test_missing_extra_changed_and_reordered_columns_are_faults(tmp_path: Path) -> None:
    wanted = catalog.NORMALIZED_BARS.schema()
    vwap = wanted.get_field_index("vwap")
    assert faults(tmp_path, wanted.remove(vwap)) == ["vwap double is missing"]
    assert faults(tmp_path, wanted.append(pa.field("mood", pa.string()))) == ["mood string is not in the schema"]
    assert faults(tmp_path, wanted.set(vwap, pa.field("vwap", pa.int64()))) == [
        "vwap double is missing",
        "vwap int64 is not in the schema",
    ]
    reordered = pa.schema(list(wanted)[::-1])
    assert faults(tmp_path, reordered) == ["the columns are in another order"]
