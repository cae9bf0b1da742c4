"""The vendor's REST API, served over HTTP: a market's final bars and what is listed of it, with faults on request.

Belongs here: the routes, their errors and limits, and the faults of this API. Does not belong here: making bars
(synthetic) and lists (corporate_actions), flat files, and any code that reads the API: if server and client shared
code, a misunderstanding of the API would go unnoticed.
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
from datetime import date, datetime
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
from polygon_pipeline.simulator.corporate_actions import Listings
from polygon_pipeline.simulator.daily import DailyChanges, daily_bars
from polygon_pipeline.simulator.tickers import is_otc

JsonObject = dict[str, Any]

History = Callable[[date], pa.Table]
"""Returns a trading day's minute bars in the format of SyntheticMarket.day_bars, sorted by start_ms, then ticker."""

Changes = Mapping[tuple[str, int], Mapping[str, float] | None]
"""By ticker and start (Unix ms): the columns to change and their new values, or None to remove the bar."""

_MINUTE_MS = 60_000
_MAX_LIMIT = 50_000
_FIRST_DATE, _END_DATE = date(1970, 1, 2), date(2100, 1, 1)  # requests must be for dates in this range
_ANOTHER_HOST = "https://elsewhere.invalid"
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


class RestFaultType(StrEnum):
    """What can go wrong with a response."""

    TOO_MANY_REQUESTS = "too_many_requests"  # 429 with an empty body; also counts requests over the rate limit
    SERVER_ERROR = "server_error"  # 500
    UNAVAILABLE = "unavailable"  # 503
    NOT_AUTHORIZED = "not_authorized"  # 403: the plan does not include this data
    SLOW = "slow"  # the response is delayed
    CUT_BODY = "cut_body"  # the connection ends in the middle of the body
    # These apply only to responses with bars.
    REPEATED_NEXT_URL = "repeated_next_url"  # next_url leads to the same page
    NEXT_URL_OF_ANOTHER_HOST = "foreign_next_url"  # next_url leads to another host
    EMPTY_PAGE = "empty_page"  # no results, and a next_url that leads to the results missing here


_ERROR_RESPONSES = {
    RestFaultType.TOO_MANY_REQUESTS: (429, ""),
    RestFaultType.SERVER_ERROR: (500, "internal error"),
    RestFaultType.UNAVAILABLE: (503, "the service is unavailable"),
    RestFaultType.NOT_AUTHORIZED: (403, "You are not entitled to this data. Please upgrade your plan."),
}


@dataclass(frozen=True)
class RestFault:
    """One type of fault and the requests it applies to: those whose path, including the query, contains `path`.

    after: the first this many of those requests are left alone. times: the fault applies to this many requests after
    them; None means to all. rate: the probability (0 to 1) for each of these. seconds: the delay of a SLOW response.
    """

    kind: RestFaultType
    path: str = "/v2/aggs/"
    after: int = 0
    times: int | None = 1
    rate: float = 1.0
    seconds: float = 1.0


class Request(NamedTuple):
    """One received request. at: time.monotonic(). path: with the query, but without any API key."""

    at: float
    path: str


class _Response(NamedTuple):
    status: int
    body: Any  # JSON; None means an empty body
    truncated: bool = False


