"""The session report: a trading day at a glance, as a row per ticker and as figures of the whole day.

Belongs here: those rows and figures, and what became of each gap. Does not belong here: which minutes were lost
(datasets.coverage), when a collector was connected (lake.ledger), and how the report looks (defs.report_page).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from polygon_pipeline.datasets.coverage import totals
from polygon_pipeline.datasets.day_state import DayStatus
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.lake.lag import LatenessSummary, merged
from polygon_pipeline.lake.ledger import Ledger, connected_minutes, market_time, missing_minutes, subscribed_tickers
from polygon_pipeline.market.bars import Channel

# So many are named of each, because a page is made at every checkpoint.
_NAMED = 5

Span = tuple[datetime, datetime]

# $day_state: how the day stood. Sums are decimals, so that the same input gives the same bytes.
_ROWS = """
    SELECT
        ticker,
        $day AS date,
        coalesce(bars, 0)::BIGINT AS bars,
        first_bar,
        last_bar,
        last_price,
        day_return,
        coalesce(CAST(shares AS DOUBLE), 0) AS volume,
        CAST(shares AS DOUBLE) / nullif(CAST(sum(shares) OVER () AS DOUBLE), 0) AS share_of_volume,
        CAST(round(coalesce(traded_minutes * (1 - share), 0)) AS BIGINT) AS missing_minutes,
        repaired_minutes,
        corrected_minutes,
        late_minutes,
        share,
        $day_state AS day_state
    FROM coverage LEFT JOIN found USING (ticker)
    ORDER BY ticker
"""
_FOUND = """
    CREATE TEMP VIEW found AS
    SELECT
        ticker,
        count(*) AS bars,
        min(timestamp) AS first_bar,
        max(timestamp) AS last_bar,
        arg_max(close, timestamp) AS last_price,
        arg_max(close, timestamp) FILTER (session = 'regular')
            / nullif(arg_min(open, timestamp) FILTER (session = 'regular'), 0) - 1 AS day_return,
        sum(CAST(volume AS DECIMAL(38, 6))) AS shares
    FROM normalized
    GROUP BY ticker
"""

# A bar that came once: one that was revised came the last time when there was something to revise.
_LAG = """
    SELECT quantile_cont(epoch_ms(received_at) - epoch_ms(timestamp) - 60000, [0.5, 0.99])
    FROM normalized WHERE source = 'websocket' AND revisions = 1
"""

# What became of the minutes of each gap: bars that the history added, and those that it has and the bars lack.
_FATES = """
    SELECT number, count(*) FILTER (added)::BIGINT, count(*) FILTER (NOT added)::BIGINT
    FROM (
        SELECT timestamp, true AS added FROM normalized WHERE revisions = 0
        UNION ALL
        SELECT timestamp, false FROM reference ANTI JOIN normalized USING (ticker, timestamp)
    ) JOIN gaps ON timestamp BETWEEN first AND last
    GROUP BY number
"""


class Gap(NamedTuple):
    """A time in which no collector was connected. first, last: the starts of its minutes, aware.

    repaired: bars that the vendor's history added; missing: bars that it has and the dataset lacks. is_known: whether
    the history reaches over the whole gap.
    """

    first: datetime
    last: datetime
    cause: str
    repaired: int
    missing: int
    is_known: bool


class Mover(NamedTuple):
    """A ticker's day. day_return: of the regular hours, 0.01 is one percent; None without bars in them."""

    ticker: str
    last_price: float
    day_return: float | None
    volume: float
    share_of_volume: float


class Report(NamedTuple):
    """The figures of a day.

    feeds: simulated, polygon or whatever the ledgers name; empty where no collector of ours was at work. asked_for: how
    many tickers were; None for the whole market or where nobody says. bars, tickers: those that are there. lag_seconds:
    from a bar's end to its arrival, the median and the 99th of a hundred; None where that says nothing. minutes: the
    totals of bar_coverage. share: of all traded minutes, those that the bars have; None where none is known. up, down:
    the tickers that moved most; most_traded: by shares. revisions: how late they came in all runs of the day;
    None where none was measured.
    """

    feeds: list[str]
    asked_for: int | None
    bars: int
    tickers: int
    volume: float
    first_bar: datetime | None
    last_bar: datetime | None
    gaps: list[Gap]
    quarantined: int
    lag_seconds: tuple[float, float] | None
    minutes: dict[str, int]
    missing: int
    share: float | None
    up: list[Mover]
    down: list[Mover]
    most_traded: list[Mover]
    revisions: LatenessSummary | None = None


def in_real_time(ledgers: Iterable[Ledger]) -> bool:
    """Whether the bars of these runs came when they were made. Where a feed plays a past day, when they came says
    nothing."""
    return not any(ledger.time_base == "event" for ledger in ledgers)


def day_gaps(day: date, ledgers: Sequence[Ledger], now: datetime, live_run: str | None = None) -> list[Span]:
    """The times of a session in which no collector was connected, so far; none on a day when none was at work.

    The arguments are those of day_status.
    """
    return missing_minutes(day, ledgers, market_time(ledgers, now), live_run) if ledgers else []


