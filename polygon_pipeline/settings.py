"""The environment variables, read and checked in one place. Every error names its variable.

Belongs here: names, defaults and rules of configuration. Does not belong here: using any of it, and what the demo sets
where nothing is set (demo).

Without POLYGON_API_KEY, or MASSIVE_API_KEY as the vendor's own client calls it, the feed is simulated.
`POLYGON_API_KEY=simulator` asks for that by name; only then may it fill an `s3://` lake.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import date
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from polygon_pipeline.market import hours, revisions
from polygon_pipeline.market.bars import Channel, ticker_error
from polygon_pipeline.market.calendar import FIRST_SESSION, session

WEBSOCKET_URL = "wss://socket.massive.com/stocks"
DELAYED_URL = "wss://delayed.massive.com/stocks"
REST_URL = "https://api.massive.com"
FLAT_FILES_URL = "https://files.massive.com"
SIMULATOR_KEY = "simulator"
_KEY_NAMES = ("POLYGON_API_KEY", "MASSIVE_API_KEY")
# How long the vendor is thought to replace published files; what was seen of it, publication_sensor says.
FLAT_FILES_REPLACED_DAYS = 30
_TOKEN_CHARACTERS = 16

# In the spellings of all libraries: not each of them knows networks.
_THIS_MACHINE = "localhost,127.0.0.1,::1,127.0.0.0/8"

# Two years, of which the free plan has the history; earlier days are asked for by name, back to the vendor's first.
HISTORY_START = date(2024, 12, 2)

# A run's start takes 5 to 10 s, as long as twenty days of a watch list; a hundred whole-market days take half an hour,
# in which no other day is made. Several machines share a backfill by its runs.
DAYS_PER_RUN = 100


class ConfigurationError(Exception):
    """A variable has a value that cannot work; the text names it and says what would."""


@dataclass(frozen=True)
class Settings:
    """What the environment says. tickers: symbols, or `("*",)` for the whole market.

    websocket_url and rest_url: None for the built-in simulator's own. The flat files' three are all set or all None,
    and so are the relay's two. standby: whether a run waits while another machine collects, and takes over when that is
    gone. checkpoint_seconds: how often a run archives what it received; None for the default.
    """

    feed: str
    api_key: str = field(repr=False)
    websocket_url: str | None
    rest_url: str | None
    rest_requests_per_minute: int
    flat_files_url: str | None
    flat_files_key_id: str | None = field(repr=False)
    flat_files_secret: str | None = field(repr=False)
    tickers: tuple[str, ...]
    channels: tuple[Channel, ...]
    lake_uri: str
    journal_dir: Path
    metrics_port: int | None
    standby: bool
    checkpoint_seconds: float | None
    relay_port: int | None
    relay_token: str | None = field(repr=False)
    flat_files_replaced_days: int = FLAT_FILES_REPLACED_DAYS

    @property
    def is_simulated(self) -> bool:
        return self.feed == "simulated"

    @property
    def time_base(self) -> Literal["processing", "event"]:
        """Which time says what a connection covered: a simulator may play a past day, faster than the clock."""
        return "event" if self.is_simulated else "processing"

    @property
    def is_demo(self) -> bool:
        """Whether the built-in simulator is the feed."""
        return self.websocket_url is None

    @property
    def is_whole_market(self) -> bool:
        return self.tickers == ("*",)

    @property
    def topics(self) -> list[str]:
        """The subscriptions, such as `AM.SPY`."""
        return [f"{channel}.{ticker}" for channel in self.channels for ticker in self.tickers]


@dataclass(frozen=True)
class AlertReceivers:
    """Who is told what is wrong; each may be missing. The webhook's URL and smtp_url hold secrets."""

    webhook: str | None = field(default=None, repr=False)
    smtp_url: str | None = field(default=None, repr=False)
    sender: str = ""
    recipients: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.webhook or self.smtp_url)


