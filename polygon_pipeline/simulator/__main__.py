"""`python -m polygon_pipeline.simulator`: serve a synthetic day, or recorded files, until interrupted.

Belongs here: the command line. Does not belong here: anything a test or a definition would import.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import Faults, Kind
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline.simulator.replay import replay
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST, first_tickers


def _tickers(text: str) -> list[str]:
    return first_tickers(int(text)) if text.isdigit() else text.split(",")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m polygon_pipeline.simulator",
        description="A simulated exchange that speaks the vendor's WebSocket protocol on 127.0.0.1.",
    )
    parser.add_argument("--port", type=int, default=0, help="0, the default, picks a free one")
    parser.add_argument("--day", type=date.fromisoformat, help="trading day (default: the last completed one)")
    parser.add_argument(
        "--tickers",
        type=_tickers,
        default=",".join(WATCH_LIST),
        help="comma-separated, or how many (default: %(default)s)",
    )
    parser.add_argument(
        "--channels",
        choices=("AM", "A", "AM,A"),
        default="AM,A",
        help="what is there to subscribe to (default: %(default)s); for a whole market at speed, AM alone",
    )
    parser.add_argument("--seed", type=int, default=7, help="another number, another market (default: 7)")
    parser.add_argument(
        "--replay",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="send these instead: .csv of bars, or raw frames in .jsonl or .jsonl.zst",
    )
    parser.add_argument(
        "--speed",
        type=float,
        default=320.0,
        help="market seconds a second: 320 (default) is a day in 3 minutes, 1 is real time, 0 knows no pause",
    )
    parser.add_argument("--key", help="the only API key to accept (default: any)")
    parser.add_argument(
        "--faults",
        metavar="KIND=RATE,...",
        help=f"what is to go wrong, each kind at a chance a frame, such as drop=0.01; kinds: {', '.join(Kind)}",
    )
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        feed, what = _feed(arguments)
        faults = Faults.parse(arguments.faults, arguments.seed) if arguments.faults else None
        with Exchange(feed, speed=arguments.speed, key=arguments.key, port=arguments.port, faults=faults) as exchange:
            sys.stdout.write(
                f"SIMULATED exchange at {exchange.url} with {what}; connect the project to it with "
                f"POLYGON_WEBSOCKET_URL={exchange.url} POLYGON_API_KEY={arguments.key or 'simulated'}\n"
            )
            sys.stdout.flush()
            while exchange.serving and not stop.wait(0.5):
                pass
    except (ValueError, OSError) as error:
        sys.exit(f"The simulated exchange cannot go on: {error}")


def _feed(arguments: argparse.Namespace) -> tuple[Iterable[Event], str]:
    """What to send, and how to call it."""
    if arguments.replay:
        if missing := [str(path) for path in arguments.replay if not path.is_file()]:
            raise ValueError(f"there is no file {', '.join(missing)}")
        return replay(arguments.replay), f"a replay of {', '.join(map(str, arguments.replay))}"
    day = arguments.day or calendar.completed_sessions(datetime.now(UTC), 1)[0]
    market = SyntheticMarket(arguments.tickers, arguments.seed)
    feed = SyntheticFeed(market, day, [Channel(name) for name in arguments.channels.split(",")])
    return feed, f"the synthetic {day.isoformat()} of {len(market.tickers)} tickers"


if __name__ == "__main__":
    main()
