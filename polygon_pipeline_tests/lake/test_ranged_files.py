from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.lake.errors import LakeError
from polygon_pipeline.lake.ranged_files import RangedFiles
from polygon_pipeline.lake.store import Lake

KEY = "datasets/x/date=2026-01-26/data.parquet"


def connected(files: RangedFiles) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.register_filesystem(files)
    return connection


def test_a_file_is_read_from_where_it_was_sought_to(lake: Lake) -> None:
    lake.put(KEY, b"0123456789")
    file = RangedFiles(lake).open(f"lake://{KEY}")
    assert (file.size, file.read(3), file.tell(), file.read()) == (10, b"012", 3, b"3456789")
    assert (file.read(1), file.seek(-4, 2), file.read(99), file.seek(2), file.seek(1, 1)) == (b"", 6, b"6789", 2, 3)


def test_a_pattern_finds_the_keys_that_are_there_now(lake: Lake) -> None:
    lake.put(KEY, b"1")
    lake.put("datasets/x/date=2026-01-26/other", b"1")
    files = RangedFiles(lake)
    assert files.glob("lake://datasets/x/date=*/data.parquet") == [KEY]
    later = KEY.replace("26/", "27/")
    lake.put(later, b"1")
    assert files.glob("lake://datasets/x/date=*/data.parquet") == [KEY, later]
    if lake.is_s3:
        assert files.keys("datasets/x/", after=KEY) == ["datasets/x/date=2026-01-26/other", later]


def test_a_query_reads_only_the_parts_of_a_file_that_it_needs(file_lake: Lake, tmp_path: Path) -> None:
    """What is not needed could not be read: there is nothing but zeros."""
    file = tmp_path / "file"
    table = pa.table({"ticker": ["A"] * 1000 + ["B"] * 1000, "close": [1.5] * 2000, "other": [*range(2000)]})
    pq.write_table(table, file, row_group_size=1000, use_dictionary=False)
    content = bytearray(file.read_bytes())
    metadata = pq.read_metadata(file)
    needed = [metadata.row_group(1).column(number) for number in (0, 1)]
    first, last = needed[0].data_page_offset, needed[1].data_page_offset + needed[1].total_compressed_size
    footer = metadata.row_group(1).column(2).data_page_offset + metadata.row_group(1).column(2).total_compressed_size
    content[4:first] = bytes(first - 4)
    content[last:footer] = bytes(footer - last)
    file_lake.put(KEY, bytes(content))
    connection = connected(RangedFiles(file_lake))
    query = f"SELECT {{column}} FROM 'lake://{KEY}' WHERE ticker = '{{ticker}}'"
    assert connection.sql(query.format(column="sum(close)", ticker="B")).fetchall() == [(1500.0,)]
    for column, ticker in (("sum(close)", "A"), ("sum(other)", "B")):
        with pytest.raises(duckdb.Error):
            connection.sql(query.format(column=column, ticker=ticker)).fetchall()


def test_a_file_that_is_replaced_while_it_is_read_is_an_error_and_no_mixture(lake: Lake) -> None:
    lake.put(KEY, b"0123456789")
    file = RangedFiles(lake).open(f"lake://{KEY}")
    assert file.read(3) == b"012"
    lake.put(KEY, b"9876543210")
    with pytest.raises(LakeError, match="was replaced by a newer one while it was read"):
        file.read(3)


def test_nothing_is_written_there(file_lake: Lake) -> None:
    with pytest.raises(PermissionError):
        RangedFiles(file_lake).open(f"lake://{KEY}", "wb")
    with pytest.raises(duckdb.Error):
        connected(RangedFiles(file_lake)).execute(f"COPY (SELECT 1) TO 'lake://{KEY}'")
    assert file_lake.keys("datasets/") == []
