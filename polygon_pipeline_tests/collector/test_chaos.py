"""Whole sessions with every fault that a stream can have, compared with the exchange's own record."""

from __future__ import annotations

import json
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow.parquet as pq
import pytest

from polygon_pipeline.collector.collector import Collector, Progress
from polygon_pipeline.datasets.inputs import fetch_raw, normalize_day
from polygon_pipeline.lake.ledger import Ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.polygon import stream
from polygon_pipeline.polygon.stream import Backoff
from polygon_pipeline.simulator import exchange as exchange_module
from polygon_pipeline.simulator.exchange import Exchange, Served
from polygon_pipeline.simulator.faults import AT_AUTHENTICATION, Fault, Faults, FaultType, OutgoingFrame
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.archives import archived_lines, quarantined_entries
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.collecting import plan
from polygon_pipeline_tests.support.journals import read_ledger
from polygon_pipeline_tests.support.lakes import local_lake

pytestmark = [pytest.mark.slow, pytest.mark.fault("faults of the stream")]

TOPICS = ("AM.AAPL", "AM.BRK.B", "AM.KIMpL", "AM.TCEHY", "A.TCEHY")

# What ends a connection, and what its gap must give as the cause.
CAUSES = {
    FaultType.DROP: "the connection was lost",
    FaultType.RESET: "the connection was lost",
    FaultType.TRUNCATED_FRAME: "the connection was lost",
    FaultType.CLOSE: "code 1001: going away",
    FaultType.SLOW_CONSUMER: "the server said slow_consumer",
    FaultType.FORCE_DISCONNECT: "the server said force_disconnect",
    FaultType.MAX_CONNECTIONS: "the server said max_connections",
    FaultType.STALL: "answered no ping",
    FaultType.SILENCE: "no bar came",
    FaultType.HUGE_FRAME: "announced a message of 67108864 bytes",
    FaultType.HUGE_MESSAGE: "announced a message of 9437184 bytes",
    FaultType.DRIP: "sent no whole message",
}
# These take the client seconds to notice, so each comes once; the others at random as well.
SLOW = (FaultType.STALL, FaultType.SILENCE, FaultType.DRIP)
RANDOM = sorted(set(FaultType) - AT_AUTHENTICATION - {*SLOW})