class _HttpError(Exception):
    """Ends the handling of a request; the client receives `response`."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.response = _Response(status, None)
        if status == 403:
            self.response = _Response(403, {"status": "NOT_AUTHORIZED", "request_id": uuid4().hex, "message": error})
        elif error:
            self.response = _Response(status, {"status": "ERROR", "request_id": uuid4().hex, "error": error})


def corrected(history: History, changes: Changes) -> History:
    """The same history with some bars changed, removed or added, as when the vendor corrects a day later.

    changes is read again on every call, so it may be filled later. The returned history raises ValueError for a column
    that bars do not have, and for an added bar with a missing column.
    """

    def day_bars(day: date) -> pa.Table:
        bars = history(day)
        of_the_day = {key: change for key, change in list(changes.items()) if calendar.trade_date(key[1]) == day}
        if not of_the_day:
            return bars
        keys = pa.Table.from_pylist([{"ticker": ticker, "start_ms": start_ms} for ticker, start_ms in of_the_day])
        originals = bars.join(keys, keys.column_names, join_type="left semi").to_pylist()
        rows = {(row["ticker"], row["start_ms"]): row for row in originals}
        changed = []
        for key, change in of_the_day.items():
            if change is not None:
                changed.append({"ticker": key[0], "start_ms": key[1], **rows.get(key, {}), **change})
                if changed[-1].keys() != set(bars.column_names):
                    raise ValueError(f"the changed bar {changed[-1]} must have exactly the columns {bars.column_names}")
        unchanged = bars.join(keys, keys.column_names, join_type="left anti")
        corrected_bars = pa.concat_tables([unchanged, pa.Table.from_pylist(changed, unchanged.schema)])
        return corrected_bars.sort_by([("start_ms", "ascending"), ("ticker", "ascending")])

    return day_bars


class HistoryServer:
    """Serves a market's historical bars; a context manager that starts and stops the server.

    history: the source of the bars, called again for every page. key: the only API key to accept; None accepts any key
    except an empty one. It must be sent as `Authorization: Bearer`: the vendor also accepts it in the query, but our
    client must never put it into a URL, so here that fails. host: whose address it serves on, this machine's loopback
    or that of a test's own network. port: 0 picks a free one. clock: the current time in Unix ms; only bars that have
    ended by then are served. None serves all bars. requests_per_minute: None means no limit. minute_seconds: the length
    of the rate limit's minute; tests make it shorter. faults: the faults to inject; the first that is due is applied to
    a request. seed: for faults with a rate. listings: splits, dividends and tickers; None does not serve them.
    daily_changes: in what the vendor's days differ from what their minutes give.

    An error in the server itself is answered with status 500, and is raised by stop().
    """

    def __init__(
        self,
        history: History,
        *,
        key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], int] | None = None,
        requests_per_minute: int | None = None,
        minute_seconds: float = 60.0,
        faults: Iterable[RestFault] = (),
        seed: int = 0,
        listings: Listings | None = None,
        daily_changes: DailyChanges | None = None,
    ) -> None:
        self._history = history
        self._listings = listings
        self._daily_changes = daily_changes
        self._key = key
        self._host = host
        self.port = port
        self._clock = clock
        self._limit = requests_per_minute
        self._minute_seconds = minute_seconds
        self._plan = list(faults)
        self._random = random.Random(seed)

        self.requests: list[Request] = []
        """Every request so far, also those answered with an error, in the order received."""
        self.happened: Counter[RestFaultType] = Counter()
        """How often each type of fault has happened so far."""
        self._matched: Counter[int] = Counter()  # how many requests matched so far, by the fault's index in the plan
        self._admitted: deque[float] = deque()  # the times of the last minute's requests within the rate limit
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._error: Exception | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    def __enter__(self) -> Self:
        self._server = _Server((self._host, self.port), _Handler)
        self._server.respond = self._respond
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="simulated-history", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; open connections receive no more responses. Raises the server's own error, if any."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        if self._error:
            error, self._error = self._error, None
            raise error

    # One request

    def _respond(self, target: str, authorization: str) -> _Response | None:
        """The response to a GET; None if the server is stopping."""
        parts = urlsplit(target)
        query = {name: value for name, value in parse_qsl(parts.query) if name.lower() != "apikey"}
        path = parts.path + (f"?{urlencode(query)}" if query else "")
        try:
            with self._lock:
                self.requests.append(Request(time.monotonic(), path))
                self._authenticate(authorization)
                too_many = RestFault(RestFaultType.TOO_MANY_REQUESTS)
                fault = self._fault_due(path) if self._within_rate_limit() else too_many
                if fault:
                    self.happened[fault.kind] += 1
            if fault and fault.kind in _ERROR_RESPONSES:
                raise _HttpError(*_ERROR_RESPONSES[fault.kind])
            response = _Response(200, self._route(parts.path, query))
            if fault:
                response = self._apply_fault(response, fault, path)
        except _HttpError as error:
            response = error.response
        except Exception as error:  # noqa: BLE001 - stop() raises it, in the thread that can act on it
            self._error = error
            response = _HttpError(500, "internal error").response
        return None if self._stopping.is_set() else response

    def _authenticate(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        if scheme != "Bearer" or not key:
            raise _HttpError(401, "API Key was not provided")
        if self._key not in (None, key):
            raise _HttpError(401, "Unknown API Key")

    def _within_rate_limit(self) -> bool:
        """Whether the rate limit allows one more request; requests that it refuses do not count towards the limit."""
        now = time.monotonic()
        while self._admitted and self._admitted[0] <= now - self._minute_seconds:
            self._admitted.popleft()
        if self._limit is not None and len(self._admitted) >= self._limit:
            return False
        self._admitted.append(now)
        return True

    def _fault_due(self, path: str) -> RestFault | None:
        """The first fault of the plan that applies to this request."""
        for index, fault in enumerate(self._plan):
            if fault.path in path:
                self._matched[index] += 1
                count = self._matched[index] - fault.after
                if count > 0 and (fault.times is None or count <= fault.times) and self._random.random() < fault.rate:
                    return fault
        return None

    def _apply_fault(self, response: _Response, fault: RestFault, path: str) -> _Response:
        match fault.kind:
            case RestFaultType.SLOW:
                self._stopping.wait(fault.seconds)
            case RestFaultType.CUT_BODY:
                return response._replace(truncated=True)
            case RestFaultType.REPEATED_NEXT_URL:
                response.body["next_url"] = self.url + path
            case RestFaultType.NEXT_URL_OF_ANOTHER_HOST:
                response.body["next_url"] = _ANOTHER_HOST + path
            case RestFaultType.EMPTY_PAGE:
                # The same page with a different URL, because a client may refuse a page that leads to itself.
                same_page = f"{self.url}{path}{'&' if '?' in path else '?'}again={uuid4().hex}"
                response.body.pop("results", None)
                response.body.update(queryCount=0, resultsCount=0, count=0, next_url=same_page)
        return response

    def _route(self, path: str, query: dict[str, str]) -> Any:
        match [unquote(part) for part in path.split("/")[1:]]:
            case ["v2", "aggs", "ticker", ticker, "range", "1", "minute", first, last]:
                return self._range(ticker, first, last, query)
            case ["v2", "aggs", "ticker", _, "range", multiplier, timespan, _, _]:
                raise _HttpError(400, f"this simulation serves 1/minute only, not {multiplier}/{timespan}")
            case ["v2", "aggs", "grouped", "locale", "us", "market", "stocks", day]:
                return self._grouped(day, query)
            case ["stocks", "v1", "splits" | "dividends"] | ["v3", "reference", "tickers"] if self._listings:
                return self._list(path, query, self._listings)
            case ["vX", "reference", "tickers", ticker, "events"] if self._listings:
                if events := self._listings.events(ticker):
                    return {"results": events, "status": "OK", "request_id": uuid4().hex}
                raise _HttpError(404, "Not found.")
        raise _HttpError(404, "page not found")

    # Lists

    def _list(self, path: str, query: dict[str, str], listings: Listings) -> JsonObject:
        query = _resumed(query)
        match path:
            case "/stocks/v1/splits":
                rows, day, most = listings.splits(), "execution_date", 5000
            case "/stocks/v1/dividends":
                rows, day, most = listings.dividends(), "ex_dividend_date", 5000
            case _:
                rows, day, most = _on_a_date(listings, query), "", 1000
        limit = query.get("limit", "100")
        if not limit.isdecimal() or not 1 <= int(limit) <= most:
            raise _HttpError(400, f"The parameter 'limit' must be from 1 to {most}")
        rows = [
            row for row in rows if all(_is_asked_for(str(row[name]), name, query) for name in ("ticker", day) if name)
        ]
        if query.get("sort", "").endswith(".desc"):
            rows.reverse()
        first, last = int(query.get("offset", "0")), int(query.get("offset", "0")) + int(limit)
        body: JsonObject = {"results": rows[first:last], "status": "OK", "request_id": uuid4().hex}
        if last < len(rows):
            cursor = base64.urlsafe_b64encode(urlencode(query | {"offset": last}).encode()).decode().rstrip("=")
            body["next_url"] = f"{self.url}{path}?cursor={cursor}"
        return body

    # Bars

    def _range(self, ticker: str, first: str, last: str, query: dict[str, str]) -> JsonObject:
        query = _resumed(query)
        first_ms, last_ms = _parse_time(first, "from")[0], _parse_time(last, "to")[1]
        if last_ms < first_ms:
            raise _HttpError(400, "The parameter 'to' cannot be a time that occurs before 'from'")
        adjusted, limit, sort = _parse_adjusted(query), query.get("limit", "5000"), query.get("sort", "asc")
        if sort not in ("asc", "desc"):
            raise _HttpError(400, "The parameter 'sort' must be asc or desc")
        if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_LIMIT:
            raise _HttpError(400, f"The parameter 'limit' must be from 1 to {_MAX_LIMIT}")

        bars = self._bars(ticker, first_ms, last_ms, descending=sort == "desc")
        body: JsonObject = {"ticker": ticker} | _response_body(list(islice(bars, int(limit))), adjusted=adjusted)
        if next_bar := next(bars, None):
            remaining = f"{next_bar['t']}/{last_ms}" if sort == "asc" else f"{first_ms}/{next_bar['t']}"
            settings = urlencode({"adjusted": str(adjusted).lower(), "limit": limit, "sort": sort})
            cursor = base64.urlsafe_b64encode(settings.encode()).decode().rstrip("=")
            path = f"/v2/aggs/ticker/{quote(ticker, safe='')}/range/1/minute/{remaining}"
            body["next_url"] = f"{self.url}{path}?cursor={cursor}"
        return body

    def _bars(self, ticker: str, first_ms: int, last_ms: int, *, descending: bool) -> Iterator[JsonObject]:
        last_known_ms = min(last_ms, self._clock()) if self._clock else last_ms
        days = calendar.trading_days(calendar.trade_date(first_ms), calendar.trade_date(last_known_ms))
        for day in reversed(days) if descending else days:
            table = self._ended_bars(day)
            bars = _as_vendor_json(table.filter(pc.equal(table["ticker"], ticker)))
            for bar in reversed(bars) if descending else bars:
                if first_ms <= bar["t"] <= last_ms:
                    del bar["T"]
                    yield bar

    def _grouped(self, day: str, query: dict[str, str]) -> JsonObject:
        session = calendar.session(datetime.fromtimestamp(_parse_time(day, "date")[0] / 1000, calendar.NEW_YORK).date())
        bars = _as_vendor_json(self._daily(session)) if session else []
        if query.get("include_otc") != "true":
            bars = [bar for bar in bars if "otc" not in bar]
        return _response_body(bars, adjusted=_parse_adjusted(query))

    def _daily(self, session: calendar.Session) -> pa.Table:
        return daily_bars(self._ended_bars(session.date), session, self._daily_changes)

    def _ended_bars(self, day: date) -> pa.Table:
        """The day's bars that have ended by now."""
        bars = self._history(day)
        return _in_time_range(bars, 0, self._clock() - _MINUTE_MS + 1) if self._clock else bars


