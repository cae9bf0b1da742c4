"""What a day's bars cover: every minute of every ticker's session: its bar was collected, lost or never was.

Belongs here: that classification, the row per ticker made of it, and the tickers with the worst coverage. Does not
belong here: when a collector was connected (lake.ledger), and how the result is drawn (datasets.pictures).

A minute without a bar is no loss by itself. Only the vendor's history distinguishes "no trade" from "lost"; where it
does not reach, the minute is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from polygon_pipeline.datasets.catalog import BAR_COVERAGE
from polygon_pipeline.datasets.reference import read_reference_info
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.market.calendar import session

if TYPE_CHECKING:
    import pyarrow as pa

_MINUTE_MS = 60_000

# A bar whose kept revision came later than this after the minute's end counts as late. Ordinary bars come within
# seconds; revisions for late trades for about a quarter of an hour.
LATE_SECONDS = 60


class State(StrEnum):
    """What became of one minute of one ticker."""

    NO_TRADE = "no_trade"  # neither the history nor the stream has a bar
    COLLECTED = "collected"  # the stream's bar is kept
    CORRECTED = "corrected"  # the stream sent a bar, and the history's values are kept
    FROM_HISTORY = "from_history"  # no collector was at work that day; the history's bar is kept
    NOT_COLLECTED = "not_collected"  # traded, no collector was at work that day, and the history's bar is not added yet
    REPAIRED = "repaired"  # the stream sent none, and the history's bar was added
    LOST_DISCONNECTED = "lost_disconnected"  # traded, not collected while no collector was connected, not repaired yet
    LOST_CONNECTED = "lost_connected"  # traded, not collected though a collector was connected, not repaired yet
    UNKNOWN = "unknown"  # no bar, and no history that reaches so far: no trade or lost


# One row per ticker and minute of the session; everything else is counted from it. $known_tickers is null where the
# reference knows the whole market, $subscribed where the collector asked for it.
_STATES = f"""
    WITH tickers AS (
        SELECT
            ticker,
            coalesce(list_contains($known_tickers::VARCHAR[], ticker), true) AS known,
            coalesce(list_contains($subscribed::VARCHAR[], ticker), true) AS subscribed
        FROM (
            SELECT ticker FROM normalized UNION SELECT ticker FROM reference
            UNION SELECT unnest($known_tickers::VARCHAR[]) UNION SELECT unnest($subscribed::VARCHAR[])
        )
    ), found AS (
        SELECT
            tickers.ticker,
            minute,
            regular,
            known AND epoch_ms(minutes.timestamp) < $until_ms AS known,
            subscribed AND connected AS connected,
            reference.ticker IS NOT NULL AS traded,
            normalized.revisions AS revisions,
            normalized.source = 'websocket' AS kept,
            normalized.received_at > minutes.timestamp + INTERVAL {60 + LATE_SECONDS} SECOND AS late
        FROM tickers CROSS JOIN minutes
            LEFT JOIN normalized ON normalized.ticker = tickers.ticker AND normalized.timestamp = minutes.timestamp
            LEFT JOIN reference ON reference.ticker = tickers.ticker AND reference.timestamp = minutes.timestamp
    ), states AS (
        SELECT
            *,
            CASE
                WHEN revisions > 0 AND kept THEN '{State.COLLECTED}'
                WHEN revisions > 0 THEN '{State.CORRECTED}'
                WHEN revisions = 0 AND $was_collected THEN '{State.REPAIRED}'
                WHEN revisions = 0 THEN '{State.FROM_HISTORY}'
                WHEN traded AND NOT $was_collected THEN '{State.NOT_COLLECTED}'
                WHEN traded AND connected THEN '{State.LOST_CONNECTED}'
                WHEN traded THEN '{State.LOST_DISCONNECTED}'
                WHEN known THEN '{State.NO_TRADE}'
                ELSE '{State.UNKNOWN}'
            END AS state,
            state IN ('{State.COLLECTED}', '{State.CORRECTED}') AS collected,
            state IN ('{State.REPAIRED}', '{State.LOST_CONNECTED}', '{State.LOST_DISCONNECTED}') AS lost
        FROM found
    )
"""

_COVERAGE = f"""
    {_STATES}
    SELECT
        ticker,
        $day AS date,
        count(*) AS expected_minutes,
        count(*) FILTER (regular) AS regular_minutes,
        count(*) FILTER (collected) AS collected_minutes,
        CASE WHEN bool_or(known) THEN count(*) FILTER (traded) END AS traded_minutes,
        count(*) FILTER (lost AND NOT connected) AS lost_disconnected,
        count(*) FILTER (lost AND connected) AS lost_connected,
        count(*) FILTER (state IN ('{State.FROM_HISTORY}', '{State.NOT_COLLECTED}')) AS not_collected_minutes,
        count(*) FILTER (state = '{State.REPAIRED}') AS repaired_minutes,
        count(*) FILTER (state = '{State.CORRECTED}') AS corrected_minutes,
        CASE WHEN $in_real_time THEN count(*) FILTER (state = '{State.COLLECTED}' AND late) END AS late_minutes,
        count(*) FILTER (collected AND known AND NOT traded) AS unexpected_minutes,
        count(*) FILTER (state = '{State.UNKNOWN}') AS unknown_minutes,
        -- consecutive minutes have the same distance to their place in the list
        coalesce(list_max(map_values(list_histogram(
            list_transform(list(minute ORDER BY minute) FILTER (lost), lambda m, place: m - place)
        ))), 0)::BIGINT AS longest_gap_minutes,
        (traded_minutes - count(*) FILTER (
            (lost AND state <> '{State.REPAIRED}') OR state = '{State.NOT_COLLECTED}'
        )) / nullif(traded_minutes, 0) AS share
    FROM states
    GROUP BY ticker
    ORDER BY ticker
