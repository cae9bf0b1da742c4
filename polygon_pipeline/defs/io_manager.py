"""The IO manager for daily partitioned Parquet: what assets return goes to the lake, what they ask for comes from it.

Belongs here: Dagster's inputs and outputs. Does not belong here: how a day is stored and shown (defs.writer).

Takes and gives, by type annotation: a pyarrow Table, a pandas DataFrame, or the Path of a local Parquet file, which
is the way for days larger than memory. An input of several partitions is a dict of them by partition key.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import dagster as dg

from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.defs.writer import write_day
from polygon_pipeline.lake.dataset_files import fetch_dataset

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class ParquetIOManager(dg.ConfigurableIOManager):
    """Stores `datasets/NAME/date=YYYY-MM-DD/data.parquet` for an asset NAME partitioned by trading day."""

    lake: LakeResource

    def handle_output(self, context: dg.OutputContext, obj: "pa.Table | pd.DataFrame | Path") -> None:
        """Stores one partition. Raises dg.Failure for an empty one: no data is a failure, never an empty file."""
        file = obj if isinstance(obj, Path) else _write_parquet(obj, self.lake.scratch() / "data.parquet")
        name, day = context.asset_key.path[-1], context.partition_key
        context.add_output_metadata(write_day(self.lake.open(), name, day, file) | _column_schema(file))

    def load_input(self, context: dg.InputContext) -> Any:
        """Fetches one partition, or a dict of several. Raises MissingDataset for one that was never made."""
        annotation = context.dagster_type.typing_type
        if len(context.asset_partition_keys) > 1:
            (_, kind) = get_args(annotation)
            return {day: self._load(context, day, kind) for day in context.asset_partition_keys}
        return self._load(context, context.asset_partition_key, annotation)

    def _load(self, context: dg.InputContext, day: str, annotation: Any) -> "pa.Table | pd.DataFrame | Path":
        file = fetch_dataset(self.lake.open(), context.asset_key.path[-1], day, self.lake.scratch())
        if annotation is Path:
            return file
        import pandas as pd
        import pyarrow.parquet as pq

        if annotation is pd.DataFrame:
            return pd.read_parquet(file, dtype_backend="pyarrow")
        return pq.read_table(file, partitioning=None)


def _column_schema(file: Path) -> dict[str, dg.TableSchema]:
    import pyarrow.parquet as pq

    columns = [dg.TableColumn(field.name, str(field.type)) for field in pq.read_schema(file)]
    return {"dagster/column_schema": dg.TableSchema(columns)}


def _write_parquet(obj: "pa.Table | pd.DataFrame", file: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = obj if isinstance(obj, pa.Table) else pa.Table.from_pandas(obj, preserve_index=False)
    pq.write_table(table, file, compression="zstd")
    return file
