"""The vendor's history, as flat file and as REST pages, becomes a day's reference."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.reference import (
    Pages,
    ReferenceInfo,
    UnreadableReference,
    from_flat_file,
    page_line,
    read_reference_info,
    same_bars,
)
from polygon_pipeline.lake import archive
from polygon_pipeline.polygon.rest import Page
from polygon_pipeline_tests.support.bars import DAY, NOON, JsonObject, Row, at, later, reference_row, rest_bar
from polygon_pipeline_tests.support.day_files import columns, read, reference_file, schema

HEADER = "ticker,volume,open,close,high,low,window_start,transactions"
PUBLISHED = datetime(2026, 1, 27, 16, 0, 0, tzinfo=UTC)
MIDNIGHT = at(0, 0, date(2026, 1, 27))


def csv_line(ticker: str = "SPY", start_ms: int = NOON, volume: str = "1000") -> str:
    return f"{ticker},{volume},450.25,450.5,450.75,450.2,{start_ms}000000,7"


def packed(lines: Sequence[str], header: str = HEADER) -> bytes:
    return gzip.compress("".join(f"{line}\n" for line in (header, *lines)).encode(), mtime=0)


def flat(folder: Path, content: bytes) -> Path:
    """The reference made of a flat file's content."""
    folder.mkdir(exist_ok=True)
    file, target = folder / "2026-01-26.csv.gz", folder / "reference.parquet"
    file.write_bytes(content)
    from_flat_file(DAY, file, PUBLISHED, '"it\'s"', target, folder)
    return target


# Flat files


def test_every_column_of_a_flat_file_arrives_under_its_own_name(tmp_path: Path) -> None:
    file = flat(tmp_path, packed([csv_line(volume="1000.25")]))
    [row] = read(file)
    assert row == reference_row(volume=1000.25, vwap=None, received_at=PUBLISHED, source="flat_file")
    assert columns(file) == schema(catalog.REFERENCE_BARS)
    assert read_reference_info(file) == ReferenceInfo("flat_file", None, MIDNIGHT, '"it\'s"')


def test_tickers_that_look_like_null_or_numbers_are_kept_as_text(tmp_path: Path) -> None:
    tickers = ["NA", "NULL", "TRUE", "NAN", "NaN", "null", "INF", "1E5", "BRK.B", "KIMpL"]
    assert [row["ticker"] for row in read(flat(tmp_path, packed([csv_line(name) for name in tickers])))] == sorted(
        tickers
    )


def test_a_flat_file_is_sorted_and_other_days_are_left_out(tmp_path: Path) -> None:
    lines = [
        csv_line("SPY", at(0, 0)),
        csv_line("SPY", at(0, 0) - 60_000),
        csv_line("SPY", MIDNIGHT),
        csv_line("IBM", MIDNIGHT - 60_000),
        csv_line("IBM", at(19, 59)),
    ]
    first = flat(tmp_path / "first", packed(lines))
    assert [(row["ticker"], row["timestamp"].timestamp() * 1000) for row in read(first)] == [
        ("IBM", at(19, 59)),
        ("IBM", MIDNIGHT - 60_000),
        ("SPY", at(0, 0)),
    ]
    assert flat(tmp_path / "second", packed(lines[::-1])).read_bytes() == first.read_bytes()


def test_a_flat_file_packed_in_several_pieces_is_read_whole(tmp_path: Path) -> None:
    pieces = packed([csv_line("SPY")]) + gzip.compress(f"{csv_line('IBM')}\n".encode())
    assert [row["ticker"] for row in read(flat(tmp_path, pieces))] == ["IBM", "SPY"]


@pytest.mark.parametrize("header", [HEADER.replace("volume,open", "open,volume"), HEADER[:-13], "", HEADER + ",vwap"])
def test_a_flat_file_with_other_columns_is_refused_with_their_names(tmp_path: Path, header: str) -> None:
    with pytest.raises(UnreadableReference) as refusal:
        flat(tmp_path, packed([csv_line()], header))
    assert f"2026-01-26.csv.gz has the columns {header.replace(',', ', ')}, but" in str(refusal.value)


