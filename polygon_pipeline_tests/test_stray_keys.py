"""Keys that are not ours, in every prefix: each is left alone and told, and nothing waits for its removal.

Belongs here: one lake with all of them, and everything that reads a prefix run over it. Does not belong here: objects
of ours that cannot be read (datasets.test_inputs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import dagster as dg
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.making import FailedDay, MadeDataset, make_days
from polygon_pipeline.defs import external
from polygon_pipeline.defs.reference import repair_sensor
from polygon_pipeline.defs.resources import LakeResource
from polygon_pipeline.lake import external as external_data
from polygon_pipeline.lake.ledger import reconcile
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.bars import DAY, NOON, plain_bar
from polygon_pipeline_tests.support.journals import finished_journal, frame_of, publish_leftovers, read_ledger
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.s3_server import strict_s3

_BAR = "2026-01-26T17:00:00Z.json"
_PREFIXES = ("raw-data/", "raw-frames/", "ledger/", "quarantine/", "datasets/bars_5m/", "datasets/reference_bars/")
_NAMES = (
    "",  # a folder's marker, as the console makes it
    "FOLDER/",
    "/T.json",
    f"/{_BAR}",  # without a ticker
    f"./{_BAR}",
    f"../{_BAR}",
    "A//B",
    f"SPY/{_BAR}/",
    f"SPY/{_BAR}/copy.json",
    "notes.json",
    "*-000001.jsonl.zst",  # a pattern that our own archive fits
    "deep/run-000001.jsonl.zst",
    "Kopie von 100%2F#?&=+ é`|<b>.txt",
)
# moto and the web take no such names; a file system does.
_NAMES_OF_FILES = (b"line\nbreak", b"\x01", b"\xff\xfe")


class Strays(NamedTuple):
    """A lake that has stray keys. keys: all that it has, as the store spells them."""

    lake: Lake
    resource: LakeResource
    keys: Callable[[], set[str]]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def strays(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Strays]:
    prefixes = [prefix + day for prefix in _PREFIXES for day in ("", "2026-01-26/", "date=2026-01-26/")]
    if request.param == "file":
        yield _on_disk(tmp_path / "lake", prefixes)
        return
    with strict_s3() as url:
        session = boto3.Session("key", "secret", region_name="us-east-1")
        client = session.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="bucket")
        for prefix in prefixes:
            for name in _NAMES:
                client.put_object(Bucket="bucket", Key=f"lake/{prefix}{name}", Body=b"not ours")
        lake = open_lake("s3://bucket/lake", lambda: S3Access(session, url))
        s3 = S3Resource(
            endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
        )

        def keys() -> set[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
            return {found["Key"] for page in pages for found in page["Contents"]}

        yield Strays(lake, LakeResource(s3=s3), keys)


def _on_disk(root: Path, prefixes: list[str]) -> Strays:
    lake = local_lake(root)
    for prefix in prefixes:
        for name in [*map(os.fsencode, _NAMES), *_NAMES_OF_FILES]:
            if not name.endswith(b"/") and b"./" not in name and name and not name.startswith(f"SPY/{_BAR}".encode()):
                path = Path(root, prefix, os.fsdecode(name.lstrip(b"/")))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"not ours")

    def keys() -> set[str]:
        return {str(file) for file in root.rglob("*") if file.is_file()}

    return Strays(lake, LakeResource(s3=S3Resource()), keys)


@pytest.mark.fault("stray keys")
def test_a_key_that_is_not_ours_is_told_and_left_and_nothing_waits_for_it(
    strays: Strays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = strays.lake
    monkeypatch.setenv("LAKE_URI", lake.uri)
    before = strays.keys()

    # The publisher
    journal, bar = tmp_path / "journal", plain_bar("QQQ", NOON, 5)
    finished_journal(journal, lake, [frame_of(bar), frame_of(plain_bar("QQQ", NOON, 6))])
    publish_leftovers(lake, journal)
    assert read_ledger(lake).imbalance == []
    assert reconcile(lake, DAY, Channel.MINUTE).errors == []
    assert reconcile(lake, DAY, Channel.MINUTE).objects_on_lake == 1

    # Every dataset of the day
    (tmp_path / "scratch").mkdir()
    wanted = [d for d in catalog.FOLLOWING if d.channel is Channel.MINUTE and not d.required]
    facts: dict[str, Any] = {}
    for made in make_days(lake, [DAY], lambda _: wanted, tmp_path / "scratch", datetime.now(UTC)):
        assert not isinstance(made, FailedDay), made
        assert isinstance(made, MadeDataset)
        facts[made.dataset.name] = made.facts
    assert facts.keys() == {dataset.name for dataset in wanted if not dataset.required}
    normalized = facts["normalized_bars"]
    assert (normalized["frame_files"], normalized["unreadable_objects"]) == (1, {})
    assert normalized["left_alone"]["objects"] > 3
    assert facts["bar_coverage"]["unreadable_ledgers"] == {}

    # The sensors
    monkeypatch.setattr(external_data, "QUIET", timedelta(0))
    for name, value in {
        "POLYGON_API_KEY": "simulator",
        "POLYGON_HISTORY_START": "2026-01-01",
        "LAKE_URI": lake.uri,
        "JOURNAL_DIR": str(journal),
    }.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("raw_bars", partition="2026-01-26"))
        with dg.build_sensor_context(instance=instance, resources={"lake": strays.resource}) as context:
            noticed = external.external_raw_data_sensor(context)
            asked = repair_sensor(context)
    assert isinstance(noticed, dg.SensorResult)
    assert noticed.skip_reason
    assert "days looked at to their end: 1;" in (noticed.skip_reason.skip_message or "")
    assert isinstance(asked, dg.SensorResult)
    assert [request.partition_key for request in asked.run_requests or []] == ["2026-01-26"]

    assert before < strays.keys()
