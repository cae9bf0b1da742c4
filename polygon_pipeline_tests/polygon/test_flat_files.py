"""Which flat file is a day's, when it is there, and fetching it once, from a folder and from a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import S3Store

from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.polygon.errors import HistoryRefused, HistoryUnavailable, NotYetPublished
from polygon_pipeline.polygon.flat_files import FlatFile, expected_at, fetch_flat_file, flat_file_key
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server
from polygon_pipeline_tests.support.s3_server import SeaweedFS

KEY = "us_stocks_sip/minute_aggs_v1/2026/01/2026-01-26.csv.gz"
MONTH = "us_stocks_sip/minute_aggs_v1/2026/01"
PUBLISHED = datetime(2026, 1, 27, 16, tzinfo=UTC)  # 11:00 in New York
# More than one chunk of the download.
CONTENT = b"ticker,volume,open,close,high,low,window_start,transactions\n" * 400_000


def fetch(lake: Lake, target: Path, known_etag: str | None = None) -> FlatFile | None:
    return fetch_flat_file(lake.store, DAY, target, known_etag=known_etag, now=PUBLISHED)


def test_a_days_file_has_the_vendors_key() -> None:
    assert flat_file_key(DAY) == KEY
    assert flat_file_key(date(2003, 9, 10)) == "us_stocks_sip/minute_aggs_v1/2003/09/2003-09-10.csv.gz"


@pytest.mark.parametrize(
    ("day", "utc"),
    [
        (DAY, PUBLISHED),
        (date(2026, 7, 1), datetime(2026, 7, 2, 15, tzinfo=UTC)),
        (date(2026, 3, 6), datetime(2026, 3, 7, 16, tzinfo=UTC)),  # a Friday's comes on Saturday
        (date(2026, 12, 31), datetime(2027, 1, 1, 16, tzinfo=UTC)),
    ],
)
def test_a_days_file_is_expected_by_eleven_in_new_york_the_next_day(day: date, utc: datetime) -> None:
    assert expected_at(day) == utc


@given(st.dates(date(2003, 9, 10), date(2040, 1, 1)))
def test_the_expected_time_is_eleven_in_new_york_in_summer_and_winter(day: date) -> None:
    local = expected_at(day).astimezone(NEW_YORK)
    assert (local.date(), local.hour, local.minute) == (day + timedelta(days=1), 11, 0)


def test_a_file_is_fetched_whole_with_its_identity(lake: Lake, tmp_path: Path) -> None:
    lake.put(KEY, CONTENT)
    found = fetch(lake, tmp_path / "day.csv.gz")
    assert found
    assert found.etag
    assert found.last_modified.tzinfo
    assert (tmp_path / "day.csv.gz").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.glob("day*")] == ["day.csv.gz"]


def test_a_file_that_is_still_the_same_is_not_fetched_again(lake: Lake, tmp_path: Path) -> None:
    lake.put(KEY, b"first")
    found = fetch(lake, tmp_path / "day.csv.gz")
    assert found
    (tmp_path / "day.csv.gz").unlink()
    assert fetch(lake, tmp_path / "day.csv.gz", found.etag) is None
    assert not (tmp_path / "day.csv.gz").exists()


def test_a_replaced_file_is_fetched_again(lake: Lake, tmp_path: Path) -> None:
    lake.put(KEY, b"first")
    first = fetch(lake, tmp_path / "day.csv.gz")
    assert first
    lake.put(KEY, b"replaced")
    second = fetch(lake, tmp_path / "day.csv.gz", first.etag)
    assert second
    assert second.etag != first.etag
    assert (tmp_path / "day.csv.gz").read_bytes() == b"replaced"


# What is not there


@pytest.mark.parametrize(
    ("now", "next_try"),
    [
        (PUBLISHED - timedelta(hours=20), PUBLISHED),
        (PUBLISHED - timedelta(minutes=1), PUBLISHED),
        (PUBLISHED + timedelta(minutes=5), PUBLISHED + timedelta(hours=1, minutes=5)),
    ],
)
def test_a_missing_file_is_retried_when_it_is_due_and_hourly_when_it_is_late(
    lake: Lake, tmp_path: Path, now: datetime, next_try: datetime
) -> None:
    with pytest.raises(NotYetPublished, match="expected by 2026-01-27 11:00 New York time") as error:
        fetch_flat_file(lake.store, DAY, tmp_path / "day.csv.gz", known_etag=None, now=now)
    assert error.value.next_try == next_try
    assert not (tmp_path / "day.csv.gz").exists()


def test_a_file_that_is_missing_for_more_than_a_week_is_refused(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(HistoryRefused, match=KEY):
        fetch_flat_file(lake.store, DAY, tmp_path / "day.csv.gz", known_etag=None, now=PUBLISHED + timedelta(days=8))


# What is forbidden


def test_the_error_for_wrong_keys_names_their_variables(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    right = seaweedfs.lake("")
    right.put(KEY, b"there")
    session = boto3.Session("wrong-id", "wrong-secret", region_name="us-east-1")
    wrong = open_lake(right.uri, lambda: S3Access(session, seaweedfs.endpoint_url))
    with pytest.raises(HistoryRefused, match="POLYGON_FLAT_FILES_KEY_ID and POLYGON_FLAT_FILES_SECRET") as error:
        fetch(wrong, tmp_path / "day.csv.gz")
    assert "wrong-secret" not in str(error.value)


@pytest.fixture
def server() -> Iterator[PlannedServer]:
    with planned_server({f"/flatfiles/{KEY}": [Answer(403)]}) as planned:
        yield planned


def ask(server: PlannedServer, target: Path, now: datetime, known_etag: str | None = None) -> FlatFile | None:
    store = S3Store(
        "flatfiles",
        endpoint=server.url,
        region="us-east-1",
        skip_signature=True,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    return fetch_flat_file(store, DAY, target, known_etag=known_etag, now=now)


def listing(*keys: str) -> Answer:
    rows = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-01-27T16:00:00.000Z</LastModified><Size>1</Size></Contents>"
        for key in keys
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
    return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def test_a_listed_file_that_is_forbidden_is_not_in_the_plan(server: PlannedServer, tmp_path: Path) -> None:
    server.plan["/flatfiles"] = [listing(f"{MONTH}/2026-01-23.csv.gz", KEY)]
    with pytest.raises(HistoryRefused, match="The plan does not include"):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED)


def test_a_forbidden_file_that_is_not_listed_is_not_published_yet(server: PlannedServer, tmp_path: Path) -> None:
    server.plan["/flatfiles"] = [listing(f"{MONTH}/2026-01-23.csv.gz")]
    with pytest.raises(NotYetPublished):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED)


def test_where_listing_is_forbidden_a_file_counts_as_forbidden_from_its_due_time(
    server: PlannedServer, tmp_path: Path
) -> None:
    server.plan["/flatfiles"] = [Answer(403)]
    with pytest.raises(NotYetPublished):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED - timedelta(seconds=1))
    with pytest.raises(HistoryRefused, match="refuse these credentials"):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED)


# What fails


def test_a_failure_to_list_is_distinguished_from_a_refusal(server: PlannedServer, tmp_path: Path) -> None:
    server.plan["/flatfiles"] = [Answer(503)]
    with pytest.raises(HistoryUnavailable, match=KEY):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED)


@pytest.mark.parametrize(
    "fault",
    [Answer(503), Answer(200, b"x" * 1000, {"Last-Modified": "Tue, 27 Jan 2026 16:00:00 GMT"}, dropped=True)],
)
def test_a_failing_store_is_distinguished_from_a_refusal(fault: Answer, server: PlannedServer, tmp_path: Path) -> None:
    server.plan[f"/flatfiles/{KEY}"] = [fault]
    (tmp_path / "day.csv.gz").write_bytes(b"the earlier one")
    with pytest.raises(HistoryUnavailable, match=KEY):
        ask(server, tmp_path / "day.csv.gz", PUBLISHED)
    assert (tmp_path / "day.csv.gz").read_bytes() == b"the earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["day.csv.gz"]


def test_an_unchanged_file_is_not_read_from_a_server_that_ignores_conditions(
    server: PlannedServer, tmp_path: Path
) -> None:
    headers = {"Last-Modified": "Tue, 27 Jan 2026 16:00:00 GMT", "ETag": '"same"'}
    server.plan[f"/flatfiles/{KEY}"] = [Answer(200, b"content", headers)]
    assert ask(server, tmp_path / "day.csv.gz", PUBLISHED, known_etag='"same"') is None
    assert not (tmp_path / "day.csv.gz").exists()
