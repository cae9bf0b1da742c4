"""The vendor's history over REST: minute bars of a ticker, and a day of the whole market.

Belongs here: requests, pages, retries, and what an answer's status means. Does not belong here: how often one may ask
(polygon.rate_limit), or what becomes of the bars.

The key travels in a header, to the configured server only: a page's `next_url` that leads elsewhere is refused. Every
request, retries included, takes a turn of the rate limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import msgspec
import tenacity
import urllib3
from tenacity.wait import wait_base

from polygon_pipeline.market.bars import Price, Shares, ticker_error
from polygon_pipeline.polygon.errors import (
    HistoryRefused,
    HistoryUnavailable,
    NotYetPublished,
    RequestRefused,
    without_key,
)
from polygon_pipeline.polygon.rate_limit import RateLimit

T = TypeVar("T")
B = TypeVar("B", bound="HistoryBar")

# Requests in flight where a plan allows hundreds: an answer takes 100 to 200 ms, so that these make a hundred a second.
CONCURRENCY = 16
# The most an answer can hold.
_PAGE_LIMIT = 50_000
_TIMEOUT = urllib3.Timeout(connect=10, read=30)
# With the waits below, two minutes: longer than a free plan's window, and than most restarts.
_TRIES = 8
_BACKOFF = tenacity.wait_exponential_jitter(initial=1, max=60)
# Ten times an answer with as many bars as there can be.
_LARGEST_ANSWER = 64 * 1024 * 1024
# Where no ticker is served and so many are refused, it is not because of the tickers.
_REFUSALS = 20
# A server that wants longer is asked again by a later run.
_LONGEST_RETRY_AFTER = 300.0
# Of an answer that is quoted: more than is shown, so that the key is found before it is cut.
_SHOWN_BYTES = 4096


# What a column can hold.
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class HistoryBar(
    msgspec.Struct,
    frozen=True,
    gc=False,
    rename={
        "start_ms": "t",
        "open": "o",
        "high": "h",
        "low": "l",
        "close": "c",
        "volume": "v",
        "vwap": "vw",
        "transactions": "n",
    },
):
    """One minute of a ticker. start_ms: the window's start, Unix ms. US dollars, unadjusted; volume in shares."""

    start_ms: _Int64
    open: Price
    high: Price
    low: Price
    close: Price
    volume: Shares
    vwap: Price | None = None
    transactions: _Int64 | None = None


class Page(NamedTuple):
    """A part of a ticker's bars, oldest first; a ticker has at least one page, which may be empty.

    fetched_at: when the answer was asked for (aware, UTC). The vendor's values are at least as new as that, while a
    revision that the stream sends during the request may be newer than the answer. content: a JSON array of HistoryBar,
    checked and as received. is_last: no page follows. refused: why bars were left out of it.
    """

    ticker: str
    fetched_at: datetime
    content: bytes
    is_last: bool
    refused: tuple[str, ...] = ()

    @property
    def bars(self) -> list[HistoryBar]:
        """The bars, decoded at every call."""
        return _sound_bars.all(self.content)


class DailyBar(HistoryBar, frozen=True, gc=False, rename={"ticker": "T", "otc": "otc"}, kw_only=True):
    """A ticker's day. start_ms: the window's END here, unlike a minute's."""

    ticker: str
    otc: bool = False


class DayAnswer(NamedTuple):
    """The whole market's day. fetched_at: as in Page. refused: why bars were left out."""

    fetched_at: datetime
    bars: list[DailyBar]
    refused: tuple[str, ...] = ()


class _Sound(Generic[B]):
    """Takes an answer's bars of one kind apart from those that are none."""

    def __init__(self, kind: type[B]) -> None:
        self.all: Callable[[bytes], list[B]] = msgspec.json.Decoder(list[kind]).decode  # type: ignore[valid-type]
        self._one = msgspec.json.Decoder(kind).decode

    def __call__(self, content: bytes) -> tuple[bytes, list[str]]:
        """The bars that are sound, as JSON, and why each of the others is left out. Raises as msgspec does where it is
        no list, and where none of its bars is sound."""
        try:
            self.all(content)
            return content, []
        except msgspec.ValidationError as error:
            sound: list[bytes] = []
            refused: list[str] = []
            for bar in map(bytes, msgspec.json.decode(content, type=list[msgspec.Raw])):
                try:
                    self._one(bar)
                    sound.append(bar)
                except (ValueError, RecursionError) as reason:
                    refused.append(f"{reason}: {bar[:200].decode(errors='replace')}")
            if not sound:
                raise error
            return b"[" + b",".join(sound) + b"]", refused


