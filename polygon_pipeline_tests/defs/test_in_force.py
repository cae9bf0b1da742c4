"""The resources' pages: they show what is in force, and no secret."""

from __future__ import annotations

from polygon_pipeline.defs.in_force import lake_resource, polygon_resource
from polygon_pipeline.defs.resources import LakeResource, PolygonResource

SECRETS = {
    "POLYGON_API_KEY": "secret-key",
    "POLYGON_FLAT_FILES_KEY_ID": "secret-key-id",
    "POLYGON_FLAT_FILES_SECRET": "secret-of-the-files",
    "AWS_ACCESS_KEY_ID": "secret-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "secret-access-key",
    "AWS_SESSION_TOKEN": "secret-token",
}
ENVIRONMENT = {
    **SECRETS,
    "POLYGON_TICKERS": "SPY,BRK.B",
    "LAKE_URI": "s3://bucket/prefix",
    "AWS_ENDPOINT_URL": "https://s3.example.com",
    "AWS_DEFAULT_REGION": "eu-north-1",
}


def page(resource: type) -> str:
    return resource.__doc__ or ""


def test_a_page_shows_what_is_in_force_and_whether_keys_are_set() -> None:
    feed, lake = page(polygon_resource(ENVIRONMENT)), page(lake_resource(ENVIRONMENT))
    assert (PolygonResource.__doc__ or "?") in feed
    assert "- feed: polygon\n- key: set\n" in feed
    assert "- tickers: SPY\\, BRK.B\n" in feed
    assert "- flat files' key: set\n" in feed
    assert "- night session from: not set\n" in feed
    assert "- lake: s3\\:\\/\\/bucket\\/prefix\n" in lake
    assert "- region: eu-north-1\n" in lake
    assert "- access key: set\n" in lake


def test_a_key_under_its_second_name_is_set_and_not_shown() -> None:
    feed = page(polygon_resource({"MASSIVE_API_KEY": "secret-key", "POLYGON_TICKERS": "SPY"}))
    assert "- feed: polygon\n- key: set\n" in feed
    assert "secret-key" not in feed
    both = page(polygon_resource(ENVIRONMENT | {"MASSIVE_API_KEY": "another-secret"}))
    assert "cannot be used: POLYGON\\_API\\_KEY and MASSIVE\\_API\\_KEY" in both
    assert "another-secret" not in both
    assert "secret-key" not in both


def test_no_page_shows_a_secret() -> None:
    pages = page(polygon_resource(ENVIRONMENT)) + page(lake_resource(ENVIRONMENT))
    assert not [secret for secret in SECRETS.values() if secret in pages]


def test_without_a_key_the_page_says_that_all_is_simulated() -> None:
    feed = page(polygon_resource({}))
    assert "- feed: SIMULATED\n- key: not set\n- stream: the built-in simulator\n" in feed


def test_a_variable_that_cannot_work_is_named_and_no_credentials_in_a_url_are_shown() -> None:
    assert "- cannot be used: POLYGON\\_TICKERS is not set" in page(polygon_resource({"POLYGON_API_KEY": "secret-key"}))
    odd = ENVIRONMENT | {"AWS_ENDPOINT_URL": "https://user:another-secret@s3.example.com"}
    assert "another-secret" not in page(lake_resource(odd))


def test_the_resource_is_the_same_but_for_its_page() -> None:
    assert issubclass(polygon_resource({}), PolygonResource)
    assert issubclass(lake_resource({}), LakeResource)
    assert PolygonResource.__doc__ != polygon_resource({}).__doc__
