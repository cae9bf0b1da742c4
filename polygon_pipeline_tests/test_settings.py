"""Every rule of the environment; every error names its variable."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline import settings
from polygon_pipeline.market.bars import Channel, ticker_error
from polygon_pipeline.settings import (
    ConfigurationError,
    Settings,
    alert_receivers,
    days_per_run,
    keep_proxies_off_this_machine,
    load,
)

KEY = "a-very-secret-key"
SECRET = "another-secret"
TOKEN = "a-secret-of-the-relay"
REAL = {"POLYGON_API_KEY": KEY, "POLYGON_TICKERS": "SPY"}
SIMULATED = {"POLYGON_TICKERS": "SPY"}
FLAT_FILES = {"POLYGON_FLAT_FILES_KEY_ID": "an-id", "POLYGON_FLAT_FILES_SECRET": SECRET}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def refused(**environment: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        load(REAL | environment)
    assert KEY not in str(error.value)
    assert SECRET not in str(error.value)
    return str(error.value)


def test_replaced_files_are_looked_for_as_long_as_is_said_and_thirty_days_otherwise() -> None:
    assert load(REAL).flat_files_replaced_days == 30
    assert load(REAL | {"POLYGON_FLAT_FILES_REPLACED_DAYS": " 90 "}).flat_files_replaced_days == 90
    for wrong in ("0", "367", "-1", "a month"):
        assert "POLYGON_FLAT_FILES_REPLACED_DAYS" in refused(POLYGON_FLAT_FILES_REPLACED_DAYS=wrong)


def test_without_a_key_the_feed_is_simulated_by_a_server_without_a_fixed_port() -> None:
    found = load(SIMULATED)
    assert (found.feed, found.is_simulated, found.is_demo) == ("simulated", True, True)
    assert (found.websocket_url, found.rest_url) == (None, None)
    assert found.channels == (Channel.MINUTE,)


@pytest.mark.parametrize("environment", [{}, {"POLYGON_TICKERS": ""}, {"POLYGON_TICKERS": " "}])
def test_without_tickers_the_error_names_the_variable(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="POLYGON_TICKERS is not set"):
        load({"POLYGON_API_KEY": KEY, **environment})


def test_the_lake_can_be_opened_without_naming_tickers(tmp_path: Path) -> None:
    assert settings.lake_uri({"POLYGON_API_KEY": KEY}) == (tmp_path / "var/lake").as_uri()


def test_with_a_key_the_vendor_feeds_a_lake_of_its_own(tmp_path: Path) -> None:
    found = load(REAL)
    assert (found.feed, found.is_simulated, found.api_key) == ("polygon", False, KEY)
    assert found.websocket_url == "wss://socket.massive.com/stocks"
    assert found.rest_url == "https://api.massive.com"
    assert found.lake_uri == (tmp_path / "var/lake").as_uri()
    assert found.journal_dir == tmp_path / "var/journal"


@pytest.mark.parametrize("key", ["", "  ", "simulator", " simulator "])
def test_no_key_and_the_simulators_name_are_the_simulator(key: str) -> None:
    assert load(SIMULATED | {"POLYGON_API_KEY": key}).is_simulated


@pytest.mark.parametrize("polygon", [{}, {"POLYGON_API_KEY": " "}, {"POLYGON_API_KEY": f"{KEY} "}])
def test_the_key_has_a_second_name_which_the_vendors_own_client_reads(polygon: dict[str, str]) -> None:
    environment = {"POLYGON_TICKERS": "SPY", "MASSIVE_API_KEY": KEY} | polygon
    found = load(environment | {"LAKE_URI": "s3://bucket/x"})
    assert (found.api_key, found.is_simulated, found.rest_url) == (KEY, False, "https://api.massive.com")
    assert not settings.is_simulated(environment)


def test_the_simulator_can_be_asked_for_under_either_name() -> None:
    found = load(SIMULATED | {"MASSIVE_API_KEY": "simulator", "LAKE_URI": "s3://bucket/x"})
    assert (found.is_simulated, found.lake_uri) == (True, "s3://bucket/x")


@pytest.mark.parametrize("other", [SECRET, "simulator"])
def test_two_different_keys_are_refused_by_their_names_and_neither_is_shown(other: str) -> None:
    message = refused(MASSIVE_API_KEY=other)
    assert "POLYGON_API_KEY and MASSIVE_API_KEY" in message
    assert not settings.is_simulated(REAL | {"MASSIVE_API_KEY": other}), "no demo fills a lake by mistake"


@pytest.mark.parametrize(
    "url", [settings.WEBSOCKET_URL, settings.DELAYED_URL, f"{settings.WEBSOCKET_URL}/", "wss://feed.example.com/any"]
)
def test_the_vendors_feeds_of_stocks_and_other_servers_are_taken(url: str) -> None:
    assert load(REAL | {"POLYGON_WEBSOCKET_URL": url}).websocket_url == url


@pytest.mark.parametrize("path", ["options", "crypto", "forex", "indices", "futures/cme", ""])
def test_the_vendors_feeds_of_other_markets_are_refused(path: str) -> None:
    for host in ("socket.massive.com", "delayed.polygon.io"):
        assert "only stocks" in refused(POLYGON_WEBSOCKET_URL=f"wss://{host}/{path}")


def test_white_space_around_a_key_is_removed() -> None:
    assert load(REAL | {"POLYGON_API_KEY": f" {KEY}\n"}).api_key == KEY


@pytest.mark.parametrize("value", ["soon", "2026-11-30", "20261207", "2026-12-06", "2026-12-25", "2030-13-01"])
def test_the_first_night_is_a_trading_day_that_can_have_one(value: str) -> None:
    assert "POLYGON_NIGHT_SESSION_FROM is" in refused(POLYGON_NIGHT_SESSION_FROM=value)


def test_the_first_night_may_be_unset_and_a_simulated_feed_may_have_it_on_any_past_day() -> None:
    def found(environment: dict[str, str]) -> date | None:
        load(environment)
        return settings.night_session_from(environment)

    assert found(REAL) is None
    assert found(REAL | {"POLYGON_NIGHT_SESSION_FROM": " "}) is None
    assert found(REAL | {"POLYGON_NIGHT_SESSION_FROM": "2026-12-07"}) == date(2026, 12, 7)
    assert found(SIMULATED | {"POLYGON_NIGHT_SESSION_FROM": "2026-11-20"}) == date(2026, 11, 20)


def test_the_key_is_not_shown() -> None:
    found = load(REAL)
    for shown in (repr(found), str(found), f"{found!r}"):
        assert KEY not in shown


def test_the_flat_files_secret_is_not_shown() -> None:
    assert SECRET not in repr(load(REAL | FLAT_FILES))


def test_every_setting_can_be_set(tmp_path: Path) -> None:
    environment = {
        "POLYGON_WEBSOCKET_URL": "wss://delayed.massive.com/stocks",
        "POLYGON_REST_URL": "https://api.polygon.io",
        "POLYGON_REST_REQUESTS_PER_MINUTE": "6000",
        "POLYGON_FLAT_FILES_URL": "https://files.polygon.io",
        "POLYGON_TICKERS": "SPY,BRK.B",
        "POLYGON_CHANNELS": "AM,A",
        "LAKE_URI": "s3://bucket/prefix",
        "JOURNAL_DIR": "journal",
        "POLYGON_METRICS_PORT": "9464",
        "POLYGON_STANDBY": "yes",
        "POLYGON_RELAY_PORT": "9465",
        "POLYGON_RELAY_TOKEN": TOKEN,
        "POLYGON_CHECKPOINT_SECONDS": "30",
    }
    assert load(REAL | FLAT_FILES | environment) == Settings(
        feed="polygon",
        api_key=KEY,
        websocket_url="wss://delayed.massive.com/stocks",
        rest_url="https://api.polygon.io",
        rest_requests_per_minute=6000,
        flat_files_url="https://files.polygon.io",
        flat_files_key_id="an-id",
        flat_files_secret=SECRET,
        tickers=("SPY", "BRK.B"),
        channels=(Channel.MINUTE, Channel.SECOND),
        lake_uri="s3://bucket/prefix",
        journal_dir=tmp_path / "journal",
        metrics_port=9464,
        standby=True,
        relay_port=9465,
        relay_token=TOKEN,
        checkpoint_seconds=30.0,
    )


@pytest.mark.parametrize(
    "name",
    [
        "POLYGON_WEBSOCKET_URL",
        "POLYGON_REST_URL",
        "POLYGON_REST_REQUESTS_PER_MINUTE",
        "POLYGON_FLAT_FILES_URL",
        "POLYGON_FLAT_FILES_KEY_ID",
        "POLYGON_FLAT_FILES_SECRET",
        "LAKE_URI",
        "JOURNAL_DIR",
    ],
)
def test_an_empty_variable_is_an_absent_one(name: str) -> None:
    assert load(REAL | {name: ""}) == load(REAL)


# Simulated and real data


def test_without_a_key_no_s3_lake_is_filled() -> None:
    with pytest.raises(ConfigurationError, match="LAKE_URI is s3://bucket/x, but without POLYGON_API_KEY"):
        load(SIMULATED | {"LAKE_URI": "s3://bucket/x"})


def test_the_simulator_may_fill_an_s3_lake_when_asked_by_name() -> None:
    found = load(SIMULATED | {"LAKE_URI": "s3://bucket/x", "POLYGON_API_KEY": "simulator"})
    assert (found.lake_uri, found.is_simulated) == ("s3://bucket/x", True)


def test_the_rule_holds_for_a_scheme_in_any_case() -> None:
    with pytest.raises(ConfigurationError, match="LAKE_URI"):
        load(SIMULATED | {"LAKE_URI": "S3://bucket/x"})


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8765", "localhost:8765", "[::1]:8765", "127.1.2.3", "LOCALHOST"]
)
def test_plain_urls_may_lead_to_this_machine(host: str) -> None:
    found = load(REAL | {"POLYGON_WEBSOCKET_URL": f"ws://{host}/stocks", "POLYGON_REST_URL": f"http://{host}"})
    assert found.websocket_url == f"ws://{host}/stocks"


@pytest.mark.parametrize(
    "host",
    [
        "socket.massive.com",
        "10.0.0.1",
        "0.0.0.0",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[2001:db8::1]",
        "2130706433",
    ],
)
def test_plain_urls_to_anywhere_else_are_refused(host: str) -> None:
    for variable, scheme in (("POLYGON_WEBSOCKET_URL", "ws"), ("POLYGON_REST_URL", "http")):
        message = refused(**{variable: f"{scheme}://{host}/stocks"})
        assert message.startswith(variable)
        assert f"Use {scheme}" in message


@pytest.mark.parametrize("host", ["relay", "RELAY:8765", "10.1.2.3", "a.b.internal"])
def test_plain_urls_may_lead_to_the_named_hosts_of_a_private_network(host: str) -> None:
    named = {"ALLOW_PLAINTEXT_HOSTS": "relay, .internal,10.1.2.3"}
    found = load(REAL | named | {"POLYGON_WEBSOCKET_URL": f"ws://{host}/stocks", "POLYGON_REST_URL": f"http://{host}"})
    assert found.websocket_url == f"ws://{host}/stocks"
    assert alert_receivers(named | {"POLYGON_ALERT_WEBHOOK": f"http://{host}/hook"}).webhook == f"http://{host}/hook"


@pytest.mark.parametrize("host", ["relay2", "a.relay", "internal", "x.internal.example", "10.1.2.30", "market"])
def test_a_host_that_is_not_named_in_full_or_by_its_ending_is_reached_by_tls_alone(host: str) -> None:
    message = refused(ALLOW_PLAINTEXT_HOSTS="relay,.internal,10.1.2.3", POLYGON_REST_URL=f"http://{host}")
    assert message.startswith("POLYGON_REST_URL")
    assert "ALLOW_PLAINTEXT_HOSTS" in message


@pytest.mark.parametrize("names", ["*", ".", "relay,*.internal", "http://relay", "10.0.0.0/8"])
def test_names_of_plaintext_hosts_that_would_be_anything_or_nothing_are_refused(names: str) -> None:
    message = refused(ALLOW_PLAINTEXT_HOSTS=names, POLYGON_REST_URL="http://relay")
    assert message.startswith("ALLOW_PLAINTEXT_HOSTS")


def test_no_proxy_is_asked_for_this_machine_nor_for_plaintext_hosts() -> None:
    environment = {"NO_PROXY": "other", "ALLOW_PLAINTEXT_HOSTS": "relay,.internal"}
    for _ in range(2):
        keep_proxies_off_this_machine(environment)
    assert environment["no_proxy"].startswith("other,relay,.internal,localhost,127.0.0.1")
    assert environment["no_proxy"].count("relay") == 1


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("POLYGON_WEBSOCKET_URL", "https://socket.massive.com/stocks"),
        ("POLYGON_WEBSOCKET_URL", "socket.massive.com"),
        ("POLYGON_WEBSOCKET_URL", "wss://"),
        ("POLYGON_WEBSOCKET_URL", "wss:///stocks"),
        ("POLYGON_WEBSOCKET_URL", "file:///etc/passwd"),
        ("POLYGON_REST_URL", "wss://api.massive.com"),
        ("POLYGON_REST_URL", "ftp://api.massive.com"),
        ("POLYGON_REST_URL", "api.massive.com"),
    ],
)
def test_the_error_for_a_url_of_another_kind_names_its_variable(variable: str, url: str) -> None:
    assert variable in refused(**{variable: url})


@pytest.mark.parametrize("tail", ["user:pass@host/stocks", "user@host/stocks", f"host/stocks?apiKey={KEY}"])
def test_a_url_holds_no_credentials_and_the_error_does_not_repeat_them(tail: str) -> None:
    for variable, scheme in (("POLYGON_WEBSOCKET_URL", "wss"), ("POLYGON_REST_URL", "https")):
        message = refused(**{variable: f"{scheme}://{tail}"})
        assert message.startswith(variable)
        assert "pass" not in message
        assert "credentials" in message


@pytest.mark.parametrize("variable", ["POLYGON_WEBSOCKET_URL", "POLYGON_REST_URL"])
def test_the_error_for_a_malformed_url_names_its_variable(variable: str) -> None:
    assert variable in refused(**{variable: "wss://[nowhere"})


def test_urls_are_checked_for_the_simulator_too() -> None:
    with pytest.raises(ConfigurationError, match="POLYGON_WEBSOCKET_URL"):
        load({"POLYGON_WEBSOCKET_URL": "ws://socket.massive.com"})


# The vendor's history


def test_the_free_plans_limit_holds_until_another_is_set() -> None:
    assert load(REAL).rest_requests_per_minute == 5
    assert load(REAL | {"POLYGON_REST_REQUESTS_PER_MINUTE": " 100 "}).rest_requests_per_minute == 100


@pytest.mark.parametrize("text", ["0", "6001", "-5", "5.0", "five", " ", "٥", "9" * 5000])
def test_an_invalid_limit_is_refused(text: str) -> None:
    assert refused(POLYGON_REST_REQUESTS_PER_MINUTE=text).startswith("POLYGON_REST_REQUESTS_PER_MINUTE")


def test_there_are_no_flat_files_without_their_keys() -> None:
    found = load(REAL)
    assert (found.flat_files_url, found.flat_files_key_id, found.flat_files_secret) == (None, None, None)


def test_the_flat_files_are_the_vendors_where_only_their_keys_are_set() -> None:
    found = load(REAL | FLAT_FILES)
    assert (found.flat_files_url, found.flat_files_key_id) == ("https://files.massive.com", "an-id")


@pytest.mark.parametrize(
    "given",
    [
        {"POLYGON_FLAT_FILES_KEY_ID": "an-id"},
        {"POLYGON_FLAT_FILES_SECRET": SECRET},
        {"POLYGON_FLAT_FILES_URL": "https://files.massive.com"},
        FLAT_FILES | {"POLYGON_FLAT_FILES_SECRET": " "},
    ],
)
def test_flat_files_that_are_half_configured_are_refused(given: dict[str, str]) -> None:
    message = refused(**given)
    assert "POLYGON_FLAT_FILES_KEY_ID" in message
    assert "POLYGON_FLAT_FILES_SECRET" in message


def test_the_flat_files_keys_go_over_no_plain_url() -> None:
    message = refused(**FLAT_FILES, POLYGON_FLAT_FILES_URL="http://files.massive.com")
    assert message.startswith("POLYGON_FLAT_FILES_URL")


# Tickers and channels


@pytest.mark.parametrize(
    ("text", "tickers"),
    [
        ("SPY", ("SPY",)),
        (" SPY , BRK.B,,KIMpL, ", ("SPY", "BRK.B", "KIMpL")),
        ("SPY,spy,SPY", ("SPY", "spy")),
        ("*", ("*",)),
        ("SPY,*", ("*",)),
    ],
)
def test_tickers_are_a_list_in_their_own_case_without_repeats(text: str, tickers: tuple[str, ...]) -> None:
    found = load(REAL | {"POLYGON_TICKERS": text})
    assert found.tickers == tickers
    assert found.is_whole_market == (tickers == ("*",))


@pytest.mark.parametrize("text", ["", " ", ",", "A/B", "SPY,..", "SPY,A\\B", "A" * 65, "A\x00B"])
def test_invalid_tickers_are_refused(text: str) -> None:
    assert refused(POLYGON_TICKERS=text).startswith("POLYGON_TICKERS")


@given(st.text(max_size=20))
def test_any_text_is_a_list_of_tickers_or_refused_with_the_variables_name(text: str) -> None:
    try:
        tickers = settings.parse_tickers(text.split(","))
    except ConfigurationError as error:
        assert str(error).startswith("POLYGON_TICKERS")  # noqa: PT017 - either outcome is right
    else:
        assert tickers
        assert len(set(tickers)) == len(tickers)
        assert all(ticker_error(ticker) is None for ticker in tickers)


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("AM", (Channel.MINUTE,)),
        ("A", (Channel.SECOND,)),
        ("AM,A", (Channel.MINUTE, Channel.SECOND)),
        (" A , AM,A ", (Channel.SECOND, Channel.MINUTE)),
    ],
)
def test_channels_are_a_list_without_repeats(text: str, channels: tuple[Channel, ...]) -> None:
    assert load(REAL | {"POLYGON_CHANNELS": text}).channels == channels


@pytest.mark.parametrize("text", ["", " ", ",", "am", "T", "AM,T", "AM;A", "*"])
def test_invalid_channels_are_refused(text: str) -> None:
    message = refused(POLYGON_CHANNELS=text)
    assert message.startswith("POLYGON_CHANNELS")
    assert "AM, A or AM,A" in message


def test_every_channel_of_every_ticker_is_a_topic() -> None:
    found = load(REAL | {"POLYGON_TICKERS": "SPY,BRK.B", "POLYGON_CHANNELS": "AM,A"})
    assert sorted(found.topics) == ["A.BRK.B", "A.SPY", "AM.BRK.B", "AM.SPY"]
    assert load(REAL | {"POLYGON_TICKERS": "*"}).topics == ["AM.*"]


def test_metrics_are_served_on_a_port_alone_and_not_without_one() -> None:
    assert load(REAL).metrics_port is None
    assert load(REAL | {"POLYGON_METRICS_PORT": " 9464 "}).metrics_port == 9464


@pytest.mark.parametrize("port", ["0", "65536", "-1", "0.0.0.0:9464", "nine", "٩٤٦٤"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    assert "POLYGON_METRICS_PORT" in refused(POLYGON_METRICS_PORT=port)


def test_a_backfills_runs_may_be_shorter_for_more_machines() -> None:
    assert (days_per_run({}), days_per_run({"POLYGON_DAYS_PER_RUN": " 5 "})) == (100, 5)
    assert "POLYGON_DAYS_PER_RUN is '0'" in refused(POLYGON_DAYS_PER_RUN="0")


@pytest.mark.parametrize(("text", "standby"), [("", False), ("no", False), (" Yes ", True)])
def test_a_collector_stands_by_where_it_is_asked_to(text: str, standby: bool) -> None:
    assert load(REAL | {"POLYGON_STANDBY": text}).standby is standby


@pytest.mark.parametrize("text", ["4", "3601", "-5", "1.5", "soon"])
def test_a_time_between_checkpoints_that_cannot_be_is_refused(text: str) -> None:
    assert load(REAL).checkpoint_seconds is None
    assert "POLYGON_CHECKPOINT_SECONDS" in refused(POLYGON_CHECKPOINT_SECONDS=text)


def test_what_says_neither_yes_nor_no_to_standing_by_is_refused() -> None:
    assert "POLYGON_STANDBY is '1'" in refused(POLYGON_STANDBY="1")


@pytest.mark.parametrize("minutes", ["0", "241", "-5", "15.5", "fifteen", "٣٠"])
def test_minutes_of_revisions_that_are_none_are_refused(minutes: str) -> None:
    assert "POLYGON_REVISION_MINUTES" in refused(POLYGON_REVISION_MINUTES=minutes)
    assert load(REAL | {"POLYGON_REVISION_MINUTES": " 30 "})


def test_the_stream_is_shared_on_a_port_with_a_token_of_its_own_and_not_without_a_port() -> None:
    alone = load(REAL | {"POLYGON_RELAY_TOKEN": TOKEN})
    assert (alone.relay_port, alone.relay_token) == (None, None)
    shared = load(REAL | {"POLYGON_RELAY_TOKEN": f" {TOKEN}\n", "POLYGON_RELAY_PORT": "9465"})
    assert (shared.relay_port, shared.relay_token) == (9465, TOKEN)
    assert TOKEN not in repr(shared)


@pytest.mark.parametrize("token", ["", "short-secret", "a-secret-in-no-äscii", KEY])
def test_a_token_that_is_missing_short_or_the_vendors_key_is_refused_and_not_shown(token: str) -> None:
    message = refused(POLYGON_RELAY_PORT="9465", POLYGON_RELAY_TOKEN=token)
    assert "POLYGON_RELAY_TOKEN" in message
    assert not token or token not in message
    assert "POLYGON_RELAY_PORT" in refused(POLYGON_RELAY_PORT="x", POLYGON_RELAY_TOKEN=TOKEN)


_HOOK = "https://hooks.example.com/services/a-webhooks-secret-path?key=another-secret"
_MAIL = {"POLYGON_ALERT_SMTP_URL": "smtps://me:another-secret@mail.example.com", "POLYGON_ALERT_TO": "me@example.com"}


def test_nobody_is_told_unless_a_receiver_is_set() -> None:
    assert not alert_receivers({})
    assert not alert_receivers({"POLYGON_ALERT_WEBHOOK": " ", "POLYGON_ALERT_SMTP_URL": ""})


def test_a_webhook_may_hold_a_secret_and_mails_come_from_their_first_recipient() -> None:
    found = alert_receivers({"POLYGON_ALERT_WEBHOOK": _HOOK, **_MAIL, "POLYGON_ALERT_TO": "a@example.com, b@x.org"})
    assert (found.webhook, found.smtp_url) == (_HOOK, _MAIL["POLYGON_ALERT_SMTP_URL"])
    assert (found.sender, found.recipients) == ("a@example.com", ("a@example.com", "b@x.org"))
    assert alert_receivers({**_MAIL, "POLYGON_ALERT_FROM": "bot@example.com"}).sender == "bot@example.com"
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({"POLYGON_ALERT_WEBHOOK": _HOOK.replace("https", "http")}, "POLYGON_ALERT_WEBHOOK"),
        ({"POLYGON_ALERT_WEBHOOK": _HOOK.replace("https", "file")}, "POLYGON_ALERT_WEBHOOK"),
        ({"POLYGON_ALERT_WEBHOOK": "another-secret"}, "POLYGON_ALERT_WEBHOOK"),
        ({"POLYGON_ALERT_WEBHOOK": "https://[another-secret"}, "POLYGON_ALERT_WEBHOOK"),
        ({**_MAIL, "POLYGON_ALERT_SMTP_URL": "another-secret"}, "POLYGON_ALERT_SMTP_URL"),
        ({**_MAIL, "POLYGON_ALERT_SMTP_URL": "smtps://me:another-secret@host:port"}, "POLYGON_ALERT_SMTP_URL"),
        ({**_MAIL, "POLYGON_ALERT_TO": ""}, "POLYGON_ALERT_TO"),
        ({"POLYGON_ALERT_TO": "me@example.com"}, "POLYGON_ALERT_SMTP_URL"),
        ({**_MAIL, "POLYGON_ALERT_TO": "Me <me@example.com>"}, "POLYGON_ALERT_TO"),
        ({**_MAIL, "POLYGON_ALERT_TO": "me@example.com\r\nBcc:x@example.com"}, "POLYGON_ALERT_TO"),
        ({**_MAIL, "POLYGON_ALERT_FROM": "a@example.com,b@example.com"}, "POLYGON_ALERT_FROM"),
    ],
)
def test_receivers_that_cannot_work_are_refused_by_name_and_without_their_secrets(
    environment: dict[str, str], variable: str
) -> None:
    with pytest.raises(ConfigurationError, match=variable) as refused:
        alert_receivers(environment)
    assert "secret" not in str(refused.value)
    assert "secret" not in str(refused.value.__cause__ or "")


def test_a_webhook_on_this_machine_need_not_be_encrypted() -> None:
    assert alert_receivers({"POLYGON_ALERT_WEBHOOK": "http://127.0.0.1:8080/hook"})