_sound_bars = _Sound(HistoryBar)
_sound_days = _Sound(DailyBar)


class _Traded(msgspec.Struct, rename={"ticker": "T"}):
    """The part of a grouped bar that is used."""

    ticker: str


_decode_traded = msgspec.json.Decoder(list[_Traded]).decode


class _Answer(msgspec.Struct):
    """results is absent or null where there are none, next_url on the last page."""

    results: msgspec.Raw = msgspec.Raw(b"[]")
    next_url: str | None = None
    status: str = ""


class _ErrorBody(msgspec.Struct):
    """The vendor's reason for a refusal, under one of two names."""

    message: str = ""
    error: str = ""


class _Passing(Exception):
    """An error that may be gone with the next try. pause: the seconds that the server asks for."""

    def __init__(self, cause: str, pause: float = 0.0) -> None:
        super().__init__(cause)
        self.pause = pause


class RestHistory:
    """The vendor's REST server. Threads may share it.

    url: https, or loopback. Whatever is asked raises HistoryRefused where asking again cannot help, NotYetPublished for
    what is not there, and HistoryUnavailable when the tries are used up.
    """

    def __init__(
        self, url: str, key: str, limit: RateLimit, *, tries: int = _TRIES, backoff: wait_base = _BACKOFF
    ) -> None:
        if not (key.isascii() and key.isprintable()):  # the HTTP library's error would show it
            raise HistoryRefused("POLYGON_API_KEY (or MASSIVE_API_KEY) has characters that no key has.")
        self._url = url.rstrip("/")
        self._key = key
        self._limit = limit
        self._tries = tries
        self._backoff = backoff
        self._pool = connections(
            url,
            maxsize=CONCURRENCY,
            timeout=_TIMEOUT,
            retries=False,  # redirects are not followed either
            headers={
                "Authorization": f"Bearer {key}",
                "Accept-Encoding": "gzip",
                "User-Agent": "polygon_pipeline",
            },
        )

    def minute_bars(self, ticker: str, first: date | int, last: date | int) -> Iterator[Page]:
        """The unadjusted minute bars from first to last, both included: New York dates, or Unix ms.

        Raises ValueError for what cannot be a ticker.
        """
        return self._pages(ticker, first, last, threading.Event())

    def traded_tickers(self, day: date) -> list[str]:
        """The tickers that have a daily bar, sorted, those over the counter too, as the stream of the whole market has
        them; empty where the vendor has none for that day."""
        _, _, rows = self._ask(self._grouped(day), _decode_traded, threading.Event())
        return sorted({row.ticker for row in rows if not ticker_error(row.ticker)})

    def daily_bars(self, day: date) -> DayAnswer:
        """The whole market's unadjusted bars of a day, over the counter too; none where the vendor has none yet."""
        fetched_at, _, (content, refused) = self._ask(self._grouped(day), _sound_days, threading.Event())
        bars: list[DailyBar] = []
        for bar in _sound_days.all(content):
            if error := ticker_error(bar.ticker):
                refused.append(f"{bar.ticker[:20]!r}: {error}")
            else:
                bars.append(bar)
        return DayAnswer(fetched_at, bars, tuple(self._safe(why) for why in refused))

    def _grouped(self, day: date) -> str:
        return f"{self._url}/v2/aggs/grouped/locale/us/market/stocks/{day}?adjusted=false&include_otc=true"

    def fetch_many(
        self,
        tickers: Sequence[str],
        first: date | int,
        last: date | int,
        use: Callable[[Page], object],
        progress: Callable[[int, int, float], object] = lambda done, total, seconds: None,
        is_served: bool = False,
    ) -> dict[str, str]:
        """minute_bars of many tickers, as many at a time as the limit allows. Returns why tickers were refused.

        A ticker that is refused or not there costs no other, unless no ticker is served: then it is not because of the
        tickers. That, and the first error of another kind, ends all and is raised. use: called for every page, one at a
        time and a ticker's in order, on other threads. progress: called on this thread after each ticker with those
        done, all, and the seconds left by estimate. is_served: whether the vendor is known to serve others.
        """
        stop, one_at_a_time, began = threading.Event(), threading.Lock(), time.monotonic()

        def fetch(ticker: str) -> None:
            for page in self._pages(ticker, first, last, stop):
                with one_at_a_time:
                    use(page)

        with ThreadPoolExecutor(min(CONCURRENCY, math.ceil(self._limit.per_second))) as threads:
            refused: dict[str, str] = {}
            asked = {threads.submit(fetch, ticker): ticker for ticker in tickers}
            try:
                for done, ended in enumerate(as_completed(asked), 1):
                    try:
                        ended.result()
                        is_served = True
                    except (RequestRefused, NotYetPublished) as error:
                        refused[asked[ended]] = str(error)
                        if not is_served and len(refused) == min(len(tickers), _REFUSALS):
                            raise
                    elapsed = time.monotonic() - began
                    progress(done, len(tickers), seconds_left(done, len(tickers), elapsed, self._limit.per_second))
            except BaseException:
                stop.set()
                threads.shutdown(cancel_futures=True)
                raise
        return refused

    def _pages(self, ticker: str, first: date | int, last: date | int, stop: threading.Event) -> Iterator[Page]:
        if error := ticker_error(ticker):
            raise ValueError(f"{ticker!r} cannot be asked for: {error}")
        path = f"/v2/aggs/ticker/{quote(ticker, safe='')}/range/1/minute/{first}/{last}"
        query = f"adjusted=false&sort=asc&limit={_PAGE_LIMIT}"
        for fetched_at, bars, refused, is_last in self._answers(f"{path}?{query}", _sound_bars, stop):
            yield Page(ticker, fetched_at, bars, is_last, refused)

    def answers(
        self, path: str, decode: Callable[[bytes], tuple[T, list[str]]]
    ) -> Iterator[tuple[datetime, T, tuple[str, ...]]]:
        """What is at a path and on the pages that follow it: when each was asked for, what it says, and what was left
        out of it and why.

        path: with its query, as the vendor documents it. decode: takes the JSON of the results, an empty list where
        there are none, and gives the last two; what it raises as msgspec does is told as an answer that cannot be read.
        """
        for fetched_at, results, refused, _ in self._answers(path, decode, threading.Event()):
            yield fetched_at, results, refused

    def _answers(
        self, path: str, decode: Callable[[bytes], tuple[T, list[str]]], stop: threading.Event
    ) -> Iterator[tuple[datetime, T, tuple[str, ...], bool]]:
        """As answers(), with whether no page follows."""
        first = f"{self._url}{path}"
        url: str | None = first
        name = first.partition("?")[0]
        asked: set[str] = set()
        while url:
            asked.add(url)
            fetched_at, answer, (results, refused) = self._ask(url, decode, stop)
            url = answer.next_url
            if url and not url.lower().startswith(_origin(self._url)):
                raise HistoryRefused(
                    f"{name} goes on at {self._safe(_origin(url))}, which the API key is not sent to. "
                    "If that is the vendor's, set POLYGON_REST_URL to it."
                )
            if url in asked:
                raise HistoryUnavailable(f"{name} goes on with a page that it gave before, without end.")
            yield fetched_at, results, tuple(map(self._safe, refused)), not url

    def _ask(self, url: str, decode: Callable[[bytes], T], stop: threading.Event) -> tuple[datetime, _Answer, T]:
        """When an answer was asked for, the answer, and its results, decoded."""
        name = url.partition("?")[0]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=tenacity.stop_after_attempt(self._tries),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(stop),  # and then the limit raises Stopped
            reraise=True,
        )
        try:
            asked_at, body = retrying(self._request, url, name, stop)
        except _Passing as error:
            raise HistoryUnavailable(f"{name} failed {self._tries} times, the last time because {error}.") from error
        try:
            answer = msgspec.json.decode(body, type=_Answer)
            if bytes(answer.results) == b"null":
                answer.results = msgspec.Raw(b"[]")
            decoded = decode(bytes(answer.results))
        except (ValueError, RecursionError) as error:
            start = self._safe(body[:_SHOWN_BYTES].decode(errors="replace"), 200)
            raise HistoryUnavailable(
                f"{name} answered with what cannot be read ({error}). It begins: {start}"
            ) from None
        if answer.status == "ERROR":
            raise HistoryUnavailable(f"{name} answered with an error: {self._reason(body)}.")
        return asked_at, answer, decoded

    def _request(self, url: str, name: str, stop: threading.Event) -> tuple[datetime, bytes]:
        with self._limit.turn(stop):
            asked_at = datetime.now(UTC)
            try:
                # Read in pieces, because a small answer may unpack to any size.
                response = self._pool.request("GET", url, preload_content=False)
                body = response.read(_LARGEST_ANSWER + 1)
                if len(body) > _LARGEST_ANSWER:
                    response.close()
                    raise HistoryUnavailable(f"{name} answered with more than {_LARGEST_ANSWER} bytes.")
                response.release_conn()
            except urllib3.exceptions.HTTPError as error:
                raise _Passing(f"of {type(error).__name__}: {self._safe(str(error))}") from None
        if response.status == 200:
            return asked_at, body
        reason = self._reason(body)
        match response.status:
            case 401:
                raise HistoryRefused(
                    f"{name} refused the API key ({reason}). Set POLYGON_API_KEY (or MASSIVE_API_KEY) to a valid one."
                )
            case 403:
                raise RequestRefused(
                    f"{name} is not in the plan ({reason}). Plans differ in how far back they reach and whether today "
                    "is included: ask for days that yours covers, or upgrade it."
                )
            case 404:
                raise NotYetPublished(f"{name} is not there ({reason}): not published yet, or not the vendor's URL.")
            case 408 | 429 | 500 | 502 | 503 | 504 as status:
                raise _Passing(f"it answered {status} ({reason})", _retry_after(response, name))
            case status:
                raise RequestRefused(f"{name} answered {status} ({reason}). Check POLYGON_REST_URL and what was asked.")

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_for = error.pause if isinstance(error, _Passing) else 0.0
        return max(asked_for, self._backoff(state))

    def _reason(self, body: bytes) -> str:
        """What the vendor says of a refusal; 429 says nothing at all."""
        reason = body[:_SHOWN_BYTES].decode(errors="replace")
        with suppress(ValueError, RecursionError):
            error_body = msgspec.json.decode(body, type=_ErrorBody)
            reason = error_body.message or error_body.error or reason
        return self._safe(reason, 300) or "no reason given"

    def _safe(self, text: str, limit: int | None = None) -> str:
        return without_key(text, self._key, limit)