def _resumed(query: dict[str, str]) -> dict[str, str]:
    """What a cursor stands for; a query without one is as it is."""
    if "cursor" not in query:
        return query
    try:
        return dict(parse_qsl(base64.urlsafe_b64decode(query["cursor"] + "==").decode()))
    except ValueError:
        raise _HttpError(400, "The parameter 'cursor' is invalid") from None


def _on_a_date(listings: Listings, query: dict[str, str]) -> list[JsonObject]:
    try:
        as_of = date.fromisoformat(query["date"]) if "date" in query else date.max
    except ValueError:
        raise _HttpError(400, "The parameter 'date' must be YYYY-MM-DD") from None
    rows = listings.tickers(as_of, active=query.get("active", "true") == "true")
    return [row for row in rows if query.get("market", row["market"]) == row["market"]]


def _is_asked_for(value: str, name: str, query: dict[str, str]) -> bool:
    """Whether a field's value passes the filters of its name."""
    return (
        query.get(name, value) == value
        and value in query.get(f"{name}.any_of", value).split(",")
        and query.get(f"{name}.gte", value) <= value <= query.get(f"{name}.lte", value)
        and not (f"{name}.gt" in query and value <= query[f"{name}.gt"])
        and not (f"{name}.lt" in query and value >= query[f"{name}.lt"])
    )


