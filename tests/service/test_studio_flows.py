# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""Whole ways through the studio in headless Chromium, on checkouts whose pipeline really runs."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser  # noqa: F401 - a fixture
from conftest import Checkout, copy_of
from studio_reader import DESKTOP, PHONE, SMALL_RECIPE, Reader
from studio_server import Studio

pytestmark = pytest.mark.slow

SECONDS_OF_A_RUN = 300


@pytest.fixture
def checkout(reproduced: Checkout, tmp_path: Path) -> Checkout:
    """A checkout that has run, whose recipe of the defaults is the small one with other values."""
    checkout = copy_of(reproduced, tmp_path / "lathe").without_preloading()
    (checkout.root / "experiments/small.yaml").write_text(SMALL_RECIPE)
    (checkout.root / "experiments/baseline.yaml").write_text(f"{SMALL_RECIPE}  training.max_steps: 300\n")
    checkout.commit()
    return checkout


@pytest.fixture
def studio(checkout: Checkout) -> Iterator[Studio]:
    with Studio(checkout.root) as studio:
        studio.open()
        yield studio


def wait_for_end(reader: Reader, studio: Studio) -> str:
    """Wait until the command of the page has ended well, and its page says so; return its identifier."""
    identifier = reader.page.url.rpartition("/")[2]
    assert studio.wait(identifier, SECONDS_OF_A_RUN)["state"] == "ended", studio.api(
        "GET", f"/api/commands/{identifier}/log"
    ).text
    return str(identifier)


def test_quick_start_live_curve_scores_comparison_apply_and_chat_by_keyboard_alone(browser, checkout, studio):
    reader = Reader(browser, studio, DESKTOP, "light", "en")
    page = reader.go("/")
    press = page.keyboard.press

    reader.tab_to('button:has-text("Quick start")')
    press("Enter")
    page.wait_for_url(re.compile("/commands/"))
    page.wait_for_selector("[data-chart=curves] canvas", timeout=240_000)
    # What is loaded anew every other second takes nobody's place away.
    cancel = reader.tab_to("#cancel")
    page.wait_for_timeout(5000)
    assert cancel.and_(page.locator(":focus")).count() == 1
    assert page.locator("#state dt", has_text="loss").count() == 1
    assert reader.find_faults() == []
    wait_for_end(reader, studio)

    reader.tab_to('a:has-text("Scores of this run")')
    press("Enter")
    page.wait_for_selector("[data-chart=curves] canvas")
    assert page.locator("section:has(h2:has-text('Scores: validation')) tbody tr").count() > 3

    reader.tab_to('nav a:has-text("Compare")')
    press("Enter")
    page.wait_for_url(re.compile("/compare"))
    reader.tab_to('input[name="names"] >> nth=0')
    page.keyboard.type("main")
    reader.tab_to('input[name="names"] >> nth=1')
    page.keyboard.type("baseline")
    press("Enter")
    page.wait_for_selector(".verdict")
    differing = page.locator("section:has(h2:has-text('What differs')) code").all_inner_texts()
    assert sorted(differing) == ["lora.r", "training.max_steps"]

    # Back to what was there before, to apply the experiment.
    for path in ("dvc.lock", "metrics", "params.yaml"):
        checkout.run("git", "checkout", "--quiet", "HEAD", "--", path)
    assert checkout.run("git", "status", "--porcelain", "--untracked-files=no").stdout == ""
    reader.tab_to('th a:has-text("baseline")')
    press("Enter")
    page.wait_for_url(re.compile("/run"))
    reader.tab_to('button:has-text("Apply to the workspace")')
    press("Enter")
    page.wait_for_url(re.compile("/commands/"))
    wait_for_end(reader, studio)
    assert checkout.run("git", "diff", "--stat", "HEAD", "--", "params.yaml").stdout
    assert "max_steps: 300" in (checkout.root / "params.yaml").read_text()
    # Applied once more, nothing would be lost.
    again = studio.api("POST", "/api/runs/baseline/actions", {"action": "apply"})
    assert again.status == 201, again.text
    assert studio.wait(again.json()["identifier"])["code"] == 0

    reader.tab_to('nav a:has-text("Chat")')
    press("Enter")
    page.wait_for_url(re.compile("/chat"))
    reader.tab_to("#first")
    while page.input_value("#first") != "models/gguf/Q8_0.gguf":
        press("ArrowDown")
    reader.tab_to("#second")
    while page.input_value("#second") != "models/gguf/Q4_K_M.gguf":
        press("ArrowDown")
    reader.tab_to("#prompt")
    page.keyboard.type("Turn on the attic lamp.")
    reader.tab_to('button:has-text("Ask")')
    press("Enter")
    page.wait_for_selector("article.answer", timeout=120_000)
    assert page.locator("article.answer").count() == 2
    assert (reader.complaints, reader.others) == ([], [])
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


