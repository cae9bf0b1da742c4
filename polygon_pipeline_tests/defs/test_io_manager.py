"""The Parquet IO manager: what assets return is stored as one file per day, and loaded as the annotation asks."""

from pathlib import Path

import dagster as dg
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.defs.io_manager import ParquetIOManager
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.defs.resources import LakeResource

_DAY = "2026-11-20"
_TABLE = pa.table(
    {
        "ticker": ["IBM", "SPY"],
        "timestamp": pa.array([1_795_000_000_000_000, 1_795_000_060_000_000], pa.timestamp("us", tz="UTC")),
        "close": [1.5, 2.5],
    }
)


TRADING_DAYS = Project().trading_days


@dg.asset(partitions_def=TRADING_DAYS, io_manager_key="parquet")
def as_table() -> pa.Table:
    return _TABLE


@dg.asset(partitions_def=TRADING_DAYS, io_manager_key="parquet")
def as_frame() -> pd.DataFrame:
    frame: pd.DataFrame = _TABLE.to_pandas()
    return frame


@dg.asset(partitions_def=TRADING_DAYS, io_manager_key="parquet")
def as_file(lake: LakeResource) -> Path:
    file = lake.scratch() / "made.parquet"
    pq.write_table(_TABLE, file)
    return file


@dg.asset(partitions_def=TRADING_DAYS, io_manager_key="parquet")
def empty() -> pa.Table:
    return _TABLE.slice(0, 0)


@pytest.fixture(autouse=True)
def lake_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE_URI", tmp_path.as_uri())


def _materialize(*assets: dg.AssetsDefinition, day: str | None = _DAY) -> dg.ExecuteInProcessResult:
    lake = LakeResource(s3=S3Resource())
    resources = {"lake": lake, "parquet": ParquetIOManager(lake=lake)}
    return dg.materialize(list(assets), resources=resources, partition_key=day)


@pytest.mark.parametrize("made", [as_table, as_frame, as_file])
def test_tables_frames_and_files_are_stored_as_one_parquet_file_per_day(
    tmp_path: Path, made: dg.AssetsDefinition
) -> None:
    _materialize(made)
    name = made.key.to_user_string()
    stored = pq.read_table(tmp_path / "datasets" / name / f"date={_DAY}" / "data.parquet", partitioning=None)
    assert stored.to_pylist() == _TABLE.to_pylist()


def test_an_input_has_the_type_of_its_annotation() -> None:
    seen: dict[str, object] = {}

    @dg.asset(partitions_def=TRADING_DAYS)
    def reads_a_table(as_table: pa.Table) -> None:
        seen["table"] = as_table

    @dg.asset(partitions_def=TRADING_DAYS)
    def reads_a_frame(as_table: pd.DataFrame) -> None:
        seen["frame"] = as_table

    @dg.asset(partitions_def=TRADING_DAYS)
    def reads_a_file(as_table: Path) -> None:
        seen["file"] = pq.read_table(as_table, partitioning=None)

    _materialize(as_table, reads_a_table, reads_a_frame, reads_a_file)
    assert seen["table"].to_pylist() == _TABLE.to_pylist()  # type: ignore[attr-defined]
    assert seen["frame"]["close"].tolist() == [1.5, 2.5]  # type: ignore[index]
    assert seen["file"].num_rows == 2  # type: ignore[attr-defined]


def test_several_days_come_as_a_dict_by_day() -> None:
    seen: dict[str, pa.Table] = {}

    @dg.asset(
        ins={"as_table": dg.AssetIn(partition_mapping=dg.SpecificPartitionsPartitionMapping(["2026-11-19", _DAY]))}
    )
    def reads_days(as_table: dict[str, pa.Table]) -> None:
        seen.update(as_table)

    _materialize(as_table, day="2026-11-19")
    _materialize(as_table, day=_DAY)
    lake = LakeResource(s3=S3Resource())
    dg.materialize(
        [as_table, reads_days],
        selection=[reads_days],
        resources={"lake": lake, "parquet": ParquetIOManager(lake=lake)},
    )
    assert sorted(seen) == ["2026-11-19", _DAY]
    assert all(table.num_rows == 2 for table in seen.values())


def test_an_empty_day_is_a_failure_and_never_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(dg.Failure, match=f"empty of {_DAY} would be empty"):
        _materialize(empty)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_day_that_was_never_made_is_named() -> None:
    @dg.asset(partitions_def=TRADING_DAYS)
    def reads_a_table(as_table: pa.Table) -> None:
        raise AssertionError("there was nothing to read")

    lake = LakeResource(s3=S3Resource())
    result = dg.materialize(
        [as_table, reads_a_table],
        selection=[reads_a_table],
        partition_key=_DAY,
        resources={"lake": lake, "parquet": ParquetIOManager(lake=lake)},
        raise_on_error=False,
    )
    (failed,) = [event for event in result.all_events if event.is_step_failure]
    assert f"as_table has no data of {_DAY}" in str(failed.step_failure_data.error)


def test_every_materialization_describes_its_content(tmp_path: Path) -> None:
    result = _materialize(as_table)
    metadata = result.asset_materializations_for_node("as_table")[0].metadata
    assert metadata["dagster/row_count"].value == 2
    assert metadata["tickers"].value == 2
    assert metadata["dagster/partition_row_count"].value == 2
    assert metadata["first_bar"].value == "2026-11-18 06:06 New York"
    assert metadata["dagster/size_bytes"].value == next(tmp_path.rglob("*.parquet")).stat().st_size
    assert metadata["dagster/uri"].value == f"{tmp_path.as_uri()}/datasets/as_table/date={_DAY}/data.parquet"
    schema = metadata["dagster/column_schema"].value
    assert isinstance(schema, dg.TableSchema)
    assert [column.name for column in schema.columns] == ["ticker", "timestamp", "close"]
    assert "| IBM |" in str(metadata["preview"].value)


@dg.asset(partitions_def=TRADING_DAYS, io_manager_key="parquet")
def hostile() -> pa.Table:
    """A ticker may have any character but a few (market.bars)."""
    tickers = ["A|B", "`code`", "[here](javascript:alert(1))", "<img src=x>", "www.example.com", "http:&#47;x", "**B**"]
    return pa.table({"ticker": tickers, "date": ["x\n| y"] * len(tickers)})


def test_a_preview_shows_text_as_it_is_and_as_nothing_else() -> None:
    metadata = _materialize(hostile).asset_materializations_for_node("hostile")[0].metadata
    lines = str(metadata["preview"].value).splitlines()
    assert len(lines) == 2 + 7
    shown = [line.removeprefix("| ").removesuffix(" | x \\| y |") for line in lines[2:]]
    assert sorted(shown) == sorted(
        [
            r"A\|B",
            r"\`code\`",
            r"\[here\]\(javascript\:alert\(1\)\)",
            r"\<img src\=x\>",
            r"www\.example.com",
            r"http\:\&\#47\;x",
            r"\*\*B\*\*",
        ]
    )
