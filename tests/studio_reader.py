"""A browser that reads the studio's pages for a test, and what is asked of every page."""

import json
from typing import Any

from studio_server import Studio

from lathe.common import paths

AXE = (paths.ROOT / "tests/axe/axe.min.js").read_text(encoding="utf-8")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
MOST_TABS = 300

SMALL_RECIPE = """\
description: >-
  The small model of the tests learns from sixty rows.
hypothesis: >-
  It runs.
expect: >-
  Seconds.
overrides:
  lora.r: 4
"""


class Reader:
    """A browser with the studio's cookie: what its pages complained of, and which other hosts they asked."""

    def __init__(self, browser: Any, studio: Studio, size: dict[str, int], scheme: str, language: str) -> None:
        self.address = studio.address
        self.context = browser.new_context(viewport=size, color_scheme=scheme, locale=language)
        name, _, value = studio.cookie.partition("=")
        self.context.add_cookies([{"name": name, "value": value, "url": studio.address}])
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.others: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.others.append(request.url)

    def go(self, path: str) -> Any:
        self.page.goto(self.address + path)
        if not path.startswith("/new"):  # whose estimate takes seconds
            self.page.wait_for_load_state("networkidle")
        return self.page

    def go_live(self, path: str) -> Any:
        """Go to a page that never rests: it follows what runs."""
        self.page.goto(self.address + path)
        self.page.wait_for_load_state("load")
        self.page.wait_for_timeout(1500)  # the first curves are drawn
        return self.page

    def tab_to(self, selector: str) -> Any:
        """Move the focus by Tab, as one without a mouse does, to an element that a selector finds."""
        target = self.page.locator(selector)
        target.first.wait_for()
        for _ in range(MOST_TABS):
            if target.and_(self.page.locator(":focus")).count():
                return target
            self.page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached by Tab")

    def measure_overflow(self) -> float:
        """Return by how many pixels the page is wider than its window."""
        width: float = self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return width

    def evaluate(self, script: str) -> Any:
        """Evaluate by the debugger: the page's own policy forbids what Playwright would do."""
        session = self.context.new_cdp_session(self.page)
        wanted = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = session.send("Runtime.evaluate", wanted)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def find_faults(self) -> list[Any]:
        """Return axe's serious and critical findings."""
        self.evaluate(AXE)
        found = json.loads(
            self.evaluate(
                "axe.run().then(r => JSON.stringify(r.violations.map(v => [v.impact, v.id, v.nodes[0].html])))"
            )
        )
        return [fault for fault in found if fault[0] in ("serious", "critical")]
