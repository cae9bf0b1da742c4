"""What is told when: each cause once, a word when it is over, and nothing twice after a restart."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline.alerts.causes import Cause, Failure
from polygon_pipeline.alerts.telling import Memory, Open

START = datetime(2026, 1, 26, 15, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
DEAD = Cause("collector:dead", "dead")


def _stored(memory: Memory) -> Memory:
    """As the next tick reads it."""
    return Memory.parse(msgspec.json.encode(memory).decode())


def _looks(*looks: list[Cause], unknown: tuple[str, ...] = (), every: timedelta = MINUTE) -> list[list[str]]:
    """What is told at each look, with the memory stored in between."""
    memory, told, now = Memory(), [], START
    for found in looks:
        memory = _stored(memory)
        memory.begin(now)
        told.append(memory.news(found, unknown, now))
        now += every
    return told


def test_a_cause_is_told_once_and_so_is_its_end() -> None:
    assert _looks([], [DEAD], [DEAD], [], [], [DEAD]) == [[], ["dead"], [], ["Over: dead"], [], ["dead"]]


def test_what_may_pass_by_itself_is_told_only_where_it_lasts() -> None:
    lasting = Cause("lake:away", "away", patience=2 * MINUTE)
    assert _looks([lasting], [lasting], [], [lasting], [lasting], [lasting], [lasting]) == [[]] * 5 + [["away"], []]


def test_what_comes_back_within_its_calm_is_the_same() -> None:
    """As a collector that fails, is tried again, and fails."""
    again = Cause("run:x", "failed", calm=3 * MINUTE)
    assert _looks([again], [], [], [again], [], [], [], []) == [["failed"]] + [[]] * 6 + [["Over: failed"]]


def test_what_is_not_known_is_not_over() -> None:
    memory = Memory()
    for minute, (found, unknown) in enumerate([([DEAD], []), ([], ["collector"]), ([], ["lake"])]):
        memory.begin(START + minute * MINUTE)
        told = memory.news(found, unknown, START + minute * MINUTE)
        assert told == [["dead"], [], ["Over: dead"]][minute]


def test_after_a_pause_what_was_not_told_yet_is_given_its_patience_again() -> None:
    """As after a restart of the machine: the collector's sensor is about to start it again."""
    lasting = Cause("lake:away", "away", patience=2 * MINUTE)
    memory = Memory()
    memory.begin(START)
    assert memory.news([lasting], [], START) == []
    for hours, minutes, told in ((5, 0, []), (5, 1, []), (5, 2, ["away"])):
        now = START + timedelta(hours=hours, minutes=minutes)
        memory.begin(now)
        assert memory.news([lasting], [], now) == told


def test_a_lease_counts_as_unchanged_from_when_it_was_first_seen_and_anew_after_a_pause() -> None:
    memory, now = Memory(), START
    for step, lease, unchanged in ((0, "a", 0), (1, "a", 1), (1, "b", 0), (2, "b", 2), (60, "b", 0), (1, "b", 1)):
        now += step * MINUTE
        memory.begin(now)
        assert memory.lease_unchanged(lease, now) == unchanged * MINUTE


@given(st.lists(st.sets(st.sampled_from("abc")), max_size=30), st.integers(0, 3), st.integers(0, 3))
def test_told_and_over_take_turns_whatever_happens(looks: list[set[str]], patience: int, calm: int) -> None:
    causes = {name: Cause(f"t:{name}", name, patience * MINUTE, calm * MINUTE) for name in "abc"}
    told = [line for news in _looks(*([causes[name] for name in found] for found in looks)) for line in news]
    for name in "abc":
        mine = [line for line in told if line.endswith(name)]
        assert mine == [name, f"Over: {name}"] * (len(mine) // 2) + [name] * (len(mine) % 2)


def test_a_failure_or_a_day_that_nobody_mends_is_forgotten_without_a_word() -> None:
    memory = Memory(
        open={key: Open("text", START, told=True) for key in ("run:a", "day:2026-01-23", "lake:away")},
        failures={"run:a": Failure("id", "a", set(), set(), START)},
    )
    memory.begin(START + timedelta(days=8))
    assert set(memory.open) == {"lake:away"}
    assert memory.failures == {}
    assert memory.days_done == [date(2026, 1, 23)], "it is not looked at again"


# Receivers


def test_each_receiver_gets_what_it_has_not_got_and_one_that_is_away_delays_no_other() -> None:
    memory = Memory()
    memory.queue(["one"], ["webhook", "mail"])
    memory.sent("mail")
    assert memory.not_sent("webhook", START) == START + MINUTE
    memory.queue(["two"], ["webhook", "mail"])
    assert memory.due(START) == {"mail": ["two"]}
    assert _stored(memory).due(START + MINUTE) == {"webhook": ["one", "two"], "mail": ["two"]}


def test_a_receiver_that_stays_away_is_tried_ever_more_rarely_but_for_ever() -> None:
    memory = Memory()
    memory.queue(["one"], ["webhook"])
    pauses = [(memory.not_sent("webhook", START) - START) / MINUTE for _ in range(10)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    memory.sent("webhook")
    memory.queue(["two"], ["webhook"])
    assert memory.due(START) == {"webhook": ["two"]}


def test_what_waits_is_bounded_and_a_message_short() -> None:
    memory = Memory()
    for number in range(200):
        memory.queue([f"{number}"], ["webhook"])
    assert len(msgspec.json.encode(memory)) < 1000
    [lines] = memory.due(START).values()
    assert lines == ["188 more before these; Dagster shows what is wrong.", *map(str, range(188, 200))]


def test_a_receiver_that_is_not_set_any_more_is_forgotten() -> None:
    memory = Memory()
    memory.queue(["one"], ["webhook"])
    memory.queue(["two"], ["mail"])
    assert memory.due(START) == {"mail": ["two"]}


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"since": 5}'])
def test_a_cursor_that_cannot_be_read_is_a_new_beginning(text: str | None) -> None:
    assert Memory.parse(text) == Memory()