def connections(url: str, **options: Any) -> urllib3.PoolManager:
    """Connections as the environment wants them: https_proxy for https, unless no_proxy has the host."""
    parts = urlsplit(url)
    proxy = getproxies_environment().get(parts.scheme)
    if parts.scheme != "https" or not proxy or proxy_bypass(parts.hostname or ""):
        return urllib3.PoolManager(**options)
    credentials = unquote(urllib3.util.parse_url(proxy).auth or "")
    headers = urllib3.make_headers(proxy_basic_auth=credentials) if credentials else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)


def seconds_left(done: int, total: int, elapsed: float, per_second: float) -> float:
    """How long the rest takes: at the pace so far (elapsed seconds), but no faster than the limit (per second).

    The first requests of a small limit come at once, so that the pace alone would promise too much.
    """
    rest = total - done
    return max(rest / per_second, rest * elapsed / done if done else 0.0)


def _origin(url: str) -> str:
    """Scheme, host and port, as `https://host/`: what follows the slash can lead nowhere else."""
    return "/".join(url.lower().split("/")[:3]) + "/"


def _retry_after(response: urllib3.BaseHTTPResponse, name: str) -> float:
    """The seconds that the server asks for."""
    header = response.headers.get("Retry-After")
    try:
        seconds = urllib3.Retry().parse_retry_after(header) if header else 0.0
    except urllib3.exceptions.InvalidHeader:
        return 0.0
    if seconds > _LONGEST_RETRY_AFTER:
        raise HistoryUnavailable(f"{name} answered {response.status} and asks to be left alone for {seconds:.0f} s.")
    return seconds
