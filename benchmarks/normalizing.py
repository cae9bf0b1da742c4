"""A full-market day from raw-frames to normalized_bars: ours beside bare DuckDB, Polars, and orjson with pandas.

The rivals read the same files from the local disk and do what a user would write in an hour: the same reading, latest
revision, sorting and zstd Parquet, without the checks (cut archives, refused events, odd frames) that ours makes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import data
from benchmarks.equality import same_rows
from benchmarks.harness import Measured, Run, Table, at_least, at_most, contest, measure
from polygon_pipeline.market.bars import Channel

_BARE = """
    COPY (
        SELECT
            sym AS ticker, to_timestamp(s / 1000) AS timestamp, o AS open, h AS high, l AS low, c AS close,
            coalesce(CAST(dv AS DOUBLE), v) AS volume, vw AS vwap, nullif(op, 0) AS day_open,
            coalesce(CAST(dav AS DOUBLE), av) AS day_volume, a AS day_vwap, z AS average_trade_size,
            coalesce(otc, false) AS otc, CAST(NULL AS BIGINT) AS transactions,
            CASE WHEN s < 1769437800000 THEN 'pre' WHEN s < 1769461200000 THEN 'regular' ELSE 'post' END AS session,
            revisions, received_at, 'websocket' AS source
        FROM (
            SELECT *, count(*) OVER (PARTITION BY sym, s) AS revisions
            FROM (SELECT received_at, unnest(frame, recursive := true) FROM read_json({files},
                format = 'newline_delimited', columns = {{received_at: 'TIMESTAMPTZ', frame: 'STRUCT(ev VARCHAR,
                sym VARCHAR, s BIGINT, o DOUBLE, h DOUBLE, l DOUBLE, c DOUBLE, v DOUBLE, dv VARCHAR, vw DOUBLE,
                op DOUBLE, av DOUBLE, dav VARCHAR, a DOUBLE, z DOUBLE, otc BOOLEAN)[]'}}))
            WHERE ev = '{channel}'
            QUALIFY row_number() OVER (PARTITION BY sym, s ORDER BY received_at DESC) = 1
        )
        ORDER BY ticker, timestamp
    ) TO '{target}' (FORMAT parquet, COMPRESSION zstd)
"""


def ours(run: Run, tickers: int, channel: Channel) -> Callable[[], Path]:
    import pyarrow  # noqa: F401 imported where it is first used, which is within the timed part

    from polygon_pipeline.datasets.inputs import fetch_raw, normalize_day

    lake, _ = data.frames_lake(run, tickers, channel)
    folder = Path(tempfile.mkdtemp(dir=run.scratch))

    def work() -> Path:
        normalize_day(lake, fetch_raw(lake, data.DAY, channel, folder), folder / "ours.parquet", folder)
        return folder / "ours.parquet"

    return work


def bare_duckdb(run: Run, tickers: int, channel: Channel) -> Callable[[], Path]:
    import duckdb

    files, target, spill = _work_on(run, tickers, channel)

    def work() -> Path:
        with duckdb.connect(config={"memory_limit": "1GB", "threads": 2, "temp_directory": str(spill)}) as connection:
            connection.execute("SET enable_progress_bar = false; SET TimeZone = 'UTC'")
            connection.execute(_BARE.format(files=[str(file) for file in files], channel=channel, target=target))
        return target

    return work


def polars(run: Run, tickers: int, channel: Channel) -> Callable[[], Path]:
    import os

    os.environ["POLARS_MAX_THREADS"] = "2"
    import polars as pl

    files, target, _ = _work_on(run, tickers, channel)
    numbers = ("o", "h", "l", "c", "vw", "op", "av", "a", "z", "v")
    event = pl.Struct(
        {"ev": pl.String, "sym": pl.String, "s": pl.Int64, "dv": pl.String, "dav": pl.String, "otc": pl.Boolean}
        | dict.fromkeys(numbers, pl.Float64)
    )

    def work() -> Path:
        lines = pl.scan_ndjson(files, schema={"received_at": pl.String, "frame": pl.List(event)})
        events = lines.explode("frame").unnest("frame").filter(pl.col("ev") == str(channel))
        bars = events.select(
            ticker="sym",
            timestamp=pl.from_epoch("s", time_unit="ms").dt.replace_time_zone("UTC"),
            open="o",
            high="h",
            low="l",
            close="c",
            volume=pl.coalesce(pl.col("dv").cast(pl.Float64), "v"),
            vwap="vw",
            day_open=pl.when(pl.col("op") != 0).then("op"),
            day_volume=pl.coalesce(pl.col("dav").cast(pl.Float64), "av"),
            day_vwap="a",
            average_trade_size="z",
            otc=pl.col("otc").fill_null(False),
            received_at=pl.col("received_at").str.to_datetime("%Y-%m-%dT%H:%M:%S%.6fZ", time_zone="UTC"),
        )
        latest = bars.sort("ticker", "timestamp", "received_at").unique(
            ["ticker", "timestamp"], keep="last", maintain_order=True
        )
        latest.sink_parquet(target, compression="zstd")
        return target

    return work


def orjson_and_pandas(run: Run, tickers: int, channel: Channel) -> Callable[[], Path]:
    import io

    import orjson
    import pandas as pd
    import pyarrow  # noqa: F401 pandas takes it when it writes
    import zstandard

    files, target, _ = _work_on(run, tickers, channel)

    def work() -> Path:
        rows = []
        for file in files:
            with file.open("rb") as packed:
                for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(packed)):
                    entry = orjson.loads(line)
                    received_at = entry["received_at"]
                    rows += [(received_at, event) for event in entry["frame"] if event["ev"] == channel]
        bars = pd.DataFrame.from_records([event for _, event in rows])
        bars["received_at"] = pd.to_datetime([received_at for received_at, _ in rows], utc=True)
        bars["timestamp"] = pd.to_datetime(bars["s"], unit="ms", utc=True)
        bars["v"] = pd.to_numeric(bars["dv"]).fillna(bars["v"])
        bars = bars.rename(
            columns={"sym": "ticker", "o": "open", "h": "high", "l": "low", "c": "close", "v": "volume", "vw": "vwap"}
        )
        bars = bars.sort_values(["ticker", "timestamp", "received_at"])
        bars = bars.drop_duplicates(["ticker", "timestamp"], keep="last")
        bars.to_parquet(target, compression="zstd", index=False)
        return target

    return work


def benchmark(run: Run) -> Iterator[Table]:
    tickers = data.WHOLE_MARKET if run.full else data.WHOLE_MARKET // 8
    _, bars = data.frames_lake(run, tickers)

    def on(contender: Callable[[Run, int, Channel], Callable[[], Path]]) -> Callable[[], Measured]:
        return lambda: measure(contender, run, tickers, Channel.MINUTE)

    rows = contest(
        [
            ("ours", on(ours)),
            ("bare DuckDB", on(bare_duckdb)),
            ("Polars", on(polars)),
            ("orjson + pandas", on(orjson_and_pandas)),
        ],
        bars,
        3,
        same_rows,
    )
    times = {name: measured.seconds for name, _, measured in rows}
    yield Table(
        f"raw-frames of a day of {tickers:,} tickers to normalized_bars",
        "bars",
        rows,
        [
            at_most(1.3, times["ours"] / times["bare DuckDB"], "times bare DuckDB"),
            at_least(1, times["Polars"] / times["ours"], "times as fast as Polars"),
            at_least(4, times["orjson + pandas"] / times["ours"], "times as fast as orjson + pandas"),
            at_most(1000, rows[0][2].peak_mb, "MB"),
        ],
        "parsing JSON on both cores; ours does it in the same statement as bare DuckDB, and beyond that only checks "
        "that no archive is cut short (unpacking it once more) and unpacks nothing that DuckDB does not.",
    )


def _work_on(run: Run, tickers: int, channel: Channel) -> tuple[list[Path], Path, Path]:
    """The files to read, the one to write, and a folder to spill into."""
    lake, _ = data.frames_lake(run, tickers, channel)
    folder = Path(tempfile.mkdtemp(dir=run.scratch))
    return data.frame_files(lake), folder / "theirs.parquet", folder / "spill"
