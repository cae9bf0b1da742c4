"""The alerts' sensor against a real instance, a real web server and a real mail server: each cause arrives, and its end
does; nothing else, nothing twice, and no secret."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from dagster_aws.s3 import S3Resource

from polygon_pipeline.alerts.causes import DISK_LIMIT_BYTES
from polygon_pipeline.alerts.telling import Memory
from polygon_pipeline.collector.lease import CollectorStatus
from polygon_pipeline.defs import alerts
from polygon_pipeline.defs.collect import SESSION_DATE_TAG
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake import layout
from polygon_pipeline.lake.ledger import SESSION_OVER, Account, Connection, encode_ledger
from polygon_pipeline.market.calendar import session
from polygon_pipeline_tests.support.bars import DAY
from polygon_pipeline_tests.support.leases import holding
from polygon_pipeline_tests.support.ledgers import ledger_of
from polygon_pipeline_tests.support.receivers import SECRET_PATH, MailServer, Webhook, mail_server, webhook

_MINUTE = timedelta(minutes=1)
_PASSWORD = "a-mail-secret"
_RunsFilter = dg.RunsFilter


class Watchman:
    """Ticks of the sensor, a minute apart, and what they tell."""

    def __init__(self, instance: dg.DagsterInstance, lake: Path, chat: Webhook, mails: MailServer) -> None:
        self.instance = instance
        self.lake = lake
        self.chat = chat
        self.mails = mails
        self.now = datetime.now(UTC) - timedelta(hours=2)  # so that what happens in a test is never long ago
        self.cursor: str | None = None
        self.said = ""

    def tick(self, ticks: int = 1) -> list[str]:
        """What arrived in the chat; the mails say the same."""
        before, mailed = len(self.chat.texts), len(self.mails.mails)
        for _ in range(ticks):
            self.said = self._tick()
            self.now += _MINUTE
        arrived = [line for text in self.chat.texts[before:] for line in text.splitlines()[1:]]
        assert arrived == [
            line for found in self.mails.mails[mailed:] for line in found.get_content().splitlines() if line
        ]
        return arrived

    def _tick(self) -> str:
        resources = {"polygon": PolygonResource(), "lake": LakeResource(s3=S3Resource())}
        with dg.build_sensor_context(self.instance, self.cursor, resources=resources) as context:
            result = alerts.alerts_sensor(context)
        if isinstance(result, dg.SensorResult):
            self.cursor = result.cursor
            assert isinstance(result.skip_reason, dg.SkipReason)
            return result.skip_reason.skip_message or ""
        assert isinstance(result, dg.SkipReason)
        return result.skip_message or ""

    def end_run(self, succeeded: bool, job: str = "datasets", **tags: str) -> str:
        @dg.job(name=job)
        def a_job() -> None: ...

        run = self.instance.create_run_for_job(a_job, tags=tags)
        if succeeded:
            self.instance.handle_new_event(_success(run))
        else:
            self.instance.report_run_failed(run, "the error's own words")
        return run.run_id[:8]

    def renew_lease(self, released: bool = False, **status: object) -> None:
        lease = msgspec.structs.replace(
            holding(now=self.now, released=released),
            status=CollectorStatus(**status),  # type: ignore[arg-type]
        )
        (self.lake / layout.LEASE_KEY).write_bytes(msgspec.json.encode(lease))


def _success(run: dg.DagsterRun) -> dg.EventLogEntry:
    event = dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_SUCCESS.value, job_name=run.job_name)
    return dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None,
        level=logging.INFO,
        user_message="",
        run_id=run.run_id,
        timestamp=datetime.now(UTC).timestamp(),
        job_name=run.job_name,
        dagster_event=event,
    )


@pytest.fixture
def watchman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watchman]:
    """One who has looked once, and found nothing wrong."""
    (tmp_path / "lake").mkdir()
    (tmp_path / "journal").mkdir()
    with dg.instance_for_test() as instance, webhook() as chat, mail_server() as mails:
        mails.password = _PASSWORD.encode()
        for name, value in {
            "POLYGON_ALERT_WEBHOOK": chat.url,
            "POLYGON_ALERT_SMTP_URL": mails.url(f"me:{_PASSWORD}@"),
            "POLYGON_ALERT_TO": "one@example.com, two@example.com",
            "LAKE_URI": (tmp_path / "lake").as_uri(),
            "JOURNAL_DIR": str(tmp_path / "journal"),
        }.items():
            monkeypatch.setenv(name, value)
        found = Watchman(instance, tmp_path / "lake", chat, mails)
        monkeypatch.setattr(alerts, "_now", lambda: found.now)
        assert found.tick() == []
        assert found.said == "nothing is wrong"
        yield found


def test_a_run_that_fails_is_told_once_and_so_is_its_success(watchman: Watchman) -> None:
    run = watchman.end_run(False, **{"dagster/partition": "2026-01-26"})
    assert watchman.tick(3) == [f"Run {run} of datasets failed (2026-01-26). Dagster has its error."]
    watchman.end_run(True, **{"dagster/partition": "2026-01-26"})
    [over] = watchman.tick(20)
    assert over.startswith(f"Over: Run {run}")


def test_a_run_of_a_partition_that_is_no_day_can_fail_too(watchman: Watchman) -> None:
    run = watchman.end_run(False, "my_own", **{"dagster/partition": "BRK.B"})
    assert watchman.tick() == [f"Run {run} of my_own failed. Dagster has its error."]


def test_runs_from_before_the_first_look_are_not_told(watchman: Watchman) -> None:
    watchman.end_run(False)
    watchman.cursor, watchman.now = None, datetime.now(UTC)
    assert watchman.tick(3) == []


def test_a_failure_that_dagster_tries_again_by_itself_is_not_told(watchman: Watchman) -> None:
    watchman.end_run(False, **{"dagster/will_retry": "true"})
    assert watchman.tick(3) == []


def test_a_run_that_is_tagged_long_after_its_end_is_not_told_again(
    watchman: Watchman, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tagging updates it; here the storage says that everything was updated just now."""
    run = watchman.end_run(False)
    assert len(watchman.tick(5)) == 1
    memory = Memory.parse(watchman.cursor)
    memory.failures, memory.open, memory.runs = {}, {}, []  # as when it is over
    watchman.cursor, watchman.now = msgspec.json.encode(memory).decode(), datetime.now(UTC) + timedelta(days=14)
    watchman.tick()
    [record] = watchman.instance.get_run_records()
    assert record.dagster_run.run_id.startswith(run)
    watchman.instance.add_run_tags(record.dagster_run.run_id, {"polygon_pipeline/logs_cleared": "yes"})
    monkeypatch.setattr(dg, "RunsFilter", lambda statuses, updated_after: _RunsFilter(statuses=statuses))
    assert watchman.tick(3) == []


