"""`make dev` at a terminal: a banner, and then a line for whatever a person wants to know.

Belongs here: starting `dagster dev`, and which of its lines are shown and how. Does not belong here: what is logged
(defs).

Dagster's own output is some 160 lines a minute, of which three are about the market. It goes to a file as it is; shown
are the project's lines, warnings and errors, without dates, run ids and stacks, and every line of a kind that is not
known here. A pipe carries it, which a collector that outlives `dagster dev` holds open: what it says at its end is
still shown.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from polygon_pipeline import demo, settings
from polygon_pipeline.collector.journal import leftovers
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.settings import ConfigurationError, Settings

_HOST = "127.0.0.1"
_LOG_BYTES = 20_000_000
_SHOWN_TICKERS = 12

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# `2026-11-25 03:38:45 +0000 - dagster - WARNING - text`
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}) - ([\w.-]+) - ([A-Z]+) - (.*)")
# The text of a run's event, `job - run id - process - step - EVENT - message`, perhaps without a step; and of what it
# logs, `job - run id - step - message`.
_OF_RUN = re.compile(
    r"(?P<job>\S+) - [0-9a-f]{8}-[0-9a-f-]{27}(?: - \d+(?: - (?P<step>\S+))? - (?P<event>[A-Z_]+)| - (?P<logging>\S+))"
    r" - (?P<message>.*)"
)
_OF_SENSOR = re.compile(r"__repository__ - (?P<sensor>\w+) - (?P<message>.*)")
# An error's last line: `package.Kind: text`, or `KindError: text` of Python's own.
_ERROR = re.compile(r"(?:(?:\w+\.)+(?P<kind>\w+)|\w*(?:Error|Exception))(?:: (?P<text>.+))?")

_COLLECTOR = "collect_aggregates"
_SHOWN_LEVELS = {"INFO", "WARNING", "ERROR", "CRITICAL"}
# What Dagster says at its start and end, and of a step's failure before its error.
_ROUTINE = re.compile(
    r"No cursor for event type|Received interrupt|KeyboardInterrupt received|Shutting down|Daemon threads shut down|"
    r"Server for .* was shut down|Launching Dagster services|Dagster services shut down|Run was canceled\."
)
# Of a stack: whatever is indented, and the lines between its parts.
_OF_STACK = re.compile(
    r"\s|$|Traceback \(most recent call last\)|Stack Trace:|The above exception|During handling|"
    r"(?:\w+\.)*\w*Interrupt\w*$"
)


def shown(lines: Iterable[str]) -> Iterator[str]:
    """What a person sees of Dagster's lines, given without their ends."""
    failed: str | None = None  # what to put before an error whose text follows
    is_told = False  # whether what follows says the same again
    for raw in lines:
        line = _COLOURS.sub("", raw)
        if not (found := _LINE.fullmatch(line)):
            if _OF_STACK.match(line):
                continue
            error = _ERROR.fullmatch(line)
            if failed and error:
                is_told = error["kind"] == "Failure"  # a sentence, and then its causes
                yield f"{failed}{error['text'] if is_told else line}"
            elif not (is_told and error):
                yield line
            failed = None
            continue
        at, logger, level, text = found.groups()
        if logger.startswith("dagster") and _ROUTINE.match(text):
            continue
        is_told = False
        clock = f"{datetime.strptime(at, '%Y-%m-%d %H:%M:%S %z').astimezone(NEW_YORK):%H:%M:%S}"
        mark = "" if level in ("INFO", "DEBUG") else f"{level} "
        if run := _OF_RUN.fullmatch(text):
            is_told = run["event"] == "RUN_FAILURE" and "Steps failed" in run["message"]
            name = "" if run["job"] == _COLLECTOR else f"{run['step'] or run['logging'] or run['job']}: "
            if run["event"] == "STEP_FAILURE":
                failed = f"{clock} {mark}{name}"
            elif run["event"] == "RUN_CANCELED":
                continue  # its step has said it
            elif level in _SHOWN_LEVELS or (run["event"] == "ASSET_MATERIALIZATION" and not name):
                yield f"{clock} {mark}{name}{run['message']}"
        elif level in _SHOWN_LEVELS:
            sensor = _OF_SENSOR.fullmatch(text)
            yield f"{clock} {mark}" + (f"{sensor['sensor']}: {sensor['message']}" if sensor else text)


