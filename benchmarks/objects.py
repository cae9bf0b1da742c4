"""raw-data objects, one per bar, to normalized_bars: ours beside obstore's bare GETs, boto3 with pandas, and Polars.

SeaweedFS on this machine stands for S3. The objects are a bucket's that another program filled: no frames, so that
every object is read.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.edge import Server
from benchmarks.equality import same_rows
from benchmarks.harness import Measured, Run, Table, at_least, contest, measure
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.records import encode_record
from polygon_pipeline.lake.store import for_each
from polygon_pipeline.market.bars import Bar, Channel
from polygon_pipeline_tests.support.s3_server import SeaweedFS

_MOST_FOR_BOTO3 = 20_000  # whose rate is known by then: ten times as many take ten minutes

_PREFIX = layout.raw_prefix(Channel.MINUTE, data.DAY)


def ours(run: Run, server: Server, bucket: str) -> Callable[[], Path]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.datasets.inputs import fetch_raw, normalize_day

    lake = server.lake(bucket)
    folder = Path(tempfile.mkdtemp(dir=run.scratch))

    def work() -> Path:
        normalize_day(lake, fetch_raw(lake, data.DAY, Channel.MINUTE, folder), folder / "ours.parquet", folder)
        return folder / "ours.parquet"

    return work


def bare_gets(run: Run, server: Server, bucket: str) -> Callable[[], None]:
    import obstore

    lake = server.lake(bucket)

    async def get(key: str) -> None:
        await (await obstore.get_async(lake.store, key)).bytes_async()

    return lambda: asyncio.run(for_each(lake.keys(_PREFIX), get))


def boto3_and_pandas(run: Run, server: Server, bucket: str) -> Callable[[], Path]:
    import json

    import pandas as pd
    import pyarrow  # noqa: F401 pandas takes it when it writes

    client = server.client()
    target = Path(tempfile.mkdtemp(dir=run.scratch)) / "theirs.parquet"

    def read(key: str) -> Any:
        return json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def work() -> Path:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=_PREFIX)
        with ThreadPoolExecutor(16) as pool:
            records = list(pool.map(read, [entry["Key"] for page in pages for entry in page["Contents"]]))
        bars = pd.DataFrame.from_records([record.pop("bar_data") | record for record in records])
        bars["timestamp"] = pd.to_datetime(bars["timestamp"])
        bars.sort_values(["ticker", "timestamp"]).to_parquet(target, compression="zstd", index=False)
        return target

    return work


def polars_glob(run: Run, server: Server, bucket: str) -> Callable[[], Path]:
    import os

    os.environ["POLARS_MAX_THREADS"] = "2"
    import polars as pl

    target = Path(tempfile.mkdtemp(dir=run.scratch)) / "theirs.parquet"

    def work() -> Path:
        records = pl.scan_ndjson(f"s3://{bucket}/{_PREFIX}**/*.json", storage_options=server.options())
        bars = records.unnest("bar_data").with_columns(
            pl.col("timestamp").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC"),
            pl.col("volume").cast(pl.Float64),
        )
        bars.sort("ticker", "timestamp").sink_parquet(target, compression="zstd")
        return target

    return work


def benchmark(run: Run) -> Iterator[Table]:
    seaweedfs = SeaweedFS(Path(tempfile.mkdtemp(dir=run.scratch)))
    seaweedfs.start()
    try:
        server = Server(seaweedfs)
        for count in (20_000, 200_000) if run.full else (5_000,):
            yield _of(run, server, count)
    finally:
        seaweedfs.stop()


def _of(run: Run, server: Server, count: int) -> Table:
    bucket = server.new_bucket()
    _fill(server, bucket, run.seed, count)

    def on(contender: Callable[..., Callable[[], Any]]) -> Callable[[], Measured]:
        return lambda: measure(contender, run, server, bucket)

    contenders = [("ours", on(ours)), ("Polars' glob", on(polars_glob))]
    if count <= _MOST_FOR_BOTO3:
        contenders.append(("boto3, 16 threads, + pandas", on(boto3_and_pandas)))
    rows = contest(contenders, count, 1, same_rows)
    rows.insert(1, ("obstore's GETs alone", count, on(bare_gets)()))
    rates = {name: measured.rate(count) for name, count, measured in rows}
    return Table(
        f"{count:,} raw-data objects to normalized_bars",
        "objects",
        rows,
        [
            at_least(0.9, rates["ours"] / rates["obstore's GETs alone"], "of obstore's bare GET rate"),
            at_least(5, rates["ours"] / rates["Polars' glob"], "times as fast as Polars"),
        ],
        "the server's GETs, one per bar, for Polars too: it asks for as many at a time. None can be five times as fast "
        "as that; a day of the whole market belongs into raw-frames.",
    )


def _fill(server: Server, bucket: str, seed: int, count: int) -> None:
    import obstore

    lake = server.lake(bucket)
    at = datetime(2026, 1, 27, tzinfo=UTC)
    table = data.market(count // 200, seed).day_bars(data.DAY, Channel.MINUTE).slice(0, count)
    assert table.num_rows == count, f"{count // 200} tickers have only {table.num_rows} bars"

    async def put(row: dict[str, Any]) -> None:
        names = ("ticker", "start_ms", "open", "high", "low", "close", "volume", "vwap")
        bar = Bar(*(row[name] for name in names))
        key = layout.raw_key(Channel.MINUTE, data.DAY, bar.ticker, bar.start_ms)
        await obstore.put_async(lake.store, key, io.BytesIO(encode_record(bar, at)), use_multipart=False)

    asyncio.run(for_each(table.to_pylist(), put))
