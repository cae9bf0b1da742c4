"""What `make dev` shows of Dagster's output, and what it does not start. The lines are Dagster's own, of 1.13.27."""

from __future__ import annotations

import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polygon_pipeline import demo, settings, terminal
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.terminal import banner, shown
from polygon_pipeline_tests.support.bars import aggregate
from polygon_pipeline_tests.support.journals import finished_journal, frame_of, publish_leftovers
from polygon_pipeline_tests.support.s3_server import free_ports

RUN = "8175b33f-6f30-4451-897d-b5a21fd01a65"


def line(level: str, text: str, logger: str = "dagster") -> str:
    return f"2026-11-25 03:38:45 +0000 - {logger} - {level} - {text}"


def of_run(level: str, text: str, job: str = "collect_aggregates", step: str = "collect_aggregates") -> str:
    """What a run logs."""
    return line(level, f"{job} - {RUN} - {step} - {text}")


def event(level: str, kind: str, text: str, job: str = "collect_aggregates", step: str = " - a_step") -> str:
    return line(level, f"{job} - {RUN} - 8126{step} - {kind} - {text}")


STACK = [
    "",
    "Stack Trace:",
    '  File "/somewhere/dagster/_core/execution/plan/execute_plan.py", line 243, in dagster_event_sequence_for_step',
    "    yield from check.generator(step_events)",
    "",
]
SENTENCE = "dagster._core.definitions.events.Failure: The bucket does not exist. Create it."
CAUSE = "The above exception was caused by the following exception:"
FAILED_STEP = [event("ERROR", "STEP_FAILURE", 'Execution of step "a_step" failed.', job="datasets"), ""]
FAILED_RUN = [event("ERROR", "RUN_FAILURE", "Steps failed: ['a_step'].", job="datasets", step=""), ""]


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (of_run("INFO", "subscribed: 12 of 12 topics"), ["22:38:45 subscribed: 12 of 12 topics"]),
        (of_run("WARNING", "disconnected - no answer"), ["22:38:45 WARNING disconnected - no answer"]),
        (event("DEBUG", "ASSET_MATERIALIZATION", "14:42 New York: 1 bar"), ["22:38:45 14:42 New York: 1 bar"]),
        (event("DEBUG", "ASSET_MATERIALIZATION", "Materialized value bars_5m.", job="datasets"), []),
        (event("DEBUG", "RUN_START", "Started execution of run.", step=""), []),
        (event("DEBUG", "STEP_START", "Started execution of step."), []),
        (
            of_run("INFO", "12 of 12 tickers fetched", job="reference", step="reference_bars"),
            ["22:38:45 reference_bars: 12 of 12 tickers fetched"],
        ),
        (
            line("INFO", "__repository__ - repair_sensor - 2026-11-18: a gap"),
            ["22:38:45 repair_sensor: 2026-11-18: a gap"],
        ),
        (line("WARNING", "No cursor for event type X, ignoring older events", "dagster.daemon.EventLogConsumer"), []),
        (line("ERROR", "The disk is full", "dagster.daemon"), ["22:38:45 ERROR The disk is full"]),
        ("\x1b[32m2026-11-25 03:38:45 +0000\x1b[0m - dagster - \x1b[34mINFO\x1b[0m - Shutting down Dagster", []),
        (event("ERROR", "RUN_CANCELED", "Run was canceled. Failed steps: ['a_step'].", step=""), []),
        ("Address already in use", ["Address already in use"]),
    ],
)
def test_what_concerns_the_market_is_shown_without_run_ids_in_new_yorks_time(said: str, seen: list[str]) -> None:
    assert list(shown([said])) == seen


def test_a_failed_run_is_two_lines_whatever_caused_it() -> None:
    told = [SENTENCE, *STACK, CAUSE, "a_package.errors.LakeError: The bucket does not exist. Create it.", *STACK]
    assert list(shown([*FAILED_STEP, *told, *FAILED_RUN, *told])) == [
        "22:38:45 ERROR a_step: The bucket does not exist. Create it.",
        "22:38:45 ERROR datasets: Steps failed: ['a_step'].",
    ]


