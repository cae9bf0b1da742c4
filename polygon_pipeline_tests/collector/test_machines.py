"""Two machines and one lake: processes with journals of their own, of which the one that collects is killed.

The lease's times are shortened in every process, so that a takeover takes two seconds instead of eighty.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from polygon_pipeline.collector import collector, lease
from polygon_pipeline.collector.collector import Collector
from polygon_pipeline.collector.journal import leftovers
from polygon_pipeline.collector.lease import read_lease
from polygon_pipeline.collector.recovery import drain
from polygon_pipeline.lake.ledger import Ledger, missing_minutes, read_ledgers, reconcile, repairable_gaps
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline_tests.support.archives import archived_lines
from polygon_pipeline_tests.support.bars import DAY, plain_bar
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.feeds import feed_event
from polygon_pipeline_tests.support.s3_server import S3Address, SeaweedFS
from polygon_pipeline_tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.fault("machines lost")]

_PRE_OPEN_MS = int(datetime(2026, 1, 26, 9, tzinfo=UTC).timestamp()) * 1000
# Market time a second: eight minutes.
_SPEED = 480.0


def _feed() -> Iterator[Event]:
    """Two tickers' bars of every minute from pre-market on, for longer than the test lasts."""
    for minute in itertools.count():
        start_ms = _PRE_OPEN_MS + 60_000 * minute
        for ticker in ("SPY", "QQQ"):
            yield feed_event(start_ms + 60_000, plain_bar(ticker, start_ms, minute + 1))


def _collect(url: str, uri: str, s3: S3Address, journal_dir: Path, run: str, stop: Path) -> None:
    """A machine: it stands by, collects when it may, and ends when it is told to."""
    lease.TTL, lease.TOLERANCE, lease._LOOK_SECONDS = timedelta(seconds=1.2), timedelta(seconds=0.3), 0.1
    collector.RENEW_SECONDS = 0.2  # type: ignore[attr-defined]
    wanted = plan(url, journal_dir, run=run, owner=run, standby=True, time_base="event", checkpoint_seconds=0.5)
    lake = open_lake(uri, s3.access)
    ended = Collector(lake, wanted, logging.getLogger(run)).run(
        lambda: "told to" if stop.exists() else None, lambda _: None
    )
    assert ended == "told to"


def _stops_with_frames_on_disk_only(process: multiprocessing.process.BaseProcess, folder: Path) -> bool:
    """Stops the process, and lets it go on where the segment under way has no frame."""
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    if max(folder.glob("*.segment")).stat().st_size > 600:
        return True
    os.kill(process.pid, signal.SIGCONT)
    return False


def test_a_standby_takes_over_from_a_killed_machine_and_what_its_disk_held_is_a_gap_until_it_comes_back(
    s3_lake: Lake, seaweedfs: SeaweedFS, tmp_path: Path, say: Callable[[str], None]
) -> None:
    context = multiprocessing.get_context("forkserver")
    stop = tmp_path / "stop"
    runs = {"first": "20260126T090000Z-first", "second": "20260126T090001Z-second"}

    def start(machine: str) -> multiprocessing.process.BaseProcess:
        arguments = exchange.url, s3_lake.uri, seaweedfs.address, tmp_path / machine, runs[machine], stop
        process = context.Process(target=_collect, args=arguments, daemon=True)
        process.start()
        return process

    def ledger(machine: str) -> Ledger | None:
        return next((of for of in read_ledgers(s3_lake, DAY).ledgers if of.run == runs[machine]), None)

    def has_bars(machine: str) -> bool:
        found = ledger(machine)
        return found is not None and found.account.bars > 0

    with Exchange(_feed(), speed=_SPEED) as exchange:
        first = start("first")
        until(lambda: has_bars("first"), "the first machine has archived something")
        second = start("second")
        until(lambda: (tmp_path / "second" / runs["second"]).exists(), "the second machine is there")
        holder = read_lease(s3_lake)
        assert holder
        assert holder.run == runs["first"]
        until(lambda: _stops_with_frames_on_disk_only(first, tmp_path / "first" / runs["first"]), "frames are on disk")
        first.kill()
        first.join()
        until(lambda: has_bars("second"), "the second machine has taken over")
        stop.touch()
        second.join()
        assert second.exitcode == 0

    lost, taken_over = ledger("first"), ledger("second")
    assert lost
    assert taken_over
    assert (lost.complete, taken_over.complete) == (False, True)
    last_ms = taken_over.account.connections[-1].last_bar_ms or 0
    now = datetime.fromtimestamp(last_ms / 1000, UTC)

    def gaps() -> list[tuple[datetime, datetime]]:
        return missing_minutes(DAY, read_ledgers(s3_lake, DAY).ledgers, now)

    [gap] = gaps()
    assert gap in repairable_gaps(DAY, [lost, taken_over], 0, timedelta(minutes=16), datetime.now(UTC))
    told = f"a machine killed, its standby took over: {gap[0]:%H:%M} to {gap[1]:%H:%M} of a played day are a gap"
    assert reconcile(s3_lake, DAY, Channel.MINUTE).unfinished == [runs["first"]]
    (left,) = leftovers(tmp_path / "first")
    held = {record.payload for n in left.numbers() for record in left.read(n, 0, left.end_of(n)[0])}
    left.release()
    assert [found.header.run for found in drain(s3_lake, "polygon", tmp_path / "first", "drain")] == [runs["first"]]
    [smaller] = gaps()
    assert gap[0] < smaller[0]
    assert gap[1] == smaller[1]
    lines = [line.content for line in archived_lines(s3_lake, DAY)]
    frames = [line for line in lines if b'"AM"' in line]
    assert len(frames) == len(set(frames))
    assert {frame for frame in held if b'"AM"' in frame} <= set(frames)
    balance = reconcile(s3_lake, DAY, Channel.MINUTE)
    assert (balance.errors, balance.unfinished) == ([], [])
    bars = sum(event["ev"] == "AM" for frame in frames for event in json.loads(frame))
    assert balance.bars == bars == balance.objects_on_lake
    say(f"{told}, and from {smaller[0]:%H:%M} on after its journal was published: {bars} bars, 0 lost, 0 doubled")
