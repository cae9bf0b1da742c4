"""`dagster dev` for real: its processes are killed, and exactly one collector goes on, with nothing lost.

The built-in simulator is the feed, as in the demo; the web server is asked what a user would see.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TypeVar

import pytest

from polygon_pipeline.collector.lease import Holding, read_lease
from polygon_pipeline.datasets.catalog import FOLLOWING
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import Ledger, decode_ledger, read_ledgers
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, trading_days
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.history import put_history
from polygon_pipeline_tests.support.made_days import day_state
from polygon_pipeline_tests.support.receivers import webhook
from polygon_pipeline_tests.support.waiting import until

T = TypeVar("T")

_MINUTE = [dataset for dataset in FOLLOWING if dataset.channel is Channel.MINUTE and not dataset.required]

pytestmark = pytest.mark.slow


@pytest.fixture
def dev(tmp_path: Path, file_lake: Lake) -> Iterator[DagsterDev]:
    dev = DagsterDev(tmp_path, file_lake)
    try:
        dev.start()
        yield dev
    finally:
        dev.close()


@pytest.mark.timeout(600)
def test_exactly_one_collector_continues_after_any_process_is_killed(
    dev: DagsterDev, file_lake: Lake, say: Callable[[str], None]
) -> None:
    first = _until(lambda: _alive(file_lake), "the sensor starts a collector")
    _until(lambda: file_lake.keys("raw-data/"), "bars are on the lake")
    assert _statuses(dev) == ["STARTED"]

    os.kill(first.pid, signal.SIGKILL)
    second = _until(lambda: _alive(file_lake, after=first), "a second attempt follows the killed worker")
    assert _statuses(dev) == ["STARTED", "FAILURE"]
    assert len(dev.collectors()) == 1

    dev.kill("dagster._daemon")
    _until(lambda: not dev.serves(), "dagster dev ends without its daemon")
    dev.start()
    time.sleep(20)  # a sensor tick and more: time enough to start a second collector
    assert _statuses(dev) == ["STARTED", "FAILURE"], "the collector at work goes on"
    assert len(dev.collectors()) == 1

    dev.kill("dagster", but=second.pid)
    _until(lambda: len(dev.collectors()) == 0, "a collector whose launcher is gone ends by itself")
    dev.start()
    third = _until(lambda: _alive(file_lake, after=second), "the next start begins another")
    assert len(dev.collectors()) == 1

    dev.kill("")
    _until(lambda: len(dev.collectors()) == 0, "everything is dead")
    dev.start()
    fourth = _until(lambda: _alive(file_lake, after=third), "it goes on after everything was killed")
    assert len(dev.collectors()) == 1
    statuses = _statuses(dev)
    assert statuses[0] == "STARTED"
    assert "STARTED" not in statuses[1:]

    dev.interrupt()
    _until(lambda: len(dev.collectors()) == 0, "Ctrl-C ends the collector")
    dev.start()
    _until(lambda: _statuses(dev)[1] == "CANCELED", "the interrupted run is canceled, and another begun")
    fifth = _until(lambda: _alive(file_lake, after=fourth), "an interrupted session goes on")
    statuses = _statuses(dev)
    ledgers = [decode_ledger(file_lake.get(key) or b"") for key in file_lake.keys("ledger/")]
    _assert_nothing_lost(file_lake, [ledger for ledger in ledgers if ledger.run != fifth.run])
    say(
        f"dagster dev: worker, daemon, launcher and everything killed, then Ctrl-C: {len(statuses)} runs "
        f"({', '.join(reversed(statuses))}), never two collectors, "
        f"{sum(ledger.account.bars for ledger in ledgers)} bars, 0 lost"
    )


@pytest.mark.timeout(900)
def test_a_day_gets_to_final_by_itself_whatever_happened_to_its_session(
    tmp_path: Path, file_lake: Lake, say: Callable[[str], None]
) -> None:
    """A session whose worker is killed and whose next attempt is terminated by hand, while a backfill is under way."""
    dev = DagsterDev(tmp_path, file_lake)
    with webhook() as chat, contextlib.closing(dev):
        backfilled = trading_days(date(2026, 1, 5), date(2026, 3, 31))
        file_lake.claim("simulated")  # the simulator fills no lake that holds data of nobody knows whom
        put_history(file_lake, backfilled, tmp_path)
        dev.start(POLYGON_HISTORY_START="2026-01-02", POLYGON_ALERT_WEBHOOK=chat.url)
        asked = dev.backfill([dataset.name for dataset in _MINUTE], backfilled)
        first = _until(lambda: _alive(file_lake), "the sensor starts a collector beside the backfill")
        day = completed_sessions(datetime.now(UTC), 5)[0]
        _until(lambda: day_state(file_lake, day) == "collecting", "half a day is called half a day")
        os.kill(first.pid, signal.SIGKILL)
        _until(lambda: _alive(file_lake, after=first), "another attempt follows the killed worker")
        _until(lambda: len(file_lake.keys(layout.ledger_prefix(day))) == 2, "it has published something")
        dev.terminate(dev.runs()[0]["runId"])
        _until(lambda: day_state(file_lake, day) == "final", "the day is completed by itself", 240)
        _until(lambda: dev.backfill_status(asked).startswith("COMPLETED"), "the backfill is completed", 300)
        assert dev.backfill_status(asked) == "COMPLETED_SUCCESS"
        assert {day_state(file_lake, day) for day in backfilled} == {"final"}
        ledgers, unreadable, _ = read_ledgers(file_lake, day)
        assert not unreadable
        assert [(ledger.complete, ledger.imbalance) for ledger in ledgers] == [(True, []), (True, [])]
        _until(lambda: chat.texts, "it is told that a run failed")
        told = [line for text in chat.texts for line in text.splitlines()[1:]]
        assert told[0].startswith(f"Run {dev.runs()[-1]['runId'][:8]} of collect_aggregates failed ({day})")
        assert len(told) == len({*told}), "nothing is told twice"
    say(f"a session killed and terminated beside a backfill of {len(backfilled)} days: every day final")


def _assert_nothing_lost(lake: Lake, ledgers: list[Ledger]) -> None:
    assert len(ledgers) >= 4
    for ledger in ledgers:
        assert ledger.complete, ledger.run
        assert ledger.imbalance == []
    counted = sum(count.objects for ledger in ledgers for day in ledger.account.days.values() for count in day.values())
    assert len(lake.keys("raw-data/")) >= counted


def _alive(lake: Lake, after: Holding | None = None) -> Holding | None:
    lease = read_lease(lake)
    if lease is None or lease.is_free(datetime.now(UTC)) or (after and lease.run == after.run):
        return None
    return lease


def _statuses(dev: DagsterDev) -> list[str]:
    return [run["status"] for run in dev.runs()]


def _until(condition: Callable[[], T | None], what: str, seconds: float = 240) -> T:
    return until(condition, what, seconds=seconds, pause=0.5)
