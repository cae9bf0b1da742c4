"""The vendor's lists over REST that are not of one day: splits, dividends, tickers, and how a company was renamed.

Belongs here: which requests bring them, and the rows as the vendor spells them. Does not belong here: requests, pages
and refusals (polygon.rest), keeping the rows (datasets.listings), and what follows from them for prices.

A blank field counts as absent. One that cannot be read is left out and told; a row without what makes it one is left
out and told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from typing import Annotated, Any, Generic, TypeVar, get_type_hints
from urllib.parse import quote, urlencode

import msgspec

from polygon_pipeline.market.bars import ticker_error
from polygon_pipeline.polygon.errors import NotYetPublished, RequestRefused
from polygon_pipeline.polygon.rest import RestHistory

# The most that these answers hold.
_EVENTS_LIMIT = 5000
_TICKERS_LIMIT = 1000
# A URL of so many is some 800 characters long.
_TICKERS_PER_REQUEST = 100
# More are found sooner in the whole listing, which takes some 60 requests.
_ASKED_ONE_BY_ONE = 25
_MARKETS = ("stocks", "otc")
# Where none is served and so many are refused, it is not because of the tickers.
_REFUSALS = 20

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]


class Split(msgspec.Struct, frozen=True):
    """split_from old shares become split_to new ones from execution_date on, its pre-market included."""

    ticker: _Name
    execution_date: date
    id: str | None = None
    adjustment_type: str | None = None
    split_from: float | None = None
    split_to: float | None = None
    historical_adjustment_factor: float | None = None


class Dividend(msgspec.Struct, frozen=True):
    """cash_amount a share, in the currency, for whoever held one before ex_dividend_date."""

    ticker: _Name
    ex_dividend_date: date
    id: str | None = None
    cash_amount: float | None = None
    split_adjusted_cash_amount: float | None = None
    currency: str | None = None
    declaration_date: date | None = None
    record_date: date | None = None
    pay_date: date | None = None
    frequency: _Int64 | None = None
    distribution_type: str | None = None
    historical_adjustment_factor: float | None = None


class ListedTicker(msgspec.Struct, frozen=True):
    """A stock as the vendor lists it on a date. Times are aware; those without a zone are UTC."""

    ticker: _Name
    name: str | None = None
    market: str | None = None
    locale: str | None = None
    primary_exchange: str | None = None
    type: str | None = None
    active: bool | None = None
    currency_name: str | None = None
    cik: str | None = None
    composite_figi: str | None = None
    share_class_figi: str | None = None
    delisted_utc: datetime | None = None
    last_updated_utc: datetime | None = None


class TickerEvent(msgspec.Struct, frozen=True):
    """The company that requested_ticker stands for today was called `ticker` from the date on."""

    requested_ticker: str
    ticker: str
    date: date
    type: str
    name: str | None = None
    composite_figi: str | None = None
    cik: str | None = None


class _Renamed(msgspec.Struct):
    ticker: _Name


class _Event(msgspec.Struct):
    date: date
    type: _Name
    ticker_change: _Renamed


class _Entity(msgspec.Struct):
    name: str | None = None
    composite_figi: str | None = None
    cik: str | None = None
    events: list[Any] = []


Row = TypeVar("Row", bound=msgspec.Struct)


@dataclass
class Found(Generic[Row]):
    """What the vendor has of a list. fetched_at: when it was first asked (aware, UTC). refused: what was left out of
    it, and why, for people."""

    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    requests: int = 0
    fetched_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def splits(rest: RestHistory, tickers: Sequence[str] | None, since: date) -> Found[Split]:
    """All splits of the tickers, or, where they are None, of the whole market since a day. Raises as RestHistory."""
    return _all(rest, Split, _queries("/stocks/v1/splits", "execution_date", tickers, since))


def dividends(rest: RestHistory, tickers: Sequence[str] | None, since: date) -> Found[Dividend]:
    """All dividends of the tickers, or, where they are None, of the whole market since a day. Raises as RestHistory."""
    return _all(rest, Dividend, _queries("/stocks/v1/dividends", "ex_dividend_date", tickers, since))


def tickers(rest: RestHistory, wanted: Sequence[str] | None, as_of: date) -> Found[ListedTicker]:
    """The listing as of a date, with what was delisted by then. wanted: None for all. Raises as RestHistory.

    Two requests a ticker, or some 60 for the whole market: a page has a thousand.
    """
    common = {"date": as_of.isoformat(), "limit": _TICKERS_LIMIT, "sort": "ticker"}
    chosen: list[dict[str, str]] = [{"market": market} for market in _MARKETS]
    if wanted is not None and len(wanted) <= _ASKED_ONE_BY_ONE:
        chosen = [{"ticker": ticker} for ticker in wanted]
    found = _all(
        rest,
        ListedTicker,
        (
            f"/v3/reference/tickers?{urlencode({**chosen_by, 'active': active, **common})}"
            for chosen_by in chosen
            for active in ("true", "false")
        ),
    )
    if wanted is not None:
        found.rows = [row for row in found.rows if row.ticker in {*wanted}]
    return found


def ticker_events(rest: RestHistory, wanted: Sequence[str]) -> Found[TickerEvent]:
    """The renames of what these tickers stand for today, a request each. Raises as RestHistory; a ticker that the
    vendor does not know or serve costs no other, unless none is served."""
    found: Found[TickerEvent] = Found()
    served = refusals = 0
    for ticker in wanted:
        if error := ticker_error(ticker):
            raise ValueError(f"{ticker!r} cannot be asked for: {error}")
        found.requests += 1
        try:
            for _, rows, refused in rest.answers(
                f"/vX/reference/tickers/{quote(ticker, safe='')}/events", partial(_decode_events, ticker)
            ):
                found.rows += rows
                found.refused += refused
            served += 1
        except NotYetPublished:
            found.refused.append(f"{ticker}: the vendor has no events of it")
        except RequestRefused as error:
            refusals += 1
            found.refused.append(f"{ticker}: {error}")
            if not served and refusals == min(len(wanted), _REFUSALS):
                raise
    return found


def _queries(path: str, day: str, wanted: Sequence[str] | None, since: date) -> Iterator[str]:
    common = {"limit": _EVENTS_LIMIT, "sort": f"{day}.asc"}
    if wanted is None:
        yield f"{path}?{urlencode({f'{day}.gte': since.isoformat(), **common})}"
        return
    for first in range(0, len(wanted), _TICKERS_PER_REQUEST):
        some = ",".join(wanted[first : first + _TICKERS_PER_REQUEST])
        yield f"{path}?{urlencode({'ticker.any_of': some, **common}, safe=',')}"


def _all(rest: RestHistory, kind: type[Row], paths: Iterable[str]) -> Found[Row]:
    """The rows of these lists without repeats: a page that shifts while it is read may bring a row again."""
    found: Found[Row] = Found()
    distinct: dict[Row, None] = {}
    for path in paths:
        for _, rows, refused in rest.answers(path, partial(_decode_rows, kind)):
            found.requests += 1
            found.refused += refused
            distinct.update(dict.fromkeys(rows))
    found.rows = [*distinct]
    return found


def _decode_rows(kind: type[Row], content: bytes) -> tuple[list[Row], list[str]]:
    return _sound(msgspec.json.decode(content, type=list[Any]), kind)


def _decode_events(requested_ticker: str, content: bytes) -> tuple[list[TickerEvent], list[str]]:
    entity = _Entity() if content == b"[]" else msgspec.json.decode(content, type=_Entity)
    events, refused = _sound(entity.events, _Event)
    rows = [
        TickerEvent(
            requested_ticker=requested_ticker,
            ticker=event.ticker_change.ticker,
            date=event.date,
            type=event.type,
            name=entity.name or None,
            composite_figi=entity.composite_figi or None,
            cik=entity.cik or None,
        )
        for event in events
    ]
    return rows, refused


def _sound(raw: Sequence[Any], kind: type[Row]) -> tuple[list[Row], list[str]]:
    """The rows that are of this kind, and why others, or fields of these, are left out."""
    rows: list[Row] = []
    refused: list[str] = []
    for value in raw:
        given = {name: part for name, part in value.items() if part not in ("", None)} if type(value) is dict else value
        try:
            rows.append(msgspec.convert(given, kind))
        except msgspec.ValidationError as error:
            told = f"{error}: {msgspec.json.encode(value)[:300].decode(errors='replace')}"
            try:
                rows.append(msgspec.convert(_readable(given, kind), kind))
                refused.append(f"a field is left out, {told}")
            except msgspec.ValidationError:
                refused.append(f"a row is left out, {told}")
    return rows, refused


def _readable(given: Any, kind: type[Row]) -> Any:
    """A row without the fields that cannot be read."""
    if type(given) is not dict:
        return given
    types = get_type_hints(kind, include_extras=True)
    return {name: value for name, value in given.items() if name in types and _fits(value, types[name])}


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
