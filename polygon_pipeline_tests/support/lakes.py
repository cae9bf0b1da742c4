"""Lakes in a folder, for tests and benchmarks.

Belongs here: opening and filling them. Does not belong here: lakes on S3 (s3_server, faulty_s3), and what is in an
archive (archives). The benchmarks measure processes that import this: it imports nothing large.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.bars import Channel

_START_MS = 1769437800000  # 09:30 New York on 2026-01-26


def no_s3() -> S3Access:
    """The access to S3 of a lake that needs none."""
    raise AssertionError("a local lake asks for no access to S3")


def local_lake(folder: Path) -> Lake:
    """A lake in this folder, which is made."""
    return open_lake(folder.as_uri(), no_s3)


def put_raw_bars(lake: Lake, day: date, *tickers: str, minutes: int = 1) -> None:
    """Objects where bars of that day would be, of SPY or these tickers, for some minutes. Only their keys are right."""
    for ticker in tickers or ("SPY",):
        for minute in range(minutes):
            lake.put(layout.raw_key(Channel.MINUTE, day, ticker, _START_MS + 60_000 * minute), b"{}")
