"""The vendor's history as its REST interface serves it, on loopback: a market's final bars, with faults on request.

Belongs here: the routes, their errors and limits, and what goes wrong on request. Does not belong here: making bars
(synthetic), flat files, and any code that reads the interface: were both sides to share it, a misreading would go
unnoticed.
"""

from __future__ import annotations

import base64
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from uuid import uuid4

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from polygon_pipeline.market import calendar
from polygon_pipeline.simulator.tickers import is_otc

JsonObject = dict[str, Any]

History = Callable[[date], pa.Table]
"""A trading day's minute bars as SyntheticMarket.day_bars has them: those columns, sorted by start_ms, then ticker."""

Changes = Mapping[tuple[str, int], Mapping[str, float] | None]
"""By ticker and start (Unix ms): the columns that are to be different, or None for no bar at all."""

_MINUTE_MS = 60_000
_LONGEST_PAGE = 50_000
_TIMES = date(1970, 1, 2), date(2100, 1, 1)  # what a client may ask about
_ELSEWHERE = "https://elsewhere.invalid"
_FIELDS = {
    "volume": "v",
    "vwap": "vw",
    "open": "o",
    "close": "c",
    "high": "h",
    "low": "l",
    "start_ms": "t",
    "transactions": "n",
}


class RestKind(StrEnum):
    """What can go wrong with an answer."""

    TOO_MANY_REQUESTS = "too_many_requests"  # 429 with an empty body; those beyond the rate limit count here too
    SERVER_ERROR = "server_error"  # 500
    UNAVAILABLE = "unavailable"  # 503
    NOT_AUTHORIZED = "not_authorized"  # 403: the plan does not include it
    SLOW = "slow"  # the answer comes late
    CUT_BODY = "cut_body"  # the connection ends in the middle of the body
    # These are for bars alone.
    REPEATED_NEXT_URL = "repeated_next_url"  # next_url leads to the page it is on
    FOREIGN_NEXT_URL = "foreign_next_url"  # next_url leads to another host
    EMPTY_PAGE = "empty_page"  # no results, and a next_url that leads to those that belong here


_REFUSALS = {
    RestKind.TOO_MANY_REQUESTS: (429, ""),
    RestKind.SERVER_ERROR: (500, "internal error"),
    RestKind.UNAVAILABLE: (503, "the service is unavailable"),
    RestKind.NOT_AUTHORIZED: (403, "You are not entitled to this data. Please upgrade your plan."),
}


@dataclass(frozen=True)
class RestFault:
    """One kind of fault and the requests that meet it, among those whose path with its query contains `path`.

    after: the first so many of them are spared. times: so many meet it then; None is all. rate: each with this chance
    (0 to 1). seconds: how late a slow answer is.
    """

    kind: RestKind
    path: str = "/v2/aggs/"
    after: int = 0
    times: int | None = 1
    rate: float = 1.0
    seconds: float = 1.0


class Request(NamedTuple):
    """One request as it came in. at: time.monotonic(). path: with its query, without any key."""

    at: float
    path: str


class _Answer(NamedTuple):
    status: int
    body: Any  # JSON; None is no body at all
    cut: bool = False


class _Refusal(Exception):
    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.answer = _Answer(status, None)
        if status == 403:
            self.answer = _Answer(403, {"status": "NOT_AUTHORIZED", "request_id": uuid4().hex, "message": error})
        elif error:
            self.answer = _Answer(status, {"status": "ERROR", "request_id": uuid4().hex, "error": error})


def corrected(history: History, changes: Changes) -> History:
    """The same history with some bars changed, removed or added, as when the vendor corrects a day later.

    changes is looked into anew each time, so that what it holds may come later. The history raises ValueError for a
    column that no bar has, and for an added bar that lacks one.
    """

    def day_bars(day: date) -> pa.Table:
        bars = history(day)
        due = {key: change for key, change in list(changes.items()) if calendar.session_date(key[1]) == day}
        if not due:
            return bars
        keys = pa.Table.from_pylist([{"ticker": ticker, "start_ms": start_ms} for ticker, start_ms in due])
        found = bars.join(keys, keys.column_names, join_type="left semi").to_pylist()
        rows = {(row["ticker"], row["start_ms"]): row for row in found}
        made = []
        for key, change in due.items():
            if change is not None:
                made.append({"ticker": key[0], "start_ms": key[1], **rows.get(key, {}), **change})
                if made[-1].keys() != set(bars.column_names):
                    raise ValueError(f"the changed bar {made[-1]} has not exactly the columns {bars.column_names}")
        kept = bars.join(keys, keys.column_names, join_type="left anti")
        whole = pa.concat_tables([kept, pa.Table.from_pylist(made, kept.schema)])
        return whole.sort_by([("start_ms", "ascending"), ("ticker", "ascending")])

    return day_bars


