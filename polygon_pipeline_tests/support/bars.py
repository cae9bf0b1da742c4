"""What the tests make bars with: one function for each form that a bar has on its way.

Belongs here: single bars, and the lines and objects that hold them. Does not belong here: whole files of them
(day_files), events as a feed has them (feeds), and strategies (events).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from polygon_pipeline.lake import archive
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK, session, trade_date

DAY = date(2026, 1, 26)  # a Monday in winter: 18:30 UTC is 13:30 in New York
HALF_DAY = date(2026, 11, 27)
NIGHT_DAY = date(2026, 12, 8)  # a Tuesday whose night, if there is one, is Monday's
ARRIVAL = datetime(2026, 1, 26, 18, 31, 0, 123456, tzinfo=UTC)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Any microsecond from 2003 to 2099.
moments = st.integers(1_041_379_200_000_000, 4_102_444_799_999_999).map(
    lambda microseconds: EPOCH + timedelta(microseconds=microseconds)
)

JsonObject = dict[str, Any]
Row = dict[str, Any]


def at(hour: int, minute: int, day: date = DAY) -> int:
    """That time of the day in New York, in Unix ms."""
    return int(datetime(day.year, day.month, day.day, hour, minute, tzinfo=NEW_YORK).timestamp()) * 1000


OPENING = at(9, 30)
NOON = at(12, 0)


def moment(start_ms: int) -> datetime:
    return datetime.fromtimestamp(start_ms / 1000, UTC)


def later(seconds: float) -> datetime:
    return ARRIVAL + timedelta(seconds=seconds)


# As the stream sends it


def aggregate(ticker: str = "SPY", start_ms: int = NOON, **fields: object) -> JsonObject:
    """An acceptable `AM` event. fields: what differs; None takes a field away."""
    event = {
        "ev": "AM",
        "sym": ticker,
        "v": 1000,
        "av": 50_000,
        "op": 449.5,
        "vw": 450.3,
        "o": 450.25,
        "c": 450.5,
        "h": 450.75,
        "l": 450.2,
        "a": 450.1,
        "z": 62,
        "s": start_ms,
        "e": start_ms + 60_000,
        **fields,
    }
    return {name: value for name, value in event.items() if value is not None}


def plain_bar(
    ticker: str, start_ms: int, price: int, channel: Channel = Channel.MINUTE, **fields: object
) -> JsonObject:
    """An acceptable event without the fields that may be absent. Its one price tells it from other revisions."""
    absent = dict.fromkeys(("av", "op", "a", "z"))
    prices = dict.fromkeys(("o", "h", "l", "c"), price)
    return aggregate(ticker, start_ms, ev=channel.value, v=7, vw=1.5, **prices, **absent, **fields)


def line(received_at: datetime, events: object, refused: Sequence[int] = ()) -> bytes:
    """The archive's line of a frame."""
    return archive.frame_line(received_at, json.dumps(events).encode(), refused)


def record_line(
    ticker: str, start_ms: int, close: float, *, collected_at: datetime = ARRIVAL, bar_data: JsonObject | None = None
) -> bytes:
    """A raw-data record by another writer."""
    record = {
        "source": "polygon_websocket",
        "ticker": ticker,
        "timestamp": moment(start_ms).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "bar_data": {
            "open": 1.0,
            "high": 999.0,
            "low": 0.5,
            "close": close,
            "volume": 10,
            "vwap": 2.0,
            **(bar_data or {}),
        },
        "collected_at": collected_at.isoformat(),
    }
    return json.dumps(record).encode() + b"\n"


# As the vendor's history has it


def rest_bar(start_ms: int = NOON, **fields: object) -> JsonObject:
    """A bar in an answer of REST, which says of the bar what aggregate() does. fields: as there."""
    bar = {"v": 1000, "vw": 450.3, "o": 450.25, "c": 450.5, "h": 450.75, "l": 450.2, "t": start_ms, "n": 7, **fields}
    return {name: value for name, value in bar.items() if value is not None}


def reference_row(ticker: str = "SPY", start_ms: int = NOON, **fields: object) -> Row:
    """A row of reference_bars that says of a bar what aggregate() does. fields: what differs."""
    return {
        "ticker": ticker,
        "timestamp": moment(start_ms),
        "open": 450.25,
        "high": 450.75,
        "low": 450.2,
        "close": 450.5,
        "volume": 1000.0,
        "vwap": 450.3,
        "transactions": 7,
        "received_at": later(86_400),
        "source": "rest",
        **fields,
    }


def reference_daily_row(ticker: str = "SPY", day: date = DAY, **fields: object) -> Row:
    """A row of reference_daily_bars. fields: what differs."""
    return {
        "ticker": ticker,
        "date": day,
        "open": 10.0,
        "high": 12.0,
        "low": 9.0,
        "close": 11.0,
        "volume": 100.0,
        "vwap": 10.5,
        "transactions": 7,
        "otc": False,
        "received_at": later(86_400),
        "source": "rest",
        **fields,
    }


# As a dataset has it


def normalized_row(ticker: str = "SPY", start_ms: int = NOON, **fields: object) -> Row:
    """A row of normalized_bars, in the right part of the day. fields: what differs, and columns it leaves out."""
    start = moment(start_ms)
    found = session(trade_date(start_ms))
    assert found
    parts = {"overnight": found.pre_open, "pre": found.open, "regular": found.close}
    if not found.night_open:
        del parts["overnight"]
    return {
        "ticker": ticker,
        "timestamp": start,
        "open": 10.0,
        "high": 12.0,
        "low": 9.0,
        "close": 11.0,
        "volume": 100.0,
        "vwap": 10.5,
        "session": next((part for part, end in parts.items() if start < end), "post"),
        "revisions": 1,
        "source": "websocket",
        **fields,
    }
