"""Takes the README's screenshots, lineage.png, runs.png and asset.png, from a running `make dev`.

    .venv/bin/python -m pip install -e '.[browser]'
    .venv/bin/python docs/screenshots.py

Best from a new demo (no red) while it plays its second day or a later one.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from playwright.sync_api import Page, TimeoutError, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1600, 1000
# The UI asks for one thing after the other and keeps its connections open: no event says that all is there.
SETTLED = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="where the UI is (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to (docs/)")
    options = parser.parse_args()
    url: str = options.url.rstrip("/")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        open_first(page, url)
        show_lineage(page, url)
        save(page, out / "lineage.png", 800)
        page.goto(f"{url}/runs")
        page.wait_for_timeout(SETTLED)
        save(page, out / "runs.png", 720)
        show_checked_partition(page, url)
        save(page, out / "asset.png", HEIGHT)
        browser.close()


def open_first(page: Page, url: str) -> None:
    """Dismisses the community dialog, which a new instance shows once, and folds the navigation."""
    page.goto(f"{url}/runs")
    try:
        page.get_by_role("button", name="Skip").click(timeout=SETTLED)
    except TimeoutError:
        print("no community dialog: this instance has been visited before")
    page.get_by_text("Hide navigation").click()


def show_lineage(page: Page, url: str) -> None:
    """All assets, from top to bottom, with their groups unfolded."""
    page.goto(f"{url}/asset-groups?expanded=global@global:bars")
    page.wait_for_timeout(SETTLED)
    page.locator("button:has([aria-label=panel_show_right])").first.click()
    page.locator("button:has([aria-label=settings])").last.click()
    page.get_by_text("Change graph to vertical orientation").click()
    page.wait_for_timeout(SETTLED)
    page.mouse.dblclick(WIDTH / 4, HEIGHT - 50)  # on empty canvas: fits the graph into the window
    page.wait_for_timeout(SETTLED)


def show_checked_partition(page: Page, url: str) -> None:
    """The newest materialized day of normalized_bars."""
    page.goto(f"{url}/assets/normalized_bars?view=partitions&status=MATERIALIZED")
    page.get_by_text(re.compile(r"^\d{4}-\d\d-\d\d$")).locator("visible=true").nth(2).click()  # after the range's ends
    page.wait_for_timeout(SETTLED)


def save(page: Page, target: Path, height: int) -> None:
    """Saves the upper `height` pixels."""
    page.screenshot(path=target, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
