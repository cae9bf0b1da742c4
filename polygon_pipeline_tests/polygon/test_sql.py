"""The generated SQL reads the vendor's spelling as the decoders do. Whole archives: datasets/test_archive_agreement."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.polygon import sql
from polygon_pipeline.polygon.flat_files import FLAT_FILE_COLUMNS
from polygon_pipeline.polygon.messages import Arrival, MinuteAggregate, SecondAggregate, decode_frame
from polygon_pipeline.polygon.rest import HistoryBar
from polygon_pipeline_tests.support.bars import NOON, JsonObject
from polygon_pipeline_tests.support.events import RECEIVED_AT, encode, good_events, prices, volumes


def rows(content: bytes, type_: str, columns: str, alias: str) -> list[dict[str, Any]]:
    """What DuckDB reads of a JSON array, as an object of the type with these columns."""
    with TemporaryDirectory() as name, duckdb.connect() as connection:
        file = Path(name) / "content.json"
        file.write_bytes(b'{"found": ' + content + b"}")
        result = connection.execute(
            f"SELECT {columns} FROM (SELECT unnest(found) AS {alias} "
            f"FROM read_json($file, format = 'newline_delimited', columns = {{found: '{type_}'}}))",
            {"file": str(file)},
        )
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def test_the_type_of_a_struct_has_every_field_of_its_decoder() -> None:
    class Sample(msgspec.Struct, tag_field="kind", tag="x"):
        text: str
        number: int | float
        count: int
        maybe: bool | None = None
        anything: Any = None
        spelt: float = msgspec.field(default=0.0, name="s")

    assert sql.struct_type(Sample) == (
        "STRUCT(kind VARCHAR, text VARCHAR, number DOUBLE, count BIGINT, maybe BOOLEAN, anything VARCHAR, s DOUBLE)"
    )
    fields = [field.encode_name for field in msgspec.structs.fields(MinuteAggregate)]
    assert fields == [field.encode_name for field in msgspec.structs.fields(SecondAggregate)]
    assert [part.split()[0] for part in sql.EVENTS_TYPE[len("STRUCT(") : -len(")[]")].split(", ")] == ["ev", *fields]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(good_events(), min_size=1, max_size=8))
def test_a_good_event_arrives_with_the_same_columns_and_values_as_from_the_decoder(events: list[JsonObject]) -> None:
    content = encode(events)
    frame = decode_frame(content, RECEIVED_AT)
    assert len(frame.aggregates) == len(events)
    columns = f"{sql.EVENT_CHANNEL} AS channel, {sql.EVENT_START_MS} AS sent_start_ms, {sql.ARRIVAL_COLUMNS}"
    found = rows(content, sql.EVENTS_TYPE, columns, "e")
    for channel in Channel:
        mine = [row for row in found if row["channel"] == channel]
        arrivals = frame.arrivals(channel)
        assert [{name: row[name] for name in Arrival._fields} for row in mine] == [
            arrival._asdict() for arrival in arrivals
        ]
        assert [row["sent_start_ms"] for row in mine] == [arrival.start_ms for arrival in arrivals]
        assert all(row.keys() == {"channel", "sent_start_ms", *Arrival._fields} for row in mine)


history_bars = st.fixed_dictionaries(
    {"t": st.integers(0, 9).map(lambda minute: NOON + 60_000 * minute), "v": volumes}
    | dict.fromkeys(("o", "h", "l", "c"), prices),
    optional={"vw": prices | st.none(), "n": st.integers(0, 10**9) | st.none(), "otc": st.booleans()},
)


@settings(max_examples=30, deadline=None)
@given(st.lists(history_bars, min_size=1, max_size=8))
def test_a_bar_of_rest_has_the_same_columns_and_values_as_from_the_decoder(bars: list[JsonObject]) -> None:
    content = encode(bars)
    decoded = msgspec.json.decode(content, type=list[HistoryBar])
    assert rows(content, sql.HISTORY_BARS_TYPE, sql.HISTORY_BAR_COLUMNS, "bar") == [
        msgspec.structs.asdict(bar) for bar in decoded
    ]


@pytest.mark.parametrize("text", ["SPY,1.5,2,3,4,1,1769446800000000000,7", "NULL,0,2,3,4,1,1769446800000000000,0"])
def test_a_row_of_a_flat_file_starts_in_milliseconds(text: str, tmp_path: Path) -> None:
    file = tmp_path / "day.csv.gz"
    file.write_bytes(gzip.compress(f"{','.join(FLAT_FILE_COLUMNS)}\n{text}\n".encode()))
    with duckdb.connect() as connection:
        found = connection.execute(
            f"SELECT ticker, {sql.FLAT_FILE_START_MS} FROM read_csv($file, header = true, columns = $columns)",
            {"file": str(file), "columns": FLAT_FILE_COLUMNS},
        ).fetchall()
    assert found == [(text.partition(",")[0], NOON)]
