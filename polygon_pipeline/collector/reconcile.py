"""Holds a day's ledgers against the lake: do the runs' accounts balance, and is what they counted there?

Belongs here: that comparison. Does not belong here: one run's own balance (collector.account).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import NamedTuple

from polygon_pipeline.collector.account import Ledger, decode_ledger
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel


class Balance(NamedTuple):
    """A day's account over all its runs. objects_on_lake beyond objects_counted are other writers'."""

    faults: list[str]
    runs: int
    bars: int
    quarantined: int
    gaps: int
    objects_counted: int
    objects_on_lake: int


def reconcile(lake: Lake, day: date, channel: Channel) -> Balance:
    """Reads the day's ledgers and lists its raw-data; a day without ledgers (another writer's) balances."""
    faults: list[str] = []
    runs = bars = counted = quarantined = gaps = 0
    for ledger in _ledgers(lake, day, faults):
        runs += 1
        faults += [f"{ledger.run}: {fault}" for fault in ledger.account.imbalance(ledger.write_objects)]
        quarantined += ledger.account.quarantined
        gaps += len(ledger.gaps)
        if count := ledger.account.days.get(day, {}).get(channel):
            bars += count.bars
            counted += count.objects
    on_lake = len(lake.keys(layout.raw_prefix(channel, day)))
    if on_lake < counted:
        faults.append(f"the ledgers count {counted} objects, but only {on_lake} are on the lake")
    return Balance(faults, runs, bars, quarantined, gaps, counted, on_lake)


def objects_counted(lake: Lake, day: date, channel: Channel) -> int:
    """The objects that the day's ledgers count; one that cannot be read counts none. Raises the store's errors."""
    counts = (ledger.account.days.get(day, {}).get(channel) for ledger in _ledgers(lake, day, []))
    return sum(count.objects for count in counts if count)


def _ledgers(lake: Lake, day: date, faults: list[str]) -> Iterator[Ledger]:
    """The day's ledgers; those that cannot be read are told in faults."""
    for key in lake.keys(layout.ledger_prefix(day)):
        try:
            yield decode_ledger(lake.get(key) or b"")
        except ValueError as error:
            faults.append(f"{lake.url(key)} cannot be read: {error}")
