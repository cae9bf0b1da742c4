"""What frames say, held against the vendor's genuine ones and against everything that is no frame."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygon_pipeline.market.bars import Bar, Channel
from polygon_pipeline.polygon.messages import Frame, Status, decode_frame, decode_statuses
from polygon_pipeline_tests.support.bars import NOON, JsonObject, aggregate
from polygon_pipeline_tests.support.events import (
    RECEIVED_AT,
    START_MS,
    bad_events,
    encode,
    good_events,
    no_events,
    status_events,
    unknown_events,
)

GENUINE = (
    b'[{"ev":"A","sym":"FCX","v":4989,"av":4332125,"op":75.98,"vw":78.0894,"o":78.1,"c":78.08,"h":78.125,'
    b'"l":78.07,"a":76.8404,"z":62,"s":1788877043000,"e":1788877044000,"dv":"4989.0","dav":"4332125.038360"}]'
)
DOCUMENTED = (
    b'{"ev":"AM","sym":"GTE","v":4110,"av":9470157,"op":0.4372,"vw":0.4488,"o":0.4488,"c":0.4486,"h":0.4489,'
    b'"l":0.4486,"a":0.4352,"z":685,"s":1610144640000,"e":1610144700000}'
)


def decode(*events: object) -> Frame:
    return decode_frame(encode(list(events)), RECEIVED_AT)


def only_bar(**fields: Any) -> Bar:
    frame = decode(aggregate(**fields))
    assert frame.events == 1, frame
    [(channel, bar)] = frame.bars
    assert channel is Channel.MINUTE
    return bar


def refusal(**fields: Any) -> str:
    """Why this event is refused, beside two good ones that are not."""
    bad = aggregate(**fields)
    frame = decode(aggregate(sym="BEFORE"), bad, aggregate(sym="AFTER"))
    assert [bar.ticker for _, bar in frame.bars] == ["BEFORE", "AFTER"]
    [refused] = frame.refused
    assert refused.position == 1
    assert json.loads(refused.raw) == bad
    assert refused.reason
    return refused.reason


# The vendor's fields


def test_the_genuine_frame_is_one_second_bar() -> None:
    received_at = datetime(2026, 9, 8, 13, 50, 44, tzinfo=UTC)
    bar = Bar("FCX", 1788877043000, 78.1, 78.125, 78.07, 78.08, 4989, 78.0894)
    frame = decode_frame(GENUINE, received_at)
    assert (frame.bars, frame.events) == ([(Channel.SECOND, bar)], 1)


def test_the_documented_sample_is_one_minute_bar_though_it_is_a_bare_object() -> None:
    frame = decode_frame(DOCUMENTED, RECEIVED_AT)
    assert frame.events == 1
    assert list(frame.bars) == [
        (Channel.MINUTE, Bar("GTE", 1610144640000, 0.4488, 0.4489, 0.4486, 0.4486, 4110, 0.4488))
    ]


def test_prices_and_start_come_from_the_fields_of_the_window() -> None:
    assert only_bar() == Bar("SPY", NOON, 450.25, 450.75, 450.2, 450.5, 1000, 450.3)


@pytest.mark.parametrize(("ev", "channel"), [("AM", Channel.MINUTE), ("A", Channel.SECOND)])
def test_the_kind_is_the_channel(ev: str, channel: Channel) -> None:
    assert [found for found, _ in decode(aggregate(ev=ev)).bars] == [channel]


@pytest.mark.parametrize("op", [75.98, 0, None])
def test_open_is_o_for_any_official_open(op: float | None) -> None:
    assert only_bar(op=op).open == 450.25


def test_op_is_used_where_o_is_absent_unless_it_is_zero() -> None:
    assert only_bar(o=None, op=75.98).open == 75.98
    assert "no opening price" in refusal(o=None, op=0)
    assert "no opening price" in refusal(o=None, op=None)


def test_an_opening_price_of_zero_is_taken_as_it_is() -> None:
    assert only_bar(o=0, op=75.98).open == 0


@pytest.mark.parametrize(
    ("fields", "volume"),
    [
        ({"v": 4989}, 4989),
        ({"v": 4989.0}, 4989),
        ({"v": 4989.25}, 4989.25),
        ({"v": 4989, "dv": "4989.75"}, 4989.75),
        ({"v": 4989, "dv": "4989.000000"}, 4989),
        ({"v": None, "dv": "0.5"}, 0.5),
        ({"v": 0}, 0),
    ],
)
def test_volume_is_dv_with_its_fractions_or_else_v(fields: JsonObject, volume: int | float) -> None:
    found = only_bar(**fields).volume
    assert found == volume
    assert type(found) is type(volume)


def test_the_days_fields_do_not_change_the_bar() -> None:
    assert only_bar(av=7.5, dav="7.5", a=99.5, z=62.5, e=1, otc=True) == only_bar()


def test_fields_that_no_row_needs_may_hold_anything() -> None:
    assert only_bar(e="?", dav=[1], new={"deep": [None]}) == only_bar()


def test_vwap_may_lie_outside_the_prices_or_be_absent() -> None:
    assert only_bar(vw=99.0).vwap == 99.0
    assert only_bar(vw=None).vwap is None


def test_a_start_is_whole_milliseconds_even_as_a_float() -> None:
    assert only_bar(s=float(START_MS)).start_ms == START_MS


@pytest.mark.parametrize("ticker", ["BRK.B", "KIMpL", "KIMPL", "AAC.WS", "AAC.U", "É"])
def test_tickers_keep_their_case_and_dots(ticker: str) -> None:
    assert only_bar(sym=ticker).ticker == ticker


def test_a_frame_of_mixed_kinds_is_read_to_its_end() -> None:
    status = {"ev": "status", "status": "success", "message": "subscribed to: AM.SPY"}
    frame = decode(status, aggregate(), {"ev": "T", "sym": 5}, aggregate(ev="A", sym="QQQ"), aggregate(sym="IBM"))
    assert [bar.ticker for _, bar in frame.bars] == ["SPY", "QQQ", "IBM"]
    assert frame.statuses == [Status("success", "subscribed to: AM.SPY")]
    assert frame.other == ["T"]
    assert frame.refused == []
    assert frame.events == 5


def test_revisions_in_one_frame_are_all_given_in_order() -> None:
    assert [bar.close for _, bar in decode(aggregate(c=1.0), aggregate(c=3.0), aggregate(c=2.0)).bars] == [
        1.0,
        3.0,
        2.0,
    ]


def test_a_status_needs_no_message() -> None:
    assert decode({"ev": "status", "status": "connected"}).statuses == [Status("connected", "")]


@pytest.mark.parametrize("payload", [b"[]", b" [ ] ", b"\n[\r\n]\t"])
def test_an_empty_frame_holds_nothing(payload: bytes) -> None:
    assert decode_frame(payload, RECEIVED_AT).events == 0


# What is refused


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not JSON"),
        (b" ", "not JSON"),
        (b"?", "not JSON"),
        (b"[", "not JSON"),
        (b'[{"ev":"AM"', "not JSON"),
        (b"[]]", "not JSON"),
        (b"[NaN]", "not JSON"),
        (b"[{]", "not JSON"),
        (b"\xef\xbb\xbf[]", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"5", "neither an object nor an array"),
        (b"null", "neither an object nor an array"),
        (b'"AM"', "neither an object nor an array"),
        (b"true", "neither an object nor an array"),
    ],
)
def test_content_that_is_no_frame_is_refused_as_a_whole_and_counts_as_one_event(payload: bytes, reason: str) -> None:
    frame = decode_frame(payload, RECEIVED_AT)
    assert frame.events == 1
    [refused] = frame.refused
    assert (refused.position, refused.raw) == (None, payload)
    assert reason in refused.reason


@pytest.mark.parametrize("name", ["sym", "s", "h", "l", "c"])
def test_a_missing_field_is_named(name: str) -> None:
    assert f"`{name}`" in refusal(**{name: None})


def test_an_event_without_a_volume_is_refused() -> None:
    assert "no volume" in refusal(v=None)


@pytest.mark.parametrize("ticker", ["", "../etc", "A/B", "A\\B", "A..B", "..", ".", "A\nB", "A\x00B", "A" * 65])
def test_a_ticker_that_could_leave_its_folder_is_refused(ticker: str) -> None:
    assert "ticker" in refusal(sym=ticker)


@pytest.mark.parametrize(
    "start",
    [
        0,
        -START_MS,
        START_MS // 1000,
        START_MS * 1000,
        1e300,
        10**30,
        START_MS + 1,
        START_MS + 0.5,
        int((RECEIVED_AT + timedelta(days=1, seconds=1)).timestamp()) * 1000,
    ],
)
def test_a_start_out_of_range_or_between_seconds_is_refused(start: float) -> None:
    assert "timestamp" in refusal(s=start)


@pytest.mark.parametrize(
    "fields",
    [
        {"o": "1.5"},
        {"h": None},
        {"l": True},
        {"c": [2.5]},
        {"v": "10"},
        {"v": True},
        {"dv": 10},
        {"dv": "ten"},
        {"dv": ""},
        {"dv": "nan"},
        {"dv": "Infinity"},
        {"dv": "1e400"},
        {"sym": 5},
        {"s": "1769452200000"},
        {"vw": "2.25"},
        {"av": "much"},
        {"a": [1]},
        {"z": "62"},
        {"otc": "?"},
        *({"dv": text} for text in (" 10 ", "1_000", "1e3", "+5", "5.", ".5", "0x10", "\uff11", "1,5")),
    ],
)
def test_a_value_of_another_type_or_that_is_not_finite_is_refused(fields: JsonObject) -> None:
    assert refusal(**fields)


def raw_event(**fields: bytes) -> bytes:
    """An event whose JSON no encoder would write. fields: their JSON."""
    known = {name: json.dumps(value).encode() for name, value in aggregate().items()} | fields
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in known.items()) + b"}"


@pytest.mark.parametrize(
    "bad",
    [
        raw_event(o=b"1e400"),
        raw_event(h=b"-1e400"),
        raw_event(v=b"1e400"),
        raw_event(vw=b"1e400"),
        raw_event(s=b"1e400"),
        raw_event(c=b"1" + b"0" * 400),
        raw_event(sym=b'"S\xffY"'),
        raw_event(note=b'"\xff"'),
        raw_event(note=b'"\xed\xa0\x80"'),
        raw_event(note=b'"\xc0\xaf"'),
    ],
)
def test_numbers_beyond_a_double_and_bytes_that_are_no_text_affect_only_their_event(bad: bytes) -> None:
    good = encode(aggregate(sym="GOOD"))
    frame = decode_frame(b"[" + b",".join([good, bad, good]) + b"]", RECEIVED_AT)
    assert [bar.ticker for _, bar in frame.bars] == ["GOOD", "GOOD"]
    assert [(refused.position, refused.raw) for refused in frame.refused] == [(1, bad)]


@pytest.mark.parametrize("bad", [raw_event(sym=rb'"\ud800"'), raw_event(note=rb'"a\udc00b"'), raw_event(o=b"NaN")])
def test_a_lone_surrogate_or_nan_makes_no_bar_and_is_kept_verbatim(bad: bytes) -> None:
    payload = b"[" + bad + b"]"
    frame = decode_frame(payload, RECEIVED_AT)
    assert frame.events == 1
    [refused] = frame.refused
    assert refused.raw in (payload, bad)


def test_a_volume_that_reads_as_two_is_refused_among_fractional_ones() -> None:
    frame = decode(aggregate(dv="1.5"), aggregate(dv="1,5"), aggregate(dv="2.5"))
    assert [bar.volume for _, bar in frame.bars] == [1.5, 2.5]
    assert [refused.position for refused in frame.refused] == [1]


def test_a_volume_of_four_hundred_digits_is_refused() -> None:
    assert "`$.v`" in refusal(v=10**400)


@pytest.mark.parametrize("payload", [b"[" * 100_000, b'[{"ev":"T","x":' + b"[" * 5000 + b"]" * 5000 + b"}]"])
def test_nesting_too_deep_to_read_is_refused(payload: bytes) -> None:
    frame = decode_frame(payload, RECEIVED_AT)
    assert frame.events == 1
    [refused] = frame.refused
    assert refused.raw in payload


def test_nesting_too_deep_to_read_has_no_statuses() -> None:
    assert list(decode_statuses(b'["status",' + b"[" * 100_000)) == []


# Invariants


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ue0123456789.-AMsv \n', max_size=60).map(str.encode))
def test_no_bytes_make_decoding_raise(payload: bytes) -> None:
    frame = decode_frame(payload, RECEIVED_AT)
    assert all(refused.raw in payload for refused in frame.refused)
    assert list(decode_statuses(payload)) == list(frame.statuses)


@settings(max_examples=120)
@given(st.data())
def test_no_damage_to_a_good_frame_makes_decoding_raise(data: st.DataObject) -> None:
    payload = encode(data.draw(st.lists(good_events() | status_events, max_size=3)))
    at = data.draw(st.integers(0, len(payload)))
    cut = data.draw(st.integers(0, 4))
    damaged = payload[:at] + data.draw(st.binary(max_size=4)) + payload[at + cut :]
    frame = decode_frame(damaged, RECEIVED_AT)
    assert all(refused.raw in damaged for refused in frame.refused)
    statuses = list(decode_statuses(damaged))
    if damaged.isascii():  # undecodable text in a field that no reader needs does not hide a status
        assert statuses == list(frame.statuses)


any_event: st.SearchStrategy[tuple[str, Any]] = st.one_of(
    st.tuples(st.just("bar"), good_events()),
    st.tuples(st.just("refused"), bad_events() | no_events),
    st.tuples(st.just("other"), unknown_events),
    st.tuples(st.just("status"), status_events),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(any_event, max_size=6))
def test_every_event_is_accounted_for_and_every_good_one_is_returned(events: list[tuple[str, Any]]) -> None:
    frame = decode(*(value for _, value in events))
    assert frame.events == len(events)
    good = [value for kind, value in events if kind == "bar"]
    assert [(channel, bar.ticker, bar.start_ms, bar.close) for channel, bar in frame.bars] == [
        (value["ev"], value["sym"], value["s"], value["c"]) for value in good
    ]
    assert [status.status for status in frame.statuses] == [v["status"] for kind, v in events if kind == "status"]
    assert list(frame.other) == [value["ev"] for kind, value in events if kind == "other"]
    positions = [position for position, (kind, _) in enumerate(events) if kind == "refused"]
    assert [refused.position for refused in frame.refused] == positions
    assert [json.loads(refused.raw) for refused in frame.refused] == [events[position][1] for position in positions]


@settings(max_examples=60)
@given(good_events() | status_events | unknown_events | bad_events())
def test_a_bare_object_is_a_frame_of_that_one_event(one: JsonObject) -> None:
    bare, framed = (decode_frame(encode(value), RECEIVED_AT) for value in (one, [one]))
    assert [list(part) for part in bare[:3]] == [list(part) for part in framed[:3]]
    # A bare object that is refused is a whole frame that is refused.
    assert list(bare.refused) == [refused._replace(position=None) for refused in framed.refused]
    assert bare.events == 1
