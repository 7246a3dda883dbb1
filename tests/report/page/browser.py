"""A headless Chromium for tests of the report; tests that need one skip, with a reason, where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its own sandbox to root.
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield found
        finally:
            found.close()


def wait(page: Any, condition: str, seconds: float = 20) -> None:
    """Waits until a JavaScript condition holds. Playwright's own wait evaluates text in the page, which the page forbids."""
    from playwright.sync_api import Error

    def holds() -> bool:
        try:
            return bool(page.evaluate(f"!!({condition})"))
        except Error as error:
            # Asked just as another page took the place of this one.
            if "navigation" in str(error):
                return False
            raise

    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(25)


class Watched:
    """A page of a report, with everything it complained of and asked for."""

    def __init__(self, browser_: Any, folder: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.folder = folder
        self.context = browser_.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on(
            "console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, place: str) -> Any:
        """Opens a page such as `unit.html#layer=0&neuron=1` and waits for its data."""
        self.page.goto("about:blank")
        self.page.goto((self.folder / place.split("#")[0]).resolve().as_uri() + place[len(place.split("#")[0]) :])
        if not place.startswith("index"):
            wait(self.page, "document.body?.dataset.ready && document.body?.dataset.ready !== 'first'")
        return self.page
