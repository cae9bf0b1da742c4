"""Our day against the vendor's, field by field, with the reason where the day's minutes show it.

Belongs here: what counts as different, which reasons there are, and how each is shown. Does not belong here: the two
days (datasets.resample, datasets.reference), and how the outcome is told (defs.checks).

A reason is never guessed. It is given where the minutes, put together in that one other way, give the vendor's value:

- official_open: the feed itself reported the vendor's open as the day's official one.
- closing_auction: the minute after the bell, where the auction prints, has the vendor's close among its four prices,
  and the vendor's high or low is that close; or, with the shares of that minute, the volume is the vendor's.
- extended_hours: with all shares of the day, those of trades outside regular hours (Form T) among them, the volume is
  the vendor's.
- missing_bars, corrected_bars, extra_bars: the vendor's own minutes give its value where ours do not, and they have
  bars that we lack, have other values than ours (a correction after the last revision that we got), or lack ones that
  we have.

A VWAP is explained where the trades that explain the volume give it. Several reasons are joined by ` + `.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from polygon_pipeline.datasets.normalize import parts_of
from polygon_pipeline.datasets.reference import read_reference_info
from polygon_pipeline.datasets.session import DuckSession
from polygon_pipeline.datasets.wording import count
from polygon_pipeline.market.calendar import session

UNEXPLAINED = "unexplained"
_NAMED = 20

_FIELDS = ("open", "high", "low", "close", "volume", "vwap")

# Prices are the same or not. Sums of volumes differ in the last digits, and four digits of a minute's VWAP give as many
# of the day's.
_TOLERANCE = "CASE field WHEN 'volume' THEN 1e-5 WHEN 'vwap' THEN 1.001e-4 ELSE 0 END"
_SAME = f"coalesce(abs({{}} - theirs) <= {_TOLERANCE}, ({{}}) IS NULL AND theirs IS NULL)"

# part: 0 for regular hours, 1 for the minute after the bell, 2 for the others. The vendor's minutes are read of the
# tickers in question alone, those that ours do not explain: few, and of the whole market they would take four seconds.
_MINUTES = """
    CREATE TEMP VIEW minutes AS
    SELECT *, CASE
        WHEN epoch_ms(timestamp) >= {open_ms} AND epoch_ms(timestamp) < {close_ms} THEN 0
        WHEN epoch_ms(timestamp) = {close_ms} THEN 1
        ELSE 2
    END AS part
    FROM (
        SELECT 'ours' AS side, ticker, timestamp, open, high, low, close, volume, vwap FROM normalized
        UNION ALL
        SELECT 'vendor', ticker, timestamp, open, high, low, close, volume, vwap FROM reference
        WHERE ticker IN (FROM in_question)
    )
"""

_IN_QUESTION = """
    INSERT INTO in_question
    SELECT DISTINCT ticker FROM differences JOIN tickers USING (ticker) WHERE known AND reason = '{}'
"""

# Every ticker of either day. known: whether the vendor's minutes of it are here, if there are any.
_TICKERS = """
    CREATE TEMP TABLE tickers AS
    SELECT
        ticker,
        $whole_market OR list_contains($known::VARCHAR[], ticker) AS known
    FROM (SELECT ticker FROM ours UNION SELECT ticker FROM theirs)
    WHERE ticker IN (SELECT ticker FROM ours) OR $asked_all OR list_contains($asked::VARCHAR[], ticker)
"""

_COMPARED = f"""
    CREATE TEMP TABLE compared AS
    SELECT *, {_SAME.format("ours", "ours")} OR (field = 'vwap' AND (ours IS NULL OR theirs IS NULL)) AS same
    FROM (
        SELECT ticker, theirs.volume AS their_volume, official_open, unnest([
            {
    ", ".join(
        f"{{field: '{name}', place: {place}, theirs: theirs.{name}, "
        f"ours: CASE WHEN bar_count > 0 THEN ours.{name} END}}"
        for place, name in enumerate(_FIELDS)
    )
}
        ], max_depth := 2)
        FROM tickers LEFT JOIN ours USING (ticker) LEFT JOIN theirs USING (ticker)
        WHERE bar_count > 0 OR theirs.ticker IS NOT NULL
    )
