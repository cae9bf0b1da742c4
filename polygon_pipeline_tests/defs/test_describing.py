"""What an asset says of itself before anything is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dagster as dg

from polygon_pipeline.datasets.catalog import DATASETS, LISTINGS, Dataset
from polygon_pipeline.definitions import build_defs
from polygon_pipeline_tests.support.materializing import PROJECT


def test_every_asset_has_an_owner_a_channel_and_a_source_that_is_there_and_one_group_has_them_all() -> None:
    graph = build_defs(PROJECT).resolve_asset_graph()
    for dataset in (*DATASETS, *LISTINGS):
        asset = graph.get(dg.AssetKey(dataset.name))
        assert asset.owners, dataset.name
        channel = str(dataset.channel) if isinstance(dataset, Dataset) else None
        assert asset.tags.get("polygon_pipeline/channel") == channel
        assert asset.group_name == "bars"
        references = asset.metadata["dagster/code_references"]
        assert isinstance(references, dg.CodeReferencesMetadataValue)
        files = [place for place in references.code_references if isinstance(place, dg.LocalFileCodeReference)]
        assert files
        assert all(Path(place.file_path).is_file() for place in files), dataset.name


def test_what_is_made_every_day_is_to_be_fresh_where_a_market_is_collected() -> None:
    def to_be_fresh(is_simulated: bool) -> set[str]:
        graph = build_defs(replace(PROJECT, is_simulated=is_simulated)).resolve_asset_graph()
        nodes = [graph.get(dg.AssetKey(dataset.name)) for dataset in DATASETS]
        return {node.key.to_user_string() for node in nodes if node.freshness_policy_or_from_metadata}

    assert to_be_fresh(is_simulated=False) == {"daily_bars", "bar_coverage", "session_report"}
    assert to_be_fresh(is_simulated=True) == set(), "a demo rests after its last session"


def test_resources_have_their_values_on_their_pages() -> None:
    resources = build_defs(PROJECT).get_repository_def().get_top_level_resources()
    for name in ("polygon", "lake"):
        assert "In force" in (resources[name].description or "")
