"""Every key of the lake, made by pure functions.

Belongs here: what is called what, and how to read a name back. Does not belong here: reading or writing anything.
All dates are trade dates (market.calendar.trade_date), so that one prefix is one daily partition.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import date, datetime

from polygon_pipeline.market.bars import Channel, iso_seconds, ticker_error

# Which feed fills this lake, and the number of its format: simulated and real data are never mixed.
FEED_KEY = "feed.json"

# The lake's format. What may be added without changing it, and what may not: docs/decisions/0007-lake-format-version.md
FORMAT = 1

# Who collects into this lake, with its live status.
LEASE_KEY = "lease.json"

# Who may ask the vendor's REST server now (lake.token).
REST_RIGHT_KEY = "rest-right.json"

# What `make doctor` writes to see whether the store keeps conditions. Nothing reads it, and it may be removed.
DOCTOR_KEY = "doctor.json"

_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\.json", re.ASCII)

# Archives of ours and of others: a name that is one name to whatever reads files by patterns.
_FRAMES = re.compile(r"raw-frames/[^/]+/[\w.+-]+\.jsonl\.zst", re.ASCII)

# What only a ledger of ours is called (defs.collect names the runs).
_LEDGER = re.compile(r"ledger/[^/]+/\d{8}T\d{6}Z-[\w.-]+\.json", re.ASCII)

_LISTING = re.compile(r"datasets/[^/]+/fetched=(\d{4}-\d\d-\d\d)/data\.parquet", re.ASCII)

_RAW = {Channel.MINUTE: "raw-data", Channel.SECOND: "raw-data-second"}

# Answers of REST that wait for the others of their days (datasets.staged_answers).
STAGING_ROOT = "history-staging/"

# Where data is: everything but the lake's own marks.
DATA_ROOTS = (*(f"{name}/" for name in _RAW.values()), "raw-frames/", "quarantine/", "ledger/", "datasets/")


def raw_root(channel: Channel) -> str:
    return f"{_RAW[channel]}/"


def raw_prefix(channel: Channel, day: date) -> str:
    return f"{_RAW[channel]}/{day.isoformat()}/"


def parse_raw_prefix(prefix: str) -> date | None:
    """The day of a raw-data prefix, with or without its last slash, or None if it is not one."""
    name = prefix.rstrip("/").rpartition("/")[2]
    try:
        day = date.fromisoformat(name)
    except ValueError:
        return None
    return day if day.isoformat() == name else None  # 20260126 is a date too, but no day's prefix


def raw_key(channel: Channel, day: date, ticker: str, start_ms: int) -> str:
    """`raw-data/2026-01-26/SPY/2026-01-26T18:30:00Z.json`: one bar's record."""
    return f"{_RAW[channel]}/{day.isoformat()}/{ticker}/{iso_seconds(start_ms)}.json"


def parse_raw_key(key: str) -> tuple[str, int] | None:
    """The ticker and start (Unix ms) a raw-data key names, or None if it is not one."""
    parts = key.split("/")
    if len(parts) != 4 or not _NAME.fullmatch(parts[3]) or ticker_error(parts[2]):
        return None
    try:
        start = datetime.fromisoformat(parts[3].removesuffix(".json"))  # strptime takes thirty times as long
    except ValueError:
        return None
    return parts[2], int(start.timestamp()) * 1000


def frames_prefix(day: date) -> str:
    return f"raw-frames/{day.isoformat()}/"


def frames_key(day: date, run: str, segment: int) -> str:
    """`raw-frames/2026-01-26/RUN-000007.jsonl.zst`: the frames of one journal segment that concern the day."""
    return f"{frames_prefix(day)}{run}-{segment:06d}.jsonl.zst"


def is_frames_key(key: str) -> bool:
    """Whether a key below frames_prefix() is an archive's, and not of something else that lies there."""
    return _FRAMES.fullmatch(key) is not None


def quarantine_prefix(day: date) -> str:
    return f"quarantine/{day.isoformat()}/"


def quarantine_key(day: date, run: str, segment: int) -> str:
    return f"{quarantine_prefix(day)}{run}-{segment:06d}.jsonl"


def ledger_prefix(day: date) -> str:
    return f"ledger/{day.isoformat()}/"


def ledger_key(day: date, run: str) -> str:
    return f"{ledger_prefix(day)}{run}.json"


def is_ledger_key(key: str) -> bool:
    """Whether a key below ledger_prefix() is certainly of a run of ours, and not of something else that lies there."""
    return _LEDGER.fullmatch(key) is not None


def dataset_key(name: str, day: str) -> str:
    """`datasets/NAME/date=2026-01-26/data.parquet`. day: a partition key, YYYY-MM-DD."""
    return f"datasets/{name}/date={day}/data.parquet"


def staging_prefix(first: date, last: date) -> str:
    return f"{STAGING_ROOT}{first.isoformat()}_{last.isoformat()}/"


def listing_key(name: str, fetched: date) -> str:
    """`datasets/NAME/fetched=2026-01-26/data.parquet`: all that was known on a day. fetched: the UTC date."""
    return f"{listing_prefix(name)}fetched={fetched.isoformat()}/data.parquet"


def listing_prefix(name: str) -> str:
    return f"datasets/{name}/"


def parse_listing_key(key: str) -> date | None:
    """The day of a listing's file, or None if the key is none."""
    found = _LISTING.fullmatch(key)
    with suppress(ValueError):
        return date.fromisoformat(found[1]) if found else None
    return None