def test_an_error_that_nobody_foresaw_has_its_kind_and_its_cause() -> None:
    unforeseen = 'dagster._core.errors.DagsterExecutionStepExecutionError: Error occurred while executing op "a_step":'
    lines = [*FAILED_STEP, unforeseen, *STACK, CAUSE, "ValueError: 3 is no price", *STACK]
    assert list(shown(lines)) == [f"22:38:45 ERROR a_step: {unforeseen}", "ValueError: 3 is no price"]


def test_an_error_of_another_process_is_not_taken_for_a_cause() -> None:
    lines = [*FAILED_STEP, SENTENCE, line("INFO", "something else"), "OSError: the disk is full"]
    assert list(shown(lines))[-1] == "OSError: the disk is full"


def test_ctrl_c_leaves_no_stacks() -> None:
    assert (
        list(
            shown(
                [
                    "Traceback (most recent call last):",
                    '  File "/somewhere/watch_orphans.py", line 42, in <module>',
                    line("INFO", "Received interrupt, shutting down daemon threads...", "dagster.daemon"),
                    "    watch(sys.argv[1:])",
                    "KeyboardInterrupt",
                    "dagster._core.errors.DagsterExecutionInterruptedError",
                ]
            )
        )
        == []
    )


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)))
def test_a_line_of_an_unknown_kind_is_shown_as_it_is(lines: list[str]) -> None:
    unknown = [f"libsomething: {text}" for text in lines]
    assert list(shown(unknown)) == unknown


def test_the_banner_says_what_runs_and_has_no_key(tmp_path: Path) -> None:
    demos = banner(settings.load(demo.with_defaults({})), "http://127.0.0.1:3000", tmp_path / "dev.log")
    assert re.search(r"feed +SIMULATED", demos)
    assert "AAPL, AMZN" in demos
    live = settings.load({"POLYGON_API_KEY": "a-secret-key", "POLYGON_TICKERS": "*", "LAKE_URI": "s3://bucket/lake"})
    lives = banner(live, "http://127.0.0.1:3000", tmp_path / "dev.log")
    for part in ("LIVE, wss://", "the whole market", "s3://bucket/lake", str(live.journal_dir), ":3000", "Ctrl-C"):
        assert part in lives
    assert "a-secret-key" not in lives


def test_a_wrong_variable_and_a_taken_port_are_named_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "command", lambda port: pytest.fail("it was started"))
    environment = {"DAGSTER_HOME": str(tmp_path)}
    assert terminal.main([], {**environment, "POLYGON_CHANNELS": "T"}) == 2
    assert "POLYGON_CHANNELS" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert terminal.main(["--port", str(port)], environment) == 2
    assert f"Port {port} cannot be used" in capsys.readouterr().out


def test_all_of_the_output_is_kept_and_the_exit_code_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [of_run("INFO", "connected: the socket is open"), event("DEBUG", "STEP_START", "Started.")]
    script = f"import sys; print({chr(10).join(said)!r}, file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(terminal, "command", lambda port: [sys.executable, "-c", script])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests have their own
    environment = {"DAGSTER_HOME": str(tmp_path), "JOURNAL_DIR": str(tmp_path / "journal")}
    assert terminal.main(["--port", str(free_ports(1)[0])], environment) == 3
    shown_lines = capsys.readouterr().out.splitlines()
    assert shown_lines[-2:] == [
        "22:38:45 connected: the socket is open",
        "Stopped. Everything that was received is on the lake.",
    ]
    assert (tmp_path / "dev.log").read_text().splitlines() == said


def test_at_its_end_it_says_what_waits_in_the_journal(file_lake: Lake, tmp_path: Path) -> None:
    finished_journal(tmp_path / "journal", file_lake, [frame_of(aggregate())])
    said = terminal._left(tmp_path / "journal")
    assert re.fullmatch(r"\d+ bytes of what was received wait in .*; the next start here publishes them\.", said)
    publish_leftovers(file_lake, tmp_path / "journal")  # it was only looked at
    assert terminal._left(tmp_path / "journal") == "Everything that was received is on the lake."
