"""Prices across splits and dividends: what a day's raw prices are multiplied with. Nothing adjusted is ever stored.

Belongs here: the factors, what of the vendor's records they leave out, and where they differ from the vendor's own, in
SQL over tables of a DuckDB connection. Does not belong here: finding and reading those tables (read, defs).

The tables, with the vendor's names, one fetch each: `splits` (ticker, execution_date, adjustment_type, split_from,
split_to, historical_adjustment_factor), `dividends` (ticker, ex_dividend_date, cash_amount, currency,
distribution_type, historical_adjustment_factor), and `closes` (ticker, date, close): raw closes, of which the last one
before each ex-date is needed.

How it is reckoned:

- All goes by trade dates. A split takes effect overnight, so every bar of its trade date is in new shares, the
  pre-market and the night before it included. What is adjusted are the days before.
- Prices are in the shares of `as_of` (today, where nobody asks otherwise), as the vendor's adjusted prices are: not in
  those of the last day read, so that two readings of a day agree. An event after `as_of` changes nothing, though it is
  announced already.
- A split multiplies the prices before it by split_from / split_to, and divides the volumes by it.
- A dividend takes its cash from the close before its ex-date: the prices before are multiplied by 1 - cash / close, and
  the volumes stay. Cash is per share as counted on the ex-date: the close is brought across the splits between. Several
  dividends of a day are added up. So the adjusted return across an ex-date is close / (previous close * split - cash).
- Records that are the same in all that is used count once.
- A record that says nothing usable (a ratio or an amount that is null, 0 or negative; another currency than USD; cash
  that is not below the price; no close before it) is left out, and told by `skipped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import duckdb

Adjusted = Literal["none", "splits", "all"]

# By how much a ratio may differ from the vendor's before it is told: closes differ by some cents between sources, which
# changes a dividend's ratio by a few millionths.
TOLERANCE = 0.0005

# Of all datasets, the columns that are prices, and those that count shares.
PRICES = frozenset(
    {"open", "high", "low", "close", "vwap", "day_open", "day_vwap", "official_open", "official_close", "last_price"}
)
SHARES = frozenset(
    {
        "volume",
        "day_volume",
        "average_trade_size",
        "pre_market_volume",
        "after_hours_volume",
        "overnight_volume",
    }
)

# Every record once, with what is wrong with it; then what the days' events come to.
_EVENTS = """
    WITH split_events AS (
        SELECT
            *,
            CASE
                WHEN date IS NULL THEN 'it has no execution_date'
                WHEN NOT coalesce(split_from > 0 AND split_to > 0 AND isfinite(split_from / split_to), false)
                THEN concat(
                    'split_from is ', ifnull(split_from::VARCHAR, 'null'),
                    ', split_to ', ifnull(split_to::VARCHAR, 'null')
                )
            END AS problem,
            CASE WHEN problem IS NULL THEN split_from / split_to END AS ratio
        FROM (
            SELECT
                ticker,
                execution_date AS date,
                adjustment_type,
                CAST(split_from AS DOUBLE) AS split_from,
                CAST(split_to AS DOUBLE) AS split_to,
                max(CAST(historical_adjustment_factor AS DOUBLE)) AS vendor_factor
            FROM splits
            GROUP BY ALL
        )
    ),
    split_days AS (
        SELECT ticker, date, product(ratio) AS ratio FROM split_events WHERE problem IS NULL GROUP BY ticker, date
    ),
    dividend_records AS (
        SELECT
            ticker,
            ex_dividend_date AS date,
            distribution_type,
            currency,
            CAST(cash_amount AS DOUBLE) AS cash,
            max(CAST(historical_adjustment_factor AS DOUBLE)) AS vendor_factor
        FROM dividends
        GROUP BY ALL
    ),
    last_closes AS (
        SELECT record.ticker, record.date, last.date AS close_date, last.close
        FROM (SELECT DISTINCT ticker, date FROM dividend_records WHERE date IS NOT NULL) record
        ASOF JOIN (SELECT ticker, date, close FROM closes WHERE close > 0) last
        ON record.ticker = last.ticker AND record.date > last.date
    ),
    prices AS (
        SELECT c.ticker, c.date, any_value(c.close) * coalesce(product(s.ratio), 1) AS price
        FROM last_closes c
        LEFT JOIN split_days s ON c.ticker = s.ticker AND s.date > c.close_date AND s.date <= c.date
        GROUP BY c.ticker, c.date
    ),
    dividend_events AS (
        SELECT
            * EXCLUDE (problem),
            sum(cash) FILTER (WHERE problem IS NULL) OVER (PARTITION BY ticker, date) AS day_cash,
            CASE
                WHEN problem IS NOT NULL THEN problem
                WHEN day_cash >= price
                THEN concat('the cash of its day is ', day_cash, ', and the price before it ', price)
            END AS problem
        FROM (
            SELECT
                *,
                CASE
                    WHEN date IS NULL THEN 'it has no ex_dividend_date'
                    WHEN NOT coalesce(cash > 0 AND isfinite(cash), false)
                    THEN concat('cash_amount is ', ifnull(cash::VARCHAR, 'null'))
                    WHEN currency IS NULL THEN 'it has no currency'
                    WHEN currency <> 'USD' THEN concat('it is paid in ', currency)
                    WHEN price IS NULL THEN 'no close is known before it'
                END AS problem
            FROM dividend_records LEFT JOIN prices USING (ticker, date)
        )
    ),
    dividend_days AS (
        SELECT ticker, date, 1 - any_value(day_cash) / any_value(price) AS ratio
        FROM dividend_events
        WHERE problem IS NULL
        GROUP BY ticker, date
    )