def _in_time_range(bars: pa.Table, first_ms: int, end_ms: int) -> pa.Table:
    """The bars that start from first_ms until before end_ms."""
    first, end = np.searchsorted(bars["start_ms"].to_numpy(), (first_ms, end_ms)).tolist()
    return bars.slice(first, end - first)


def _as_vendor_json(bars: pa.Table) -> list[JsonObject]:
    """The bars with the vendor's field names, each with its ticker as `T`."""
    rows = bars.select(["ticker", *_FIELDS]).rename_columns(["T", *_FIELDS.values()]).to_pylist()
    return [row | {"otc": True} if is_otc(row["T"]) else row for row in rows]


def _response_body(bars: list[JsonObject], *, adjusted: bool) -> JsonObject:
    results = {"results": bars} if bars else {}
    counts = {"queryCount": len(bars), "resultsCount": len(bars), "adjusted": adjusted}
    return {**counts, **results, "status": "OK", "request_id": uuid4().hex, "count": len(bars)}


def _parse_adjusted(query: dict[str, str]) -> bool:
    adjusted = query.get("adjusted", "true")
    if adjusted not in ("true", "false"):
        raise _HttpError(400, "The parameter 'adjusted' must be true or false")
    return adjusted == "true"


def _parse_time(text: str, name: str) -> tuple[int, int]:
    """The first and last Unix ms of a date in New York; a time in Unix ms stands for itself."""
    first_ms, end_ms = (calendar.new_york_day_ms(day)[0] for day in (_FIRST_DATE, _END_DATE))
    with suppress(ValueError):
        if text.isdecimal() and first_ms <= int(text) < end_ms:
            return int(text), int(text)
        day = date.fromisoformat(text)
        if _FIRST_DATE <= day < _END_DATE:
            start_ms, next_start_ms = calendar.new_york_day_ms(day)
            return start_ms, next_start_ms - 1
    raise _HttpError(400, f"Could not parse the time parameter: '{name}'. Use YYYY-MM-DD or Unix MS Timestamps")


# HTTP


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    respond: Callable[[str, str], _Response | None]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may disconnect at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes, and the second must not be delayed
    server: _Server

    def do_GET(self) -> None:
        response = self.server.respond(self.path, self.headers.get("Authorization", ""))
        if response is None:
            self.close_connection = True
            return
        body = b"" if response.body is None else msgspec.json.encode(response.body)
        self.send_response(response.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if response.truncated else body)
        self.close_connection |= response.truncated

    def log_message(self, format: str, *arguments: Any) -> None:
        pass  # HistoryServer.requests has them all, and an API key in a URL must not be logged