class Reporting(DuckSession):
    """Reports a day. A context manager.

    normalized, reference, coverage: files of that day's datasets. known_until_ms: as in day_status. space: as in
    DuckSession.
    """

    def __init__(
        self,
        day: date,
        normalized: Path,
        reference: Path | None,
        coverage: Path,
        known_until_ms: int,
        space: Path | DuckSession,
    ) -> None:
        super().__init__(space)
        self._day, self._coverage, self._known_until_ms = day, coverage, known_until_ms
        self.view("normalized", normalized)
        self.view("coverage", coverage)
        if reference is None:
            self.rows("CREATE TEMP VIEW reference AS SELECT ticker, timestamp FROM normalized WHERE false")
        else:
            self.view("reference", reference)
        self.rows(_FOUND)

    def write(self, target: Path, status: DayStatus) -> None:
        """Writes a row for every ticker that bar_coverage has."""
        self.copy(_ROWS, target, {"day": self._day, "day_state": str(status.state)})

    def report(self, file: Path, ledgers: Sequence[Ledger], gaps: Sequence[Span]) -> Report:
        """The figures of the day. file: what write() wrote; gaps: of day_gaps."""
        self.view("report", file)
        [(bars, tickers, volume, first, last, missing)] = self.rows(
            """
            SELECT sum(bars)::BIGINT, count(*) FILTER (bars > 0), sum(volume), epoch_ms(min(first_bar)),
                epoch_ms(max(last_bar)), sum(missing_minutes)::BIGINT
            FROM report
            """
        )
        minutes = totals(self._coverage)
        traded = minutes.get("traded_minutes")
        asked_for = subscribed_tickers(ledgers) if ledgers else None
        return Report(
            feeds=sorted({ledger.feed for ledger in ledgers}),
            asked_for=None if asked_for is None else len(asked_for),
            bars=bars or 0,
            tickers=tickers,
            volume=volume or 0.0,
            first_bar=_moment(first),
            last_bar=_moment(last),
            gaps=self._fates(ledgers, gaps),
            quarantined=sum(ledger.account.quarantined for ledger in ledgers),
            lag_seconds=self._lag() if in_real_time(ledgers) else None,
            minutes=minutes,
            missing=missing or 0,
            share=1 - (missing or 0) / traded if traded else None,
            up=self._movers("day_return > 0", "day_return DESC, volume DESC, ticker"),
            down=self._movers("day_return < 0", "day_return, volume DESC, ticker"),
            most_traded=self._movers("true", "volume DESC, ticker"),
            revisions=_revisions(ledgers),
        )

    def _movers(self, condition: str, order: str) -> list[Mover]:
        query = f"""
            SELECT {", ".join(Mover._fields)} FROM report
            WHERE bars > 0 AND {condition} ORDER BY {order} LIMIT {_NAMED}
        """
        return [Mover(*row) for row in self.rows(query)]

    def _lag(self) -> tuple[float, float] | None:
        [(found,)] = self.rows(_LAG)
        return None if found is None else (found[0] / 1000, found[1] / 1000)

    def _fates(self, ledgers: Sequence[Ledger], gaps: Sequence[Span]) -> list[Gap]:
        import pyarrow as pa

        kind = pa.timestamp("us", tz="UTC")
        spans = {
            "number": pa.array(range(len(gaps)), pa.int32()),
            "first": pa.array([first for first, _ in gaps], kind),
            "last": pa.array([last for _, last in gaps], kind),
        }
        self.connection.register("gaps", pa.table(spans))
        fates = {number: (repaired, missing) for number, repaired, missing in self.rows(_FATES)}
        return [
            Gap(
                first,
                last,
                _cause(ledgers, first, last),
                *fates.get(number, (0, 0)),
                is_known=last.timestamp() * 1000 < self._known_until_ms,
            )
            for number, (first, last) in enumerate(gaps)
        ]


def _revisions(ledgers: Sequence[Ledger]) -> LatenessSummary | None:
    measured = merged(
        lateness for ledger in ledgers if (lateness := ledger.account.lateness.get(Channel.MINUTE)) is not None
    )
    return measured.summary() if measured.revised.count else None


def _cause(ledgers: Iterable[Ledger], first: datetime, last: datetime) -> str:
    """Why no collector was connected: what ended the connection before, or that there was none."""
    causes = {
        gap.cause: None  # in order, once
        for ledger in ledgers
        for gap in ledger.gaps
        if gap.first_minute and gap.first_minute <= last and (gap.last_minute is None or first <= gap.last_minute)
    }
    for ledger in ledgers:
        known = connected_minutes([ledger])
        until = datetime.fromtimestamp(known[-1][1] / 1000 + 60, UTC) if known else ledger.started_at
        if not ledger.complete and first <= until <= last:
            causes[f"what run {ledger.run} received then is not on the lake"] = None
    return "; ".join(causes) or "no collector was at work"


def _moment(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