def test_an_upload_whose_faults_are_shown_is_mended_on_the_page_saved_and_run(browser, checkout, studio, tmp_path):
    rows = [json.loads(line) for line in (checkout.root / "data/local/few.jsonl").read_text().splitlines()]
    rows[3]["reply"] = ""
    lines = [json.dumps(row) for row in rows]
    lines[7] = lines[7][:-1]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    reader = Reader(browser, studio, PHONE, "dark", "ru-RU")
    page = reader.go("/data")
    page.set_input_files("#upload-file", tmp_path / "mine.jsonl")
    page.locator("#upload button.primary").click()
    # It has columns of its own, which are said once.
    page.wait_for_selector("#found .refusal", timeout=60_000)
    assert "--prompt COLUMN" in page.locator("#found .refusal").inner_text()
    assert reader.find_faults() == []
    page.fill("#prompt-column", "ask")
    page.fill("#completion-column", "reply")
    page.locator("#read-columns").click()
    page.wait_for_selector("#found .faults", timeout=60_000)
    shown = page.locator("#found .faults").inner_text()
    assert "mine.jsonl:4" in shown
    assert "mine.jsonl:8" in shown
    page.fill("#line-8", page.input_value("#line-8") + "}")
    assert reader.find_faults() == []
    assert reader.measure_overflow() <= 0
    page.fill("#line-4", json.dumps({**rows[3], "reply": "{}"}))
    page.locator("#mend").click()
    page.wait_for_selector("#found p.passed >> nth=1", timeout=60_000)
    assert page.locator("#found .faults").count() == 0
    kept = [json.loads(line) for line in (checkout.root / "data/local/mine.jsonl").read_text().splitlines()]
    assert kept == [{**row, "reply": row["reply"] or "{}"} for row in rows]

    page.fill('#found input[name="name"]', "mine")
    page.locator('form[hx-post="/data/preset"] button').click()
    page.wait_for_url(re.compile("/commands/"))
    wait_for_end(reader, studio)
    page = reader.go("/data")
    page.locator("button", has_text="mine.jsonl").click()
    page.locator('#found a.button:has-text("mine")').click()
    page.wait_for_url(re.compile("/new"))
    page.select_option("#recipe-choice", "small")
    page.wait_for_url(re.compile("recipe=small"))
    assert page.input_value("#p-dataset") == "mine"
    page.fill("#experiment", "of-mine")
    page.locator('input[value="temp"]').check()
    page.wait_for_selector("#check code:has-text('--temp')")
    assert page.locator("#check code").inner_text() == "lathe run small --name of-mine -S dataset=mine --temp"
    page.locator('button[hx-post="/new/start"]').click()
    page.wait_for_url(re.compile("/commands/"))
    wait_for_end(reader, studio)
    page = reader.go("/run?name=of-mine")
    assert page.locator("table tr.primary").count() == 2
    assert "mine" in page.locator("section >> nth=0").inner_text()
    assert (reader.complaints, reader.others) == ([], [])


def test_a_queued_run_shows_its_log_and_an_experiment_is_pulled_from_a_remote(browser, checkout, studio, tmp_path):
    wanted = {"recipe": "small", "name": "waits", "values": {"evaluate.bootstrap_samples": 150}, "mode": "queue"}
    queued = studio.api("POST", "/api/runs", wanted).json()
    assert studio.wait(queued["identifier"])["code"] == 0
    reader = Reader(browser, studio, DESKTOP, "light", "en")
    page = reader.go("/queue")
    assert page.locator("#queue tbody tr").inner_text().split()[:2] == ["waits", "queued"]
    page.get_by_role("button", name="Start the queue").click()
    page.wait_for_url(re.compile("/commands/"))
    wait_for_end(reader, studio)
    page = reader.go("/queue")
    page.wait_for_selector("#queue .state.success", timeout=SECONDS_OF_A_RUN * 1000)
    page.get_by_role("link", name="waits").click()
    page.wait_for_selector('#log:has-text("Running stage \'evaluate")')
    page.fill("#search", "running stage 'evaluate")
    page.wait_for_function("() => document.querySelector('#log').innerText.trim().split('\\n').length === 1")
    assert reader.find_faults() == []
    checkout.run("dvc", "queue", "stop")

    # A Git remote of another clone, with an experiment that is not here.
    remote = tmp_path / "remote.git"
    checkout.run("git", "init", "--quiet", "--bare", str(remote))
    checkout.run("git", "remote", "add", "origin", str(remote))
    checkout.run("git", "push", "--quiet", "origin", "main")
    checkout.run("dvc", "exp", "push", "--no-cache", "origin", "waits")
    checkout.run("dvc", "exp", "remove", "waits")
    page = reader.go("/")
    page.get_by_role("button", name="List those of origin").click()
    page.get_by_role("button", name="Pull waits").wait_for(timeout=60_000)
    assert reader.find_faults() == []
    page.get_by_role("button", name="Pull waits").click()
    page.wait_for_url(re.compile("/commands/"))
    identifier = page.url.rpartition("/")[2]
    assert studio.wait(identifier)["code"] == 0
    assert "waits" in {run["name"] for run in studio.api("GET", "/api/runs").json()}
    refused = studio.api("POST", "/api/runs/waits/actions", {"action": "pull", "target": "nowhere"})
    assert (refused.status, refused.json()["code"]) == (422, "no-such-remote")
    assert (reader.complaints, reader.others) == ([], [])
