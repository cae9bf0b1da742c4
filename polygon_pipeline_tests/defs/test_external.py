"""The sensor for other programs' raw data, tick after tick as the daemon does it, on both kinds of lake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import partial

import dagster as dg
import msgspec
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.defs import external
from polygon_pipeline.defs.following import datasets_follow_sensor
from polygon_pipeline.defs.partitions import days_of
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake import external as external_data
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import encode_ledger
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline_tests.support.lakes import put_raw_bars
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.ledgers import account_of, ledger_of
from polygon_pipeline_tests.support.s3_server import SeaweedFS

DAYS = calendar.completed_sessions(datetime(2026, 2, 1, tzinfo=UTC), 6)


class Ticks:
    """The sensor's ticks against one instance; only the cursor and what was reported go from one to the next."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None
        self.said = ""

    def next(self) -> list[str]:
        """The days that this tick reports."""
        lake = LakeResource(s3=S3Resource())
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources={"lake": lake}) as context:
            result = external.external_raw_data_sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        self.said = (result.skip_reason and result.skip_reason.skip_message) or ""
        for event in result.asset_events:
            self.instance.report_runless_asset_event(event)
        return [str(event.partition) for event in result.asset_events if isinstance(event, dg.AssetMaterialization)]


@pytest.fixture
def ticks(lake: Lake, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ticks]:
    monkeypatch.setattr(external_data, "QUIET", timedelta(0))
    monkeypatch.setenv("POLYGON_API_KEY", "simulator")
    monkeypatch.setenv("POLYGON_HISTORY_START", "2025-01-01")
    monkeypatch.setenv("LAKE_URI", lake.uri)
    if lake.is_s3:
        server: SeaweedFS = request.getfixturevalue("seaweedfs")
        for name, value in server.address.environment().items():
            monkeypatch.setenv(name, value)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Ticks(instance)


def put_ledger(lake: Lake, day: date, run: str, objects: int) -> None:
    ledger = ledger_of(account_of(objects, day), run=run, feed="simulated", session_date=day)
    lake.put(layout.ledger_key(day, run), encode_ledger(ledger))


def test_a_bucket_too_large_for_one_tick_is_reported_over_several_with_each_day_once(
    ticks: Ticks, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "look", partial(external_data.look, pages=1, page_objects=2))
    for number, day in enumerate(DAYS):
        put_raw_bars(lake, day, minutes=1 + number % 4)
    reported = Counter[str]()
    for _ in range(8):
        days = ticks.next()
        assert len(days) <= 3
        reported.update(days)
    assert reported == Counter(str(day) for day in DAYS)
    put_raw_bars(lake, DAYS[1], "QQQ")
    assert [day for _ in range(12) for day in ticks.next()] == [str(DAYS[1])]


def test_days_accounted_for_by_our_ledgers_are_not_reported_until_there_are_more_objects(
    ticks: Ticks, lake: Lake
) -> None:
    put_raw_bars(lake, DAYS[0], minutes=3)
    put_ledger(lake, DAYS[0], "ONE", 2)
    put_ledger(lake, DAYS[0], "TWO", 1)
    lake.put(layout.ledger_key(DAYS[0], "20260126T090000Z-torn"), b"{")
    assert ticks.next() == []
    put_raw_bars(lake, DAYS[0], "QQQ")
    assert ticks.next() == [str(DAYS[0])]
    assert ticks.next() == []


@pytest.mark.parametrize("lake", ["file"], indirect=True)
def test_reports_of_the_collector_do_not_hide_earlier_reports(ticks: Ticks, lake: Lake) -> None:
    put_raw_bars(lake, DAYS[0])
    assert ticks.next() == [str(DAYS[0])]
    for _ in range(3):
        ticks.instance.report_runless_asset_event(
            dg.AssetMaterialization("raw_bars", partition=str(DAYS[0]), metadata={"objects": 7})
        )
    assert ticks.next() == []


@pytest.mark.parametrize("lake", ["file"], indirect=True)
@pytest.mark.parametrize(("released", "expected"), [(False, []), (True, [str(DAYS[-1])])])
def test_while_a_collector_is_running_it_reports_today_itself(
    ticks: Ticks, lake: Lake, monkeypatch: pytest.MonkeyPatch, released: bool, expected: list[str]
) -> None:
    noon = datetime(*DAYS[-1].timetuple()[:3], 17, tzinfo=UTC)

    class Noon(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return noon

    monkeypatch.setattr(external, "datetime", Noon)
    put_raw_bars(lake, DAYS[-1], minutes=2)
    lake.put(layout.LEASE_KEY, msgspec.json.encode(holding(released=released, now=noon)))
    assert ticks.next() == expected


@pytest.mark.parametrize("lake", ["file"], indirect=True)
def test_a_day_that_is_no_partition_is_left_out_with_a_warning(
    ticks: Ticks, lake: Lake, capfd: pytest.CaptureFixture[str]
) -> None:
    put_raw_bars(lake, date(2026, 1, 24))
    put_raw_bars(lake, date(2126, 1, 24))
    put_raw_bars(lake, DAYS[0])
    assert ticks.next() == [str(DAYS[0])]
    err = capfd.readouterr().err
    assert "2026-01-24 is no trading day" in err
    assert "2126-01-24 is no trading day" in err


@pytest.mark.parametrize("lake", ["s3"], indirect=True)
def test_a_lake_that_cannot_be_read_is_reported_and_the_cursor_is_kept(
    ticks: Ticks, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_raw_bars(lake, DAYS[0])
    ticks.next()
    cursor = ticks.cursor
    monkeypatch.setenv("LAKE_URI", "s3://no-such-bucket/lake")
    assert ticks.next() == []
    assert "cannot be read" in ticks.said
    monkeypatch.delenv("POLYGON_API_KEY")
    assert ticks.next() == []
    assert "POLYGON_API_KEY" in ticks.said
    assert ticks.cursor == cursor


@pytest.mark.parametrize("lake", ["file"], indirect=True)
def test_a_cursor_of_another_version_is_discarded(ticks: Ticks, lake: Lake) -> None:
    put_raw_bars(lake, DAYS[0])
    ticks.cursor = '{"all": 7}'
    assert ticks.next() == [str(DAYS[0])]


@pytest.mark.parametrize("lake", ["file"], indirect=True)
def test_a_report_makes_the_days_datasets_follow(ticks: Ticks, lake: Lake) -> None:
    put_raw_bars(lake, DAYS[0])
    assert ticks.next() == [str(DAYS[0])]
    with dg.build_sensor_context(instance=ticks.instance) as context:
        result = datasets_follow_sensor(context)
    assert isinstance(result, dg.SensorResult)
    assert [days_of(request.tags) for request in result.run_requests or ()] == [[DAYS[0]]]