"""


class Shortfall(NamedTuple):
    """A ticker whose share of traded minutes is too low. collected: from the stream or by repair."""

    ticker: str
    share: float
    traded: int
    collected: int


class Coverage(DuckSession):
    """A day's minutes, classified. A context manager.

    normalized, reference: files of that day's datasets. connected: the minutes whose bars must have reached a
    collector, as (first, last) starts in Unix ms, both included. subscribed: the tickers the collector asked for, None
    for the whole market; to the others it was never connected. was_collected: whether a collector was at work that day
    at all; else nothing was lost, and what there is comes from the history. in_real_time: whether bars came when they
    were made; a past day that is played has no late ones. space: as in DuckSession. Raises ValueError for a day that is
    no trading day.
    """

    def __init__(
        self,
        day: date,
        normalized: Path,
        reference: Path | None,
        connected: Sequence[tuple[int, int]],
        space: Path | DuckSession,
        subscribed: Sequence[str] | None = None,
        was_collected: bool = True,
        in_real_time: bool = True,
    ) -> None:
        super().__init__(space)
        self._day = day
        self._in_real_time = in_real_time
        self.view("normalized", normalized)
        self.connection.register("minutes", _minutes(day, connected))
        known_tickers: tuple[str, ...] | None = ()
        until_ms = 0
        if reference is None:
            self.rows("CREATE TEMP VIEW reference AS SELECT ticker, timestamp FROM normalized WHERE false")
        else:
            self.view("reference", reference)
            info = read_reference_info(reference)
            known_tickers, until_ms = info.tickers, info.until_ms
        self._parameters = {
            "known_tickers": None if known_tickers is None else list(known_tickers),
            "until_ms": until_ms,
            "subscribed": None if subscribed is None else list(subscribed),
            "was_collected": was_collected,
        }

    def write(self, target: Path) -> None:
        """Writes the coverage: a row for every ticker that is in either file, asked for or subscribed."""
        self.copy(_COVERAGE, target, {**self._parameters, "day": self._day, "in_real_time": self._in_real_time})

    def minute_states(self, tickers: Sequence[str] | None = None) -> pa.Table:
        """The minutes that write() counts: ticker, minute (0 at the session's begin), state, connected, traded.

        tickers: only these; None for all. Sorted by ticker and minute.
        """
        query = f"""
            {_STATES}
            SELECT ticker, minute, state, connected, CASE WHEN known THEN traded END AS traded
            FROM states WHERE coalesce(list_contains($tickers::VARCHAR[], ticker), true)
            ORDER BY ticker, minute
        """
        parameters = {**self._parameters, "tickers": None if tickers is None else list(tickers)}
        return self.connection.sql(query, params=parameters).to_arrow_table()

    def market_states(self) -> list[tuple[int, str, int]]:
        """Of all tickers, how many have each state in each minute: minute, state, tickers."""
        query = f"{_STATES} SELECT minute, state, count(*) FROM states GROUP BY minute, state ORDER BY minute, state"
        return self.rows(query, self._parameters)


def below(coverage: Path, least_share: float) -> list[Shortfall]:
    """The tickers of a coverage file whose share of traded minutes is below least_share (0 to 1), worst first."""
    query = """
        SELECT ticker, share, traded_minutes, CAST(round(share * traded_minutes) AS BIGINT)
        FROM read_parquet($file) WHERE share < $least ORDER BY share, traded_minutes DESC, ticker
    """
    with DuckSession() as session:
        return [Shortfall(*row) for row in session.rows(query, {"file": str(coverage), "least": least_share})]


def worst_first(coverage: Path, limit: int) -> list[str]:
    """The tickers of a coverage file that are most worth a look: least share, most lost, most corrected first."""
    query = """
        SELECT ticker FROM read_parquet($file)
        ORDER BY share NULLS LAST, lost_disconnected + lost_connected DESC, corrected_minutes DESC,
            collected_minutes DESC, ticker
        LIMIT $limit
    """
    with DuckSession() as session:
        return [ticker for (ticker,) in session.rows(query, {"file": str(coverage), "limit": limit})]


def totals(coverage: Path) -> dict[str, int]:
    """The sums of a coverage file's counts of minutes, by column; the longest gap is the longest of any ticker.

    Without what no ticker has, and without what the calendar says of every day.
    """
    calendars = ("expected_minutes", "regular_minutes")
    names = [c.name for c in BAR_COVERAGE.columns if c.type == "int64" and c.name not in calendars]
    sums = ", ".join(f"{'max' if name.startswith('longest') else 'sum'}({name})::BIGINT" for name in names)
    with DuckSession() as session:
        [row] = session.rows(f"SELECT {sums} FROM read_parquet($file)", {"file": str(coverage)})
    return {name: value for name, value in zip(names, row, strict=True) if value is not None}


def _minutes(day: date, connected: Sequence[tuple[int, int]]) -> pa.Table:
    """The session's minutes: minute, timestamp, regular, connected."""
    import numpy as np
    import pyarrow as pa

    found = session(day)
    if found is None:
        raise ValueError(f"{day} is not a trading day")
    first, opens, closes, after = (
        int(moment.timestamp()) * 1000 for moment in (found.begin, found.open, found.close, found.post_close)
    )
    starts = np.arange(first, after, _MINUTE_MS, dtype="int64")
    online = np.zeros(len(starts), dtype=bool)
    for begin, end in connected:
        online |= (begin <= starts) & (starts <= end)
    return pa.table(
        {
            "minute": pa.array(range(len(starts)), pa.int16()),
            "timestamp": pa.array(starts * 1000, pa.timestamp("us", tz="UTC")),
            "regular": (opens <= starts) & (starts < closes),
            "connected": online,
        }
    )
