# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""The studio's pages in headless Chromium, on a checkout whose pipeline has really run."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from browser import browser  # noqa: F401 - a fixture
from conftest import Checkout, copy_of
from studio_server import Studio

from lathe.common import paths

AXE = (paths.ROOT / "tests/axe/axe.min.js").read_text(encoding="utf-8")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PAGES = [
    "/",
    "/new?recipe=small",
    "/searches",
    "/data",
    "/compare",
    "/compare?names=main&names=halved",
    "/chat",
    "/lineage?file=models/gguf/Q8_0.gguf",
    "/judge",
    "/run?name=halved",
    "/run?name=no-such-run",
]
RECIPE = """\
description: >-
  The small model of the tests learns from sixty rows.
hypothesis: >-
  It runs.
expect: >-
  Seconds.
overrides:
  lora.r: 4
"""
HOSTILE = "<script>window.hacked=1</script>\u001b[31m'\"><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def checkout(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout that has run, with the experiment `halved` of the same metrics and a hostile file of data."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("studio") / "lathe").without_preloading()
    (checkout.root / "experiments/small.yaml").write_text(RECIPE)
    rows = [{"prompt": HOSTILE * (1 + row), "completion": HOSTILE} for row in range(12)]
    rows += [{"prompt": "x" * 100_000, "completion": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    checkout.commit()
    (checkout.root / "data/local/hostile.jsonl").write_text(lines)
    base = checkout.run("git", "rev-parse", "HEAD").stdout.strip()
    checkout.set({"lora.r": 8})
    checkout.run("git", "commit", "--quiet", "--all", "--message", "halved")
    checkout.run("git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/halved", "HEAD")
    checkout.run("git", "reset", "--quiet", "--hard", base)
    return checkout


@pytest.fixture(scope="module")
def studio(checkout: Checkout) -> Iterator[Studio]:
    with Studio(checkout.root) as studio:
        studio.open()
        yield studio


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


VIEWS = [(DESKTOP, "light", "en-GB"), (PHONE, "dark", "ru-RU")]


@pytest.fixture(scope="module", params=VIEWS, ids=["desktop-light-english", "phone-dark-russian"])
def reader(request: pytest.FixtureRequest, browser: Any, studio: Studio) -> Iterator[Reader]:
    reader = Reader(browser, studio, *request.param)
    yield reader
    reader.context.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_serious_fault_of_access_complains_of_nothing_and_asks_no_other_host(reader, path):
    reader.complaints.clear()
    reader.go(path)
    reader.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert reader.find_faults() == []
    wider = reader.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0
    refused = "no-such" in path  # of a missing page the browser itself says that it is missing
    assert [text for text in reader.complaints if not (refused and "404" in text)] == []
    assert reader.others == []


def test_the_page_is_in_the_language_of_the_browser_and_in_another_when_it_is_chosen(reader):
    page = reader.go("/")
    first = page.locator("h1").inner_text()
    assert first in ("Overview", "Обзор")
    other = "ru" if first == "Overview" else "en"
    page.select_option("#language", other)
    page.wait_for_selector(f'html[lang="{other}"]')
    page.wait_for_load_state("networkidle")
    assert {first, page.locator("h1").inner_text()} == {"Overview", "Обзор"}
    page.select_option("#language", "en" if other == "ru" else "ru")
    page.wait_for_selector(f'html:not([lang="{other}"])')


def test_hostile_data_is_shown_as_text_with_its_faults(reader):
    page = reader.go("/data")
    page.locator("button", has_text="hostile.jsonl").click()
    page.wait_for_selector("#found .faults", timeout=60_000)
    assert ":13" in page.locator("#found").inner_text()
    assert reader.evaluate("window.hacked") is None
    assert reader.find_faults() == []


def test_the_form_refuses_as_one_types_and_shows_the_command(reader):
    page = reader.go("/new?recipe=small")
    page.fill("#p-lora-r", "eight")
    page.wait_for_selector("#check .refusal")
    assert "lora.r is 'eight'" in page.locator("#check").inner_text()
    page.fill("#p-lora-r", "8")
    page.wait_for_selector("#check .command")
    assert page.locator("#check code").inner_text() == "lathe run small -S lora.r=8"


def test_the_curves_of_a_run_are_drawn_under_the_strict_policy(reader):
    page = reader.go("/run?name=halved")
    page.wait_for_selector(".chart canvas")
    assert page.locator("[data-chart=curves] canvas").count() >= 4
    assert page.locator("[data-chart=sizes] canvas").count() == 1


def test_the_pages_can_be_used_by_keyboard_alone(reader):
    page = reader.go("/")
    page.keyboard.press("Tab")
    assert reader.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(reader.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"Lathe", "language", "q", "sort", "gates", "halved", "main"} <= reached


@pytest.mark.slow
def test_from_a_form_to_a_live_curve_scores_a_comparison_and_a_chat_while_the_studio_is_killed(
    browser, checkout, tmp_path
):
    checkout = copy_of(checkout, tmp_path / "lathe")
    with Studio(checkout.root) as studio:
        studio.open()
        reader = Reader(browser, studio, DESKTOP, "light", "en")
        page = reader.go("/new?recipe=small")
        page.fill("#experiment", "longer")
        page.fill("#p-training-max_steps", "300")
        page.locator('input[value="temp"]').check()
        page.wait_for_selector("#check code:has-text('--temp')")
        page.get_by_role("button", name="Start", exact=True).focus()
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("/commands/"))
        identifier = page.url.rpartition("/")[2]
        page.wait_for_selector("[data-chart=curves] canvas", timeout=240_000)
        assert "train" in page.locator("#state").inner_text()
        os.kill(studio.process.pid, signal.SIGKILL)
        studio.process.wait()
    with Studio(checkout.root) as first, Studio(checkout.root) as second:
        for studio in (first, second):
            studio.open()
        titles = [[work["title"] for work in studio.api("GET", "/api/running").json()] for studio in (first, second)]
        assert titles[0] == titles[1] == ["lathe run small --name longer -S training.max_steps=300 --temp"]
        assert first.wait(identifier)["state"] == "ended"
        reader = Reader(browser, second, DESKTOP, "light", "en")
        page = reader.go(f"/commands/{identifier}")
        page.get_by_role("link", name="Scores of this run").click()
        page.wait_for_selector("[data-chart=curves] canvas")
        assert "300" in page.locator("main").inner_text()
        page = reader.go("/compare?names=main&names=longer")
        assert page.locator(".verdict").inner_text()
        page = reader.go("/chat")
        page.select_option("#first", "models/gguf/Q8_0.gguf")
        page.select_option("#second", "models/gguf/Q4_K_M.gguf")
        page.fill("#prompt", "Turn on the attic lamp.")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("article.answer", timeout=120_000)
        assert page.locator("article.answer").count() == 2
        assert reader.complaints == []
        said = page.locator("pre.said").first.inner_text()
    asked = ["python3", "-m", "lathe", "chat", "--gguf", "models/gguf/Q8_0.gguf", "--prompt", "Turn on the attic lamp."]
    done = subprocess.run(
        asked,
        cwd=checkout.root,
        env={**checkout.environment, "PYTHONPATH": str(checkout.root / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == said.strip()


def test_nothing_of_the_tests_still_runs(studio):
    deadline = time.monotonic() + 10
    while (left := studio.api("GET", "/api/running").json()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