class HistoryServer:
    """Serves a market's history; a context manager around the serving.

    history: the truth, asked anew for every page. key: the only API key to accept; None accepts any but the empty
    one. It must come as `Authorization: Bearer`: the vendor takes it from the query as well, but a client of ours that
    puts it there must be found out. port: 0 picks a free one. clock: now in Unix ms, and only bars that have ended by
    then are there; None is for a history in which everything is past. requests_per_minute: None knows no limit.
    minute_seconds: how long the limit's minute is, shorter for quick tests. faults: what is to go wrong; a request
    meets the first that is due. seed: for faults with a rate.

    What goes wrong in the server itself answers 500, and is raised by stop().
    """

    def __init__(
        self,
        history: History,
        *,
        key: str | None = None,
        port: int = 0,
        clock: Callable[[], int] | None = None,
        requests_per_minute: int | None = None,
        minute_seconds: float = 60.0,
        faults: Iterable[RestFault] = (),
        seed: int = 0,
    ) -> None:
        self._history = history
        self._key = key
        self.port = port
        self._clock = clock
        self._limit = requests_per_minute
        self._minute_seconds = minute_seconds
        self._plan = list(faults)
        self._random = random.Random(seed)

        self.requests: list[Request] = []
        """Every request so far, refused ones too, in the order of coming in."""
        self.happened: Counter[RestKind] = Counter()
        """How often each kind of fault happened so far."""
        self._matched: Counter[int] = Counter()  # how many requests so far, by the fault's place in the plan
        self._admitted: deque[float] = deque()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._error: Exception | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.respond = self._respond
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="simulated-history", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; open connections get no more answers. Raises what went wrong in the server, if anything."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        if self._error:
            error, self._error = self._error, None
            raise error

    # One request

    def _respond(self, target: str, authorization: str) -> _Answer | None:
        """The answer to a GET; None when it is too late for one."""
        parts = urlsplit(target)
        query = {name: value for name, value in parse_qsl(parts.query) if name.lower() != "apikey"}
        path = parts.path + (f"?{urlencode(query)}" if query else "")
        try:
            with self._lock:
                self.requests.append(Request(time.monotonic(), path))
                self._authenticate(authorization)
                fault = self._due(path) if self._admit() else RestFault(RestKind.TOO_MANY_REQUESTS)
                if fault:
                    self.happened[fault.kind] += 1
            if fault and fault.kind in _REFUSALS:
                raise _Refusal(*_REFUSALS[fault.kind])
            answer = _Answer(200, self._route(parts.path, query))
            if fault:
                answer = self._spoil(answer, fault, path)
        except _Refusal as refusal:
            answer = refusal.answer
        except Exception as error:  # noqa: BLE001 - stop() raises it, in the thread that can act on it
            self._error = error
            answer = _Refusal(500, "internal error").answer
        return None if self._stopping.is_set() else answer

    def _authenticate(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        if scheme != "Bearer" or not key:
            raise _Refusal(401, "API Key was not provided")
        if self._key not in (None, key):
            raise _Refusal(401, "Unknown API Key")

    def _admit(self) -> bool:
        """Whether the rate limit allows one more in the last minute; what it refuses does not count against it."""
        now = time.monotonic()
        while self._admitted and self._admitted[0] <= now - self._minute_seconds:
            self._admitted.popleft()
        if self._limit is not None and len(self._admitted) >= self._limit:
            return False
        self._admitted.append(now)
        return True

    def _due(self, path: str) -> RestFault | None:
        for place, fault in enumerate(self._plan):
            if fault.path in path:
                self._matched[place] += 1
                turn = self._matched[place] - fault.after
                if turn > 0 and (fault.times is None or turn <= fault.times) and self._random.random() < fault.rate:
                    return fault
        return None

    def _spoil(self, answer: _Answer, fault: RestFault, path: str) -> _Answer:
        match fault.kind:
            case RestKind.SLOW:
                self._stopping.wait(fault.seconds)
            case RestKind.CUT_BODY:
                return answer._replace(cut=True)
            case RestKind.REPEATED_NEXT_URL:
                answer.body["next_url"] = self.url + path
            case RestKind.FOREIGN_NEXT_URL:
                answer.body["next_url"] = _ELSEWHERE + path
            case RestKind.EMPTY_PAGE:
                # By another name, because a client may well refuse a page that leads to itself.
                itself = f"{self.url}{path}{'&' if '?' in path else '?'}again={uuid4().hex}"
                answer.body.pop("results", None)
                answer.body.update(queryCount=0, resultsCount=0, count=0, next_url=itself)
        return answer

    def _route(self, path: str, query: dict[str, str]) -> Any:
        match [unquote(part) for part in path.split("/")[1:]]:
            case ["v2", "aggs", "ticker", ticker, "range", multiplier, timespan, first, last]:
                return self._range(ticker, f"{multiplier}/{timespan}", first, last, query)
            case ["v2", "aggs", "grouped", "locale", "us", "market", "stocks", day]:
                return self._grouped(day, query)
            case ["v1", "marketstatus", "now"]:
                return _status(self._now())
            case ["v1", "marketstatus", "upcoming"]:
                return _closures_to_come(self._now().astimezone(calendar.NEW_YORK).date())
        raise _Refusal(404, "page not found")

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock() / 1000 if self._clock else time.time(), UTC)

    # Bars

    def _range(self, ticker: str, window: str, first: str, last: str, query: dict[str, str]) -> JsonObject:
        if "cursor" in query:
            try:
                query = dict(parse_qsl(base64.urlsafe_b64decode(query["cursor"] + "==").decode()))
            except ValueError:
                raise _Refusal(400, "The parameter 'cursor' is invalid") from None
        if window not in ("1/minute", "1/day"):
            raise _Refusal(400, f"this simulation has the windows 1/minute and 1/day, not {window}")
        first_ms, last_ms = _bounds_ms(first, "from")[0], _bounds_ms(last, "to")[1]
        if last_ms < first_ms:
            raise _Refusal(400, "The parameter 'to' cannot be a time that occurs before 'from'")
        adjusted, limit, sort = _adjusted(query), query.get("limit", "5000"), query.get("sort", "asc")
        if sort not in ("asc", "desc"):
            raise _Refusal(400, "The parameter 'sort' must be asc or desc")
        if not limit.isdecimal() or not 1 <= int(limit) <= _LONGEST_PAGE:
            raise _Refusal(400, f"The parameter 'limit' must be from 1 to {_LONGEST_PAGE}")

        found = self._bars(ticker, window, first_ms, last_ms, descending=sort == "desc")
        body: JsonObject = {"ticker": ticker} | _body(list(islice(found, int(limit))), adjusted=adjusted)
        if following := next(found, None):
            rest = f"{following['t']}/{last_ms}" if sort == "asc" else f"{first_ms}/{following['t']}"
            settings = urlencode({"adjusted": str(adjusted).lower(), "limit": limit, "sort": sort})
            cursor = base64.urlsafe_b64encode(settings.encode()).decode().rstrip("=")
            path = f"/v2/aggs/ticker/{quote(ticker, safe='')}/range/{window}/{rest}"
            body["next_url"] = f"{self.url}{path}?cursor={cursor}"
        return body

    def _bars(self, ticker: str, window: str, first_ms: int, last_ms: int, *, descending: bool) -> Iterator[JsonObject]:
        known_ms = min(last_ms, self._clock()) if self._clock else last_ms
        days = calendar.trading_days(calendar.session_date(first_ms), calendar.session_date(known_ms))
        for day in reversed(days) if descending else days:
            bars = self._known(day)
            bars = bars.filter(pc.equal(bars["ticker"], ticker))
            if window == "1/day":
                bars = _daily(bars, day, calendar.day_bounds_ms(day)[0])
            for bar in reversed(_spelt(bars)) if descending else _spelt(bars):
                if first_ms <= bar["t"] <= last_ms:
                    del bar["T"]
                    yield bar

    def _grouped(self, day: str, query: dict[str, str]) -> JsonObject:
        session = calendar.session(calendar.session_date(_bounds_ms(day, "date")[0]))
        bars: list[JsonObject] = []
        if session:
            # The vendor dates a grouped bar by its end.
            bars = _spelt(_daily(self._known(session.date), session.date, _unix_ms(session.close)))
        if query.get("include_otc") != "true":
            bars = [bar for bar in bars if "otc" not in bar]
        return _body(bars, adjusted=_adjusted(query))

    def _known(self, day: date) -> pa.Table:
        """The day's bars that have ended by now."""
        bars = self._history(day)
        return _between(bars, 0, self._clock() - _MINUTE_MS + 1) if self._clock else bars


