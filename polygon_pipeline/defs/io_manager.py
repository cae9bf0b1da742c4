"""The IO manager for daily partitioned Parquet: what assets return goes to the lake, what they ask for comes from it.

Belongs here: Dagster's side of storing a dataset, and the metadata every materialization shows. Does not belong
here: keys and files (lake.datasets).

Takes and gives, by type annotation: a pyarrow Table, a pandas DataFrame, or the Path of a local Parquet file, which
is the way for days larger than memory. An input of several partitions is a dict of them by partition key.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import dagster as dg

from polygon_pipeline.defs.resources import LakeResource

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_PREVIEW_TICKERS = 8


class ParquetIOManager(dg.ConfigurableIOManager):
    """Stores `datasets/NAME/date=YYYY-MM-DD/data.parquet` for an asset NAME partitioned by trading day."""

    lake: LakeResource

    def handle_output(self, context: dg.OutputContext, obj: "pa.Table | pd.DataFrame | Path") -> None:
        """Stores one partition. Raises dg.Failure for an empty one: no data is a failure, never an empty file."""
        from polygon_pipeline.lake.datasets import put_dataset
        from polygon_pipeline.market.transform import describe

        name, day = context.asset_key.path[-1], context.partition_key
        file = obj if isinstance(obj, Path) else _write_parquet(obj, self.lake.scratch() / "data.parquet")
        found = describe(file)
        if not found.rows:
            raise dg.Failure(f"{name} of {day} would be empty; nothing was written.", allow_retries=False)
        lake = self.lake.open()
        uri = put_dataset(lake, name, day, file)
        context.add_output_metadata(
            {
                "dagster/row_count": found.rows,
                "tickers": found.tickers,
                "first_bar": found.first,
                "last_bar": found.last,
                "bytes": file.stat().st_size,
                "uri": dg.MetadataValue.text(uri),
                "dagster/column_schema": _column_schema(file),
                "preview": dg.MetadataValue.md(_preview(file)),
            }
        )

    def load_input(self, context: dg.InputContext) -> Any:
        """Fetches one partition, or a dict of several. Raises MissingDataset for one that was never made."""
        annotation = context.dagster_type.typing_type
        if len(context.asset_partition_keys) > 1:
            (_, kind) = get_args(annotation)
            return {day: self._load(context, day, kind) for day in context.asset_partition_keys}
        return self._load(context, context.asset_partition_key, annotation)

    def _load(self, context: dg.InputContext, day: str, annotation: Any) -> "pa.Table | pd.DataFrame | Path":
        import pandas as pd
        import pyarrow.parquet as pq

        from polygon_pipeline.lake.datasets import fetch_dataset

        file = fetch_dataset(self.lake.open(), context.asset_key.path[-1], day, self.lake.scratch())
        if annotation is Path:
            return file
        if annotation is pd.DataFrame:
            return pd.read_parquet(file, dtype_backend="pyarrow")
        return pq.read_table(file, partitioning=None)


def _write_parquet(obj: "pa.Table | pd.DataFrame", file: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = obj if isinstance(obj, pa.Table) else pa.Table.from_pandas(obj, preserve_index=False)
    pq.write_table(table, file, compression="zstd")
    return file


def _column_schema(file: Path) -> dg.TableSchema:
    import pyarrow.parquet as pq

    from polygon_pipeline.market import schemas

    described = {
        field.name: field.metadata[b"description"].decode()
        for schema in (
            schemas.BAR_COVERAGE,
            schemas.RESAMPLED_BARS,
            schemas.DAILY_BARS,
            schemas.NORMALIZED_BARS,
        )
        for field in schema
    }
    columns = pq.read_schema(file)
    return dg.TableSchema(
        [dg.TableColumn(field.name, str(field.type), description=described.get(field.name)) for field in columns]
    )


def _preview(file: Path) -> str:
    """The last bar of the first few tickers, up to its VWAP, as a Markdown table."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        columns = connection.read_parquet(str(file)).columns
        shown = columns[: columns.index("vwap") + 1] if "vwap" in columns else columns
        rows = connection.execute(
            f"""
            SELECT {", ".join(shown)} FROM read_parquet($1)
            QUALIFY row_number() OVER (PARTITION BY ticker ORDER BY "{columns[1]}" DESC) = 1
            ORDER BY ticker LIMIT {_PREVIEW_TICKERS}
            """,
            [str(file)],
        ).fetchall()
    cells = [[f"{value:,.4f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (shown, ["---"] * len(shown), *cells))
