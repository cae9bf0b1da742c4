"""Merges the stream's bars with the vendor's history of them: the most recently received revision wins.

Belongs here: that rule, in SQL, and the count of where the two differed. Does not belong here: how the stream's
revisions become one row (datasets.normalize), and where the history comes from (datasets.reference).

A bar of the history is one more revision of the stream's bar. Where both have the same values, the stream's row stays
and gains its number of transactions. Where they differ, the one received last is kept. Where only the history has the
bar, it is added. Everything reads two relations of the session: `stream` (normalized rows) and `reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from polygon_pipeline.datasets.session import DuckSession

EXAMPLES = 20

_PRICES = ("open", "high", "low", "close")

# REST's VWAPs have four digits where the stream's may have more; volumes have six.
_SAME = " AND ".join(
    [
        *(f"stream.{name} = reference.{name}" for name in _PRICES),
        "abs(stream.volume - reference.volume) <= 1e-6",
        "coalesce(abs(stream.vwap - reference.vwap) <= 5e-5, true)",
    ]
)

PAIRS = f"""
    CREATE OR REPLACE TEMP VIEW pairs AS
    SELECT
        ticker,
        timestamp,
        stream,
        reference,
        CASE
            WHEN stream.source IS NULL THEN 'added'
            WHEN reference.source IS NULL THEN 'stream only'
            WHEN coalesce({_SAME}, false) THEN 'same'
            WHEN reference.received_at > stream.received_at THEN 'corrected'
            ELSE 'kept'
        END AS verdict
    FROM stream FULL JOIN reference USING (ticker, timestamp)
"""

# session: the part of the day that a timestamp is in (normalize.SESSION).
MERGED = f"""
    SELECT
        ticker,
        timestamp,
        {"".join(f"CASE WHEN replaced THEN reference.{name} ELSE stream.{name} END AS {name}, " for name in _PRICES)}
        CASE WHEN replaced THEN reference.volume ELSE stream.volume END AS volume,
        CASE WHEN replaced THEN coalesce(reference.vwap, stream.vwap) ELSE stream.vwap END AS vwap,
        stream.day_open, stream.day_volume, stream.day_vwap, stream.average_trade_size, stream.otc,
        CASE WHEN verdict <> 'kept' THEN reference.transactions END AS transactions,
        {{session}} AS session,
        coalesce(stream.revisions, 0) AS revisions,
        CASE WHEN replaced THEN reference.received_at ELSE stream.received_at END AS received_at,
        CASE WHEN replaced THEN reference.source ELSE stream.source END AS source
    FROM (SELECT *, verdict IN ('added', 'corrected') AS replaced FROM pairs)
    ORDER BY ticker, timestamp
"""


class Merge(NamedTuple):
    """Where the vendor's history and the stream differed.

    added: bars that only the history has; differing: bars of both that differ, of which `corrected` are kept as the
    history has them and `kept` as the stream has them. examples: the first differing bars by ticker and time, each
    with both revisions, as JSON would have them.
    """

    added: int = 0
    differing: int = 0
    corrected: int = 0
    kept: int = 0
    examples: tuple[dict[str, Any], ...] = ()


def count(session: DuckSession) -> Merge:
    """Counts a merge, after PAIRS."""
    counts = dict(session.rows("SELECT verdict, count(*) FROM pairs GROUP BY verdict"))
    corrected, kept = counts.get("corrected", 0), counts.get("kept", 0)
    rows = session.rows(
        f"""
        SELECT ticker, strftime(timestamp, '%Y-%m-%dT%H:%M:%SZ'), verdict, {_json("stream")}, {_json("reference")}
        FROM pairs WHERE verdict IN ('corrected', 'kept')
        ORDER BY ticker, timestamp LIMIT {EXAMPLES}
        """
    )
    names = ("ticker", "timestamp", "verdict", "stream", "reference")
    examples = tuple(dict(zip(names, row, strict=True)) for row in rows)
    return Merge(counts.get("added", 0), corrected + kept, corrected, kept, examples)


def _json(relation: str) -> str:
    """One side of a pair as a struct that JSON can hold."""
    fields = ", ".join(f"{name}: {relation}.{name}" for name in (*_PRICES, "volume", "vwap", "source"))
    return f"{{{fields}, received_at: strftime({relation}.received_at, '%Y-%m-%dT%H:%M:%S.%fZ')}}"