def _between(bars: pa.Table, first_ms: int, end_ms: int) -> pa.Table:
    first, end = np.searchsorted(bars["start_ms"].to_numpy(), (first_ms, end_ms)).tolist()
    return bars.slice(first, end - first)


def _daily(bars: pa.Table, day: date, at_ms: int) -> pa.Table:
    """One row a ticker of the day's regular hours, with at_ms as its start_ms."""
    session = calendar.session(day)
    assert session
    regular = _between(bars, _unix_ms(session.open), _unix_ms(session.close))
    regular = regular.append_column("vwap_sum", pc.multiply(regular["vwap"], regular["volume"])).drop_columns("vwap")
    parts = {"open": "first", "high": "max", "low": "min", "close": "last"}
    parts |= dict.fromkeys(("volume", "transactions", "vwap_sum"), "sum")
    # In one thread, because first and last are those of the table's order.
    made = regular.group_by("ticker", use_threads=False).aggregate(list(parts.items()))
    made = made.rename_columns({f"{name}_{how}": name for name, how in parts.items()})
    vwap = pc.round(pc.divide(made["vwap_sum"], made["volume"]), 4)
    return made.append_column("vwap", vwap).append_column("start_ms", pa.repeat(at_ms, made.num_rows))


def _spelt(bars: pa.Table) -> list[JsonObject]:
    """The bars in the vendor's words, each with its ticker as `T`."""
    rows = bars.select(["ticker", *_FIELDS]).rename_columns(["T", *_FIELDS.values()]).to_pylist()
    return [row | {"otc": True} if is_otc(row["T"]) else row for row in rows]


