"""The lake's keys, as people and other programs know them."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.lake import layout
from polygon_pipeline.market.bars import Channel, ticker_error

DAY = date(2026, 1, 26)
START_MS = int(datetime(2026, 1, 26, 18, 30, tzinfo=UTC).timestamp() * 1000)

tickers = st.text(min_size=1, max_size=64).filter(lambda ticker: ticker_error(ticker) is None)


def test_a_raw_key_is_exactly_the_specifications() -> None:
    assert layout.raw_key(Channel.MINUTE, DAY, "SPY", START_MS) == "raw-data/2026-01-26/SPY/2026-01-26T18:30:00Z.json"


def test_second_bars_have_a_prefix_of_their_own() -> None:
    key = layout.raw_key(Channel.SECOND, DAY, "BRK.B", START_MS + 7_000)
    assert key == "raw-data-second/2026-01-26/BRK.B/2026-01-26T18:30:07Z.json"
    assert not key.startswith(layout.raw_prefix(Channel.MINUTE, DAY))


def test_every_other_key_names_its_content_and_day() -> None:
    assert layout.frames_key(DAY, "RUN", 7) == "raw-frames/2026-01-26/RUN-000007.jsonl.zst"
    assert layout.quarantine_key(DAY, "RUN", 7) == "quarantine/2026-01-26/RUN-000007.jsonl"
    assert layout.ledger_key(DAY, "RUN") == "ledger/2026-01-26/RUN.json"
    assert layout.dataset_key("bars_5m", "2026-01-26") == "datasets/bars_5m/date=2026-01-26/data.parquet"
    assert layout.listing_key("splits", DAY) == "datasets/splits/fetched=2026-01-26/data.parquet"


@given(st.dates(date(2003, 1, 1), date(2100, 1, 1)))
def test_a_listings_key_can_be_read_back_and_lies_below_its_prefix(day: date) -> None:
    key = layout.listing_key("splits", day)
    assert layout.parse_listing_key(key) == day
    assert key.startswith(layout.listing_prefix("splits"))


@pytest.mark.parametrize(
    "key",
    [
        "datasets/splits/fetched=2026-02-30/data.parquet",
        "datasets/splits/fetched=2026-01-26/data.parquet.tmp",
        "datasets/splits/date=2026-01-26/data.parquet",
        "datasets/splits/fetched=2026-01-26/",
    ],
)
def test_other_keys_are_no_listings(key: str) -> None:
    assert layout.parse_listing_key(key) is None


@given(
    st.sampled_from(list(Channel)),
    st.dates(date(2003, 1, 1), date(2100, 1, 1)),
    tickers,
    st.integers(1_041_379_200, 4_102_444_800).map(lambda second: second * 1000),
)
def test_a_raw_key_can_be_read_back_and_lies_below_its_days_prefix(
    channel: Channel, day: date, ticker: str, start_ms: int
) -> None:
    key = layout.raw_key(channel, day, ticker, start_ms)
    assert layout.parse_raw_key(key) == (ticker, start_ms)
    assert key.startswith(layout.raw_prefix(channel, day))
    assert layout.raw_prefix(channel, day).startswith(layout.raw_root(channel))
    assert layout.parse_raw_prefix(layout.raw_prefix(channel, day)) == day
    assert key.count("/") == 3


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_order_of_a_runs_archives_is_the_order_of_their_segments(one: int, other: int) -> None:
    keys = [layout.frames_key(DAY, "RUN", number) for number in (one, other)]
    if max(one, other) < 10**6:
        assert (keys[0] < keys[1]) == (one < other)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "raw-data",
        "raw-data/2026-01-26/SPY/",
        "raw-data/2026-01-26/SPY/notes.json",
        "raw-data/2026-01-26/SPY/2026-01-26T18:30:00Z",
        "raw-data/2026-01-26/SPY/2026-01-26T18:30:00Z.json.tmp",
        "raw-data/2026-01-26/SPY/2026-01-26T18:30:00.json",
        "raw-data/2026-01-26/SPY/2026-13-26T18:30:00Z.json",
        "raw-data/2026-01-26/SPY/2026-01-26T18:30:61Z.json",
        "raw-data/2026-01-26/2026-01-26T18:30:00Z.json",
        "raw-data/2026-01-26/A/B/2026-01-26T18:30:00Z.json",
        "raw-data/2026-01-26/_SUCCESS",
    ],
)
def test_other_keys_are_parsed_as_none(key: str) -> None:
    assert layout.parse_raw_key(key) is None


@pytest.mark.parametrize(
    "prefix", ["", "raw-data/", "raw-data/SPY", "raw-data/20260126", "raw-data/2026-W05-1", "raw-data/2026-02-30/"]
)
def test_other_prefixes_are_parsed_as_none(prefix: str) -> None:
    assert layout.parse_raw_prefix(prefix) is None


@given(st.text(max_size=40) | st.lists(st.text(max_size=8), min_size=4, max_size=4).map("/".join))
def test_parsing_never_fails_for_any_key(key: str) -> None:
    parsed = layout.parse_raw_key(key)
    assert parsed is None or key.split("/")[2] == parsed[0]
