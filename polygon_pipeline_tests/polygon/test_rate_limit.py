"""The limit holds over processes and threads as a server sees it, and no process that dies keeps the others out."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from polygon_pipeline.polygon.rate_limit import RateLimit, Stopped
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline_tests.support.leases import Clock
from polygon_pipeline_tests.support.planned_server import Answer, Request, planned_server

GROUPED = "/v2/aggs/grouped/locale/us/market/stocks/2026-01-26"
SPAWN = multiprocessing.get_context("spawn")


def most_in_a_window(asked: list[Request], seconds: float) -> int:
    times = sorted(request.at for request in asked)
    return max(sum(start <= at < start + seconds for at in times) for start in times)


def ask(url: str, path: Path, requests: int, per_second: int) -> None:
    history = RestHistory(url, "key", RateLimit(path, per_second, 1.0))
    for _ in range(requests):
        history.traded_tickers(date(2026, 1, 26))


@pytest.mark.slow
def test_three_processes_together_keep_the_limit_in_every_window_at_the_server(
    tmp_path: Path, say: Callable[[str], None]
) -> None:
    with planned_server({GROUPED: [Answer(body={})]}) as server:
        server.slow = 0.2
        runs = [SPAWN.Process(target=ask, args=(server.url, tmp_path / "limit", 4, 5)) for _ in range(3)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert [run.exitcode for run in runs] == [0, 0, 0]
        assert len(server.asked) == 12
        most = most_in_a_window(server.asked, 1.0)
        say(f"rate limit: 12 requests of 3 processes, 5 allowed a second, at most {most} in any second at the server")
        assert most <= 5


@pytest.mark.slow
def test_threads_of_one_process_keep_the_limit_too(tmp_path: Path) -> None:
    limit = RateLimit(tmp_path / "limit", 10, 0.3)

    def work(_: int) -> float:
        with limit.turn(threading.Event()):
            return time.monotonic()

    with ThreadPoolExecutor(16) as threads:
        asked = sorted(threads.map(work, range(35)))
    assert all(asked[n + 10] - asked[n] >= 0.3 for n in range(25))


def take_a_turn_and_hang(path: Path, in_turn: Event) -> None:
    with RateLimit(path, 1, 0.2, in_flight_seconds=0.2).turn(threading.Event()):
        in_turn.set()
        time.sleep(600)


def lock_the_file_and_hang(path: Path, in_turn: Event) -> None:
    with RateLimit(path, 1, 0.2)._locked():
        in_turn.set()
        time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("hang", [take_a_turn_and_hang, lock_the_file_and_hang])
def test_a_process_killed_during_its_turn_does_not_block_others(
    hang: Callable[[Path, Event], None], tmp_path: Path
) -> None:
    in_turn = SPAWN.Event()
    process = SPAWN.Process(target=hang, args=(tmp_path / "limit", in_turn))
    process.start()
    assert in_turn.wait(60)
    process.kill()
    process.join()
    with RateLimit(tmp_path / "limit", 1, 0.2).turn(threading.Event()):
        pass


def test_a_turn_in_progress_counts_as_used(tmp_path: Path) -> None:
    limit, stop = RateLimit(tmp_path / "limit", 1, 0.0), threading.Event()
    with limit.turn(threading.Event()):
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(Stopped), limit.turn(stop):
            pytest.fail("there was no second turn")


def test_after_a_stop_there_is_no_turn(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped), RateLimit(tmp_path / "limit", 1, 0.1).turn(stop):
        pytest.fail("there was a turn")


def test_an_answer_after_its_turn_expired_does_not_end_the_next_turn(tmp_path: Path) -> None:
    quick = RateLimit(tmp_path / "limit", 1, 0.0, in_flight_seconds=0.05)
    with quick.turn(threading.Event()):
        time.sleep(0.1)
        with RateLimit(tmp_path / "limit", 1, 60.0).turn(threading.Event()):
            pass
    after = array("d", (tmp_path / "limit").read_bytes()[16:])
    assert after[0] > time.monotonic() + 50, "the minute's turn is still counted"


@pytest.mark.parametrize(
    "left",
    [array("d", [1e12] * 5).tobytes(), b"cut", array("d", [float("nan")]).tobytes()],
    ids=["an earlier boot", "cut", "not a number"],
)
def test_content_of_an_earlier_boot_or_an_incomplete_write_delays_no_turn(tmp_path: Path, left: bytes) -> None:
    RateLimit(tmp_path / "limit", 1, 0.1)._take()  # which marks it as this machine's
    with (tmp_path / "limit").open("r+b") as file:
        file.truncate(16)
        file.seek(16)
        file.write(left)
    with RateLimit(tmp_path / "limit", 1, 0.1).turn(threading.Event()):
        pass


def test_two_machines_on_a_shared_volume_keep_the_limit_whatever_their_clocks_say(tmp_path: Path) -> None:
    clocks = {"one": Clock(), "another": Clock()}
    clocks["another"].now = 5_000_000.0
    limits = {name: RateLimit(tmp_path / "limit", 2, 60.0, clock=clock, mark=name) for name, clock in clocks.items()}
    given: list[tuple[int, str]] = []
    for second in range(900):
        for name in ("another", "one"):
            if (name == "one" or second < 400) and (taken := limits[name]._take()):
                limits[name]._answered(*taken)
                given.append((second, name))
            clocks[name].wait(1)
    assert all(later - earlier >= 60 for (earlier, _), (later, _) in zip(given, given[2:], strict=False))
    assert {name for second, name in given if second < 400} == {"another"}
    assert sum(name == "one" for _, name in given) >= 10, "it goes on when the other is done"


def test_turns_before_a_restart_are_forgotten_once_they_are_old(tmp_path: Path) -> None:
    file = tmp_path / "limit"
    with RateLimit(file, 1, 60.0, mark="before the restart").turn(threading.Event()):
        pass
    again = RateLimit(file, 1, 60.0, mark="after it")
    assert again._take() is None, "it may have been another machine, a moment ago"
    os.utime(file, (time.time() - 3600,) * 2)
    assert again._take()


def test_two_limits_on_one_file_count_each_others_turns(tmp_path: Path) -> None:
    small, large = RateLimit(tmp_path / "limit", 1, 60.0), RateLimit(tmp_path / "limit", 100, 1.0)
    for _ in range(3):
        with large.turn(threading.Event()):
            pass
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped), small.turn(stop):
        pytest.fail("the larger limit's turns were not counted")


def test_a_window_of_more_than_two_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="120 s"):
        RateLimit(tmp_path / "limit", 1, 600.0)


@pytest.mark.parametrize(("a_minute", "per_second"), [(5, 5 / 60), (599, 599 / 60), (600, 10), (659, 10), (6000, 100)])
def test_a_limit_per_minute_is_never_exceeded_by_its_limit_per_second(
    tmp_path: Path, a_minute: int, per_second: float
) -> None:
    found = RateLimit.per_minute(tmp_path / "limit", a_minute)
    assert found.per_second == pytest.approx(per_second)
    assert found.per_second * 60 <= a_minute + 1e-9