def _body(bars: list[JsonObject], *, adjusted: bool) -> JsonObject:
    results = {"results": bars} if bars else {}
    counts = {"queryCount": len(bars), "resultsCount": len(bars), "adjusted": adjusted}
    return {**counts, **results, "status": "OK", "request_id": uuid4().hex, "count": len(bars)}


def _adjusted(query: dict[str, str]) -> bool:
    adjusted = query.get("adjusted", "true")
    if adjusted not in ("true", "false"):
        raise _Refusal(400, "The parameter 'adjusted' must be true or false")
    return adjusted == "true"


def _bounds_ms(text: str, name: str) -> tuple[int, int]:
    """The first and last millisecond that a date, or a time in Unix ms, stands for."""
    earliest, latest = (calendar.day_bounds_ms(day)[0] for day in _TIMES)
    with suppress(ValueError):
        if text.isdecimal() and earliest <= int(text) < latest:
            return int(text), int(text)
        day = date.fromisoformat(text)
        if _TIMES[0] <= day < _TIMES[1]:
            first, after = calendar.day_bounds_ms(day)
            return first, after - 1
    raise _Refusal(400, f"Could not parse the time parameter: '{name}'. Use YYYY-MM-DD or Unix MS Timestamps")


# The market's hours


def _status(now: datetime) -> JsonObject:
    session = calendar.session(now.astimezone(calendar.NEW_YORK).date())
    early = bool(session and session.pre_open <= now < session.open)
    late = bool(session and session.close <= now < session.post_close)
    regular = bool(session and session.open <= now < session.close)
    market = "open" if regular else "extended-hours" if early or late else "closed"
    return {
        "market": market,
        "earlyHours": early,
        "afterHours": late,
        "serverTime": now.astimezone(calendar.NEW_YORK).isoformat(timespec="seconds"),
        "exchanges": dict.fromkeys(("nyse", "nasdaq", "otc"), market),
        "currencies": {"fx": "open", "crypto": "open"},
    }


def _closures_to_come(today: date) -> list[JsonObject]:
    """Holidays and early closes; the vendor lists each once an exchange, by its name, which is not known here."""
    closures = [{"date": day.isoformat(), "status": "closed"} for day in calendar.closed_weekdays() if day >= today]
    for day in calendar.trading_days(today, _TIMES[1]):
        session = calendar.session(day)
        if session and session.is_early_close:
            hours = {"open": _iso_ms(session.open), "close": _iso_ms(session.close)}
            closures.append({"date": day.isoformat(), "status": "early-close", **hours})
    closures.sort(key=lambda closure: closure["date"])
    return [{"exchange": name, "name": "Holiday", **closure} for closure in closures for name in ("NYSE", "NASDAQ")]


def _iso_ms(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _unix_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


# HTTP


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    respond: Callable[[str, str], _Answer | None]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go away whenever it likes
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, and the second must not wait for an answer
    server: _Server

    def do_GET(self) -> None:
        answer = self.server.respond(self.path, self.headers.get("Authorization", ""))
        if answer is None:
            self.close_connection = True
            return
        body = b"" if answer.body is None else msgspec.json.encode(answer.body)
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if answer.cut else body)
        self.close_connection |= answer.cut

    def log_message(self, format: str, *arguments: Any) -> None:
        pass  # requests are kept, and a key in a URL must get into no log
