"""The specification's record, byte for byte."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.lake.records import decode_record, encode_record
from polygon_pipeline.market.bars import PRICE_LIMIT, Bar, shares
from polygon_pipeline_tests.support.bars import moments

BAR = Bar("SPY", 1769452200000, 450.25, 450.75, 450.20, 450.50, 1234567, 450.30)
RECEIVED_AT = datetime(2026, 1, 26, 18, 30, 1, 123456, tzinfo=UTC)

# The specification's example. Its spaces and trailing zeros are the document's, not the format's.
SPECIFIED = """{"source": "polygon_websocket", "ticker": "SPY", "timestamp": "2026-01-26T18:30:00Z",
 "bar_data": {"open": 450.25, "high": 450.75, "low": 450.20, "close": 450.50, "volume": 1234567, "vwap": 450.30},
 "collected_at": "2026-01-26T18:30:01.123Z"}"""


def test_a_record_is_the_specifications_with_its_keys_in_their_order() -> None:
    compact = json.dumps(json.loads(SPECIFIED), separators=(",", ":"))
    assert encode_record(BAR, RECEIVED_AT) == compact.encode()


def test_volumes_stay_whole_or_fractional() -> None:
    assert b'"volume":1234567,' in encode_record(BAR, RECEIVED_AT)
    assert b'"volume":0.5,' in encode_record(BAR._replace(volume=0.5), RECEIVED_AT)
    for volume in (1234567, 0.5):
        found = decode_record(encode_record(BAR._replace(volume=volume), RECEIVED_AT)).bar_data.volume
        assert (found, type(found)) == (volume, type(volume))


def test_a_missing_vwap_is_null() -> None:
    content = encode_record(BAR._replace(vwap=None), RECEIVED_AT)
    assert b'"vwap":null}' in content
    assert decode_record(content).bar_data.vwap is None


@pytest.mark.parametrize(
    ("microsecond", "text"), [(0, ".000Z"), (999, ".000Z"), (1000, ".001Z"), (999_999, ".999Z"), (120_000, ".120Z")]
)
def test_collected_at_has_milliseconds_and_never_rounds_up(microsecond: int, text: str) -> None:
    record = decode_record(encode_record(BAR, RECEIVED_AT.replace(microsecond=microsecond)))
    assert record.collected_at == f"2026-01-26T18:30:01{text}"


prices = st.floats(-PRICE_LIMIT, PRICE_LIMIT, exclude_min=True, exclude_max=True)


@given(
    st.builds(
        Bar,
        st.text(min_size=1),
        st.integers(1_041_379_200, 4_102_444_800).map(lambda second: second * 1000),
        prices,
        prices,
        prices,
        prices,
        (st.integers(0, 10**12) | st.floats(0, 1e12)).map(shares),
        prices | st.none(),
    ),
    moments,
)
def test_a_bar_can_be_read_back_from_its_record(bar: Bar, received_at: datetime) -> None:
    record = decode_record(encode_record(bar, received_at))
    data = record.bar_data
    assert (
        Bar(record.ticker, record.start_ms(), data.open, data.high, data.low, data.close, data.volume, data.vwap) == bar
    )
    collected_at = datetime.fromisoformat(record.collected_at)
    assert timedelta(0) <= received_at - collected_at < timedelta(milliseconds=1)
    assert record.source == "polygon_websocket"


@given(st.lists(moments, min_size=2))
def test_the_text_of_collected_at_orders_revisions(arrivals: list[datetime]) -> None:
    texts = [decode_record(encode_record(BAR, at)).collected_at for at in sorted(arrivals)]
    assert texts == sorted(texts)


def record(**fields: object) -> bytes:
    known = json.loads(SPECIFIED)
    return json.dumps({name: value for name, value in {**known, **fields}.items() if value is not None}).encode()


def test_a_record_by_another_writer_is_read() -> None:
    other = decode_record(
        record(source="other", timestamp="2026-01-26T13:30:00-05:00", extra=[1], collected_at="2026-01-26T18:30:01Z")
    )
    assert (other.source, other.start_ms()) == ("other", BAR.start_ms)


@pytest.mark.parametrize("name", ["timestamp", "collected_at"])
@pytest.mark.parametrize("time", ["2026-01-26T18:30:00", "2026-01-26", "yesterday", "", "2026-13-26T18:30:00Z"])
def test_a_time_without_a_zone_or_that_is_invalid_is_refused(name: str, time: str) -> None:
    with pytest.raises(ValueError, match=r"has no zone|Invalid isoformat|month must be"):
        decode_record(record(**{name: time}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        record()[:-10],
        record(ticker=None),
        record(ticker=5),
        record(bar_data=None),
        record(bar_data={"open": 1}),
        record(bar_data={"open": "1", "high": 1, "low": 1, "close": 1, "volume": 1}),
        record(timestamp=1769452200),
    ],
)
def test_content_that_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_record(content)


def test_a_time_in_another_zone_is_the_same_moment() -> None:
    east = datetime(2026, 1, 26, 20, 30, tzinfo=timezone(timedelta(hours=2)))
    assert decode_record(record(timestamp=east.isoformat())).start_ms() == BAR.start_ms
