"""The blocks of docs/recipes.md, run as they stand there, over a small lake."""

from __future__ import annotations

import re
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import DATASETS, Dataset
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import trading_days
from polygon_pipeline_tests.support.actions import Dividend, Split, put_fetches
from polygon_pipeline_tests.support.bars import Row, at, normalized_row
from polygon_pipeline_tests.support.day_files import dataset_file

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
MONDAY, TUESDAY = date(2026, 1, 26), date(2026, 1, 27)
DAYS = trading_days(date(2026, 1, 20), date(2026, 1, 30))


@pytest.fixture(autouse=True)
def filled(file_lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tickers, of which AAPL rises by a dollar a day, is split on Tuesday and pays a dividend on Monday."""

    def put(dataset: Dataset, day: date, rows: list[Row]) -> None:
        put_dataset(file_lake, dataset.name, day.isoformat(), dataset_file(tmp_path / "rows", rows, dataset))

    for number, day in enumerate(DAYS):
        close = (200.0 + number) / (2 if day >= TUESDAY else 1)
        put(catalog.DAILY_BARS, day, [{"ticker": "AAPL", "close": close}, {"ticker": "SPY", "close": 690.0}])
    for day in (MONDAY, TUESDAY):
        night = [at(21, 30, MONDAY)] if day == TUESDAY else []
        times = (*night, at(4, 0, day), at(9, 30, day), at(19, 59, day))
        put(
            catalog.NORMALIZED_BARS,
            day,
            [
                normalized_row(ticker, time, open=100.25, high=100.5, low=99.75, close=100.3333, volume=1000.4)
                for ticker in ("AAPL", "SPY")
                for time in times
            ],
        )
    put_fetches(file_lake, TUESDAY, [Split(TUESDAY, 1, 2, "AAPL")], [Dividend(MONDAY, 2.04, "AAPL")])
    monkeypatch.setenv("LAKE_URI", file_lake.uri)
    monkeypatch.chdir(tmp_path)


def blocks(title: str, language: str = "python") -> list[str]:
    """The blocks of code below a heading that begins so."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{title}:")]
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(title: str) -> dict[str, Any]:
    """Runs a recipe; gives the names it leaves."""
    names: dict[str, Any] = {}
    for block in blocks(title):
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
    return names


def test_every_recipe_is_run_by_a_test_of_this_file() -> None:
    titles = re.findall(r"^## (\w+):", PAGE.read_text(), re.MULTILINE)
    assert titles == ["pandas", "Lean", "Nautilus", "Athena", "Trino"]


def test_the_backtest_holds_what_rose_across_a_split_and_a_dividend() -> None:
    names = run("pandas")
    close = names["close"]["AAPL"]
    assert close.is_monotonic_increasing  # adjusted: the raw close halves
    held = [day for day, is_held in names["is_held"]["AAPL"].items() if is_held]
    assert held == [pd.Timestamp(day) for day in DAYS[3:]]
    assert names["value"].iloc[-1] == pytest.approx(
        float((1 + close.pct_change()[pd.Timestamp(DAYS[3]) :] / 2).prod())  # half of the money, as SPY does not rise
    )


def test_leans_files_have_its_names_times_and_prices(tmp_path: Path) -> None:
    run("Lean")
    written = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.glob("data/**/*.zip"))
    assert written == [
        f"data/equity/usa/minute/{ticker}/{day}_trade.zip"
        for ticker in ("aapl", "spy")
        for day in ("20260126", "20260127")
    ]
    with zipfile.ZipFile(tmp_path / written[1]) as file:  # Tuesday's, without the bar of Monday night
        assert file.namelist() == ["20260127_aapl_minute_trade.csv"]
        lines = file.read(file.namelist()[0]).decode().splitlines()
    assert lines == [
        f"{hours * 3_600_000 + minutes * 60_000},1002500,1005000,997500,1003333,1000"
        for hours, minutes in ((4, 0), (9, 30), (19, 59))
    ]


def test_nautilus_gets_a_file_with_what_its_wrangler_needs(tmp_path: Path) -> None:
    run("Nautilus")
    [second] = blocks("Nautilus", "python nautilus")
    compile(second, "recipes.md", "exec")
    table = pq.read_table(tmp_path / "AAPL.parquet")
    assert table.schema.field("timestamp").type == pa.timestamp("us", "UTC")
    assert {table.schema.field(name).type for name in ("open", "high", "low", "close", "volume")} == {pa.float64()}
    first = table.slice(0, 1).to_pylist()[0]
    assert first["timestamp"] == datetime(2026, 1, 26, 9, tzinfo=UTC)
    assert (first["open"], first["volume"]) == (100.25 / 2, 1000.4 * 2)


@pytest.mark.parametrize(("title", "dialect"), [("Athena", "athena"), ("Trino", "trino")])
def test_tables_over_the_lake_have_the_columns_of_the_catalog(
    title: str, dialect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sqlglot: Any = pytest.importorskip("sqlglot", reason="sqlglot (of the extra dev) parses them")
    run(title)
    statements = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CREATE")]
    tables = {}
    for statement in statements:
        parsed = sqlglot.parse_one(statement, dialect=dialect)
        location = re.search(r"'s3://bucket/prefix/datasets/(\w+)/'", statement)
        assert location
        assert parsed.find(sqlglot.exp.Table).name == location[1]
        assert re.search(
            r"PARTITIONED BY \(`date` date\)|\"date\" date\) .*partitioned_by = ARRAY\['date'\]", statement
        )
        tables[location[1]] = [column.name for column in parsed.find_all(sqlglot.exp.ColumnDef)]
    for dataset in DATASETS:
        if dataset.columns:
            columns = [column.name for column in dataset.columns if column.name != "date"]
            assert sorted(set(tables[dataset.name]) - {"date"}) == sorted(columns)
