"""`python -m benchmarks.idle`: what a `dagster dev` with nothing to do takes, with no past and with ten years of it.

All sensors and schedules are on. The demo's sessions count as played. Ten years: each minute dataset of each trading
day has been materialized, and a raw bar is on the lake, with a ledger that counts it. The goals are 5 % of a core for
daemon and code server, and at most half as much again with the ten years. CPU time is counted, so that other work on
the machine changes little. It takes some twenty minutes, most of them to report 22,500 events and to wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import msgspec

from benchmarks.harness import say
from benchmarks.processes import CODE_SERVER, DAEMON, WEB_SERVER, Usage, folder_mb, usage_by_part
from polygon_pipeline import demo
from polygon_pipeline.datasets.catalog import DATASETS, Dataset
from polygon_pipeline.datasets.staleness import AS_OF
from polygon_pipeline.defs.collect import FEED_TAG, SESSION_DATE_TAG
from polygon_pipeline.defs.following import Cursor
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, session
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.lakes import local_lake, put_raw_bars
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of

_MINUTE = [dataset for dataset in DATASETS if dataset.channel is Channel.MINUTE]
# After its start, until the slowest sensor has had its first ticks.
_SETTLE_SECONDS = 15.0
_SETTLE_TURNS = 10
# The sensor's cursor behind every event.
_ALL_SEEN = msgspec.json.encode(Cursor({dataset.name: 2**40 for dataset in _MINUTE if not dataset.inputs})).decode()
_HIGHEST_SHARE = 0.05
_HIGHEST_RATIO = 1.5


class Idle(NamedTuple):
    """What was measured. shares: of a core, by part; grown_mb: of DAGSTER_HOME in an hour, going on like that."""

    days: int
    shares: dict[str, float]
    home_mb: float
    grown_mb: float

    @property
    def share(self) -> float:
        """Of daemon and code server."""
        return self.shares[DAEMON] + self.shares[CODE_SERVER]


def measure(pasts: Sequence[int], seconds: float) -> list[Idle]:
    """Lets a `dagster dev` with each past (trading days) settle, and looks how much each takes, at the same time: what
    else the machine does changes how much CPU time the same work takes."""
    with ExitStack() as stack:
        devs = [_prepared(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idle-"))), n) for n in pasts]
        for days, dev in zip(pasts, devs, strict=True):
            stack.callback(dev.close)
            first = completed_sessions(datetime.now(UTC), max(days, demo.SESSIONS))[0]
            dev.start(POLYGON_HISTORY_START=first.isoformat())
        for _ in range(_SETTLE_TURNS):
            time.sleep(_SETTLE_SECONDS)
            for dev in devs:
                # It would look at the whole past once, for minutes; a tick under way then writes its own cursor.
                dev.set_cursor("datasets_follow_sensor", _ALL_SEEN)
        before = [(usage_by_part(dev), folder_mb(dev.home)) for dev in devs]
        time.sleep(seconds)
        after = [(usage_by_part(dev), folder_mb(dev.home)) for dev in devs]
    return [
        Idle(
            days,
            {part: (end[part].cpu - start.get(part, Usage()).cpu) / seconds for part in end},
            home,
            (home - home_before) * 3600 / seconds,
        )
        for days, (start, home_before), (end, home) in zip(pasts, before, after, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=__doc__)
    parser.add_argument("--days", type=int, default=2500, help="the trading days of the past (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long is measured (default: %(default)s)")
    options = parser.parse_args(arguments)
    empty, full = measure((0, options.days), options.seconds)
    print("| trading days | daemon | code server | both | web server | DAGSTER_HOME | grows in an hour |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for found in (empty, full):
        parts = [found.shares[DAEMON], found.shares[CODE_SERVER], found.share, found.shares[WEB_SERVER]]
        shares = " | ".join(f"{share:.1%}" for share in parts)
        print(f"| {found.days:,} | {shares} | {found.home_mb:.1f} MB | {found.grown_mb:.1f} MB |")
    ratio = full.share / empty.share
    print(f"\nShares are of one core. With the {full.days:,} days it takes {ratio:.2f} times as much.")
    missed = []
    if max(empty.share, full.share) > _HIGHEST_SHARE:
        missed.append(f"more than {_HIGHEST_SHARE:.0%} of a core")
    if ratio > _HIGHEST_RATIO:
        missed.append(f"more than {_HIGHEST_RATIO} times as much with a past")
    if missed:
        sys.exit(f"Missed: {'; '.join(missed)}.")


def _prepared(folder: Path, days: int) -> DagsterDev:
    """One that has so many days behind it, not started yet."""
    say(f"{days:,} days: reporting …")
    lake = local_lake(folder / "lake")
    dev = DagsterDev(folder, lake)
    past = completed_sessions(datetime.now(UTC), max(days, demo.SESSIONS))
    with dg.DagsterInstance.from_config(str(dev.home)) as instance:
        _play(instance, past[-demo.SESSIONS :])
        for day in past[-days:] if days else []:
            _collect(lake, day)
            _materialize(instance, day)
    return dev


def _play(instance: dg.DagsterInstance, days: Sequence[date]) -> None:
    """The demo's sessions count as played, so that none is."""
    for day in days:
        tags = {SESSION_DATE_TAG: day.isoformat(), FEED_TAG: "simulated"}
        instance.add_run(dg.DagsterRun("collect_aggregates", status=dg.DagsterRunStatus.SUCCESS, tags=tags))


def _collect(lake: Lake, day: date) -> None:
    """A bar, and the ledger that counts it."""
    put_raw_bars(lake, day)
    lake.put(layout.ledger_key(day, "RUN"), encode_ledger(ledger_of(account_of(1, day), session_date=day)))


def _materialize(instance: dg.DagsterInstance, day: date) -> None:
    for dataset in _MINUTE:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(dataset.name, partition=day.isoformat(), metadata=_metadata(dataset, day))
        )


def _metadata(dataset: Dataset, day: date) -> dict[str, Any]:
    """What a materialization of a day holds: what is looked for in it, and about its size."""
    found = session(day)
    assert found
    columns = [dg.TableColumn(column.name, column.type, column.description) for column in dataset.columns]
    return {
        "dagster/row_count": 7200,
        "tickers": 12,
        "uri": f"s3://bucket/lake/datasets/{dataset.name}/date={day}/data.parquet",
        "dagster/column_schema": dg.TableSchema(columns),
        "preview": dg.MetadataValue.md("| SPY | 2026-01-26 20:59:00+00:00 | 450.0000 |\n" * 9),
        "known_until": dg.MetadataValue.timestamp(found.post_close.timestamp()),
        # Larger than any event's: nothing is newer.
        AS_OF: 2**40,
    }


if __name__ == "__main__":
    main()