@pytest.fixture(scope="module")
def feed() -> list[Event]:
    """A session with many revisions; of the seconds only those of a ticker that hardly trades."""
    market = SyntheticMarket(["AAPL", "BRK.B", "KIMpL", "TCEHY"])
    whole = SyntheticFeed(market, DAY, revised_share=0.4)
    return [event for event in whole if event.channel is Channel.MINUTE or event.ticker == "TCEHY"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits and deadlines, only shorter."""
    patient = Backoff.next_delay
    monkeypatch.setattr(Backoff, "next_delay", lambda *arguments: patient(*arguments) / 10_000)
    monkeypatch.setattr(stream, "PING_SECONDS", 0.3)
    monkeypatch.setattr(stream, "SILENCE_SECONDS", 1.5)
    monkeypatch.setattr(exchange_module, "_SETTLE_SECONDS", 0.01)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_session_with_every_fault_loses_nothing_that_arrived(
    seed: int, feed: list[Event], tmp_path: Path, say: Callable[[str], None]
) -> None:
    chance = random.Random(seed)
    appointed = [*SLOW, *RANDOM, FaultType.AUTH_TIMEOUT]
    faults = Faults(
        [Fault(kind, after_frames=chance.randrange(50, 400)) for kind in appointed]
        + [Fault(kind, rate=0.01) for kind in RANDOM],
        seed,
    )
    session = collect(feed, faults, tmp_path)

    assert set(faults.happened) == set(appointed), "a fault that did not happen proves nothing"
    holds(session)
    assert any_older_revision_stayed(session, feed), "a late bar that replaces nothing proves little"
    tell(session, f"seed {seed}: {sum(faults.happened.values())} faults", say)


def test_a_feed_that_does_not_wait_leaves_gaps_with_their_causes_and_loses_nothing_that_arrived(
    feed: list[Event], tmp_path: Path, say: Callable[[str], None]
) -> None:
    """All that ends a connection, every 20 minutes of a session that takes 9 seconds; the stall lasts hours of it."""
    times = count(feed[0].emit_ms + 1_200_000, 1_200_000)
    faults = Faults([Fault(kind, at_ms=at_ms) for kind, at_ms in zip(CAUSES, times, strict=False)])
    session = collect(feed, faults, tmp_path, speed=6400)

    assert set(faults.happened) == set(CAUSES)
    holds(session)
    assert session.ledger.account.bars < len(feed), "some bars were sent while no collector was connected"
    tell(session, "real time", say)


def test_a_key_that_is_refused_after_it_was_accepted_is_tried_again_and_nothing_is_lost(
    feed: list[Event], tmp_path: Path
) -> None:
    faults = Faults([Fault(FaultType.DROP, after_frames=20), Fault(FaultType.AUTH_FAILED, after_frames=20)])
    session = collect(feed, faults, tmp_path)
    assert session.failure is None
    assert FaultType.AUTH_FAILED in set(faults.happened)
    assert [bool(served.frames) for served in session.exchange.served[:2]] == [True, True]
    assert len(session.exchange.served[0].frames) == 20
    holds(session)


@pytest.mark.parametrize("kind", [FaultType.BROKEN_OBJECT, FaultType.DEEP_NESTING])
def test_an_undecodable_frame_does_not_end_the_run(kind: FaultType, feed: list[Event], tmp_path: Path) -> None:
    session = collect(feed[:200], Faults([Fault(kind, after_frames=3)]), tmp_path)
    assert session.failure is None
    holds(session)


@dataclass
class Session:
    """A run that is over. arrived: the frames that the lake says were received, in order."""

    exchange: Exchange
    lake: Lake
    ledger: Ledger
    folder: Path
    failure: Exception | None = None
    arrived: list[OutgoingFrame] = field(default_factory=list)


def collect(feed: list[Event], faults: Faults, folder: Path, speed: float = 0) -> Session:
    """Runs a collector against an exchange with these faults, until all that was sent is on the lake."""
    lake = local_lake(folder / "lake")
    published = 0

    def report(progress: Progress) -> None:
        nonlocal published
        published = progress.account.bars

    failure = None
    with Exchange(feed, speed=speed, batch_limit=6, faults=faults, record=True) as exchange:
        wanted = plan(
            exchange.url,
            folder / "journal",
            feed="simulated",
            topics=TOPICS,
            checkpoint_seconds=0.5,
            quiet_limit=lambda: 1.5,
        )
        ending = _when_all_is_published(exchange, lambda: published)
        try:
            Collector(lake, wanted, logging.getLogger("chaos")).run(ending, report)
        except Exception as error:  # noqa: BLE001 what ended the run is the caller's to judge
            failure = error
    session = Session(exchange, lake, read_ledger(lake), folder, failure)
    session.arrived = _match(_received(lake), exchange.served)
    return session


def _when_all_is_published(exchange: Exchange, published: Callable[[], int]) -> Callable[[], str | None]:
    """The end of a run: all that certainly arrived is accounted for, or will not be."""
    give_up = time.monotonic() + 60

    def ending() -> str | None:
        certain = sum(len(f.bars) for served in exchange.served for f in served.frames[: served.acknowledged])
        if exchange.finished.is_set() and _last_is_acknowledged(exchange.served) and published() >= certain:
            return "everything is published"
        return "it took too long" if time.monotonic() > give_up else None

    return ending


def _last_is_acknowledged(served: list[Served]) -> bool:
    """Whether the connection that saw the end has received it all."""
    return bool(served) and served[-1].acknowledged == len(served[-1].frames)


def any_older_revision_stayed(session: Session, feed: list[Event]) -> bool:
    """Whether of some bar the vendor's last revision arrived, and after it an older one, which therefore counts."""
    bars = [bar for frame in session.arrived for bar in frame.bars]
    arrived = set(bars)
    last_sent, _ = _latest(event.payload for event in feed if event.payload in arrived)
    last_arrived, _ = _latest(bars)
    return last_arrived != last_sent


def tell(session: Session, what: str, say: Callable[[str], None]) -> None:
    """Says what the assertions have shown, and that every way of ending a connection has its cause in the ledger."""
    gaps = session.ledger.gaps
    for kind, cause in CAUSES.items():
        assert any(cause in gap.cause for gap in gaps), kind
    say(f"{what}, {len(gaps)} disconnects, {session.ledger.account.bars} bars, 0 lost")


class Receipt(NamedTuple):
    """One frame as the lake has it. kept: its events but for the refused; bad: what the quarantine holds of it."""

    received_at: str
    kept: Counter[bytes]
    bad: Counter[bytes]


def holds(session: Session) -> None:
    """Everything that must be true of a run that is over."""
    account = session.ledger.account
    bars = [bar for frame in session.arrived for bar in frame.bars]
    assert session.ledger.complete
    assert session.ledger.imbalance == []
    assert account.bars == len(bars)
    assert account.quarantined == sum(len(frame.bad) for frame in session.arrived)
    assert account.other == Counter(json.loads(event)["ev"] for frame in session.arrived for event in frame.other)

    # Every connection on which something certainly arrived was one, and every end of one is a gap with a cause.
    certain = sum(served.acknowledged > 0 for served in session.exchange.served)
    assert certain <= len(account.connections) <= len(session.exchange.served)
    assert len(session.ledger.gaps) == len(account.connections) - 1
    assert all(gap.cause and gap.end and gap.start <= gap.end for gap in session.ledger.gaps)

    latest, revisions = _latest(bars)
    _objects_hold(session.lake, latest)
    for channel in Channel:
        _normalized_bars_hold(session, channel, latest, revisions)


Key = tuple[str, str, int]


def _latest(bars: Iterable[bytes]) -> tuple[dict[Key, dict[str, Any]], Counter[Key]]:
    """Of every channel, ticker and start the bar that arrived last, and how many did."""
    latest: dict[Key, dict[str, Any]] = {}
    revisions: Counter[Key] = Counter()
    for bar in map(json.loads, bars):
        key = bar["ev"], bar["sym"], bar["s"]
        latest[key] = bar
        revisions[key] += 1
    return latest, revisions


def _objects_hold(lake: Lake, latest: dict[Key, dict[str, Any]]) -> None:
    folders = {"AM": "raw-data", "A": "raw-data-second"}
    expected = {}
    for (channel, ticker, start_ms), bar in latest.items():
        at = f"{datetime.fromtimestamp(start_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
        expected[f"{folders[channel]}/{DAY}/{ticker}/{at}.json"] = {
            "source": "polygon_websocket",
            "ticker": ticker,
            "timestamp": at,
            "bar_data": {
                "open": bar["o"],
                "high": bar["h"],
                "low": bar["l"],
                "close": bar["c"],
                "volume": float(bar["dv"]),
                "vwap": bar["vw"],
            },
        }
    found: dict[str, dict[str, Any]] = {}
    for folder in folders.values():
        lake.get_many(lake.keys(f"{folder}/"), lambda key, content: found.update({key: json.loads(content)}))
    assert all(record.pop("collected_at") for record in found.values())
    assert found == expected


def _normalized_bars_hold(
    session: Session, channel: Channel, latest: dict[Key, dict[str, Any]], revisions: Counter[Key]
) -> None:
    expected = [
        {
            "ticker": key[1],
            "timestamp": datetime.fromtimestamp(key[2] / 1000, UTC),
            "open": bar["o"],
            "high": bar["h"],
            "low": bar["l"],
            "close": bar["c"],
            "volume": float(bar["dv"]),
            "vwap": bar["vw"],
            "day_open": bar["op"] or None,
            "day_volume": float(bar["dav"]),
            "day_vwap": bar["a"],
            "average_trade_size": bar["z"],
            "otc": bar.get("otc", False),
            "transactions": None,
            "session": _part_of_day(key[2]),
            "revisions": revisions[key],
            "source": "websocket",
        }
        for key, bar in sorted(latest.items())
        if key[0] == channel
    ]
    folder = session.folder / f"normalize-{channel}"
    folder.mkdir()
    raw = normalize_day(session.lake, fetch_raw(session.lake, DAY, channel, folder), folder / "data.parquet", folder)
    assert raw.unreadable == {}
    assert raw.records == 0, "every bar is in the frames"
    assert pq.read_table(folder / "data.parquet").drop_columns("received_at").to_pylist() == expected


def _part_of_day(start_ms: int) -> str:
    time_of_day = f"{datetime.fromtimestamp(start_ms / 1000, NEW_YORK):%H:%M}"
    return "pre" if time_of_day < "09:30" else "regular" if time_of_day < "16:00" else "post"


def _received(lake: Lake) -> list[Receipt]:
    """Every frame with bars or faults in the archive and the quarantine, in the order of arrival."""
    kept: dict[str, Counter[bytes]] = defaultdict(Counter)
    bad: dict[str, Counter[bytes]] = defaultdict(Counter)
    for entry in quarantined_entries(lake, DAY):
        bad[entry.received_at][entry.raw] += 1
    for line in archived_lines(lake, DAY):
        if not line.is_frame:
            continue
        events = enumerate(msgspec.json.decode(line.content, type=list[msgspec.Raw]))
        good = [bytes(event) for at, event in events if at not in line.refused]
        if any(b'"ev":"status"' not in event for event in good):
            kept[line.received_at].update(good)
    return [Receipt(at, kept[at], bad[at]) for at in sorted({*kept, *bad})]


def _match(received: list[Receipt], served: list[Served]) -> list[OutgoingFrame]:
    """The frames sent that were received. Fails unless they are the beginning of each connection's, in order,
    everything acknowledged among them, and nothing was received that was not sent."""
    arrived: list[OutgoingFrame] = []
    for connection in served:
        for number, frame in enumerate(connection.frames):
            sent = Counter([*frame.bars, *frame.other]), Counter(frame.bad)
            receipt = received[len(arrived)] if len(arrived) < len(received) else None
            if receipt is None or (receipt.kept, receipt.bad) != sent:
                assert number >= connection.acknowledged, f"lost or changed: {frame}; received instead: {receipt}"
                break
            arrived.append(frame)
    assert len(arrived) == len(received), f"never sent: {received[len(arrived)]}"
    return arrived
