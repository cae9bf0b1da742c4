"""Finding other programs' raw data: in limited pieces, with no day left out, and which of it is new."""

from __future__ import annotations

import math
import os
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from polygon_pipeline.lake import external, layout
from polygon_pipeline.lake.external import Found, Position, Report, is_news, look
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import OPENING
from polygon_pipeline_tests.support.lakes import put_raw_bars

TODAY = date(2026, 1, 30)
DAYS = calendar.trading_days(TODAY - timedelta(days=30), TODAY)
NOW = datetime(2026, 1, 30, 20, tzinfo=UTC)


def counts(found: list[Found]) -> dict[date, int]:
    assert len({one.day for one in found}) == len(found), "each day once a look"
    return {one.day: one.objects for one in found}


def look_small(lake: Lake, position: Position, reported: list[date]) -> dict[date, int]:
    return counts(list(look(lake, position, [str(day) for day in reported], TODAY, pages=1, page_objects=2)))


def test_every_day_is_counted_with_its_newest_object_although_each_look_is_limited(lake: Lake) -> None:
    put_raw_bars(lake, DAYS[0], "BRK", "BRK.B", "A B", "KIMpL", minutes=2)
    put_raw_bars(lake, DAYS[1], "SPY")
    put_raw_bars(lake, DAYS[2], "SPY", minutes=3)
    for other in (f"raw-data/{DAYS[1]}/SPY/notes.txt", f"raw-data/{DAYS[1]}/_SUCCESS", "raw-data/20260126/x.json"):
        lake.put(other, b"")
    lake.put(layout.raw_key(Channel.SECOND, DAYS[3], "SPY", OPENING), b"{}")
    newest = {
        day: max(
            meta["last_modified"]
            for page in obstore.list(lake.store, layout.raw_prefix(Channel.MINUTE, day))
            for meta in page
            if layout.parse_raw_key(meta["path"])
        )
        for day in DAYS[:3]
    }
    position, seen = Position(), {}
    for _ in range(9):
        for found in look(lake, position, [], TODAY, pages=1, page_objects=2):
            seen[found.day] = found
        position = msgspec.json.decode(msgspec.json.encode(position), type=Position)
    assert {day: (one.objects, one.newest) for day, one in seen.items()} == {
        DAYS[0]: (8, newest[DAYS[0]]),
        DAYS[1]: (1, newest[DAYS[1]]),
        DAYS[2]: (3, newest[DAYS[2]]),
    }


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(DAYS), st.integers(1, 12), min_size=1),
    st.sets(st.sampled_from(DAYS).map(str)),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_a_look_lists_no_more_than_its_limit_and_a_round_reaches_every_day(
    bucket: dict[date, int], reported: set[str], pages: int, page_objects: int
) -> None:
    lake = Lake("s3://in/memory", MemoryStore())
    for day, objects in bucket.items():
        put_raw_bars(lake, day, "SPY", minutes=objects)
    listed = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal listed
        for page in obstore_list(*args, **kwargs):
            listed += len(page)
            yield page

    obstore_list = obstore.list
    requests = sum(1 + objects // page_objects for objects in bucket.values())
    position, seen = Position(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "list", counting)
        for _ in range(math.ceil(requests / pages) + 1):
            listed = 0
            found = counts(list(look(lake, position, reported, TODAY, pages, page_objects)))
            assert listed <= 3 * pages * page_objects
            seen.append(found)
    assert all(bucket[day] == objects for found in seen for day, objects in found.items())
    assert {day for found in seen for day in found} == bucket.keys()


def test_in_a_large_bucket_the_newest_day_and_unreported_days_are_listed_before_their_turn(s3_lake: Lake) -> None:
    for day in DAYS:
        put_raw_bars(s3_lake, day, "SPY")
    position = Position()
    assert [*look_small(s3_lake, position, DAYS)] == [DAYS[-1], DAYS[-2]]
    assert [*look_small(s3_lake, position, DAYS)] == [DAYS[-1], DAYS[-3]]
    missing = [day for day in DAYS if day not in (DAYS[2], DAYS[5])]
    assert [*look_small(s3_lake, position, missing)] == [DAYS[-1], DAYS[5], DAYS[-4]]
    assert [*look_small(s3_lake, position, missing)] == [DAYS[-1], DAYS[2], DAYS[-5]]
    assert [*look_small(s3_lake, position, missing)] == [DAYS[-1], DAYS[5], DAYS[-6]]


def test_objects_added_to_an_old_day_are_found_in_a_later_round(lake: Lake) -> None:
    for day in DAYS[:4]:
        put_raw_bars(lake, day, "SPY")
    position = Position()
    looks = [look_small(lake, position, DAYS) for _ in range(4)]
    put_raw_bars(lake, DAYS[0], "QQQ")
    looks += [look_small(lake, position, DAYS) for _ in range(4)]
    assert [found[DAYS[0]] for found in looks if DAYS[0] in found] == [1, 2]


def test_a_future_or_closed_day_is_listed_by_the_round_only(file_lake: Lake) -> None:
    future, saturday = TODAY + timedelta(days=3), date(2026, 1, 24)
    for day in (future, saturday, DAYS[0]):
        put_raw_bars(file_lake, day, "SPY")
    position = Position()
    assert [*look_small(file_lake, position, [])] == [DAYS[0], future]
    assert [*look_small(file_lake, position, [])] == [DAYS[0], saturday]


def test_an_empty_lake_has_no_days(lake: Lake) -> None:
    position = Position()
    assert look_small(lake, position, []) == {}
    assert position == Position()


def test_an_object_that_is_no_bars_is_counted_and_named_and_hides_no_other(file_lake: Lake) -> None:
    put_raw_bars(file_lake, DAYS[0], "SPY")
    put_raw_bars(file_lake, DAYS[1], "SPY")
    (file_lake.local_root / f"raw-data/{DAYS[1]}" / os.fsdecode(b"\xff")).write_bytes(b"")
    found = {one.day: one for one in look(file_lake, Position(), [], TODAY)}
    assert (found[DAYS[0]].objects, found[DAYS[0]].strays) == (1, 0)
    assert (found[DAYS[1]].objects, found[DAYS[1]].strays) == (1, 1)
    assert found[DAYS[1]].first_stray == f"raw-data/{DAYS[1]}/\\xff"


OLD = NOW - timedelta(hours=1)
JUST_NOW = NOW - timedelta(seconds=20)


@pytest.mark.parametrize(
    ("day", "objects", "newest", "reported", "expected"),
    [
        (DAYS[0], 0, None, None, False),
        (DAYS[0], 5, OLD, None, True),
        (DAYS[0], 5, JUST_NOW, None, False),
        (DAYS[0], 5, OLD, Report(5, OLD, OLD), False),
        (DAYS[0], 4, OLD, Report(5, OLD, OLD), True),
        (DAYS[0], 5, OLD, Report(5, OLD - timedelta(days=1), OLD), True),
        (DAYS[0], 6, JUST_NOW, Report(5, OLD, OLD), False),
        (TODAY, 5, JUST_NOW, None, True),
        (TODAY, 6, JUST_NOW, Report(5, OLD, NOW - timedelta(minutes=4)), False),
        (TODAY, 6, JUST_NOW, Report(5, OLD, NOW - timedelta(minutes=5)), True),
        (TODAY, 6, NOW - external.QUIET, Report(5, OLD, NOW - timedelta(minutes=4)), True),
        (TODAY, 5, OLD, Report(5, OLD, OLD), False),
    ],
)
def test_unreported_objects_are_news_once_no_more_arrive_or_every_few_minutes_of_today(
    day: date, objects: int, newest: datetime | None, reported: Report | None, expected: bool
) -> None:
    assert is_news(Found(day, objects, newest), reported, NOW, TODAY) is expected
