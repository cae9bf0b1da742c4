"""The one way a dataset's day gets on the lake, and what its materialization shows.

Belongs here: storing a day's file, and the metadata that every dataset has. Does not belong here: what only one dataset
says of itself (assets, reference), keys and files (lake.dataset_files), and columns (datasets.catalog).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.session import DuckSession, describe
from polygon_pipeline.lake.dataset_files import put_dataset
from polygon_pipeline.lake.layout import dataset_key
from polygon_pipeline.lake.store import Lake

if TYPE_CHECKING:
    import pyarrow as pa

_PREVIEW_TICKERS = 8


def write_day(lake: Lake, name: str, day: str, file: Path, may_be_empty: bool = False) -> dict[str, Any]:
    """Stores a day's Parquet file; returns the metadata. Raises dg.Failure for an empty one: no data is a failure."""
    metadata = day_metadata(lake, name, day, file)
    if not (may_be_empty or metadata["dagster/row_count"]):
        raise dg.Failure(f"{name} of {day} would be empty; nothing was written.", allow_retries=False)
    put_dataset(lake, name, day, file)
    return metadata


def day_metadata(lake: Lake, name: str, day: str, file: Path) -> dict[str, Any]:
    """What a materialization of a day shows. file: the day's, local."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(file)
    with DuckSession() as session:
        session.view("bars", file)
        found = describe(session, schema.names)
        preview = _preview(session, schema.names)
    bars = {"first_bar": found.first, "last_bar": found.last, "preview": dg.MetadataValue.md(preview)}
    return {
        "dagster/row_count": found.rows,
        "tickers": found.tickers,
        "bytes": file.stat().st_size,
        "uri": dg.MetadataValue.text(lake.url(dataset_key(name, day))),
        "dagster/column_schema": _column_schema(name, schema),
        **(bars if found.rows else {}),
    }


def _column_schema(name: str, columns: "pa.Schema") -> dg.TableSchema:
    known = [dataset for dataset in catalog.DATASETS if dataset.name == name]  # other assets may use the IO manager too
    descriptions = {column.name: column.description for dataset in known for column in dataset.columns}
    return dg.TableSchema(
        [dg.TableColumn(field.name, str(field.type), description=descriptions.get(field.name)) for field in columns]
    )


def _preview(session: DuckSession, columns: list[str]) -> str:
    """The last bar of the first few tickers of the view `bars`, up to its VWAP, as a Markdown table."""
    shown = columns[: columns.index("vwap") + 1] if "vwap" in columns else columns
    rows = session.rows(
        f"""
        SELECT {", ".join(shown)} FROM bars
        QUALIFY row_number() OVER (PARTITION BY ticker ORDER BY "{columns[1]}" DESC) = 1
        ORDER BY ticker LIMIT {_PREVIEW_TICKERS}
        """
    )
    cells = [[f"{value:,.4f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (shown, ["---"] * len(shown), *cells))
