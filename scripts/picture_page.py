#!/usr/bin/env python3
"""Pictures of the server's page while neurons move: docs/page.png, and docs/page-narrow.png of a phone's width.

    python scripts/picture_page.py [-m smollm2-135m] [--to docs]

The GPU is the emulated one, and the policy `ema`, which copies what has been active lately: with `balance` the groups
of this model change hands without a copy. Needs Debian's chromium and playwright (extra `dev`). Exit code 1 if nothing
has moved within a minute.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from serving.process import serving

OPTIONS = ["--name", "SmolLM2", "--ctx", "1024", "--gpu", "host", "--vram-budget", "40MB"]
OPTIONS += ["--selector", "lowbit", "--policy", "ema"]
QUESTION = "How does a lighthouse work? Tell me in three paragraphs."
PATIENCE_S = 60.0
# Whether the answer has begun and the front moves.
MOVES = """
document.querySelector('.turn.assistant')?.textContent.length > 200 && document.querySelectorAll('.worker').length == 2
&& [...document.querySelectorAll('#figures div')].some(box =>
    box.querySelector('dt').textContent == 'moves/s' && Number(box.querySelector('dd').textContent) > 0)
"""


def picture(browser: Any, url: str, path: Path, width: int, dark: bool) -> None:
    """Ask, and keep what the page looks like while it is answered; all of it on a narrow screen. Raises SystemExit."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    page.goto(url)
    page.locator("#model", has_text="SmolLM2").wait_for()
    page.locator("#prompt").fill(QUESTION)
    page.keyboard.press("Enter")
    end = time.monotonic() + PATIENCE_S
    while not page.evaluate(MOVES):
        if time.monotonic() > end:
            raise SystemExit(f"nothing has moved within {PATIENCE_S:.0f} s: no picture")
        page.wait_for_timeout(20)
    page.screenshot(path=path, full_page=width < 400)
    page.close()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("-m", "--model", default="smollm2-135m")
    arguments.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "docs")
    given = arguments.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium: apt-get install chromium")
    with serving(["-m", given.model, *OPTIONS]) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        url = "http://{}:{}/".format(*server.address)
        picture(browser, url, given.to / "page.png", 1280, dark=False)
        picture(browser, url, given.to / "page-narrow.png", 360, dark=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