def alert_receivers(environment: Mapping[str, str]) -> AlertReceivers:
    """The POLYGON_ALERT_* variables. Raises ConfigurationError, which shows none of their secrets."""
    webhook = environment.get("POLYGON_ALERT_WEBHOOK", "").strip() or None
    smtp_url = environment.get("POLYGON_ALERT_SMTP_URL", "").strip() or None
    recipients = _addresses("POLYGON_ALERT_TO", environment)
    sender = _addresses("POLYGON_ALERT_FROM", environment) or recipients[:1]
    if webhook:
        _require_encrypted("POLYGON_ALERT_WEBHOOK", webhook, "https", "http", environment)
    if smtp_url:
        # smtp:// becomes TLS before anything is sent; where the server is on this machine it need not.
        _parts("POLYGON_ALERT_SMTP_URL", smtp_url, "smtps", "smtp")
    if bool(smtp_url) != bool(recipients):
        raise ConfigurationError(
            "For alerts by mail both POLYGON_ALERT_SMTP_URL (smtps://[user:password@]host) and POLYGON_ALERT_TO "
            "(addresses, comma-separated) must be set."
        )
    if len(sender) > 1:
        raise ConfigurationError("POLYGON_ALERT_FROM must be one address.")
    return AlertReceivers(webhook, smtp_url, sender[0] if sender else "", recipients)


def _addresses(variable: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in environment.get(variable, "").split(",") if name.strip())
    if wrong := next((name for name in names if not re.fullmatch(r"[!-~]+@[!-~]+", name)), None):
        raise ConfigurationError(f"{variable} has {wrong!r}, which is no address such as name@example.com.")
    return names


def is_simulated(environment: Mapping[str, str]) -> bool:
    """Whether the feed is simulated: no key is set, or the simulator's name."""
    return _keys(environment) <= {SIMULATOR_KEY}


def _keys(environment: Mapping[str, str]) -> set[str]:
    """The vendor's key under each of its names: one, unless they differ; none where neither is set."""
    return {environment.get(name, "").strip() for name in _KEY_NAMES} - {""}


def _api_key(environment: Mapping[str, str]) -> str:
    """The key to use. Raises ConfigurationError, which shows none."""
    keys = _keys(environment)
    if len(keys) > 1:
        raise ConfigurationError(
            f"{' and '.join(_KEY_NAMES)} are two names of the vendor's key, and are set to different values. Unset one."
        )
    return next(iter(keys), SIMULATOR_KEY)


def load(environment: Mapping[str, str]) -> Settings:
    """Reads the variables. Raises ConfigurationError for a value that cannot work; nothing is contacted."""
    simulated = is_simulated(environment)
    websocket_url = environment.get("POLYGON_WEBSOCKET_URL") or (None if simulated else WEBSOCKET_URL)
    rest_url = environment.get("POLYGON_REST_URL") or (None if simulated else REST_URL)
    flat_files_url, flat_files_key_id, flat_files_secret = _flat_files(environment)
    relay_port, relay_token = _relay(environment)
    if websocket_url:
        require_private("POLYGON_WEBSOCKET_URL", websocket_url, "wss", "ws", environment)
        _require_stocks(websocket_url)
    if rest_url:
        require_private("POLYGON_REST_URL", rest_url, "https", "http", environment)
    night_session_from(environment)
    days_per_run(environment)
    revision_minutes(environment)
    return Settings(
        feed="simulated" if simulated else "polygon",
        api_key=_api_key(environment),
        websocket_url=websocket_url,
        rest_url=rest_url,
        rest_requests_per_minute=parse_requests(environment.get("POLYGON_REST_REQUESTS_PER_MINUTE") or "5"),
        flat_files_url=flat_files_url,
        flat_files_key_id=flat_files_key_id,
        flat_files_secret=flat_files_secret,
        tickers=_tickers(environment),
        channels=channels(environment),
        lake_uri=lake_uri(environment),
        journal_dir=Path(environment.get("JOURNAL_DIR") or "var/journal").resolve(),
        metrics_port=_port("POLYGON_METRICS_PORT", environment),
        standby=_standby(environment),
        relay_port=relay_port,
        relay_token=relay_token,
        flat_files_replaced_days=_replaced_days(environment),
        checkpoint_seconds=_checkpoint_seconds(environment),
    )


