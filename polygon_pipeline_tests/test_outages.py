"""A real `dagster dev` whose store is away for whole sessions, and then Dagster's own storage, while all of them are
published: no bar is lost, and every day is completed by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from polygon_pipeline.datasets.catalog import NORMALIZED_BARS
from polygon_pipeline.lake.ledger import read_ledgers, reconcile
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions
from polygon_pipeline.polygon.flat_files import expected_at
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.made_days import day_state, made_day
from polygon_pipeline_tests.support.s3_server import SeaweedFS
from polygon_pipeline_tests.support.waiting import until

pytestmark = pytest.mark.slow

_TICKERS = ("SPY", "AAPL")
# The store is away for all but the last, in which Dagster's storage is away.
_SESSIONS = 3
_AWAY_SECONDS = 20.0
_FAST_DEMO = {
    "POLYGON_API_KEY": "simulator",
    "POLYGON_TICKERS": ",".join(_TICKERS),
    "FAST_DEMO_SESSIONS": str(_SESSIONS),
    "FAST_DEMO_SPEED": "6000",  # a session takes ten seconds
    "FAST_DEMO_CHECKPOINT": "3",
    "FAST_DEMO_DRAIN": "1",
    "FAST_DEMO_SENSORS": "5",
    "FAST_DEMO_FAULTS": "",
}


@pytest.mark.timeout(600)
@pytest.mark.fault("database away")
def test_sessions_without_the_store_and_without_dagsters_storage_are_completed_with_every_bar(
    tmp_path: Path, seaweedfs: SeaweedFS, say: Callable[[str], None]
) -> None:
    lake = seaweedfs.lake()
    days = completed_sessions(datetime.now(UTC), _SESSIONS)
    dev = DagsterDev(tmp_path, lake, "polygon_pipeline_tests.support.fast_demo")
    # A run that was about to start while Dagster's storage was away is noticed this much sooner.
    yaml = dev.home / "dagster.yaml"
    yaml.write_text(re.sub("(start_timeout|poll_interval)_seconds: [0-9]+", r"\1_seconds: 15", yaml.read_text()))
    with ExitStack() as ending:
        ending.callback(dev.close)
        seaweedfs.stop()
        ending.callback(_start, seaweedfs)
        dev.start(**seaweedfs.address.environment(), **_FAST_DEMO)

        _until(lambda: _statuses(dev).count("SUCCESS") == 2, "two sessions are over without a store")
        _start(seaweedfs)
        _until(lambda: len(_statuses(dev)) == 3 and len(dev.collectors()) == 1, "the last session runs")
        with dev.storage_away():
            time.sleep(_AWAY_SECONDS)
            _until(lambda: _days_with_ledgers(lake) == days, "all sessions are published")
        _until(lambda: all(_is_done(lake, day) for day in days), "every day is completed by itself", 240)
    market = SyntheticMarket(_TICKERS)
    for day in days:
        traded = market.day_bars(day).num_rows
        assert _rows(lake, NORMALIZED_BARS.name, day) == traded
        ledgers, unreadable, _ = read_ledgers(lake, day)
        assert not unreadable
        assert [ledger.complete for ledger in ledgers] == [True] * len(ledgers)
        balance = reconcile(lake, day, Channel.MINUTE)
        assert balance.errors == []
        assert balance.objects_on_lake == balance.objects_counted == traded, "no bar is known from the history alone"
    say(f"{_SESSIONS - 1} sessions without a store, one without Dagster's storage: 0 bars lost, all days completed")


def _statuses(dev: DagsterDev) -> list[str]:
    return [run["status"] for run in dev.runs()]


def _start(server: SeaweedFS) -> None:
    if not server.running:
        server.start()


def _days_with_ledgers(lake: Lake) -> list[date]:
    return sorted({date.fromisoformat(key.split("/")[1]) for key in lake.keys("ledger/")})


def _is_done(lake: Lake, day: date) -> bool:
    """Whether a day is as it should be by now: with every minute collected its history is fetched once it is out."""
    return day_state(lake, day) == ("final" if expected_at(day) <= datetime.now(UTC) else "complete")


def _rows(lake: Lake, name: str, day: date) -> int:
    made = made_day(lake, name, day)
    assert made is not None
    return int(made.num_rows)


def _until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    until(condition, what, seconds=seconds, pause=0.5)
