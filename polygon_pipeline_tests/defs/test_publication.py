"""The sensor that looks for flat files, with files in a folder and materializations in a real instance."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import dagster as dg
import obstore
import pytest

from polygon_pipeline import access
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import days_of
from polygon_pipeline.defs.publication import publication_sensor
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market import calendar
from polygon_pipeline.polygon.errors import HistoryUnavailable
from polygon_pipeline.polygon.flat_files import FlatFileKind, flat_file_key, published_files
from polygon_pipeline_tests.support.lakes import local_lake

BOTH = ["reference_bars", "reference_daily_bars"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """The vendor's bucket."""
    found = local_lake(tmp_path / "files")
    monkeypatch.setenv("POLYGON_TICKERS", "*")
    monkeypatch.setattr(access, "flat_files", lambda _: found.store)
    return found


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


class Ticks:
    """The sensor's ticks; each is made as if the pause since the last look were over, unless it says otherwise."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None
        self.said = ""

    def next(self, waits: bool = True) -> list[tuple[list[date], list[str]]]:
        """The days and assets of each run that is asked for."""
        cursor = self.cursor
        if cursor and waits:
            cursor = cursor.replace('"looked_at":"2', '"looked_at":"1')  # a thousand years ago
        resources = {"polygon": (build_defs().resources or {})["polygon"]}
        with dg.build_sensor_context(instance=self.instance, cursor=cursor, resources=resources) as context:
            result = publication_sensor(context)
        if isinstance(result, dg.SkipReason):
            self.said = result.skip_message or ""
            return []
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        self.said = (result.skip_reason and result.skip_reason.skip_message) or ""
        return [
            (days_of(request.tags), [key.to_user_string() for key in request.asset_selection or ()])
            for request in result.run_requests or ()
        ]


def publish(files: Lake, day: date, *kinds: FlatFileKind, content: bytes = b"a file") -> None:
    for kind in kinds:
        obstore.put(files.store, flat_file_key(day, kind), content)


def fetched(instance: dg.DagsterInstance, files: Lake, day: date) -> None:
    """What a run of both assets reports of the files that are there."""
    for name, kind in zip(BOTH, FlatFileKind, strict=True):
        etag = published_files(files.store, [day], kind)[day].etag
        event = dg.AssetMaterialization(name, partition=day.isoformat(), metadata={"etag": etag})
        instance.report_runless_asset_event(event)


def test_a_file_is_asked_for_once_as_soon_as_it_is_listed_and_again_when_it_was_replaced(
    instance: dg.DagsterInstance, files: Lake
) -> None:
    ticks = Ticks(instance)
    *_, before, day = calendar.completed_sessions(datetime.now(UTC), 2)
    assert ticks.next() == []
    assert "no new file" in ticks.said
    publish(files, day, FlatFileKind.MINUTES)
    assert ticks.next() == [([day], BOTH[:1])]
    publish(files, day, FlatFileKind.DAYS)
    assert ticks.next() == [([day], BOTH[1:])]
    assert ticks.next() == [], "it is asked for already"
    fetched(instance, files, day)
    publish(files, before, *FlatFileKind)
    assert ticks.next() == [([before], BOTH)]
    fetched(instance, files, before)
    assert ticks.next() == []
    assert "no replaced file was seen yet" in ticks.said
    publish(files, day, FlatFileKind.DAYS, content=b"another file")
    assert ticks.next() == [([day], BOTH[1:])]
    fetched(instance, files, day)
    assert ticks.next() == []
    assert "1 replaced files were seen" in ticks.said


def test_a_file_that_did_not_come_is_asked_for_again_after_a_day_and_is_no_second_replacement(
    instance: dg.DagsterInstance, files: Lake
) -> None:
    ticks = Ticks(instance)
    [day] = calendar.completed_sessions(datetime.now(UTC), 1)
    publish(files, day, *FlatFileKind)
    fetched(instance, files, day)
    publish(files, day, FlatFileKind.DAYS, content=b"another file")
    assert ticks.next() == [([day], BOTH[1:])]
    assert ticks.next() == []
    ticks.cursor = (ticks.cursor or "").replace(',"2', ',"1')  # a thousand years later
    assert ticks.next() == [([day], BOTH[1:])]
    assert ticks.next() == []
    assert "1 replaced files were seen" in ticks.said


def test_files_are_not_listed_before_the_pause_is_over(instance: dg.DagsterInstance, files: Lake) -> None:
    ticks = Ticks(instance)
    [day] = calendar.completed_sessions(datetime.now(UTC), 1)
    ticks.next()
    publish(files, day, *FlatFileKind)
    assert ticks.next(waits=False) == []
    assert "the next look is at" in ticks.said
    assert ticks.next() == [([day], BOTH)]


def test_a_bucket_that_cannot_be_listed_is_told_and_looked_at_again(
    instance: dg.DagsterInstance, files: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise HistoryUnavailable("the bucket is away")

    ticks = Ticks(instance)
    with monkeypatch.context() as broken:
        broken.setattr("polygon_pipeline.defs.publication.published_files", away)
        assert ticks.next() == []
    assert ticks.said == "the bucket is away"
    [day] = calendar.completed_sessions(datetime.now(UTC), 1)
    publish(files, day, *FlatFileKind)
    assert ticks.next() == [([day], BOTH)]


def test_without_flat_files_there_is_nothing_to_look_for(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_TICKERS", "SPY")
    ticks = Ticks(instance)
    assert ticks.next() == []
    assert "no flat files are set" in ticks.said
