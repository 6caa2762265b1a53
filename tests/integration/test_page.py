"""The page in a real browser: Debian's Chromium without a screen, driven by playwright.

pytest tests/integration/test_page.py
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server import Server, serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
KEY = "a-key-for-tests"
pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed"),
]


@pytest.fixture(scope="module")
def server(smollm2: Path, compiled: None) -> Iterator[Server]:
    """Computed by the CPU and an emulated GPU, which holds a part of the neurons."""
    options = [
        "--gpu",
        "host",
        "--vram-budget",
        "40MB",
        "--ctx",
        "1024",
        "--api-key",
        KEY,
    ]
    with serving(smollm2, "--name", "SmolLM2", *options) as server:
        yield server


@pytest.fixture
def browser(server: Server) -> Iterator[Any]:
    """One for each test, since its processes come and go."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def until(page: Any, expression: str) -> None:
    """Until it holds in the page. (playwright's own waiting evaluates texts there, which the page's policy forbids.)"""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


@pytest.mark.parametrize("width", [1280, 360])
def test_a_chat_beside_the_front(server: Server, browser: Any, width: int) -> None:
    """By the keyboard: a question, its answer as it comes, stop, again; the front is drawn meanwhile."""
    faults: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="light" if width > 400 else "dark")
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or faults.append(request.url))
    page.goto(server.url + "/")
    # Without the key it says what is missing.
    page.get_by_text("wants an API key").wait_for()
    faults.clear()  # the browser itself notes the 401
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("Most tokens").fill("300")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Settings").click()
    page.locator("#model", has_text="SmolLM2").wait_for()

    page.locator("#prompt").focus()
    page.keyboard.type("Count from one to a hundred.")
    page.keyboard.press("Enter")
    answer = page.locator(".turn.assistant")
    until(page, "document.querySelector('.turn.assistant')?.textContent.length > 60")
    assert page.locator("#send").is_disabled()
    early = answer.text_content()
    until(page, "Number(document.querySelector('#figures dd')?.textContent) > 0")
    until(page, "document.querySelectorAll('.worker').length === 2")
    # Escape stops it; what came stays.
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('#send').disabled")
    stopped = answer.text_content()
    assert stopped.startswith(early[:60])
    assert "tok/s" in page.locator("#rate").text_content()
    # Greedy again begins with the same text; it is stopped by the button.
    page.get_by_role("button", name="Regenerate").click()
    until(page, "document.querySelectorAll('.turn').length === 2")
    until(page, "document.querySelector('.turn.assistant').textContent.length > 60")
    page.get_by_role("button", name="Stop").click()
    until(page, "!document.querySelector('#send').disabled")
    assert answer.text_content()[:20] == stopped[:20]
    # The front: a row for each layer, in which both workers have a part.
    assert "cpu0" in page.locator("#legend").text_content()
    assert "gpu0" in page.locator("#legend").text_content()
    assert "% of what was computed" in page.locator("#map-text").text_content()
    assert page.evaluate("document.querySelector('#map').height") >= 30 * 8
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    assert not faults
    page.close()


def test_the_page_is_served_whole_and_nothing_else(server: Server) -> None:
    page = server.ask("/")
    assert page.status == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert b"http://" not in page.body
    for path in ("/page.css", "/page.js", "/front.js"):
        assert server.ask(path).status == 200
    for path in ("/../run.py", "/page/index.html", "/%2e%2e/run.py"):
        assert server.ask(path, Authorization=f"Bearer {KEY}").status == 404
    assert server.ask("/front").status == 401
