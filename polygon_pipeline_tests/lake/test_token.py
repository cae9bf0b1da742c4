"""A right that one process of all machines has at a time, and the limit of requests that rests on it."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polygon_pipeline.lake import token
from polygon_pipeline.lake.errors import STORE_ERRORS
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.lake.token import Token
from polygon_pipeline.polygon.rate_limit import RateLimit, Stopped
from polygon_pipeline.polygon.rest import RestHistory
from polygon_pipeline.simulator.rest_server import HistoryServer
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.faulty_s3 import Fault, FaultyS3, lake_behind
from polygon_pipeline_tests.support.leases import Clock
from polygon_pipeline_tests.support.s3_server import S3Address, SeaweedFS

KEY = "right.json"


def nothing() -> list[float]:
    return []


def test_one_has_it_and_another_when_it_is_given_back_with_what_was_left(s3_lake: Lake) -> None:
    clock = Clock()
    one, another = Token(s3_lake, KEY, clock), Token(s3_lake, KEY, clock)
    held = one.hold(nothing)
    assert held == ((), False)
    assert another.hold(nothing) is None
    one.give_back([12.5, 3.0])
    clock.wait(1)
    assert another.hold(nothing) == ((12.5, 3.0), False)
    assert another.hold(nothing) == ((), False)
    assert one.hold(nothing) is None
    one.give_back([1.0])  # what is another's
    assert another.hold(nothing) == ((), False)


def test_who_waits_gets_it_when_the_holder_has_had_its_time(s3_lake: Lake) -> None:
    clock = Clock()
    one, another = Token(s3_lake, KEY, clock), Token(s3_lake, KEY, clock)
    had: list[str] = []
    for _ in range(120):
        for name, of in (("one", one), ("another", another)):
            if of.hold(lambda: [7.0]):
                had.append(name)
        clock.wait(1)
    changes = sum(a != b for a, b in itertools.pairwise(had))
    assert 3 <= changes <= 6
    assert len(had) <= 120, "never both"


def test_a_holder_that_is_silent_has_lost_it_before_another_takes_over(s3_lake: Lake) -> None:
    clock = Clock()
    one, another = Token(s3_lake, KEY, clock), Token(s3_lake, KEY, clock)
    assert one.hold(nothing)
    taken, silent = None, clock.now
    while taken is None:
        clock.wait(1)
        taken = another.hold(nothing)
    assert taken.is_lost
    assert clock.now - silent > token.LOST_SECONDS
    assert one.hold(nothing) is None


def test_a_holder_alone_goes_on_after_any_pause(s3_lake: Lake) -> None:
    clock = Clock()
    one = Token(s3_lake, KEY, clock)
    assert one.hold(nothing)
    clock.wait(3600)
    assert one.hold(nothing) == ((), False)


@pytest.mark.fault("faults of the storage")
def test_a_store_that_is_away_does_not_let_the_limit_go(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake, clock = lake_behind(proxy, seaweedfs), Clock()
        one, another = Token(lake, KEY, clock), Token(lake, KEY, clock)
        assert one.hold(nothing)
        proxy.rates = {Fault.FORBIDDEN: 1.0}
        clock.wait(token.RENEW_SECONDS)
        assert one.hold(nothing), "its renewal is not due for ever"
        clock.wait(token.LOST_SECONDS)
        assert one.hold(nothing) is None
        assert another.hold(nothing) is None
        clock.wait(61)
        with pytest.raises(STORE_ERRORS):
            one.hold(nothing)
        proxy.rates = {}
        assert one.hold(nothing)


@pytest.mark.fault("faults of the storage")
def test_a_renewal_whose_answer_is_lost_does_not_lose_the_right(seaweedfs: SeaweedFS) -> None:
    with FaultyS3(seaweedfs.endpoint_url) as proxy:
        lake, clock = lake_behind(proxy, seaweedfs), Clock()
        one = Token(lake, KEY, clock)
        assert one.hold(nothing)
        for _ in range(3):
            clock.wait(token.RENEW_SECONDS)
            proxy.order(Fault.LOST_RESPONSE, 1, "PUT", KEY)
            assert one.hold(nothing)
        assert proxy.counts[Fault.LOST_RESPONSE] == 3


# The limit over machines


def ask(url: str, uri: str, s3: S3Address, folder: Path, requests: int, origin: float) -> None:
    """A machine, with a disk and a clock of its own; a second of the right lasts 30 ms."""
    lake = open_lake(uri, s3.access)
    limit = RateLimit(
        folder / "turns",
        4,
        1.0,
        in_flight_seconds=0.5,
        shared=Token(lake, KEY, seconds=0.03),
        clock=lambda: time.monotonic() + origin,
        mark=str(origin),
    )
    history = RestHistory(url, "key", limit)
    for _ in range(requests):
        list(history.minute_bars("SPY", DAY, DAY))
    limit.close()


@pytest.mark.slow
@pytest.mark.fault("machines lost")
def test_three_machines_keep_one_limit_at_the_server_and_one_that_is_killed_keeps_nobody_out(
    s3_lake: Lake, seaweedfs: SeaweedFS, tmp_path: Path, say: Callable[[str], None]
) -> None:
    context = multiprocessing.get_context("forkserver")
    market = SyntheticMarket(["SPY"])
    with HistoryServer(market.day_bars, requests_per_minute=4, minute_seconds=1.0) as server:
        machines = []
        for number, requests in enumerate((1000, 4, 4)):
            arguments = (server.url, s3_lake.uri, seaweedfs.address, tmp_path / str(number), requests)
            machine = context.Process(target=ask, args=(*arguments, 1e6 * number), daemon=True)
            machine.start()
            machines.append(machine)
        while len(server.requests) < 5:
            time.sleep(0.01)
        machines[0].kill()
        for machine in machines:
            machine.join()
        assert [machine.exitcode for machine in machines] == [-9, 0, 0]
        assert server.happened == {}, "no request was one too many"
        times = [request.at for request in server.requests]
    most = max(sum(start <= at < start + 1.0 for at in times) for start in times)
    say(f"rate limit: {len(times)} requests of 3 machines, one of them killed, 4 allowed a second: at most {most}")
    assert most <= 4


def test_a_large_limit_takes_no_request_to_the_lake_per_turn(s3_lake: Lake, tmp_path: Path) -> None:
    looks: list[int] = []

    class Counted(Token):
        def _write(self, content: token._Content) -> bool:
            looks.append(1)
            return super()._write(content)

    limit = RateLimit(tmp_path / "turns", 1000, 1.0, shared=Counted(s3_lake, KEY))
    for _ in range(500):
        with limit.turn(threading.Event()):
            pass
    limit.close()
    assert len(looks) < 10


def test_who_waits_for_another_machine_can_be_stopped(s3_lake: Lake, tmp_path: Path) -> None:
    holder = Token(s3_lake, KEY)
    assert holder.hold(nothing)
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    limit = RateLimit(tmp_path / "turns", 5, 1.0, shared=Token(s3_lake, KEY))
    with pytest.raises(Stopped), limit.turn(stop):
        pytest.fail("there was a turn")
