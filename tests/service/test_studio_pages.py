# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""The studio's pages in headless Chromium, on a checkout whose pipeline has really run."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from browser import browser  # noqa: F401 - a fixture
from conftest import Checkout, copy_of
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from studio_reader import DESKTOP, PHONE, SMALL_RECIPE, Reader
from studio_server import Studio

PAGES = [
    "/",
    "/new?recipe=small",
    "/searches",
    "/queue",
    "/data",
    "/compare",
    "/compare?names=main&names=halved",
    "/chat",
    "/lineage?file=models/gguf/Q8_0.gguf",
    "/judge",
    "/run?name=halved",
    "/searches/demo",
    "/commands/ENDED",
    "/run?name=no-such-run",
]
HOSTILE = "<script>window.hacked=1</script>\u001b[31m'\"><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def checkout(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout that has run, with the experiment `halved` of the same metrics and a hostile file of data."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("studio") / "lathe").without_preloading()
    (checkout.root / "experiments/small.yaml").write_text(SMALL_RECIPE)
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
    make_study(checkout.root / ".optuna/demo.journal")
    return checkout


def make_study(file: Path) -> None:
    """Write a study of two objectives with five trials, of which one has failed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file.parent.mkdir(exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.create_study(study_name="demo", storage=storage, directions=["maximize", "minimize"])
    study.set_user_attr("setting", {"objectives": {"Q8_0.exact_match": "maximize", "Q8_0.bytes": "minimize"}})
    space = {"lora.r": optuna.distributions.IntDistribution(1, 64)}
    for rank, scores in ((4, [0.5, 100.0]), (8, [0.7, 200.0]), (16, [0.6, 300.0]), (32, [0.9, 400.0])):
        study.add_trial(optuna.trial.create_trial(params={"lora.r": rank}, distributions=space, values=scores))
    failed = {"state": optuna.trial.TrialState.FAIL, "user_attrs": {"reason": f"train: {HOSTILE}"}}
    study.add_trial(optuna.trial.create_trial(params={"lora.r": 64}, distributions=space, **failed))


@pytest.fixture(scope="module")
def studio(checkout: Checkout) -> Iterator[Studio]:
    with Studio(checkout.root) as studio:
        studio.open()
        yield studio


@pytest.fixture(scope="module")
def ended(studio: Studio) -> str:
    """A command that has been started from a page, and has ended."""
    started = studio.ask("POST", "/data/keep", {"path": "data/local/hostile.jsonl"})
    identifier = started.headers["hx-redirect"].rpartition("/")[2]
    assert studio.wait(identifier, 60)["state"] == "ended"
    return identifier


VIEWS = [(DESKTOP, "light", "en-GB"), (PHONE, "dark", "ru-RU")]


@pytest.fixture(scope="module", params=VIEWS, ids=["desktop-light-english", "phone-dark-russian"])
def reader(request: pytest.FixtureRequest, browser: Any, studio: Studio) -> Iterator[Reader]:
    reader = Reader(browser, studio, *request.param)
    yield reader
    reader.context.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_no_serious_fault_of_access_complains_of_nothing_and_asks_no_other_host(reader, path, ended):
    reader.complaints.clear()
    reader.go(path.replace("ENDED", ended))
    reader.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert reader.find_faults() == []
    assert reader.measure_overflow() <= 0
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


def test_the_space_of_a_search_is_a_form_and_a_text_that_follow_each_other(reader):
    page = reader.go("/searches?file=experiments/search/default.yaml")
    page.fill("#space-1-low", "8")
    page.keyboard.press("Tab")
    page.wait_for_function("() => document.querySelector('#text').value.includes('lora.r: {type: int, low: 8,')")
    page.select_option("#add", "training.weight_decay")
    page.wait_for_selector('legend:has-text("training.weight_decay")')
    page.locator("#remove-0").click()
    page.wait_for_function("() => !document.querySelector('#text').value.includes('training.learning_rate:')")
    text = page.input_value("#text")
    assert "training.weight_decay: {type: float, low: " in text
    page.fill("#text", text.replace("low: 8", "low: 100"))
    page.locator("#n_trials").focus()
    page.wait_for_selector("#check .refusal:has-text('low must be below high')")
    page.wait_for_function("() => document.querySelector('#space-0-low').value === '100'")
    page.select_option("#plan-sampler", "random")
    page.wait_for_function("() => document.querySelector('#text').value.includes('sampler: random')")
    page.select_option("#add_objective", "quantized.bytes")
    page.wait_for_selector("#objective-1-direction")
    assert page.input_value("#objective-1-direction") == "minimize"
    page.locator("#remove-objective-0").click()
    page.wait_for_function("() => !document.querySelector('#text').value.includes('Q4_K_M.exact_match')")
    page.select_option("#use_pruner", "true")
    page.wait_for_selector("#pruner-reduction")
    assert "pruner: {min_steps: " in page.input_value("#text")
    assert reader.find_faults() == []


def test_a_conversation_goes_on_over_several_turns_and_its_prompt_becomes_a_test_row(reader, checkout):
    page = reader.go("/chat")
    page.select_option("#first", "models/gguf/Q8_0.gguf")
    page.fill("#system", "Be brief.")
    for number, prompt in enumerate(("Turn on the attic lamp.", "And the fan."), start=1):
        page.fill("#prompt", prompt)
        page.locator("#chat-form button.primary").click()
        page.wait_for_selector(f".turn >> nth={number - 1}", timeout=60_000)
        assert page.input_value("#prompt") == ""
    command = page.locator("#conversation .command code").inner_text()
    assert command.startswith("printf")
    environment = {**checkout.environment, "PYTHONPATH": str(checkout.root / "src")}
    done = subprocess.run(
        ["bash", "-c", command.replace("lathe chat", "python3 -m lathe chat")],
        cwd=checkout.root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = page.locator("pre.said").all_inner_texts()
    assert len(said) == 2
    assert "".join(done.stdout.split()) == "".join("".join(said).split())
    file = checkout.root / "data/local/test-rows.jsonl"
    before = file.read_text().splitlines() if file.exists() else []
    page.locator("summary", has_text="test").or_(page.locator("summary", has_text="тестовую")).first.click()
    page.fill("#reference", f"A right answer, {len(before)}.")
    page.locator("#save-row").click()
    page.wait_for_selector("#saved-row .passed")
    added = file.read_text().splitlines()
    assert added[:-1] == before
    row = json.loads(added[-1])
    assert [message["role"] for message in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert reader.find_faults() == []
    assert reader.measure_overflow() <= 0
    page.locator("#new-conversation").click()
    page.wait_for_selector(".turn", state="detached")


def test_thoughts_and_calls_of_a_conversation_are_shown_as_text_in_their_places(studio):
    calls = [{"name": "get_time", "arguments": {"zone": HOSTILE}}]
    answer = {"text": "x", "thought": f"I look {HOSTILE}", "content": "", "calls": calls}
    turns = [{"role": "user", "text": f"What time is it? {HOSTILE}", "answers": {"models/gguf/Q8_0.gguf": answer}}]
    form = {"conversation": json.dumps(turns), "first": "models/gguf/Q8_0.gguf", "prompt": "Hello."}
    shown = studio.ask("POST", "/chat", form)
    assert shown.text.count('class="turn"') == 2
    assert '<pre class="thought">I look &lt;script&gt;' in shown.text
    assert "<code>get_time</code>" in shown.text
    assert "<script>" not in shown.text
    assert "\x1b" not in shown.text
    refused = studio.ask("POST", "/chat", {**form, "tools": "[1]"})
    assert refused.headers["hx-retarget"] == "#refusal"
    refused = studio.ask("POST", "/chat", {**form, "conversation": "[]", "role": "tool"})
    assert "no model has called a tool" in refused.text


def test_the_pages_can_be_used_by_keyboard_alone(reader):
    page = reader.go("/")
    page.keyboard.press("Tab")
    assert reader.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(reader.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"Lathe", "language", "q", "sort", "gates", "halved", "main"} <= reached


def test_what_is_loaded_anew_stays_open_and_keeps_the_focus(reader, ended):
    page = reader.go("/")
    page.locator("#started summary").click()
    link = page.locator(f"#command-{ended}")
    link.focus()
    with page.expect_response("**/overview/running"):
        pass
    page.wait_for_timeout(300)
    assert link.is_visible()
    assert link.and_(page.locator(":focus")).count() == 1


def test_nothing_of_the_tests_still_runs(studio):
    deadline = time.monotonic() + 10
    while (left := studio.api("GET", "/api/running").json()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
