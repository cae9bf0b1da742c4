"""Strategies for the vendor's events: acceptable, bad and of unknown kinds."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from hypothesis import strategies as st

from polygon_pipeline_tests.support.bars import JsonObject, at

RECEIVED_AT = datetime(2026, 1, 26, 18, 31, 1, tzinfo=UTC)
START_MS = at(13, 30)  # 18:30 in UTC

prices = st.floats(0.0001, 1e7)
volumes = st.integers(0, 10**10) | st.floats(0, 1e10)
_decimals = st.decimals(0, 10**10, places=6).map(str)

# What a bar is made of, and what only the frame keeps.
_required = {
    "ev": st.sampled_from(["AM", "A"]),
    "sym": st.sampled_from(["SPY", "BRK.B", "KIMpL", "KIMPL", "AAC.WS", "É"]),
    "s": st.integers(0, 9).map(lambda minute: START_MS + 60_000 * minute),
    "h": prices,
    "l": prices,
    "c": prices,
}
_optional = {
    "vw": prices | st.none(),
    "av": volumes,
    "dav": _decimals,
    "a": prices,
    "z": st.integers(0, 1000) | st.floats(0, 1000),
    "e": st.integers(START_MS, START_MS + 10**6),
    "otc": st.booleans(),
    "new": st.recursive(st.none() | st.booleans() | st.text(max_size=5), st.lists, max_leaves=4),
}


@st.composite
def good_events(draw: st.DrawFn) -> JsonObject:
    """An aggregate that must be accepted."""
    event: JsonObject = draw(st.fixed_dictionaries(_required, optional=_optional))
    event |= draw(
        st.fixed_dictionaries({"o": prices}, optional={"op": prices | st.just(0)})
        | st.fixed_dictionaries({"op": prices}, optional={"o": st.none()})
    )
    event |= draw(
        st.fixed_dictionaries({"v": volumes}, optional={"dv": _decimals | st.none()})
        | st.fixed_dictionaries({"dv": _decimals})
    )
    names = draw(st.permutations(list(event)))
    return {name: event[name] for name in names}


@st.composite
def bad_events(draw: st.DrawFn) -> JsonObject:
    """An aggregate that must be refused: a good one with something essential missing or wrong."""
    event = draw(good_events())
    faults: list[JsonObject] = [
        *({name: None} for name in ("sym", "s", "h", "l", "c")),
        {"o": None, "op": None},
        {"o": None, "op": 0},
        {"v": None, "dv": None},
        {"v": True, "dv": None},
        {"sym": ""},
        {"sym": "../etc/passwd"},
        {"sym": 5},
        {"s": 0},
        {"s": START_MS + 1},
        {"s": START_MS + 0.5},
        {"s": START_MS * 1000},
        {"s": str(START_MS)},
        {"h": "high"},
        {"c": [1]},
        {"dv": "many"},
        {"dv": "nan"},
        {"dv": "1e400"},
        {"dv": "1e3"},
        {"dv": 5},
        {"z": "many"},
        {"otc": 2},
    ]
    event |= draw(st.sampled_from(faults))
    return {name: value for name, value in event.items() if value is not None}


unknown_events: st.SearchStrategy[JsonObject] = st.fixed_dictionaries(
    {"ev": st.sampled_from(["T", "Q", "LULD", "am", "STATUS", ""])},
    optional={"sym": st.integers() | st.text(max_size=3), "s": st.text(max_size=3), "x": st.booleans()},
)

status_events: st.SearchStrategy[JsonObject] = st.fixed_dictionaries(
    {"ev": st.just("status"), "status": st.text(max_size=8)}, optional={"message": st.text(max_size=8)}
)

# What is no event at all: no object, or one that does not say its kind.
no_events: st.SearchStrategy[object] = st.sampled_from(
    [None, 5, "AM", [], [{"ev": "AM"}], {}, {"ev": 7}, {"EV": "AM"}, {"ev": "status"}, {"ev": "status", "status": 1}]
)


def encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
