"""`python -m polygon_pipeline.simulator`: serve a synthetic day and its history, or recorded files, until interrupted.

Belongs here: the command line. Does not belong here: anything that a test or a Dagster definition imports.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, date, datetime
from pathlib import Path

from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import open_lake
from polygon_pipeline.market import calendar
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.corporate_actions import Actions, weekly
from polygon_pipeline.simulator.daily import daily_bars
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.faults import Faults, FaultType
from polygon_pipeline.simulator.feed import Event
from polygon_pipeline.simulator.flat_files import daily_flat_file, flat_file, publish
from polygon_pipeline.simulator.replay import replay
from polygon_pipeline.simulator.rest_server import HistoryServer
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline.simulator.tickers import WATCH_LIST, first_tickers


def _tickers(text: str) -> list[str]:
    return first_tickers(int(text)) if text.isdigit() else text.split(",")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m polygon_pipeline.simulator",
        description="A simulated exchange that speaks the vendor's WebSocket protocol on 127.0.0.1. For a synthetic "
        "market it also serves the vendor's REST API: all earlier days, and the simulated day up to the market time.",
    )
    parser.add_argument("--port", type=int, default=0, help="the port of the WebSocket server (default: a free one)")
    parser.add_argument("--day", type=date.fromisoformat, help="trading day (default: the last completed one)")
    parser.add_argument(
        "--tickers",
        type=_tickers,
        default=",".join(WATCH_LIST),
        help="comma-separated, or a number of tickers (default: %(default)s)",
    )
    parser.add_argument(
        "--channels",
        choices=("AM", "A", "AM,A"),
        default="AM,A",
        help="the channels to send (default: %(default)s); for the whole market at high speed, use AM",
    )
    parser.add_argument("--seed", type=int, default=7, help="a different seed gives a different market (default: 7)")
    parser.add_argument(
        "--corporate-actions",
        action="store_true",
        help="split GME twice a week, forth and back, and let MSFT pay a dividend, as the demo does",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="send these instead of a synthetic day: bars as .csv, or raw frames as .jsonl or .jsonl.zst",
    )
    parser.add_argument(
        "--speed",
        type=float,
        default=320.0,
        help="market seconds per second: 320 (default) plays a day in 3 minutes, 1 is real time, 0 has no pauses",
    )
    parser.add_argument("--key", help="the only API key to accept (default: any)")
    parser.add_argument(
        "--faults",
        metavar="KIND=RATE,...",
        help="the faults to inject, each with its probability per frame, such as drop=0.01; kinds: "
        f"{', '.join(FaultType)}",
    )
    parser.add_argument(
        "--rest-port", type=int, default=0, help="the port of the REST API (default: a free one); not with --replay"
    )
    parser.add_argument("--requests-per-minute", type=int, help="the rate limit of the REST API (default: none)")
    parser.add_argument(
        "--flat-files",
        metavar="URI",
        help="publish flat files at s3://bucket/prefix (reached as AWS_* says) or file:///path; not with --replay",
    )
    parser.add_argument(
        "--flat-file-days", type=int, default=1, help="for how many trading days, up to the simulated one (default: 1)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        feed, description = _feed(arguments)
        faults = Faults.parse(arguments.faults, arguments.seed) if arguments.faults else None
        with ExitStack() as serving:
            exchange = serving.enter_context(
                Exchange(feed, speed=arguments.speed, key=arguments.key, port=arguments.port, faults=faults)
            )
            variables = _serve_history(arguments, feed, exchange, serving) if isinstance(feed, SyntheticFeed) else {}
            variables |= {"POLYGON_WEBSOCKET_URL": exchange.url, "POLYGON_API_KEY": arguments.key or "simulated"}
            sys.stdout.write(
                f"SIMULATED exchange at {exchange.url} with {description}; connect the project to it with "
                f"{' '.join(f'{name}={value}' for name, value in variables.items())}\n"
            )
            sys.stdout.flush()
            while exchange.serving and not stop.wait(0.5):
                pass
    except (ValueError, LakeError, *STORE_ERRORS) as error:
        sys.exit(f"The simulated exchange cannot go on: {error}")


def _feed(arguments: argparse.Namespace) -> tuple[Iterable[Event], str]:
    """The events to send, and a description of them."""
    if arguments.replay:
        if missing := [str(path) for path in arguments.replay if not path.is_file()]:
            raise ValueError(f"there is no file {', '.join(missing)}")
        return replay(arguments.replay), f"a replay of {', '.join(map(str, arguments.replay))}"
    day = arguments.day or calendar.completed_sessions(datetime.now(UTC), 1)[0]
    actions = weekly(arguments.tickers, day) if arguments.corporate_actions else Actions()
    market = SyntheticMarket(arguments.tickers, arguments.seed, actions)
    feed = SyntheticFeed(market, day, [Channel(name) for name in arguments.channels.split(",")])
    return feed, f"the synthetic {day.isoformat()} of {len(market.tickers)} tickers"


def _serve_history(
    arguments: argparse.Namespace, feed: SyntheticFeed, exchange: Exchange, serving: ExitStack
) -> dict[str, str]:
    """Serve the history and publish the requested flat files; returns the environment variables that point to them."""
    midnight_ms = calendar.day_bounds_ms(feed.day)[0]  # the time until the market starts
    history = HistoryServer(
        feed.market.day_bars,
        key=arguments.key,
        port=arguments.rest_port,
        clock=lambda: max(midnight_ms, exchange.market_time_ms),
        requests_per_minute=arguments.requests_per_minute,
        listings=feed.market.listings(),
    )
    variables = {"POLYGON_REST_URL": serving.enter_context(history).url}
    if arguments.flat_files:
        lake = open_lake(arguments.flat_files, _s3_access)
        lake.claim("simulated")
        for day in calendar.trading_days(calendar.FIRST_SESSION, feed.day)[-max(1, arguments.flat_file_days) :]:
            bars, session = feed.market.day_bars(day), calendar.session(day)
            assert session
            publish(lake.store, day, flat_file(bars))
            publish(lake.store, day, daily_flat_file(daily_bars(bars, session), day), "day_aggs_v1")
        variables["POLYGON_FLAT_FILES_URL"] = arguments.flat_files
    return variables


def _s3_access() -> S3Access:
    import boto3

    return S3Access(boto3.Session(), os.environ.get("AWS_ENDPOINT_URL"))


if __name__ == "__main__":
    main()