def channels(environment: Mapping[str, str]) -> tuple[Channel, ...]:
    """POLYGON_CHANNELS. Raises ConfigurationError."""
    return parse_channels(environment.get("POLYGON_CHANNELS", Channel.MINUTE).split(","))


def history_start(environment: Mapping[str, str]) -> date:
    """POLYGON_HISTORY_START: the first day that is a partition. Raises ConfigurationError."""
    text = environment.get("POLYGON_HISTORY_START", "").strip()
    if not text:
        return HISTORY_START
    try:
        found = date.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.isoformat() != text or found < FIRST_SESSION:
        raise ConfigurationError(
            f"POLYGON_HISTORY_START is {text!r}; it must be a date, YYYY-MM-DD, from {FIRST_SESSION} on."
        )
    return found


def night_session_from(environment: Mapping[str, str]) -> date | None:
    """POLYGON_NIGHT_SESSION_FROM, which market.hours reads by itself. Raises ConfigurationError."""
    text = environment.get(hours.VARIABLE, "").strip()
    if not text:
        return None
    try:
        found = date.fromisoformat(text)
    except ValueError:
        found = None
    first = FIRST_SESSION if is_simulated(environment) else hours.EARLIEST_NIGHT
    if found is None or found.isoformat() != text or found < first or session(found) is None:
        raise ConfigurationError(
            f"{hours.VARIABLE} is {text!r}; it must be the first trade date with a night session: a trading day, "
            f"YYYY-MM-DD, from {first} on. Leave it unset while that day is not announced."
        )
    return found


def revision_minutes(environment: Mapping[str, str]) -> int:
    """POLYGON_REVISION_MINUTES, which market.revisions reads by itself. Raises ConfigurationError."""
    text = environment.get(revisions.VARIABLE, "").strip() or str(revisions.USUAL_MINUTES)
    found = revisions.parsed(text)
    if found is None:
        raise ConfigurationError(
            f"{revisions.VARIABLE} is {text!r}; it must be a whole number from 1 to {revisions.LONGEST_MINUTES}: for "
            "how many minutes after its end a bar is waited for that is revised."
        )
    return found


def days_per_run(environment: Mapping[str, str]) -> int:
    """POLYGON_DAYS_PER_RUN: how many days a backfill's run makes at the most. Raises ConfigurationError."""
    text = environment.get("POLYGON_DAYS_PER_RUN", "").strip() or str(DAYS_PER_RUN)
    if not (re.fullmatch("[0-9]{1,3}", text) and int(text) >= 1):
        raise ConfigurationError(f"POLYGON_DAYS_PER_RUN is {text!r}; it must be a whole number from 1 to 999.")
    return int(text)


def lake_uri(environment: Mapping[str, str]) -> str:
    """LAKE_URI. Raises ConfigurationError where a simulated feed would fill an S3 lake without being asked to."""
    uri = environment.get("LAKE_URI") or Path("var/lake").resolve().as_uri()
    if uri.lower().startswith("s3://") and not _keys(environment):
        raise ConfigurationError(
            f"LAKE_URI is {uri}, but without POLYGON_API_KEY the feed would be simulated. Set it (or MASSIVE_API_KEY) "
            f"to collect the market, or to {SIMULATOR_KEY!r} to put simulated data there on purpose."
        )
    return uri


def _tickers(environment: Mapping[str, str]) -> tuple[str, ...]:
    names = environment.get("POLYGON_TICKERS", "")
    if not names.strip():
        raise ConfigurationError(
            "POLYGON_TICKERS is not set. Name the tickers to collect, such as SPY,BRK.B, or * for the whole market."
        )
    return parse_tickers(names.split(","))


def parse_tickers(names: list[str]) -> tuple[str, ...]:
    """Symbols in their own case, without repeats, or `("*",)`."""
    tickers = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not tickers:
        raise ConfigurationError("POLYGON_TICKERS is empty. Name tickers, such as SPY,BRK.B, or * for all.")
    if "*" in tickers:
        return ("*",)
    for ticker in tickers:
        if error := ticker_error(ticker):
            raise ConfigurationError(f"POLYGON_TICKERS has {ticker!r}: {error}.")
    return tickers


