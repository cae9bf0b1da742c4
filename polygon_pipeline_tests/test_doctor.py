"""The doctor against the simulator, a real S3 server, and servers and machines on which something is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import msgspec
import pytest

from polygon_pipeline import access, demo, doctor
from polygon_pipeline.doctor import Backfill, Finding, Level, examine
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.simulator.exchange import Exchange
from polygon_pipeline.simulator.flat_files import flat_file_key
from polygon_pipeline.simulator.rest_server import HistoryServer, RestFault, RestFaultType
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.nights import first_night
from polygon_pipeline_tests.support.planned_server import planned_server
from polygon_pipeline_tests.support.s3_server import SeaweedFS, free_ports

KEY = "the-secret-key"
NOW = datetime(2026, 11, 25, 3, 40, tzinfo=UTC)  # Tuesday evening in New York; the 26th is a holiday


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A demo's; other settings are added to it."""
    return {"LAKE_URI": (tmp_path / "lake").as_uri(), "JOURNAL_DIR": str(tmp_path / "journal")}


@pytest.fixture
def live(environment: dict[str, str]) -> dict[str, str]:
    """A live feed's whose servers are not there."""
    port = free_ports(1)[0]
    return environment | {
        "POLYGON_API_KEY": KEY,
        "POLYGON_TICKERS": "SPY,IBM",
        "POLYGON_WEBSOCKET_URL": f"ws://127.0.0.1:{port}/stocks",
        "POLYGON_REST_URL": f"http://127.0.0.1:{port}",
        "POLYGON_REST_REQUESTS_PER_MINUTE": "6000",
    }


@contextmanager
def vendor(*faults: RestFault, key: str = KEY) -> Iterator[dict[str, str]]:
    """The vendor's two servers, and the variables that lead to them."""
    market = SyntheticMarket(["SPY", "IBM"])
    with Exchange([], key=key) as exchange, HistoryServer(market.day_bars, key=key, faults=faults) as rest:
        yield {"POLYGON_WEBSOCKET_URL": exchange.url, "POLYGON_REST_URL": rest.url}


def looked_at(environment: dict[str, str], backfill: Backfill | None = None) -> dict[str, Finding]:
    """The last finding of each kind; none shows the key."""
    found = list(examine(demo.with_defaults(environment), NOW, backfill=backfill))
    assert not [finding for finding in found if KEY in str(finding)]
    return {finding.what: finding for finding in found}


def levels(found: dict[str, Finding]) -> dict[str, Level]:
    return {what: finding.level for what, finding in found.items() if finding.level is not Level.OK}


def test_without_a_key_the_demo_is_looked_at_in_the_same_way(environment: dict[str, str]) -> None:
    found = looked_at(environment)
    assert levels(found) == {}
    assert list(found) == [
        *("versions", "calendar", "key", "disk", "lake", "lake writes", "REST", "entitlement", "history"),
        *("flat files", "stream", "clock"),
    ]
    assert "SIMULATED" in found["key"].text
    assert "960 minute bars" in found["entitlement"].text


def test_a_live_feed_that_works_is_all_ok(live: dict[str, str]) -> None:
    with vendor() as servers:
        found = looked_at(live | servers)
    assert levels(found) == {}
    assert "nothing was subscribed" in found["stream"].text


def test_a_wrong_key_fails_and_names_the_variable(live: dict[str, str]) -> None:
    with vendor(key="another-secret") as servers:
        found = looked_at(live | servers)
    assert levels(found) == {"REST": Level.FAIL, "stream": Level.FAIL}
    assert "POLYGON_API_KEY" in found["REST"].text
    assert "POLYGON_API_KEY" in found["stream"].text


@pytest.mark.parametrize(
    ("after", "what"), [(0, {"entitlement": Level.FAIL}), (1, {"history": Level.WARN})], ids=["recent", "oldest"]
)
def test_days_that_the_plan_does_not_include_are_named(
    after: int, what: dict[str, Level], live: dict[str, str]
) -> None:
    with vendor(RestFault(RestFaultType.NOT_AUTHORIZED, after=after)) as servers:
        found = looked_at(live | servers)
    assert levels(found) == what
    assert "not in the plan" in found[next(iter(what))].text


def test_servers_that_are_not_there_fail(live: dict[str, str]) -> None:
    found = looked_at(live)
    assert levels(found) == {"REST": Level.FAIL, "stream": Level.FAIL, "clock": Level.WARN}
    assert "POLYGON_WEBSOCKET_URL" in found["stream"].advice
    assert "POLYGON_REST_URL" in found["REST"].advice