def test_a_collector_that_died_is_told_and_so_is_its_successor(watchman: Watchman) -> None:
    watchman.renew_lease(connected=True)
    assert watchman.tick(4) == []
    [dead] = watchman.tick(3)
    assert "The collector is dead" in dead
    for _ in range(4):
        watchman.renew_lease(connected=True)
        over = watchman.tick()
    assert over == []
    assert watchman.chat.texts[-1].splitlines()[1] == f"Over: {dead}"


def test_a_collector_that_failed_and_is_at_work_again_is_over(watchman: Watchman) -> None:
    watchman.end_run(False, "collect_aggregates", **{SESSION_DATE_TAG: "2026-01-26"})
    assert len(watchman.tick()) == 1
    told = []
    for _ in range(20):
        watchman.renew_lease(connected=True)
        told += watchman.tick()
    assert len(told) == 1
    assert told[0].startswith("Over: Run ")


def test_an_eviction_is_told_and_that_bars_flow_again(watchman: Watchman) -> None:
    told = []
    for minute in range(30):
        watchman.renew_lease(evicted=minute == 0, connected=minute > 0)
        told += watchman.tick()
    assert len(told) == 2
    assert told[0].startswith("Another connection has taken the feed over")
    assert told[1] == f"Over: {told[0]}"


def test_a_backlog_that_grows_older_than_minutes_is_told(watchman: Watchman) -> None:
    told = []
    for minute in range(20):
        waits = 400.0 if minute < 10 else 0.0
        watchman.renew_lease(connected=True, unpublished_seconds=waits, backlog_bytes=3 * 2**20)
        told += watchman.tick()
    assert len(told) == 2
    assert told[0].startswith("Bars wait on disk: the oldest for 7 minutes, 3.0 MiB in all")
    assert told[1].startswith("Over: Bars wait")