"""

# One row a ticker and ex-date: what prices from the ex-date before it up to the day before it are multiplied with.
_FACTORS = f"""
    {_EVENTS}
    SELECT
        ticker,
        date,
        product(coalesce(s.ratio, 1)) OVER later AS split_factor,
        product(coalesce(s.ratio, 1) * coalesce(d.ratio, 1)) OVER later AS total_factor
    FROM split_days s FULL JOIN dividend_days d USING (ticker, date)
    WHERE date <= $as_of
    WINDOW later AS (PARTITION BY ticker ORDER BY date DESC)
"""

_SKIPPED = f"""
    {_EVENTS}
    SELECT kind, ticker, date, problem
    FROM (
        SELECT 'split' AS kind, ticker, date, problem FROM split_events
        UNION ALL
        SELECT 'dividend' AS kind, ticker, date, problem FROM dividend_events
    )
    WHERE problem IS NOT NULL AND (date IS NULL OR date > $first AND date <= $as_of)
    ORDER BY ticker, date, kind, problem
"""

# The vendor's factor is the product over all events of one kind from its own on: an event's ratio is its factor over
# the next one's. The events of one day may each have the day's factor, or one after the other. Whether an event that
# is only announced is within the others' factors, the vendor does not say. Whatever agrees with ours is taken.
_DIFFERENCES = f"""
    {_EVENTS},
    records AS (
        SELECT 'split' AS kind, ticker, date, vendor_factor FROM split_events
        UNION ALL
        SELECT 'dividend' AS kind, ticker, date, vendor_factor FROM dividend_events
    ),
    ratios AS (
        SELECT 'split' AS kind, * FROM split_days UNION ALL SELECT 'dividend' AS kind, * FROM dividend_days
    ),
    days AS (
        SELECT
            kind,
            ticker,
            date,
            list(vendor_factor) AS factors,
            lead(date) OVER following AS next_date,
            lead(list(vendor_factor)) OVER following AS next_factors
        FROM records
        WHERE date IS NOT NULL
        GROUP BY kind, ticker, date
        WINDOW following AS (PARTITION BY kind, ticker ORDER BY date)
    ),
    compared AS (
        SELECT kind, ticker, date, ratio AS ours, arg_min(factor / base, abs(factor / base - ratio)) AS theirs
        FROM (
            SELECT *, unnest(bases) AS base
            FROM (
                SELECT
                    *,
                    unnest(factors) AS factor,
                    CASE
                        WHEN next_date IS NULL THEN [1]
                        WHEN next_date > $as_of THEN list_append(next_factors, 1)
                        ELSE next_factors
                    END AS bases
                FROM days
                WHERE date <= $as_of
            )
        )
        JOIN ratios USING (kind, ticker, date)
        WHERE factor > 0 AND base > 0
        GROUP BY kind, ticker, date, ratio
    )
    SELECT * FROM compared WHERE abs(theirs / ours - 1) > {TOLERANCE}
    UNION ALL
    SELECT DISTINCT kind, ticker, date, ratio, vendor_factor
    FROM records LEFT JOIN ratios USING (kind, ticker, date)
    WHERE date <= $as_of AND NOT coalesce(vendor_factor > 0, false)
    ORDER BY ticker, date, kind
