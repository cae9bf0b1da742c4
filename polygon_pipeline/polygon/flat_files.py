"""The vendor's flat files: every ticker's minute bars, or day bars, of a day, as one compressed CSV in an S3 bucket.

Belongs here: which file is a day's, when it is there, and fetching it once. Does not belong here: the bucket's
credentials (the store is opened with them), and what is in the file.

A published file may be replaced later: its ETag shows it, and an unchanged file is not fetched again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import obstore
from obstore.exceptions import BaseError, NotFoundError, NotModifiedError, PermissionDeniedError, UnauthenticatedError

from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished

if TYPE_CHECKING:
    from obstore.store import ObjectStore

BUCKET = "flatfiles"


class FlatFileKind(StrEnum):
    """What bars a file has; both kinds have the same columns. The value is its folder."""

    MINUTES = "minute_aggs_v1"
    DAYS = "day_aggs_v1"


# The CSV's columns, in this order, as DuckDB types them; all but the start are spelled as ours are.
FLAT_FILE_COLUMNS = {
    "ticker": "VARCHAR",
    "volume": "DOUBLE",
    "open": "DOUBLE",
    "close": "DOUBLE",
    "high": "DOUBLE",
    "low": "DOUBLE",
    "window_start": "BIGINT",  # Unix ns
    "transactions": "BIGINT",
}

# A file that is late is asked for again this often, and after so long it will not come.
_LATE_RETRY = timedelta(hours=1)
_GIVEN_UP_AFTER = timedelta(days=7)
_NOT_FOUND = (NotFoundError, FileNotFoundError)  # obstore raises Python's own for a missing object
_FORBIDDEN = (PermissionDeniedError, UnauthenticatedError)


class FlatFile(NamedTuple):
    """A fetched file's identity. last_modified is aware."""

    etag: str | None
    last_modified: datetime


def flat_file_key(day: date, kind: FlatFileKind = FlatFileKind.MINUTES) -> str:
    """Where the bars of a trading day are in the bucket."""
    return f"us_stocks_sip/{kind}/{day:%Y/%m}/{day}.csv.gz"


def published_files(
    store: ObjectStore, days: Collection[date], kind: FlatFileKind = FlatFileKind.MINUTES
) -> dict[date, FlatFile]:
    """Which of these days' files are there now, by one listing a month, nothing fetched. Raises HistoryRefused where
    these credentials may not list, and HistoryUnavailable where the store failed."""
    wanted = {flat_file_key(day, kind): day for day in days}
    found: dict[date, FlatFile] = {}
    for folder in sorted({key.rpartition("/")[0] for key in wanted}):
        try:
            for meta in (meta for page in obstore.list(store, folder) for meta in page):
                if day := wanted.get(meta["path"]):
                    found[day] = FlatFile(meta["e_tag"], meta["last_modified"])
        except BaseError as error:
            raise _unlisted(folder, error) from error
    return found


def expected_at(day: date) -> datetime:
    """By when the file of a trading day is published: 11:00 New York time on the next calendar day (aware, UTC)."""
    return datetime.combine(day + timedelta(days=1), time(11), NEW_YORK).astimezone(UTC)


def fetch_flat_file(
    store: ObjectStore,
    day: date,
    target: Path,
    *,
    known_etag: str | None,
    now: datetime,
    kind: FlatFileKind = FlatFileKind.MINUTES,
) -> FlatFile | None:
    """Writes the file of a day to target, whole or not at all. None: it is still the one with known_etag.

    store: the bucket. Raises NotYetPublished for a file that may still come, HistoryRefused for one that will not or
    that these credentials may not have, and HistoryUnavailable where the store failed.
    """
    key = flat_file_key(day, kind)
    part = target.with_name(f"{target.name}.part")
    try:
        with _told(store, day, now, key):
            found = obstore.get(store, key, options={"if_none_match": known_etag} if known_etag else None)
            if known_etag and found.meta["e_tag"] == known_etag:  # not every server heeds the condition
                return None
            with part.open("wb") as file:
                for chunk in found:
                    file.write(chunk)
            os.replace(part, target)
            return FlatFile(found.meta["e_tag"], found.meta["last_modified"])
    except NotModifiedError:
        return None
    finally:
        part.unlink(missing_ok=True)


def look_at_flat_file(store: ObjectStore, day: date, now: datetime) -> int:
    """Asks for a day's file without fetching more than its first byte; returns its size. Raises as fetch_flat_file."""
    key = flat_file_key(day)
    with _told(store, day, now, key):
        found = obstore.get(store, key, options={"range": (0, 1)})
        found.bytes()
        return found.meta["size"]


@contextmanager
def _told(store: ObjectStore, day: date, now: datetime, key: str) -> Iterator[None]:
    """The store's errors about a day's file, as what they mean."""
    try:
        yield
    except NotModifiedError:
        raise
    except _NOT_FOUND as error:
        raise _absent(day, now, key) from error
    except _FORBIDDEN as error:
        raise _forbidden(store, day, now, key) from error
    except BaseError as error:
        raise _unavailable(key, error) from error


def _absent(day: date, now: datetime, key: str) -> Exception:
    expected = expected_at(day)
    if now > expected + _GIVEN_UP_AFTER:
        return HistoryRefused(f"The vendor has no flat file {key}: {day} was no trading day, or it is lost.")
    by = f"{expected.astimezone(NEW_YORK):%Y-%m-%d %H:%M} New York time"
    return NotYetPublished(
        f"The flat file {key} is not published yet; it is expected by {by}.",
        expected if now < expected else now + _LATE_RETRY,
    )


def _forbidden(store: ObjectStore, day: date, now: datetime, key: str) -> Exception:
    """What a 403 means: some buckets answer it for a missing object too, but they say what they list."""
    try:
        listed = any(meta["path"] == key for page in obstore.list(store, key.rpartition("/")[0]) for meta in page)
    except BaseError as error:
        unlisted = _unlisted(key, error)
        return _absent(day, now, key) if now < expected_at(day) and isinstance(unlisted, HistoryRefused) else unlisted
    if not listed:
        return _absent(day, now, key)
    return HistoryRefused(
        f"The plan does not include the flat file {key}, which is there. Plans differ in how far back they reach: ask "
        "for days that yours covers, or upgrade it."
    )


def _unlisted(key: str, error: BaseError) -> Exception:
    """Why what is below a key cannot be listed."""
    if "403 Forbidden" not in str(error):  # obstore has no class of its own for a forbidden list
        return _unavailable(key, error)
    return HistoryRefused(
        "The flat files refuse these credentials. Check POLYGON_FLAT_FILES_KEY_ID and POLYGON_FLAT_FILES_SECRET, "
        f"and that the plan includes flat files. (Asked for {key}.)"
    )


def _unavailable(key: str, error: BaseError) -> HistoryUnavailable:
    text = str(error).strip()
    refused = ": the certificate is refused (AWS_CA_BUNDLE names more to trust)" if "InvalidCertificate" in text else ""
    return HistoryUnavailable(f"The flat file {key} could not be fetched: {text.splitlines()[0][:300]}{refused}")