WHOLE = packed([csv_line(f"T{n}") for n in range(500)])


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-4],
        WHOLE[:-6] + bytes([WHOLE[-6] ^ 1]) + WHOLE[-5:],  # only the checksum can tell
        b"<html>not here</html>",
    ],
)
def test_a_damaged_flat_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnreadableReference, match=r"2026-01-26.csv.gz is damaged"):
        flat(tmp_path, content)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (csv_line(""), "no ticker lacks a value"),
        (csv_line("SPY", volume=""), "SPY lacks a value"),
        (csv_line("SPY", volume="many"), "2026-01-26.csv.gz cannot be read"),
        ("SPY,1,2", "2026-01-26.csv.gz cannot be read"),
    ],
)
def test_a_row_that_is_no_bar_is_refused(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(UnreadableReference, match=fault):
        flat(tmp_path, packed([csv_line("IBM"), line]))


@pytest.mark.parametrize("lines", [[], [csv_line("SPY", MIDNIGHT)]])
def test_a_flat_file_without_a_bar_of_the_day_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(UnreadableReference, match="no bar of 2026-01-26"):
        flat(tmp_path, packed(lines))


# REST pages


def page(ticker: str, fetched_at: datetime, *bars: JsonObject) -> bytes:
    stamp = fetched_at.isoformat().replace("+00:00", "Z")
    return json.dumps({"ticker": ticker, "fetched_at": stamp, "bars": bars}).encode() + b"\n"


def pages(
    folder: Path, *lines: bytes, tickers: Sequence[str] = ("SPY",), until_ms: int = MIDNIGHT, suffix: str = ".jsonl"
) -> Path:
    """The reference made of these pages, each in a file of its own."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}{suffix}" for number in range(len(lines))]
    for file, content in zip(files, lines, strict=True):
        file.write_bytes(archive.compress([content]) if suffix.endswith("zst") else content)
    target = folder / "reference.parquet"
    with Pages(files, tickers, folder) as pages:
        pages.write(DAY, until_ms, target)
    return target


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_the_days_bars_are_taken_from_pages_of_many_days(tmp_path: Path, suffix: str) -> None:
    days = [rest_bar(at(0, 0) - 60_000), rest_bar(), rest_bar(at(19, 59), vw=None, n=None), rest_bar(MIDNIGHT)]
    lines = page("SPY", later(9), *days) + page("BRK.B", later(8), rest_bar(v=0.5))
    file = pages(tmp_path, lines, tickers=["SPY", "QQQ", "BRK.B"], suffix=suffix)
    assert read(file) == [
        reference_row("BRK.B", volume=0.5, received_at=later(8)),
        reference_row("SPY", received_at=later(9)),
        reference_row("SPY", at(19, 59), received_at=later(9), vwap=None, transactions=None),
    ]
    assert read_reference_info(file) == ReferenceInfo("rest", ("BRK.B", "QQQ", "SPY"), MIDNIGHT, None)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_a_bar_in_several_pages_the_most_recently_fetched_is_used(tmp_path: Path, order: tuple[int, ...]) -> None:
    microsecond = timedelta(microseconds=1)
    fetched = [page("SPY", later(n), rest_bar(c=450.2 + n / 10)) for n in range(2)]
    fetched.append(page("SPY", later(1) + microsecond, rest_bar(c=450.7)))
    [row] = read(pages(tmp_path, *(fetched[n] for n in order)))
    assert (row["close"], row["received_at"]) == (450.7, later(1) + microsecond)


def test_pages_of_the_same_moment_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    lines = [page("SPY", later(0), rest_bar(c=450.2 + n / 10)) for n in range(4)]
    assert pages(tmp_path / "a", *lines).read_bytes() == pages(tmp_path / "b", b"".join(reversed(lines))).read_bytes()


def test_bars_after_the_known_time_are_left_out(tmp_path: Path) -> None:
    earlier = rest_bar(NOON - 60_000)
    lines = page("SPY", later(0), earlier, rest_bar(NOON)) + page("IBM", later(0), earlier)
    assert [row["ticker"] for row in read(pages(tmp_path, lines, until_ms=NOON))] == ["SPY"]


def test_tickers_that_did_not_trade_make_an_empty_reference(tmp_path: Path) -> None:
    file = pages(tmp_path, page("SPY", later(0)), b'{"ticker": "QQQ", "fetched_at": "2026-01-27T00:00:00Z"}\n')
    assert read(file) == []
    assert read_reference_info(file).tickers == ("SPY",)


@pytest.mark.parametrize("field", ["o", "h", "l", "c", "v", "t"])
def test_a_bar_that_lacks_a_value_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(UnreadableReference, match="a bar of SPY lacks a value"):
        pages(tmp_path, page("SPY", later(0), rest_bar(), {**rest_bar(NOON + 60_000), field: None}))


@pytest.mark.parametrize("more", [b'"n": 7, "n": 7', b'"n": 7, "\x94": 1', b'"n": 7, "new":\r\n "x"'])
def test_what_the_decoder_takes_of_an_answer_is_read_and_costs_no_other_line(tmp_path: Path, more: bytes) -> None:
    odd = json.dumps([rest_bar()]).encode().replace(b'"n": 7', more)
    line = page_line(Page("SPY", later(9), odd, is_last=True))
    assert read(pages(tmp_path, line + page("BRK.B", later(9), rest_bar()), tickers=["SPY", "BRK.B"])) == [
        reference_row("BRK.B", received_at=later(9)),
        reference_row("SPY", received_at=later(9)),
    ]


def test_damaged_pages_are_refused(tmp_path: Path) -> None:
    content = page("SPY", later(0), rest_bar())
    with pytest.raises(UnreadableReference, match=r"the 2 files of pages cannot be read: .*1.jsonl"):
        pages(tmp_path, content, content[:-20])
    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes(archive.compress([content * 1000])[:-8])
    with pytest.raises(UnreadableReference, match=r"cut.jsonl.zst is damaged"):
        Pages([cut], ["SPY"], tmp_path)


# What a reference says of itself


def test_references_are_the_same_whenever_they_were_received(tmp_path: Path) -> None:
    rows = [reference_row("SPY"), reference_row("SPY", NOON + 60_000, vwap=None)]
    old = reference_file(tmp_path / "old.parquet", rows, ["SPY"], etag="1")
    again = [{**row, "received_at": later(200_000)} for row in rows]
    assert same_bars(old, reference_file(tmp_path / "new.parquet", again, ["SPY"], etag="2"))


@pytest.mark.parametrize(
    ("rows", "tickers", "until_ms"),
    [
        ([reference_row("SPY", close=450.6)], ["SPY"], MIDNIGHT),
        ([reference_row("SPY", transactions=None)], ["SPY"], MIDNIGHT),
        ([reference_row("SPY", NOON + 60_000)], ["SPY"], MIDNIGHT),
        ([reference_row("SPY"), reference_row("SPY", NOON + 60_000)], ["SPY"], MIDNIGHT),
        ([], ["SPY"], MIDNIGHT),
        ([reference_row("SPY")], ["SPY", "QQQ"], MIDNIGHT),
        ([reference_row("SPY")], None, MIDNIGHT),
        ([reference_row("SPY")], ["SPY"], NOON + 60_000),
    ],
)
def test_references_with_different_content_are_not_the_same(
    tmp_path: Path, rows: list[Row], tickers: list[str] | None, until_ms: int
) -> None:
    old = reference_file(tmp_path / "old.parquet", [reference_row("SPY")], ["SPY"], MIDNIGHT)
    assert not same_bars(old, reference_file(tmp_path / "new.parquet", rows, tickers, until_ms))


def test_a_file_without_metadata_is_no_reference(tmp_path: Path) -> None:
    pq.write_table(catalog.REFERENCE_BARS.schema().empty_table(), tmp_path / "bars.parquet")
    with pytest.raises(UnreadableReference, match=r"bars.parquet has no key-value metadata"):
        read_reference_info(tmp_path / "bars.parquet")
