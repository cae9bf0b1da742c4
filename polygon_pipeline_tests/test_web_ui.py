"""The web UI in a real browser: what a person reads there of a day, a failed check, a terminated run and a sensor.

With SCREENSHOTS=docs (`make screenshots`) the test writes there what it has looked at: the pictures of the README and
of docs/pictures.md.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake
from polygon_pipeline.market.bars import Channel
from polygon_pipeline.market.calendar import completed_sessions, session
from polygon_pipeline_tests.support.dagster_dev import DagsterDev
from polygon_pipeline_tests.support.waiting import until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium is installed: the web UI cannot be looked at here"),
]

_MODULE = "polygon_pipeline_tests.support.fast_demo"
_FAST_DEMO = {
    "POLYGON_API_KEY": "simulator",
    "FAST_DEMO_SESSIONS": "2",
    "FAST_DEMO_SPEED": "2500",  # a session takes 23 seconds
    "FAST_DEMO_CHECKPOINT": "3",
    "FAST_DEMO_DRAIN": "1",
    "FAST_DEMO_SENSORS": "5",
}
# Objects, of some 8,900 of the day: the connection that the demo loses is behind.
_TERMINATED_AFTER = 3500
_FLAGS = [
    "--no-sandbox",  # which Chromium cannot have as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_WIDTH, _HEIGHT = 1440, 1000
# What is drawn, animated and asked for by then is not in a screenshot.
_SETTLED_MS = 2000
_SCREENSHOTS = os.environ.get("SCREENSHOTS")
_LARGEST_PICTURE = 50_000
_PICTURES = {
    "session_report": "session_minutes",
    "normalized_bars": "candlesticks",
    "daily_bars": "market_day",
    "bar_coverage": "heat_map",
}


@pytest.fixture
def dev(tmp_path: Path, file_lake: Lake) -> Iterator[DagsterDev]:
    dev = DagsterDev(tmp_path, file_lake, _MODULE)
    try:
        dev.start(**_FAST_DEMO)
        yield dev
    finally:
        dev.close()


@pytest.fixture
def page(dev: DagsterDev) -> Iterator[Page]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS)
        context = browser.new_context(
            base_url=dev.url,
            viewport={"width": _WIDTH, "height": _HEIGHT},
            timezone_id="America/New_York",
            locale="en-US",
        )
        context.set_default_timeout(60_000)
        yield context.new_page()
        browser.close()


@pytest.mark.timeout(600)
def test_a_person_reads_how_the_days_went_and_what_was_wrong(dev: DagsterDev, page: Page, file_lake: Lake) -> None:
    whole, cut_short = completed_sessions(datetime.now(UTC), 2)
    half = f"half of {cut_short} is collected"
    until(lambda: len(file_lake.keys(f"raw-data/{cut_short}/")) > _TERMINATED_AFTER, half, 180, 0.3)
    # What another program would have left.
    file_lake.put(layout.raw_key(Channel.MINUTE, cut_short, "IBM", _noon_ms(cut_short)), b'{"source": "anoth')
    run = dev.runs()[0]["runId"]
    dev.terminate(run)
    until(lambda: [found["status"] for found in dev.runs()] == ["CANCELED", "SUCCESS"], "it is terminated", pause=0.5)

    _first_visit(page)
    _read_the_terminated_run(page, run, cut_short)
    _read_the_failed_check(page, cut_short)
    _read_the_report(page, whole)
    _look_at_the_pictures(page, whole)
    _read_the_tick(page, whole, cut_short)
    _see_the_lineage(page)


def _first_visit(page: Page) -> None:
    """A new instance shows the dialog of Dagster's community once."""
    page.goto("/runs")
    page.get_by_role("button", name="Skip").click()
    page.get_by_text("Hide navigation").click()


def _read_the_terminated_run(page: Page, run: str, day: date) -> None:
    page.goto(f"/runs/{run}")
    page.get_by_text("Run was canceled").wait_for()
    sentence = page.get_by_text("Terminated by hand at").first
    said = _text(sentence)
    assert re.search(
        r"by hand at \d\d:\d\d New York\. [\d,]+ bars, 12 of 12 tickers, 1 gap \(10:1\d to \d\d:\d\d New", said
    )
    assert "Everything that was received is on the lake." in said
    assert re.search(rf"Not collected: what the market of {day} does from now until \d\d:00\.", said)
    assert "It stays ended; launch collect_aggregates to go on." in said
    found = sentence.bounding_box()
    assert found
    _keep(page, "terminated_run", int(found["y"]) + 58)  # without the stack, which shows where things are here


