"""The values in force, on the resources' pages: what the environment says, without a secret.

Belongs here: which values are shown. Does not belong here: reading them (settings), and what is done with them
(resources).

They are a part of the resource's description, because a resource without configuration has no other place for them.
They are those of the time when this code location was loaded.
"""

from collections.abc import Callable, Mapping
from types import new_class
from typing import TypeVar, cast

from polygon_pipeline import demo, settings
from polygon_pipeline.datasets.wording import plain
from polygon_pipeline.defs.resources import LakeResource, PolygonResource

Resource = TypeVar("Resource")

_SIMULATOR = "the built-in simulator"
_NAMED = 20


def polygon_resource(environment: Mapping[str, str]) -> type[PolygonResource]:
    """PolygonResource, with the values in force in its description."""
    return _showing(PolygonResource, _checked(lambda: _feed(demo.with_defaults(environment))))


def lake_resource(environment: Mapping[str, str]) -> type[LakeResource]:
    """LakeResource, with the values in force in its description."""
    return _showing(LakeResource, _checked(lambda: _lake(demo.with_defaults(environment))))


def _feed(environment: Mapping[str, str]) -> dict[str, str]:
    found, night = settings.load(environment), settings.night_session_from(environment)
    more = len(found.tickers) - _NAMED
    tickers = ", ".join(found.tickers[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return {
        "feed": "SIMULATED" if found.is_simulated else found.feed,
        "key": "not set" if found.is_simulated else "set",
        "stream": found.websocket_url or _SIMULATOR,
        "history": found.rest_url or _SIMULATOR,
        "requests a minute": str(found.rest_requests_per_minute),
        "flat files": found.flat_files_url or "not set",
        "flat files' key": "set" if found.flat_files_secret else "not set",
        "tickers": "the whole market" if found.is_whole_market else tickers,
        "channels": ", ".join(found.channels),
        "night session from": str(night or "not set"),
        "journals": str(found.journal_dir),
    }


def _lake(environment: Mapping[str, str]) -> dict[str, str]:
    uri = settings.lake_uri(environment)
    if not uri.lower().startswith("s3://"):
        return {"lake": uri}
    endpoint = environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings.require_private("AWS_ENDPOINT_URL", endpoint, "https", "http", environment)
    return {
        "lake": uri,
        "endpoint": endpoint or "of AWS, or of the profile",
        "region": environment.get("AWS_DEFAULT_REGION") or "of the profile, or us-east-1",
        "profile": environment.get("AWS_PROFILE") or "not set",
        "access key": "set" if environment.get("AWS_ACCESS_KEY_ID") else "not set, or not in the environment",
    }


def _checked(values: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return values()
    except settings.ConfigurationError as error:
        return {"cannot be used": str(error)}


def _showing(resource: type[Resource], values: Mapping[str, str]) -> type[Resource]:
    lines = "\n".join(f"- {name}: {plain(value)}" for name, value in values.items())
    text = f"{resource.__doc__}\n\nIn force, as this code location was loaded:\n\n{lines}\n"
    named = {"__doc__": text, "__module__": resource.__module__}
    return cast("type[Resource]", new_class(resource.__name__, (resource,), exec_body=lambda body: body.update(named)))