"""

_PARTS = {0: "", 1: "closing_auction", 2: "extended_hours"}

# What each side's minutes of a ticker give; shares: of the trades up to each part.
_SIDES = f"""
    CREATE OR REPLACE TEMP TABLE sides AS
    SELECT
        side,
        ticker,
        arg_min(open, timestamp) FILTER (part = 0) AS open,
        max(high) FILTER (part = 0) AS high,
        min(low) FILTER (part = 0) AS low,
        arg_max(close, timestamp) FILTER (part = 0) AS close,
        any_value([open, high, low, close]) FILTER (part = 1) AS auction,
        [{
    ", ".join(
        f"{{part: {part}, reason: '{reason}', "
        f"volume: CAST(sum(CAST(volume AS DECIMAL(38, 6))) FILTER (part <= {part}) AS DOUBLE), "
        f"vwap: sum(vwap * volume) FILTER (part <= {part}) / nullif(sum(volume) FILTER (part <= {part}), 0)}}"
        for part, reason in _PARTS.items()
    )
}] AS shares
    FROM (SELECT ticker, 'ours' AS side FROM tickers UNION ALL SELECT ticker, 'vendor' FROM in_question)
        LEFT JOIN minutes USING (side, ticker)
    GROUP BY side, ticker
"""

# In what the two sides' minutes of a ticker in question differ, up to each part.
_DIFFERENT_MINUTES = f"""
    CREATE OR REPLACE TEMP TABLE different_minutes AS
    SELECT ticker, [{
    ", ".join(
        "concat_ws(' + ', "
        + ", ".join(
            f"CASE WHEN bool_or({condition}) FILTER (part <= {part}) THEN '{reason}' END"
            for reason, condition in (
                ("missing_bars", "lacks"),
                ("corrected_bars", "differs"),
                ("extra_bars", "exceeds"),
            )
        )
        + ")"
        for part in _PARTS
    )
}] AS reasons
    FROM (
        SELECT
            ticker,
            coalesce(mine.part, vendors.part) AS part,
            mine.side IS NULL AS lacks,
            vendors.side IS NULL AS exceeds,
            NOT lacks AND NOT exceeds AND NOT (
                mine.open = vendors.open AND mine.high = vendors.high AND mine.low = vendors.low
                AND mine.close = vendors.close AND abs(mine.volume - vendors.volume) <= 1e-6
                AND coalesce(abs(mine.vwap - vendors.vwap) <= 5e-5, true)
            ) AS differs
        FROM (FROM minutes WHERE side = 'ours' AND ticker IN (FROM in_question)) AS mine
            FULL JOIN (FROM minutes WHERE side = 'vendor') AS vendors USING (ticker, timestamp)
    )
    GROUP BY ticker
"""

# Values that the minutes give in another way, the simplest first.
_DIFFERENCES = f"""
    CREATE OR REPLACE TEMP TABLE differences AS
    WITH different AS (
        SELECT * FROM compared WHERE NOT same
    ), candidates AS (
        SELECT ticker, field, 0 AS rank, official_open AS value, 'official_open' AS reason
        FROM different WHERE field = 'open' AND official_open IS NOT NULL
        UNION ALL
        SELECT
            ticker, field, rank + CASE side WHEN 'ours' THEN 10 ELSE 20 END, value,
            concat_ws(' + ', nullif(reason, ''), CASE side WHEN 'vendor' THEN nullif(reasons[part + 1], '') END)
        FROM (
            SELECT
                ticker, field, side, part, reasons, reason, rank,
                CASE field WHEN 'open' THEN priced.open WHEN 'high' THEN priced.high WHEN 'low' THEN priced.low
                    WHEN 'close' THEN priced.close END AS value
            FROM different
                JOIN (
                    SELECT
                        side, ticker, 0 AS part, '' AS reason, 0 AS rank, NULL AS auction, open, high, low, close
                    FROM sides
                    UNION ALL
                    SELECT
                        side, ticker, 1, 'closing_auction', 1, auction, coalesce(open, price), greatest(high, price),
                        least(low, price), price
                    FROM (
                        SELECT sides.*, theirs.close AS price FROM sides JOIN theirs USING (ticker)
                        WHERE list_contains(auction, theirs.close)
                    )
                ) AS priced USING (ticker)
                LEFT JOIN different_minutes USING (ticker)
            WHERE field IN ('open', 'high', 'low', 'close')
            UNION ALL
            SELECT
                ticker, field, side, summed.part, reasons, summed.reason, summed.part,
                CASE field
                    WHEN 'volume' THEN summed.volume
                    WHEN 'vwap' THEN CASE WHEN abs(summed.volume - their_volume) <= 1e-5 THEN summed.vwap END
                END
            FROM different
                JOIN (SELECT side, ticker, unnest(shares) AS summed FROM sides) USING (ticker)
                LEFT JOIN different_minutes USING (ticker)
            WHERE field IN ('volume', 'vwap')
        )
    )
    SELECT
        ticker,
        $day AS date,
        field,
        ours,
        theirs,
        coalesce(
            arg_min(reason, rank) FILTER (reason <> '' AND {_SAME.format("value", "value")}), '{UNEXPLAINED}'
        ) AS reason,
        place
    FROM different LEFT JOIN candidates USING (ticker, field)
    GROUP BY ticker, field, place, ours, theirs