def _read_the_failed_check(page: Page, day: date) -> None:
    """In the check's history, because a run of the other day may come after."""
    failed = page.get_by_role("row").filter(has_text=f"fails for {day}").first
    _visit(page, "/assets/normalized_bars?view=checks&checkDetail=every_object_readable", failed, "Execution history")
    assert "Failed" in _text(failed)
    failed.get_by_role("button").last.click()
    shown = page.get_by_role("dialog")
    shown.get_by_text("unreadable_objects").wait_for()
    assert re.search(rf"raw-data/{day}/IBM/{day}T\d\d:00:00Z\.json: Input data was truncated", _text(shown))
    _keep(page, "failed_check", 600)


def _read_the_report(page: Page, day: date) -> None:
    headline = page.get_by_text(f"{day:%A}, {day.day} {day:%B %Y}: final")
    _visit(page, f"/assets/session_report?view=partitions&partition={day}", headline)
    said = _text(page.get_by_role("row").filter(has_text="at_a_glance"))
    assert "the vendor's history of the whole session is merged" in said
    assert "feed: SIMULATED" in said
    assert re.search(r"[\d,]+ bars, 12 of 12 tickers, 04:00 to \d\d:\d\d New York, [\d,]+ shares", said)
    assert re.search(r"1 gap, New York: 10:1\d to \d\d:\d\d \(\d+ bars repaired\)", said)
    assert "every traded minute that the history knows is there" in said
    assert re.search(r"checks: (9|10) of \1 passed", said), said  # with the vendor's day, once it is there
    gap = _text(page.get_by_role("row").filter(has_text="what became of it").first)
    assert "the connection was lost: " in gap
    _keep(page, "report")


def _look_at_the_pictures(page: Page, day: date) -> None:
    for asset, name in _PICTURES.items():
        page.goto(f"/assets/{asset}?view=partitions&partition={day}")
        page.get_by_text("[Show Markdown]").first.click()
        shown = page.get_by_role("img", name=f"{asset} of {day}")
        shown.wait_for()
        content = base64.b64decode((shown.get_attribute("src") or "").removeprefix("data:image/png;base64,"))
        width, height = Image.open(BytesIO(content)).size
        assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [width, height]
        assert len(content) <= _LARGEST_PICTURE
        if _SCREENSHOTS:
            folder = Path(_SCREENSHOTS, "pictures")
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.png").write_bytes(content)


def _read_the_tick(page: Page, whole: date, cut_short: date) -> None:
    page.goto(f"/locations/{_MODULE}/sensors/market_session_sensor")
    page.get_by_role("button", name="0 runs requested").first.click()
    played = f"the simulated sessions from {whole} to {cut_short} are played, up to where {cut_short} was terminated"
    page.get_by_text(f"{played} by hand; set POLYGON_API_KEY to collect the market").wait_for()
    _keep(page, "sensor")


def _see_the_lineage(page: Page) -> None:
    page.set_viewport_size({"width": 1760, "height": _HEIGHT})  # smaller boxes would be empty
    page.goto("/asset-groups?expanded=global@global:bars")
    page.locator("button:has([aria-label=panel_show_right])").first.click()
    page.locator("button:has([aria-label=settings])").last.click()
    page.get_by_text("Change graph to vertical orientation").click()
    page.wait_for_timeout(_SETTLED_MS)
    page.mouse.dblclick(150, _HEIGHT - 50)  # on empty canvas: fits the graph into the window
    for asset in ("raw_bars", "reference_bars", *_PICTURES):
        page.get_by_text(asset, exact=True).first.wait_for()
    _keep(page, "lineage", 800)


def _visit(page: Page, address: str, wanted: Locator, tab: str | None = None) -> None:
    """Opens a page and a tab of it until it shows what is wanted: the UI does not look for all news by itself."""

    def shows() -> bool:
        page.goto(address)
        if tab:
            page.get_by_text(tab, exact=True).click()
        with contextlib.suppress(playwright.TimeoutError):
            wanted.wait_for(timeout=5000)
        return wanted.is_visible()

    until(shows, f"{address} shows it", 120, 1)


def _text(shown: Locator) -> str:
    return " ".join(shown.inner_text().split())


def _noon_ms(day: date) -> int:
    found = session(day)
    assert found
    return int((found.open + timedelta(hours=2.5)).timestamp()) * 1000


def _keep(page: Page, name: str, height: int = _HEIGHT) -> None:
    """Writes the upper part of what the window shows, in few colours: a third of the size."""
    if not _SCREENSHOTS:
        return
    page.wait_for_timeout(_SETTLED_MS)
    shown = Image.open(BytesIO(page.screenshot())).convert("RGB")
    shown.crop((0, 0, shown.width, height)).quantize(256, Image.Quantize.MAXCOVERAGE).save(
        Path(_SCREENSHOTS, f"{name}.png"), optimize=True
    )