def test_a_ticker_that_never_traded_is_a_warning(live: dict[str, str]) -> None:
    with vendor() as servers:
        found = looked_at(live | servers | {"POLYGON_TICKERS": "NOSUCH"})
    assert levels(found) == {"entitlement": Level.WARN}
    assert "POLYGON_TICKERS" in found["entitlement"].advice


@pytest.mark.slow
def test_the_stream_is_left_alone_while_a_collector_has_the_lease(live: dict[str, str], file_lake: Lake) -> None:
    """The stream's server is not there: had it been tried, that would have failed."""
    file_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding(now=NOW)))
    found = looked_at(live | {"LAKE_URI": file_lake.uri})
    assert found["stream"].level is Level.OK
    assert "not tried" in found["stream"].text
    file_lake.put(layout.LEASE_KEY, msgspec.json.encode(holding(now=NOW, released=True)))
    assert looked_at(live | {"LAKE_URI": file_lake.uri})["stream"].level is Level.FAIL


def test_without_the_lake_nobody_knows_whether_the_stream_may_be_tried(live: dict[str, str]) -> None:
    found = looked_at(live | {"LAKE_URI": "s3://a-bucket/lake"})
    assert found["lake"].level is Level.FAIL
    assert "No AWS credentials" in found["lake"].text
    assert found["stream"].level is Level.WARN
    assert "not tried" in found["stream"].text


def test_a_lake_of_another_feed_fails(live: dict[str, str], file_lake: Lake) -> None:
    file_lake.claim("simulated")
    assert "never mixed" in looked_at(live | {"LAKE_URI": file_lake.uri})["lake"].text
    assert file_lake.keys("") == [layout.FEED_KEY], "nothing is written where another's data lies"


def test_a_wrong_variable_ends_the_look_with_its_sentence(environment: dict[str, str]) -> None:
    found = looked_at(environment | {"POLYGON_CHANNELS": "T"})
    assert list(found)[-1] == "settings"
    assert levels(found) == {"settings": Level.FAIL}


# A bucket


