"""The catalog agrees with itself, with the asset graph, and with what a materialization shows."""

from __future__ import annotations

from itertools import pairwise

import dagster as dg
import pytest

from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.catalog import DATASETS, FOLLOWING, LISTINGS, RESAMPLED, Dataset, find
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.partitions import Project
from polygon_pipeline.market.bars import Channel
from polygon_pipeline_tests.support.materializing import PROJECT

MADE = [dataset for dataset in DATASETS if dataset.columns]
every_made_dataset = pytest.mark.parametrize("dataset", MADE, ids=[dataset.name for dataset in MADE])


def test_the_datasets_have_the_public_names() -> None:
    """A name that is here stays. Add the new dataset's."""
    assert [dataset.name for dataset in DATASETS] == [
        "raw_bars",
        "raw_second_bars",
        "reference_bars",
        "reference_daily_bars",
        "normalized_bars",
        "normalized_second_bars",
        "bars_5m",
        "bars_15m",
        "bars_30m",
        "bars_1h",
        "daily_bars",
        "daily_differences",
        "bar_coverage",
        "session_report",
    ]


def test_the_listings_have_the_public_names_and_are_described_with_their_columns() -> None:
    assert [listing.name for listing in LISTINGS] == ["splits", "dividends", "tickers", "ticker_events"]
    for listing in LISTINGS:
        assert listing.description, listing.name
        assert all(column.description for column in listing.columns), listing.name
        assert listing.schema().names == [column.name for column in listing.columns]
        assert listing.key in (None, *listing.schema().names)


def test_every_dataset_comes_after_its_inputs() -> None:
    names = [dataset.name for dataset in DATASETS]
    assert len(set(names)) == len(names)
    for number, dataset in enumerate(DATASETS):
        assert set(dataset.inputs) <= set(DATASETS[:number]), dataset.name


def test_the_parents_in_the_asset_graph_are_the_inputs() -> None:
    graph = build_defs(PROJECT).get_repository_def().asset_graph
    parents = {
        dataset.name: {key.to_user_string() for key in graph.get(dg.AssetKey(dataset.name)).parent_keys}
        for dataset in DATASETS
    }
    assert parents == {dataset.name: {needed.name for needed in dataset.inputs} for dataset in DATASETS}


def test_every_dataset_is_described_and_so_is_each_of_its_columns() -> None:
    assert {dataset.name for dataset in FOLLOWING} <= {dataset.name for dataset in MADE}
    for dataset in DATASETS:
        assert dataset.description, dataset.name
        assert all(column.description for column in dataset.columns), dataset.name
        names = [column.name for column in dataset.columns]
        assert len(set(names)) == len(names), dataset.name


@every_made_dataset
def test_an_asset_shows_its_own_columns_with_their_descriptions(dataset: Dataset) -> None:
    """Names repeat between datasets, and mean other things there: `volume` is of the regular hours in daily_bars."""
    asset = build_defs(Project(channels=tuple(Channel))).resolve_asset_graph().get(dg.AssetKey(dataset.name))
    shown = asset.metadata["dagster/column_schema"]
    assert isinstance(shown, dg.TableSchema)
    assert [(column.name, column.description) for column in shown.columns] == [
        (column.name, column.description) for column in dataset.columns
    ]


def test_a_column_that_repeats_is_described_as_its_own_dataset_says() -> None:
    descriptions = {
        dataset.name: {column.name: column.description for column in dataset.columns}["volume"]
        for dataset in (catalog.DAILY_BARS, catalog.REFERENCE_BARS)
    }
    assert "regular hours only" in descriptions["daily_bars"]
    assert "regular hours" not in descriptions["reference_bars"]


@every_made_dataset
def test_a_file_keeps_the_descriptions_of_its_columns(dataset: Dataset) -> None:
    kept = [(field.metadata or {}).get(b"description", b"").decode() for field in dataset.schema()]
    assert kept == [column.description for column in dataset.columns]


def test_resampled_intervals_divide_the_hour_and_grow() -> None:
    minutes = [dataset.interval_minutes for dataset in RESAMPLED]
    assert all(interval and 60 % interval == 0 for interval in minutes)
    assert all((one or 0) < (following or 0) for one, following in pairwise(minutes))


def test_a_dataset_is_found_by_its_name_alone() -> None:
    assert [find(dataset.name) for dataset in DATASETS] == list(DATASETS)
    with pytest.raises(KeyError, match="bars_7m"):
        find("bars_7m")
