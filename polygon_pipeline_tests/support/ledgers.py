"""Ledgers as runs leave them."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from polygon_pipeline.lake.ledger import Account, Ledger
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY


def ledger_of(account: Account, **changes: Any) -> Ledger:
    """A completed run's of DAY that wrote objects and frames. changes: what differs."""
    usual: dict[str, Any] = {
        "run": "RUN",
        "feed": "polygon",
        "session_date": DAY,
        "started_at": datetime(2026, 1, 26, 9, tzinfo=UTC),
        "complete": True,
        "write_objects": True,
        "write_frames": True,
        "imbalance": [],
        "gaps": account.gaps(changes.get("time_base", "processing")),
    }
    return Ledger(account=account, **{**usual, **changes})


def account_of(objects: int, day: date = DAY) -> Account:
    """That many minute bars, of which each became an object."""
    account = Account(frames=1, events=objects, bars=objects)
    count = account.day(day, Channel.MINUTE)
    count.bars = count.objects = objects
    return account