@pytest.fixture
def s3(seaweedfs: SeaweedFS, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in seaweedfs.address.environment().items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{seaweedfs.new_bucket()}/lake"
    return environment | {"LAKE_URI": uri, "POLYGON_API_KEY": "simulator"}


def test_a_buckets_conditional_writes_are_tried(s3: dict[str, str]) -> None:
    found = looked_at(s3)
    assert levels(found) == {}
    assert "if-match" in found["lake writes"].text
    assert s3["LAKE_URI"] in found["lake"].text


def test_a_bucket_that_refuses_the_credentials_fails(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    found = looked_at(s3)
    assert found["lake"].level is Level.FAIL
    assert "AWS_*" in found["lake"].text
    assert "another-secret" not in str(found)


def test_flat_files_that_can_be_read_and_that_cannot(
    seaweedfs: SeaweedFS, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = seaweedfs.new_bucket()
    monkeypatch.setattr(access, "BUCKET", name)
    given = environment | {
        "POLYGON_FLAT_FILES_URL": seaweedfs.endpoint_url,
        "POLYGON_FLAT_FILES_KEY_ID": seaweedfs.access_key,
        "POLYGON_FLAT_FILES_SECRET": seaweedfs.secret_key,
    }
    assert looked_at(given)["flat files"].level is Level.WARN, "not published yet, or late"
    uri = f"s3://{name}"
    bucket = open_lake(uri, lambda: S3Access(seaweedfs.address.session(), seaweedfs.endpoint_url))
    bucket.put(flat_file_key(date(2026, 11, 23)), b"a file" * 100_000)
    found = looked_at(given)["flat files"]
    assert found.level is Level.OK
    assert "0.6 MB" in found.text
    found = looked_at(given | {"POLYGON_FLAT_FILES_SECRET": "another-secret"})["flat files"]
    assert found.level is Level.FAIL
    assert "POLYGON_FLAT_FILES_SECRET" in found.text


# The machine


class _AnotherTime(BaseHTTPRequestHandler):
    offset_seconds: float | None = 0.0

    def do_GET(self) -> None:
        self.send_response_only(404)
        if self.offset_seconds is not None:
            at = datetime.now(UTC) + timedelta(seconds=self.offset_seconds)
            self.send_header("Date", self.date_time_string(at.timestamp()))
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("offset", "level", "told"),
    [
        (0, Level.OK, "agrees"),
        (10, Level.WARN, "behind"),
        (3600, Level.FAIL, "behind"),
        (-3600, Level.FAIL, "ahead"),
        (None, Level.WARN, "no server"),
    ],
)
def test_the_clock_is_compared_with_the_servers(
    offset: float | None, level: Level, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_AnotherTime, "offset_seconds", offset)
    with ThreadingHTTPServer(("127.0.0.1", 0), _AnotherTime) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        found = doctor._clock([f"http://127.0.0.1:{server.server_port}"])
        server.shutdown()
    assert found.level is level
    assert told in found.text


def test_no_key_is_sent_to_ask_for_the_time() -> None:
    with planned_server() as planned:
        doctor._clock([planned.url])
    assert [{"Authorization", "authorization"} & set(request.headers) for request in planned.asked] == [set()]


@pytest.mark.parametrize(
    ("free", "level", "advice"),
    [(200 * 2**20, Level.FAIL, "256 MiB"), (2**30, Level.WARN, "larger"), (2**42, Level.OK, "")],
)
def test_the_journals_disk_has_room_for_a_week_without_the_lake(
    free: int, level: Level, advice: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = looked_at(environment | {"POLYGON_TICKERS": "*"})["disk"]
    assert found.level is level
    assert advice in found.advice


def test_a_journal_that_cannot_be_written_fails(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    found = looked_at(environment | {"JOURNAL_DIR": str(tmp_path / "a-file" / "journal")})
    assert found["disk"].level is Level.FAIL


def test_a_library_of_a_version_that_is_not_supported_is_named(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1.12.0" if name == "dagster" else version(name))
    found = looked_at(environment)["versions"]
    assert found.level is Level.FAIL
    assert "dagster 1.12.0 is not" in found.text


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (NOW, "the next on Wednesday 2026-11-25"),
        (datetime(2026, 11, 25, 15, tzinfo=UTC), "today 04:00 to 20:00 New York; next holiday 2026-11-26"),
        (datetime(2026, 11, 26, 15, tzinfo=UTC), "no session today, the next on Friday 2026-11-27"),
        (datetime(2026, 11, 27, 15, tzinfo=UTC), "today 04:00 to 17:00 New York"),
    ],
)
def test_the_calendar_says_todays_hours_and_the_next_holiday(now: datetime, told: str) -> None:
    assert told in doctor._calendar(now).text


def test_the_calendar_says_from_when_there_are_nights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no night session (POLYGON_NIGHT_SESSION_FROM is not set)" in doctor._calendar(NOW).text
    first_night(monkeypatch, "2026-12-07")
    text = doctor._calendar(datetime(2026, 12, 7, 3, tzinfo=UTC)).text  # Sunday, 22:00
    assert text.startswith("today Sun 21:00 to 20:00 New York; ")
    assert text.endswith("night session from 2026-12-07")


# What a backfill costs


def _backfill(environment: dict[str, str], first: date, last: date = date.max) -> list[Finding]:
    found = examine(demo.with_defaults(environment), NOW, backfill=Backfill(first, last))
    return [finding for finding in found if finding.what == "backfill"]


def test_a_planned_backfill_is_told_in_requests_bytes_time_and_dollars(s3: dict[str, str]) -> None:
    plan = {"POLYGON_REST_REQUESTS_PER_MINUTE": "5", "POLYGON_TICKERS": "SPY,IBM"}
    work, storage = _backfill(s3 | plan | {"POLYGON_HISTORY_START": "2025-01-02"}, date(2025, 1, 1), date(2025, 3, 1))
    assert work.text.startswith("2025-01-02 to 2025-02-28: 39 days of 2 tickers by REST, 5 requests a minute: about 4 ")
    assert " MB and " in work.text
    assert "$" in storage.text
    assert "November 2026" in storage.text


def test_a_backfill_that_would_be_refused_or_begins_before_the_partitions_fails(environment: dict[str, str]) -> None:
    plan = {"POLYGON_REST_REQUESTS_PER_MINUTE": "5", "POLYGON_TICKERS": "*"}
    *_, refused, early = _backfill(environment | plan, date(2024, 1, 1))
    assert refused.level is early.level is Level.FAIL
    assert "half a day" in refused.text
    assert "POLYGON_HISTORY_START=2024-01-02" in early.advice
    [none] = _backfill(environment, date(2026, 11, 26))
    assert none.level is Level.FAIL
    assert "no complete trading day" in none.text


# The command


def test_the_command_prints_a_line_each_and_fails_where_something_fails(
    live: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in live.items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--without-stream"]) == 1, "REST is not there"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] not in ("OK", "WARN", "FAIL")] == []
    assert any(line.startswith("OK    stream       not tried") for line in lines)
    assert not any(KEY in line for line in lines)
    with vendor() as servers:
        for name, value in servers.items():
            monkeypatch.setenv(name, value)
        assert doctor.main([]) == 0