"""


class Skipped(NamedTuple):
    """A record of the vendor's that no price is adjusted by. kind: split or dividend; date: None where it has none."""

    kind: str
    ticker: str
    date: date | None
    problem: str

    def __str__(self) -> str:
        return f"the {self.kind} of {self.ticker} on {self.date or 'no date'} is left out: {self.problem}"


class Difference(NamedTuple):
    """A day's events of one kind, whose ratio is not the vendor's. kind: split or dividend.

    ours: what prices before the day are multiplied with; None where the day's records are left out. theirs: what
    follows from the vendor's cumulative factors; 0 or None where its own factor is that, which says nothing.
    """

    kind: str
    ticker: str
    date: date
    ours: float | None
    theirs: float | None


def make_factors(connection: duckdb.DuckDBPyConnection, as_of: date) -> None:
    """Makes the table `factors` (ticker, date, split_factor, total_factor) of the events up to `as_of`.

    A row holds for the days before its date, back to the date of the row before. Prices are multiplied with
    split_factor or, where dividends count too, with total_factor; shares are divided by split_factor.
    """
    _run(connection, f"CREATE OR REPLACE TEMP TABLE factors AS {_FACTORS}", as_of=as_of)


def adjusted_rows(bars: str, columns: Sequence[str], adjusted: Adjusted) -> str:
    """A SELECT of these columns of a relation that has `ticker` and `date` (its trade date), by the table `factors`."""
    if adjusted == "none":
        return f"SELECT {', '.join(columns)} FROM {bars}"
    price_factor = "split_factor" if adjusted == "splits" else "total_factor"
    return f"""
        SELECT {", ".join(_adjusted(column, price_factor) for column in columns)}
        FROM {bars} bar ASOF LEFT JOIN factors ON bar.ticker = factors.ticker AND bar.date < factors.date
    """


def skipped(connection: duckdb.DuckDBPyConnection, as_of: date, first: date = date.min) -> list[Skipped]:
    """The records that are left out, of those that would change prices of the days from `first` to `as_of`."""
    return [Skipped(*row) for row in _run(connection, _SKIPPED, as_of=as_of, first=first).fetchall()]


def differences(connection: duckdb.DuckDBPyConnection, as_of: date) -> list[Difference]:
    """Where an event's own ratio differs from the vendor's factors by more than TOLERANCE, up to `as_of`.

    A dividend without a close before it is not compared, so an empty `closes` compares the splits alone.
    """
    return [Difference(*row) for row in _run(connection, _DIFFERENCES, as_of=as_of).fetchall()]


def _run(connection: duckdb.DuckDBPyConnection, query: str, **parameters: date) -> duckdb.DuckDBPyConnection:
    # DuckDB compares every bar with every event where it expects few bars, and of files whose columns it was told it
    # expects one. The whole market would take minutes instead of seconds. The setting also holds for adjusted_rows.
    connection.execute("SET asof_loop_join_threshold = 0")
    return connection.execute(query, parameters)


def _adjusted(column: str, price_factor: str) -> str:
    if column in PRICES:
        return f"bar.{column} * coalesce(factors.{price_factor}, 1) AS {column}"
    if column in SHARES:
        return f"bar.{column} / coalesce(factors.split_factor, 1) AS {column}"
    return f"bar.{column}"