def test_a_day_that_is_not_complete_by_its_deadline_is_told_until_it_is(watchman: Watchman) -> None:
    hours = session(DAY)
    assert hours
    watchman.cursor, watchman.now = None, hours.open
    assert watchman.tick() == []
    watchman.now = datetime(2026, 1, 27, 16, 58, tzinfo=UTC)  # 11:58 New York
    assert watchman.tick() == []
    [late] = watchman.tick(12)
    assert late.startswith("2026-01-26 is partial although it should be complete by now: not known, New York: 04:00")
    all_day = Account(
        connections=[Connection(hours.pre_open - _MINUTE, hours.post_close + _MINUTE)],
        ended_by=SESSION_OVER,
        last_received_at=hours.post_close + _MINUTE,
    )
    ledger = watchman.lake / layout.ledger_key(DAY, "RUN")
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(encode_ledger(ledger_of(all_day, topics=("AM.SPY",))))
    assert watchman.tick(12) == [f"Over: {late}"]
    assert watchman.tick(12) == []


def test_a_disk_below_its_limit_is_told(watchman: Watchman, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(watchman.lake)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=DISK_LIMIT_BYTES // 2))
        [told] = watchman.tick(5)
    assert "has 1.0 GiB left" in told
    assert watchman.tick(5) == [f"Over: {told}"]


def test_a_lake_that_is_away_is_told_and_makes_nobody_dead(watchman: Watchman) -> None:
    watchman.renew_lease(connected=True)
    assert watchman.tick() == []
    elsewhere = watchman.lake.rename(watchman.lake.with_name("elsewhere"))
    watchman.lake.touch()
    [told] = watchman.tick(10)
    assert "cannot be read" in told
    watchman.lake.unlink()
    elsewhere.rename(watchman.lake)
    assert watchman.tick(2) == []
    watchman.renew_lease(connected=True)
    assert watchman.tick(2) == [f"Over: {told}"]


def test_a_wrong_variable_is_told_by_name(watchman: Watchman, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_CHANNELS", "a-key-in-the-wrong-place")
    [told] = watchman.tick(2)
    assert "POLYGON_CHANNELS" in told
    assert "wrong-place" not in told


def test_a_receiver_that_is_away_fails_no_tick_and_gets_all_of_it_when_it_is_back(
    watchman: Watchman, caplog: pytest.LogCaptureFixture
) -> None:
    watchman.chat.answers = 503
    run = watchman.end_run(False)
    with pytest.raises(AssertionError):  # the mail goes out, the post does not
        watchman.tick()
    assert "503" in watchman.said
    assert len(watchman.mails.mails) == 1
    watchman.chat.answers = 200
    watchman._tick()
    assert run in watchman.chat.texts[-1]
    assert len(watchman.mails.mails) == 1


def test_no_secret_is_in_a_message_the_cursor_or_a_tick(
    watchman: Watchman, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "simulator")
    watchman.end_run(False)
    watchman.tick()
    watchman.chat.answers, watchman.mails.password = 500, b"another"
    watchman.end_run(False, "another")
    watchman.said = watchman._tick()
    assert re.search(r"next try \d\d:\d\d New York", watchman.said)
    printed = capfd.readouterr()
    shown = [watchman.cursor or "", watchman.said, printed.out, printed.err, *watchman.chat.texts]
    shown += [found.as_string() for found in watchman.mails.mails]
    for text in shown:
        assert SECRET_PATH not in text
        assert _PASSWORD not in text
    assert all("the error's own words" not in text for text in watchman.chat.texts)


def test_without_a_receiver_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it would ask is not there."""
    monkeypatch.setattr(alerts, "_look", None)
    with dg.build_sensor_context(resources={"polygon": PolygonResource(), "lake": LakeResource(s3=S3Resource())}) as at:
        result = alerts.alerts_sensor(at)
    assert isinstance(result, dg.SkipReason)
    assert "POLYGON_ALERT_WEBHOOK" in (result.skip_message or "")
