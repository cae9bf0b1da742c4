"""Whether two contenders made the same rows: nothing is timed that does not come to the same result.

Belongs here: comparing Parquet files. Does not belong here: making them.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

KEY_AND_PRICES = ("ticker", "timestamp", "open", "high", "low", "close", "volume", "vwap")


def same_rows(
    ours: Path, theirs: Path, columns: tuple[str, ...] = KEY_AND_PRICES, nearly: tuple[str, ...] = ()
) -> None:
    """Raises AssertionError unless both files have the same rows.

    nearly: numbers that may differ by a millionth, where a contender adds up floats; the first column and the second
    then tell the rows apart.
    """
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        kinds = dict(connection.execute(f"SELECT column_name, column_type FROM (DESCRIBE FROM '{ours}')").fetchall())
        # Whatever a timestamp's precision and zone.
        chosen = ", ".join(f"epoch_us({name})" if "TIMESTAMP" in kinds[name] else name for name in columns)
        one, other = (f"SELECT {chosen} FROM read_parquet('{file}')" for file in (ours, theirs))
        [(left, right, rows)] = connection.execute(
            f"SELECT (SELECT count(*) FROM ({one} EXCEPT ALL {other})), (SELECT count(*) FROM ({other} EXCEPT ALL "
            f"{one})), (SELECT count(*) FROM ({one}))"
        ).fetchall()
        assert rows, f"{ours} has no rows"
        assert not left, f"{left} of {rows} rows of {ours} are not in {theirs}"
        assert not right, f"{right} rows of {theirs} are not in {ours}"
        for name in nearly:
            [(differing,)] = connection.execute(
                f"SELECT count(*) FROM read_parquet('{ours}') o JOIN read_parquet('{theirs}') t "
                f"ON o.{columns[0]} = t.{columns[0]} AND o.{columns[1]} IS NOT DISTINCT FROM t.{columns[1]} "
                f"WHERE abs(o.{name} - t.{name}) > 1e-6 * abs(o.{name}) OR (o.{name} IS NULL) <> (t.{name} IS NULL)"
            ).fetchall()
            assert not differing, f"{name} differs in {differing} rows of {ours} and {theirs}"
