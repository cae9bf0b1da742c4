"""Whether two contenders made the same rows: nothing is timed that does not come to the same result.

Belongs here: comparing Parquet files. Does not belong here: making them.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

KEY_AND_PRICES = ("ticker", "timestamp", "open", "high", "low", "close", "volume", "vwap")


def same_rows(ours: Path, theirs: Path, columns: tuple[str, ...] = KEY_AND_PRICES, digits: int | None = None) -> None:
    """Raises AssertionError unless both files have the same rows. digits: numbers are compared rounded to so many
    decimals, where a contender adds up floats."""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        kinds = dict(connection.execute(f"SELECT column_name, column_type FROM (DESCRIBE FROM '{ours}')").fetchall())
        chosen = ", ".join(_column(name, kinds[name], digits) for name in columns)
        one, other = (f"SELECT {chosen} FROM read_parquet('{file}')" for file in (ours, theirs))
        [(left, right, rows)] = connection.execute(
            f"SELECT (SELECT count(*) FROM ({one} EXCEPT ALL {other})), (SELECT count(*) FROM ({other} EXCEPT ALL "
            f"{one})), (SELECT count(*) FROM ({one}))"
        ).fetchall()
    assert rows, f"{ours} has no rows"
    assert not left, f"{left} of {rows} rows of {ours} are not in {theirs}"
    assert not right, f"{right} rows of {theirs} are not in {ours}"


def _column(name: str, kind: str, digits: int | None) -> str:
    if "TIMESTAMP" in kind:
        return f"epoch_us({name})"  # whatever its precision and zone
    return f"round({name}, {digits})" if kind == "DOUBLE" and digits is not None else name
