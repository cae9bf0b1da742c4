"""The vendor's listings in Dagster: what a fetch shows, what it costs when it is refused, and when the next is due."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest
from massive import RESTClient  # type: ignore[import-untyped, unused-ignore]

from polygon_pipeline.datasets.catalog import LISTINGS
from polygon_pipeline.definitions import build_defs
from polygon_pipeline.defs.listings import LISTINGS_TAG, listings_schedule
from polygon_pipeline.defs.resources import PolygonResource
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.calendar import NEW_YORK
from polygon_pipeline.simulator.corporate_actions import weekly
from polygon_pipeline.simulator.rest_server import HistoryServer
from polygon_pipeline.simulator.synthetic import SyntheticMarket
from polygon_pipeline_tests.support.lakes import local_lake
from polygon_pipeline_tests.support.materializing import PROJECT
from polygon_pipeline_tests.support.planned_server import Answer, PlannedServer, planned_server

KEY = "the-key-that-nobody-may-see-91c4"
NAMES = [listing.name for listing in LISTINGS]
EVENT = {"type": "ticker_change", "date": "2022-06-09", "ticker_change": {"ticker": "META"}}
ANSWERS = {
    "/stocks/v1/splits": {
        "results": [{"ticker": "META", "execution_date": "2026-01-26", "split_to": 4}, {"ticker": ""}]
    },
    "/stocks/v1/dividends": {"results": []},
    "/v3/reference/tickers": {"results": [{"ticker": "META"}]},
    "/vX/reference/tickers/META/events": {"results": {"name": "Meta | Platforms", "events": [EVENT]}},
}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    monkeypatch.setenv("POLYGON_API_KEY", KEY)
    monkeypatch.setenv("POLYGON_TICKERS", "META")
    monkeypatch.setenv("POLYGON_REST_REQUESTS_PER_MINUTE", "6000")
    monkeypatch.setenv("LAKE_URI", (tmp_path / "lake").as_uri())
    monkeypatch.setenv("JOURNAL_DIR", str(tmp_path / "journal"))
    return local_lake(tmp_path / "lake")


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlannedServer]:
    with planned_server({path: [Answer(body=body)] for path, body in ANSWERS.items()}) as server:
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        yield server


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@functools.cache
def listings_job() -> dg.JobDefinition:
    return build_defs(PROJECT).get_job_def("listings")


def fetch(instance: dg.DagsterInstance, *names: str, **config: Any) -> dg.ExecuteInProcessResult:
    return listings_job().execute_in_process(
        asset_selection=[dg.AssetKey(name) for name in names or NAMES],
        run_config={"ops": {names[0]: {"config": config}}} if config else {},
        instance=instance,
        raise_on_error=False,
    )


def shown(instance: dg.DagsterInstance, name: str) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(dg.AssetKey(name))
    assert event
    assert event.asset_materialization
    return {key: value.value for key, value in event.asset_materialization.metadata.items()}


def test_a_fetch_stores_all_listings_and_shows_what_was_left_out(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    assert fetch(instance).success
    today = datetime.now(UTC).date()
    keys = [layout.listing_key(name, today) for name in sorted(NAMES)]
    assert stored.keys("datasets/") == keys
    splits = shown(instance, "splits")
    assert (splits["dagster/row_count"], splits["requests"], splits["left_out"]) == (1, 1, 1)
    assert "a row is left out" in splits["first_left_out"]
    assert "| META | 2026-01-26 |" in splits["preview"]
    assert "Meta \\| Platforms" in shown(instance, "ticker_events")["preview"]


def check_of(instance: dg.DagsterInstance, name: str) -> Any:
    key = dg.AssetCheckKey(dg.AssetKey(name), "factors_agree")
    [record] = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    assert record.event
    assert record.event.dagster_event
    return record.event.dagster_event.asset_check_evaluation_data


def test_a_factor_that_differs_is_a_warning_and_one_of_no_use_is_told(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    split = {"ticker": "META", "execution_date": "2026-01-26", "split_from": 1, "split_to": 4}
    rows = [split | {"historical_adjustment_factor": factor} for factor in (0, 0.25, 0.2)]
    for row, passed in zip(rows, (True, True, False), strict=True):
        vendor.plan["/stocks/v1/splits"] = [Answer(body={"results": [row]})]
        assert fetch(instance, "splits").success
        found = check_of(instance, "splits")
        assert found.passed is passed
        assert found.severity is dg.AssetCheckSeverity.WARN
        told = {name: value.value for name, value in found.metadata.items()}
        assert (told["factors_of_no_use"] == "none") is bool(row["historical_adjustment_factor"])
        assert (told["differences"] == "none") is passed


def test_what_the_plan_refuses_is_told_and_costs_only_itself(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    vendor.plan["/v3/reference/tickers"] = [Answer(403, {"status": "NOT_AUTHORIZED", "message": f"{KEY} is free"})]
    result = fetch(instance)
    assert [event.step_key for event in result.get_step_failure_events()] == ["tickers"]
    text = str(result.get_step_failure_events()[0].event_specific_data)
    assert "not in the plan" in text
    assert KEY not in text
    names = {key.split("/")[1] for key in stored.keys("datasets/")}
    assert names == {"splits", "dividends", "ticker_events"}


def test_a_lake_that_cannot_be_written_is_named(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer, tmp_path: Path
) -> None:
    (tmp_path / "lake" / "datasets").write_bytes(b"no folder")
    [failure] = fetch(instance, "splits").get_step_failure_events()
    assert stored.uri in str(failure.event_specific_data)


def test_listings_as_of_past_dates_can_be_asked_for(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    assert fetch(instance, "tickers", as_of=["2020-01-02", "2021-01-04"]).success
    assert [path.partition("date=")[2][:10] for path in vendor.paths] == ["2020-01-02"] * 2 + ["2021-01-04"] * 2
    assert not fetch(instance, "tickers", as_of=["yesterday"]).success


def test_renames_of_the_whole_market_are_asked_for_by_name_only(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_TICKERS", "*")
    result = fetch(instance, "ticker_events")
    assert "a request a ticker" in str(result.get_step_failure_events()[0].event_specific_data)
    assert vendor.asked == []
    assert fetch(instance, "ticker_events", tickers=["META"]).success


def test_the_vendors_own_client_lists_what_is_stored(
    instance: dg.DagsterInstance, stored: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickers = ["AAPL", "GME", "MSFT", "UHT"]
    market = SyntheticMarket(tickers, actions=weekly(tickers, date(2026, 1, 30)))
    monkeypatch.setenv("POLYGON_TICKERS", ",".join(tickers))
    with HistoryServer(market.day_bars, key=KEY, listings=market.listings()) as server:
        monkeypatch.setenv("POLYGON_REST_URL", server.url)
        assert fetch(instance).success
        client = RESTClient(KEY, base=server.url)
        today = datetime.now(NEW_YORK).date().isoformat()
        theirs = {
            "splits": [*client.list_stocks_splits()],
            "dividends": [*client.list_stocks_dividends()],
            "tickers": [row for row in client.list_tickers(date=today, limit=1000) if row.ticker in tickers],
            "ticker_events": [
                SimpleNamespace(
                    requested_ticker=ticker, type=event["type"], date=event["date"], **event["ticker_change"]
                )
                for ticker in tickers
                for event in client.get_ticker_events(ticker).events
            ],
        }
    for name, expected in theirs.items():
        content = stored.get(layout.listing_key(name, datetime.now(UTC).date()))
        assert content
        columns = [column for column in pq.read_schema(io.BytesIO(content)).names if hasattr(expected[0], column)]
        assert len(columns) >= 4
        ours = [
            tuple(_text(row[column]) for column in columns) for row in pq.read_table(io.BytesIO(content)).to_pylist()
        ]
        assert sorted(ours) == sorted(tuple(_text(getattr(row, column)) for column in columns) for row in expected)
    assert (len(theirs["splits"]), len(theirs["dividends"])) == (8, 4)


def _text(value: Any) -> str:
    """A value as the vendor writes it; a whole number may come as an int or a float, and times to the nanosecond."""
    if isinstance(value, datetime):
        return value.isoformat()[:19]
    if isinstance(value, int | float):
        return str(float(value))
    return str(value)[:19] if str(value).startswith("20") else str(value)


@pytest.mark.parametrize("name", ["tickers", "ticker_events"])
def test_a_launch_cannot_have_a_variable_shown(name: str, instance: dg.DagsterInstance) -> None:
    option = {"tickers": "as_of", "ticker_events": "tickers"}[name]
    with pytest.raises(dg.DagsterInvalidConfigError):
        fetch(instance, name, **{option: [{"env": "POLYGON_API_KEY"}]})


# When the next is due


def asked(instance: dg.DagsterInstance, at: datetime) -> dg.RunRequest | dg.SkipReason:
    with dg.build_schedule_context(
        instance=instance, scheduled_execution_time=at, resources={"polygon": PolygonResource()}
    ) as context:
        result = listings_schedule(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def names(request: dg.RunRequest | dg.SkipReason) -> list[str]:
    assert isinstance(request, dg.RunRequest), request
    return [key.to_user_string() for key in request.asset_selection or []]


def test_everything_is_fetched_once_a_day(instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer) -> None:
    now = datetime.now(UTC)
    assert names(asked(instance, now)) == NAMES
    assert fetch(instance).success
    assert isinstance(asked(instance, now), dg.SkipReason)
    assert names(asked(instance, now + timedelta(days=1))) == NAMES


def test_a_fetch_of_a_past_listing_by_hand_is_not_the_days(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    now = datetime.now(UTC)
    assert fetch(instance, "tickers", as_of=["2026-01-05"]).success
    assert names(asked(instance, now)) == NAMES
    assert fetch(instance).success
    assert fetch(instance, "tickers", as_of=["2026-01-05"]).success
    assert isinstance(asked(instance, now), dg.SkipReason)


def test_what_failed_is_asked_for_again_alone_and_not_for_ever(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    vendor.plan["/stocks/v1/dividends"] = [Answer(403)]
    assert not fetch(instance).success
    now = datetime.now(UTC)
    keys = set()
    for _ in range(3):
        request = asked(instance, now)
        assert names(request) == ["dividends"]
        assert isinstance(request, dg.RunRequest)
        keys.add(request.run_key)
        instance.create_run_for_job(listings_job(), status=dg.DagsterRunStatus.FAILURE, tags=dict(request.tags))
    assert len(keys) == 3
    skip = asked(instance, now)
    assert isinstance(skip, dg.SkipReason)
    assert "dividends failed 3 times today" in (skip.skip_message or "")


def test_a_run_that_is_not_finished_is_waited_for(
    instance: dg.DagsterInstance, stored: Lake, vendor: PlannedServer
) -> None:
    now = datetime(2026, 1, 27, 6, tzinfo=UTC)
    instance.create_run_for_job(
        listings_job(),
        status=dg.DagsterRunStatus.STARTED,
        tags={LISTINGS_TAG: "2026-01-26"},
    )
    assert "not finished" in str(asked(instance, now))
    assert names(asked(instance, now + timedelta(hours=2))) == NAMES, "the next day's begins at 07:30 UTC"


def test_the_whole_markets_renames_are_not_fetched_by_day(
    instance: dg.DagsterInstance, stored: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_TICKERS", "*")
    assert names(asked(instance, datetime.now(UTC))) == ["splits", "dividends", "tickers"]
    monkeypatch.setenv("POLYGON_TICKERS", "")
    assert "POLYGON_TICKERS is not set" in str(asked(instance, datetime.now(UTC)))