def parse_channels(names: list[str]) -> tuple[Channel, ...]:
    known = {str(channel): channel for channel in Channel}
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted or any(name not in known for name in wanted):
        raise ConfigurationError(f"POLYGON_CHANNELS is {','.join(names)!r}; it must be AM, A or AM,A.")
    return tuple(dict.fromkeys(known[name] for name in wanted))


def parse_requests(text: str) -> int:
    """Requests a minute, up to a hundred a second."""
    if not (re.fullmatch("[0-9]{1,4}", text.strip()) and 1 <= int(text) <= 6000):
        raise ConfigurationError(
            f"POLYGON_REST_REQUESTS_PER_MINUTE is {text!r}; it must be a whole number from 1 to 6000. A free plan "
            "allows 5, a paid one a hundred a second: 6000."
        )
    return int(text)


def _port(variable: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(variable, "").strip()
    if not text:
        return None
    if not (re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= 65_535):
        raise ConfigurationError(f"{variable} is {text!r}; it must be a port from 1 to 65535.")
    return int(text)


def _standby(environment: Mapping[str, str]) -> bool:
    text = environment.get("POLYGON_STANDBY", "").strip().lower()
    if text not in ("", "yes", "no"):
        raise ConfigurationError(f"POLYGON_STANDBY is {text!r}; it must be yes or no.")
    return text == "yes"


def _replaced_days(environment: Mapping[str, str]) -> int:
    text = environment.get("POLYGON_FLAT_FILES_REPLACED_DAYS", "").strip() or str(FLAT_FILES_REPLACED_DAYS)
    if not (re.fullmatch("[0-9]{1,3}", text) and 1 <= int(text) <= 366):
        raise ConfigurationError(
            f"POLYGON_FLAT_FILES_REPLACED_DAYS is {text!r}; it must be a number of days from 1 to 366."
        )
    return int(text)


def _relay(environment: Mapping[str, str]) -> tuple[int | None, str | None]:
    """The relay's port and its token; the errors show nothing of the token."""
    port = _port("POLYGON_RELAY_PORT", environment)
    if port is None:
        return None, None
    token = environment.get("POLYGON_RELAY_TOKEN", "").strip()
    if len(token) < _TOKEN_CHARACTERS or not token.isascii():
        raise ConfigurationError(
            f"POLYGON_RELAY_PORT is set, so POLYGON_RELAY_TOKEN must be, to {_TOKEN_CHARACTERS} or more characters of "
            "ASCII: readers send it in the place of the vendor's key. Make one with: openssl rand -hex 16"
        )
    vendors = ("POLYGON_API_KEY", "MASSIVE_API_KEY", "POLYGON_FLAT_FILES_SECRET")
    if token in {environment.get(name, "").strip() for name in vendors}:
        raise ConfigurationError(
            "POLYGON_RELAY_TOKEN is a key of the vendor's, which every reader would know. Make one of its own with: "
            "openssl rand -hex 16"
        )
    return port, token


def _checkpoint_seconds(environment: Mapping[str, str]) -> float | None:
    text = environment.get("POLYGON_CHECKPOINT_SECONDS", "").strip()
    if not text:
        return None
    if not (re.fullmatch("[0-9]{1,4}", text) and 5 <= int(text) <= 3600):
        raise ConfigurationError(
            f"POLYGON_CHECKPOINT_SECONDS is {text!r}; it must be a whole number from 5 to 3600: so many seconds of "
            "frames at the most are lost with a disk."
        )
    return float(text)


def _flat_files(environment: Mapping[str, str]) -> tuple[str | None, str | None, str | None]:
    """The flat files' URL, key id and secret."""
    key_id = environment.get("POLYGON_FLAT_FILES_KEY_ID", "").strip() or None
    secret = environment.get("POLYGON_FLAT_FILES_SECRET", "").strip() or None
    url = environment.get("POLYGON_FLAT_FILES_URL") or (FLAT_FILES_URL if key_id else None)
    if len({bool(url), bool(key_id), bool(secret)}) > 1:
        raise ConfigurationError(
            "For flat files both POLYGON_FLAT_FILES_KEY_ID and POLYGON_FLAT_FILES_SECRET must be set, a key pair of "
            "its own beside the API key; without flat files neither of them, nor POLYGON_FLAT_FILES_URL."
        )
    if url:
        require_private("POLYGON_FLAT_FILES_URL", url, "https", "http", environment)
    return url, key_id, secret


def keep_proxies_off_this_machine(environment: MutableMapping[str, str]) -> None:
    """Adds this machine and the ALLOW_PLAINTEXT_HOSTS to NO_PROXY: the clients' libraries would ask a proxy of the
    environment even for them, and the key would leave unencrypted. Raises ConfigurationError."""
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    private = ",".join((*plaintext_hosts(environment), _THIS_MACHINE))
    if excluded != "*" and not excluded.endswith(private):
        excluded = ",".join(filter(None, (excluded, private)))
    environment["no_proxy"] = environment["NO_PROXY"] = excluded


def plaintext_hosts(environment: Mapping[str, str]) -> tuple[str, ...]:
    """ALLOW_PLAINTEXT_HOSTS: the hosts of a private network that need no encryption, as names, addresses or endings
    such as `.internal`. Raises ConfigurationError."""
    names = tuple(name.strip().lower() for name in environment.get("ALLOW_PLAINTEXT_HOSTS", "").split(","))
    for name in filter(None, names):
        if not re.fullmatch(r"\.?[a-z0-9]([a-z0-9._:-]*[a-z0-9])?", name):
            raise ConfigurationError(
                f"ALLOW_PLAINTEXT_HOSTS has {name!r}; it must be names of hosts of a private network, or their endings "
                "such as .internal, comma-separated."
            )
    return tuple(filter(None, names))


def require_private(variable: str, url: str, secure: str, plain: str, environment: Mapping[str, str]) -> None:
    """The URL must be encrypted, or lead to this machine or one of the ALLOW_PLAINTEXT_HOSTS: keys and data go over
    nothing else."""
    parts = _parts(variable, url, secure, plain)
    if parts.username or parts.password or parts.query:
        raise ConfigurationError(f"{variable} must hold no credentials, because URLs are logged.")
    _require_encrypted(variable, url, secure, plain, environment)


def _require_stocks(websocket_url: str) -> None:
    """The vendor's feeds of other markets speak the same protocol, and their bars are no stocks'."""
    parts = urlsplit(websocket_url)
    if f".{parts.hostname}".endswith((".massive.com", ".polygon.io")) and parts.path.rstrip("/") != "/stocks":
        raise ConfigurationError(
            f"POLYGON_WEBSOCKET_URL is a feed of {parts.path.strip('/') or 'nothing'}; only stocks are collected, real "
            f"time ({WEBSOCKET_URL}) or delayed ({DELAYED_URL})."
        )


def _parts(variable: str, url: str, secure: str, plain: str) -> SplitResult:
    """The URL's parts; what it says is in no error, as it may hold a secret."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        raise ConfigurationError(f"{variable} is not a {secure}:// URL.") from None
    if not parts.hostname or parts.scheme not in (secure, plain):
        raise ConfigurationError(f"{variable} is not a {secure}:// URL.")
    return parts


def _require_encrypted(variable: str, url: str, secure: str, plain: str, environment: Mapping[str, str]) -> None:
    parts = _parts(variable, url, secure, plain)
    host = parts.hostname or ""
    if parts.scheme == plain and not (_is_loopback(host) or _is_named(host, plaintext_hosts(environment))):
        raise ConfigurationError(
            f"{variable} is {plain}:// to {host}; unencrypted {plain}:// serves this machine, and hosts of a private "
            f"network that ALLOW_PLAINTEXT_HOSTS names. Use {secure}://."
        )


def _is_named(host: str, names: tuple[str, ...]) -> bool:
    return any(host == name or (name.startswith(".") and host.endswith(name)) for name in names)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