"""


class Agreement(NamedTuple):
    """How our day and the vendor's compare. compared: tickers; agreeing: those without any difference; reasons: how
    many values differ for each reason; unexplained: how many tickers; examples: the first of these values, as text."""

    compared: int
    agreeing: int
    reasons: dict[str, int]
    unexplained: int
    examples: list[str]

    def facts(self) -> dict[str, Any]:
        """As a materialization shows it, the sentence first: how many tickers agree, and why the others do not."""
        sentence = f"All {count(self.compared, 'ticker')} agree with the vendor's day in every field."
        if self.reasons:
            named = ", ".join(f"{reason} {number:,}" for reason, number in self.reasons.items())
            shown = self.compared - self.agreeing - self.unexplained
            sentence = (
                f"Of {count(self.compared, 'ticker')}, {self.agreeing:,} agree with the vendor's day in every field, "
                f"{shown:,} differ for reasons that the minutes show, {self.unexplained:,} in values that nothing "
                f"explains. Differing values by reason: {named}."
            )
        return {
            "outcome": sentence,
            "tickers_compared": self.compared,
            "tickers_agreeing": self.agreeing,
            "tickers_unexplained": self.unexplained,
            "unexplained": self.examples,
        }


class Differences(DuckSession):
    """A day's daily_bars beside its reference_daily_bars. A context manager.

    daily, normalized: files of our day; theirs: the vendor's; reference: the vendor's minutes, None where there are
    none yet. asked: the tickers that a collector asked for, None for the whole market: of the others only those that
    we have are compared. space: as in DuckSession. Raises ValueError for a day that is no trading day.
    """

    def __init__(
        self,
        day: date,
        daily: Path,
        theirs: Path,
        normalized: Path,
        reference: Path | None,
        asked: Sequence[str] | None,
        space: Path | DuckSession,
    ) -> None:
        super().__init__(space)
        self._day = day
        self.view("ours", daily)
        self.view("theirs", theirs)
        self.view("normalized", normalized)
        info = read_reference_info(reference) if reference else None
        found = session(day)
        if found is None:
            raise ValueError(f"{day} is not a trading day")
        if reference is not None and info is not None and info.until_ms >= found.post_close.timestamp() * 1000:
            self.view("reference", reference)
            known, whole_market = info.tickers or (), info.tickers is None
        else:
            self.rows("CREATE TEMP VIEW reference AS FROM normalized WHERE false")
            known, whole_market = (), False
        parameters = {
            "known": list(known),
            "whole_market": whole_market,
            "asked": list(asked or ()),
            "asked_all": asked is None,
        }
        self.rows("CREATE TEMP TABLE in_question (ticker VARCHAR)")
        self.rows(_MINUTES.format(**parts_of(day)))
        self.rows(_TICKERS, parameters)
        self.rows(_COMPARED)
        self._explain()
        self.rows(_IN_QUESTION.format(UNEXPLAINED))
        if self.rows("FROM in_question LIMIT 1"):
            self._explain()

    def _explain(self) -> None:
        self.rows(_SIDES)
        self.rows(_DIFFERENT_MINUTES)
        self.rows(_DIFFERENCES, {"day": self._day})

    def write(self, target: Path) -> Agreement:
        """Writes daily_differences, sorted by ticker and field."""
        self.copy("SELECT * EXCLUDE (place) FROM differences ORDER BY ticker, place", target)
        [(compared, agreeing)] = self.rows(
            "SELECT count(*), count(*) FILTER (agrees) "
            "FROM (SELECT bool_and(same) AS agrees FROM compared GROUP BY ticker)"
        )
        reasons = self.rows(
            "SELECT reason, count(*) AS number FROM differences GROUP BY reason ORDER BY number DESC, reason"
        )
        unexplained: list[Any] = self.rows(
            f"SELECT ticker, field, ours, theirs FROM differences WHERE reason = '{UNEXPLAINED}' ORDER BY ticker, field"
        )
        examples = [
            f"{ticker} {name}: ours {_shown(ours)}, theirs {_shown(theirs)}"
            for ticker, name, ours, theirs in unexplained[:_NAMED]
        ]
        return Agreement(compared, agreeing, dict(reasons), len({row[0] for row in unexplained}), examples)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:,.10g}"