def banner(wanted: Settings, url: str, log: Path) -> str:
    """What is about to run."""
    feed = f"LIVE, {wanted.websocket_url}"
    if wanted.is_simulated:
        feed = f"SIMULATED, by {wanted.websocket_url or f'the demo: the last {demo.SESSIONS} sessions, oldest first'}"
    named = ", ".join(wanted.tickers[:_SHOWN_TICKERS])
    rest = len(wanted.tickers) - _SHOWN_TICKERS
    rows = {
        "feed": feed,
        "tickers": "the whole market" if wanted.is_whole_market else named + (f" and {rest} more" if rest > 0 else ""),
        "channels": ", ".join(wanted.channels),
        "lake": wanted.lake_uri,
        "journal": str(wanted.journal_dir),
        "web UI": f"{url} (in some ten seconds)",
        "stop": "Ctrl-C, once: what was received is published first",
        "output": f"below what concerns the market, in New York's time; all of Dagster's in {log}",
    }
    return "\n".join(["polygon_pipeline", *(f"  {name:<9} {value}" for name, value in rows.items())])


def command(port: int) -> list[str]:
    """`dagster dev`, its own services quiet."""
    # It says that `dg dev` supersedes it; both work.
    python = [sys.executable, "-W", "ignore:Function `dev_command` is superseded"]
    return [*python, "-m", "dagster", "dev", "--host", _HOST, "--port", str(port), "--log-level", "warning"]


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Runs `dagster dev` until it ends; returns its exit code, and 2 where nothing was started."""
    parser = argparse.ArgumentParser(prog="python -m polygon_pipeline.terminal", description="What `make dev` runs.")
    parser.add_argument("--port", type=int, default=3000, help="of the web UI (default: 3000)")
    port = parser.parse_args(arguments).port
    try:
        wanted = settings.load(demo.with_defaults(environment))
        _require_free(port)
    except ConfigurationError as error:
        _say(f"{error} Nothing was started.")
        return 2
    log = Path(environment.get("DAGSTER_HOME") or "var/dagster") / "dev.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    url = f"http://{_HOST}:{port}"
    _say(banner(wanted, url, log))
    process = subprocess.Popen(
        command(port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    # Ctrl-C reaches the whole group from the terminal; who ends this process alone means Dagster.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=_announce, args=(port, url, process), daemon=True).start()
    for line in shown(_kept(process.stdout, log)):
        _say(line)
    code = process.wait()
    _say(f"Stopped. {_left(wanted.journal_dir)}")
    return code


def _kept(lines: Iterable[str], log: Path) -> Iterator[str]:
    """The lines, without their ends, which are written to a log of bounded size on the way."""
    with contextlib.closing(RotatingFileHandler(log, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")) as kept:
        for line in lines:
            text = line.rstrip("\n")
            kept.emit(logging.makeLogRecord({"msg": text}))
            yield text


def _left(journal_dir: Path) -> str:
    """What is left when everything has ended. A collector's own last words are lost at Ctrl-C: the process that carries
    a step's output gets it, too."""
    waiting = 0
    for journal in leftovers(journal_dir):
        waiting += journal.backlog_bytes()
        journal.release()
    if waiting:
        return f"{waiting:,} bytes of what was received wait in {journal_dir}; the next start here publishes them."
    return "Everything that was received is on the lake."


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ConfigurationError(
                f"Port {port} cannot be used for the web UI ({error.strerror}). Is another `make dev` running? Stop "
                "what listens there, or name another port: make dev PORT=3001."
            ) from error


def _announce(port: int, url: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection((_HOST, port), timeout=1).close()
        except OSError:
            time.sleep(0.5)
            continue
        _say(f"{datetime.now(NEW_YORK):%H:%M:%S} the web UI is there: {url}")
        return


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
