"""The studio's HTTP API: what it starts is the command that a person would type, and no request breaks it."""

import json
import shlex
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from conftest import Checkout, make_checkout
from experiment_repository import ROWS, Repository
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from studio_server import TOKEN, Studio

from lathe.config.yaml_files import read_yaml

REQUEST: dict[str, Any] = {
    "project_id": 123,
    "fine_tuning_params": {
        "use_llm_judge": True,
        "judge_model_id": "gemini",
        "base_model_name": "Qwen/Qwen3-0.6B",
        "n_trials": 20,
    },
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with the experiments `better` and `worse`, beside a commit that got half of the rows right."""
    checkout = make_checkout(tmp_path_factory.mktemp("studio") / "lathe")
    root = checkout.root
    checkout.run("dvc", "config", "cache.dir", str(root / ".dvc/cache"))
    repository = Repository.__new__(Repository)
    repository.root, repository.runs = root, 0
    (root / "stages").mkdir(exist_ok=True)
    repository.base = repository.run("main", [row % 2 == 0 for row in range(ROWS)], training_seconds=10.0)
    repository.run("better", [row > 3 for row in range(ROWS)], {"lora.r": 8})
    repository.run("worse", [row > 30 for row in range(ROWS)], {"lora.r": 2, "training.learning_rate": 0.1})
    return checkout


@pytest.fixture(scope="module")
def studio(checkout: Checkout) -> Iterator[Studio]:
    # No program of the tests is DVC: what is started ends at once, and says what it was.
    with Studio(checkout.root) as studio:
        studio.open()
        yield studio


def test_runs_are_those_of_lathe_results(studio, checkout):
    done = checkout.run("python3", "-m", "lathe", "results", "--json", env={"PYTHONPATH": str(checkout.root / "src")})
    assert studio.api("GET", "/api/runs").json() == json.loads(done.stdout)


def test_a_comparison_is_that_of_lathe_compare(studio, checkout):
    done = checkout.run(
        *("python3", "-m", "lathe", "compare", "better", "worse", "--json"),
        env={"PYTHONPATH": str(checkout.root / "src")},
    )
    assert studio.api("GET", "/api/compare?names=better&names=worse").json() == json.loads(done.stdout)


def test_a_page_shows_the_comparison_with_its_verdict_and_the_answers_that_differ(studio):
    verdict = studio.api("GET", "/api/compare?names=better&names=worse").json()["verdict"]
    text = studio.ask("GET", "/compare?names=better&names=worse").text
    assert verdict in text
    assert "27 of 40" in " ".join(text.split())
    assert "question 4" in text


def test_the_page_of_a_run_shows_its_scores_with_intervals(studio):
    text = studio.ask("GET", "/run?name=better").text
    assert "90.0 % [" in text
    assert "lora.r" in text
    assert "question 0" in studio.ask("GET", "/run/answers?name=better").text


@pytest.mark.parametrize(
    ("query", "names"),
    [("?q=lora.r%3D8", ["better"]), ("?sort=score&q=e", ["better", "worse"]), ("?q=none+such", [])],
)
def test_the_table_is_filtered_and_sorted(studio, query, names):
    text = studio.ask("GET", f"/overview/table{query}").text
    places = [text.find(f">{name}</a>") for name in names]
    assert all(place > 0 for place in places)
    assert places == sorted(places)
    assert [name for name in ("better", "worse") if f">{name}</a>" in text] == sorted(names)


def test_a_run_is_checked_by_the_rules_of_params_yaml_before_it_is_started(studio):
    wanted = {"recipe": "tiny", "values": {"lora.r": "eight", "training.learning_rate": -1}}
    answer = studio.api("POST", "/api/runs/check", wanted).json()
    assert answer["command"] is None
    assert any("lora.r is 'eight'" in line for line in answer["problems"])
    assert any("training.learning_rate is -1" in line for line in answer["problems"])
    refused = studio.api("POST", "/api/runs", wanted)
    assert refused.status == 422
    assert "lora.r is 'eight'" in refused.json()["message"]


def test_a_run_that_is_started_is_the_command_of_the_check_and_its_log_is_kept(studio):
    wanted = {"recipe": "tiny", "name": "of-the-api", "values": {"lora.r": 8}, "mode": "now"}
    command = studio.api("POST", "/api/runs/check", wanted).json()["command"]
    assert command == "lathe run tiny --name of-the-api -S lora.r=8"
    started = studio.api("POST", "/api/runs", wanted)
    assert started.status == 201
    assert started.json()["command"] == command
    identifier = started.json()["identifier"]
    for _ in range(240):
        lines = studio.api("GET", f"/api/commands/{identifier}/log").json()
        if any("of-the-api: " in line or "Running stage" in line for line in lines):
            break
        time.sleep(0.25)
    assert studio.api("POST", f"/api/commands/{identifier}/cancel").status == 200
    ended = studio.wait(identifier)
    assert ended["state"] == "failed"
    assert ended["code"] in (143, 255, 1)
    again = studio.api("POST", f"/api/commands/{identifier}/cancel")
    assert (again.status, again.json()["code"]) == (422, "not-running")


def test_a_fine_tuning_request_becomes_a_study_with_the_values_of_the_bases_recipe(studio):
    started = studio.api("POST", "/api/fine-tuning", REQUEST)
    assert started.status == 201, started.text
    answer = started.json()
    studio.api("POST", f"/api/commands/{answer['command']['identifier']}/cancel")
    assert answer["study"] == "project-123"
    words = shlex.split(answer["command"]["command"])
    assert words[:5] == ["lathe", "search", "experiments/search/project-123.yaml", "--n-trials", "20"]
    assert {"model=qwen3-600m", "judge.enabled=true", "judge.provider=gemini"} <= set(words)
    tree = read_yaml(studio.root / "experiments/search/project-123.yaml")
    assert (tree["study"], tree["n_trials"]) == ("project-123", 20)
    assert [objective["metric"] for objective in tree["objectives"]] == ["Q4_K_M.judge"]
    assert not {word.partition("=")[0] for word in words} & set(tree["space"])
    assert studio.wait(answer["command"]["identifier"], seconds=60)["state"] == "failed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model_name": "Qwen/Qwen3-0.6"}, "did you mean 'Qwen/Qwen3-0.6B'?"),
        ({"judge_model_id": "claude"}, "must be one of gemini, gigachat, openai"),
        ({"judge_model_id": None}, "judge_model_id is missing"),
        ({"n_trials": 4}, "greater than or equal to 5"),
        ({"n_trials": 101}, "less than or equal to 100"),
        ({"extra": 1}, "fine_tuning_params.extra"),
    ],
)
def test_a_fine_tuning_request_that_cannot_be_is_refused_and_writes_nothing(studio, change, said):
    files = sorted((studio.root / "experiments/search").iterdir())
    wanted = {"project_id": 7, "fine_tuning_params": {**REQUEST["fine_tuning_params"], **change}}
    answer = studio.api("POST", "/api/fine-tuning", wanted)
    assert answer.status == 422
    assert said in answer.json()["message"]
    assert sorted((studio.root / "experiments/search").iterdir()) == files


def test_a_study_is_shown_with_its_trials_as_far_as_they_are(studio):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = studio.root / ".optuna/demo.journal"
    file.parent.mkdir(exist_ok=True)
    study = optuna.create_study(
        study_name="demo", storage=JournalStorage(JournalFileBackend(str(file))), directions=["maximize", "minimize"]
    )
    study.set_user_attr("setting", {"objectives": {"Q8_0.exact_match": "maximize", "Q8_0.bytes": "minimize"}})
    space = {"lora.r": optuna.distributions.IntDistribution(1, 64)}
    for rank, scores in ((4, [0.5, 100.0]), (8, [0.7, 200.0]), (16, [0.6, 300.0]), (32, [0.9, 400.0])):
        study.add_trial(optuna.trial.create_trial(params={"lora.r": rank}, distributions=space, values=scores))
    failed = optuna.trial.TrialState.FAIL
    reason = {"reason": "train: <b>out of memory</b>"}
    study.add_trial(
        optuna.trial.create_trial(params={"lora.r": 64}, distributions=space, state=failed, user_attrs=reason)
    )
    study.ask(space)
    found = studio.api("GET", "/api/searches/demo").json()
    assert found["metrics"] == ["Q8_0.exact_match", "Q8_0.bytes"]
    assert [trial["state"] for trial in found["trials"]] == [*["complete"] * 4, "fail", "running"]
    assert [trial["number"] for trial in found["trials"] if trial["best"]] == [0, 1, 3]
    assert found["finished"] == 5
    assert set(found["importance"]) == {"lora.r"}
    text = studio.ask("GET", "/searches/demo").text
    assert "out of memory" in text
    assert "<b>" not in text
    assert all(f'data-chart="{kind}"' in text for kind in ("history", "front", "bars"))
    assert ">demo</a>" in studio.ask("GET", "/searches").text
    assert studio.api("GET", "/api/searches/none").status == 404


def test_a_search_file_is_checked_and_saved_before_it_is_started(studio):
    text = (studio.root / "experiments/search/default.yaml").read_text().replace("Q4_K_M", "Q8_0")
    (studio.root / "experiments/search/edited.yaml").write_text(text)
    form = {"file": "experiments/search/edited.yaml", "n_trials": "5", "jobs": "1", "text": text}
    shown = studio.ask("POST", "/searches/check", form).text
    assert "lathe search experiments/search/edited.yaml --n-trials 5" in shown
    other = {**form, "text": text.replace("study: learning", "study: mine").replace("\n", "\r\n")}
    assert "lathe search experiments/search/mine.yaml --n-trials 5" in studio.ask("POST", "/searches/check", other).text
    assert "must be from 5 to 100" in studio.ask("POST", "/searches/check", {**form, "n_trials": "4"}).text
    refused = studio.ask("POST", "/searches/start", {**other, "n_trials": "4"})
    assert "HX-Redirect" not in refused.text
    assert "hx-redirect" not in refused.headers
    assert not (studio.root / "experiments/search/mine.yaml").exists()
    started = studio.ask("POST", "/searches/start", other)
    identifier = started.headers["hx-redirect"].rpartition("/")[2]
    assert studio.api("POST", f"/api/commands/{identifier}/cancel").status == 200
    assert (studio.root / "experiments/search/mine.yaml").read_text() == text.replace("study: learning", "study: mine")
    studio.wait(identifier, 60)


def test_a_file_becomes_a_preset_and_dvc_keeps_it(studio, checkout):
    rows = "".join(json.dumps({"ask": f"a{row}", "reply": "b"}) + "\n" for row in range(30)).encode()
    assert studio.ask("PUT", "/api/data/kept.jsonl", rows).status == 201
    before = (studio.root / "presets.yaml").read_text()
    form = {"name": "kept", "path": "data/local/kept.jsonl", "prompt": "ask", "completion": "reply"}
    assert "HX-Retarget" not in studio.ask("POST", "/data/preset", {**form, "name": "Kept!"}).headers
    started = studio.ask("POST", "/data/preset", form)
    assert studio.wait(started.headers["hx-redirect"].rpartition("/")[2], 60)["state"] == "ended"
    assert (studio.root / "data/local/kept.jsonl.dvc").is_file()
    after = (studio.root / "presets.yaml").read_text()
    added = "  kept:\n    source: local\n    path: data/local/kept.jsonl\n    prompt: ask\n    completion: reply\n\n"
    assert after == before.replace("\ndatasets:\n", f"\ndatasets:\n{added}")
    shown = checkout.run(
        *("python3", "-m", "lathe", "config", "datasets", "-S", "dataset=kept"),
        env={"PYTHONPATH": str(checkout.root / "src")},
    )
    assert "completion: reply" in shown.stdout
    assert "uncommitted-changes" in studio.api("POST", "/api/runs/better/actions", {"action": "apply"}).text


class _Judge(BaseHTTPRequestHandler):
    """A judge of OpenAI's protocol with one opinion."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": json.dumps({"score": 87, "reason": "<b>nearly</b> right"})}
        usage = {"prompt_tokens": 1_000_000, "completion_tokens": 100_000}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({"model": "of-the-tests", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


def test_a_trial_call_shows_the_verdict_with_its_cost_and_refusals_in_words(studio):
    server = HTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    form = {"prompt": "2 + 2?", "reference": "4", "answer": "five", "p:judge.provider": "openai"}
    form |= {"p:judge.base_url": f"http://127.0.0.1:{server.server_port}/v1"}
    form |= {"p:judge.input_price": "0.5", "p:judge.output_price": "2.0"}
    text = studio.ask("POST", "/judge/trial", form).text
    server.shutdown()
    server.server_close()
    assert ">87<" in text
    assert "&lt;b&gt;nearly" in text
    assert "0.700000" in text
    refused = studio.ask("POST", "/judge/trial", form)
    assert refused.headers["hx-retarget"] == "#refusal"
    assert "judge openai" in refused.text
    assert "Traceback" not in refused.text


def test_an_upload_is_checked_with_the_lines_of_its_faults(studio):
    rows = [{"prompt": f"p{row}", "completion": "a" if row != 3 else ""} for row in range(30)]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert studio.ask("PUT", "/api/data/mine.jsonl", body).json() == {"path": "data/local/mine.jsonl"}
    found = studio.api("GET", "/api/data/check?path=data/local/mine.jsonl").json()
    assert found["rows"] == {"read": 30, "usable": 29, "unusable": 1}
    assert "mine.jsonl:4" in json.dumps(found["faults"]) or ":4" in json.dumps(found["faults"])
    again = studio.ask("PUT", "/api/data/mine.jsonl", body)
    assert (again.status, again.json()["code"]) == (422, "file-exists")
    assert studio.ask("PUT", "/api/data/mine.jsonl?replace=true", body[:-30]).status == 201
    assert (studio.root / "data/local/mine.jsonl").read_bytes() == body[:-30]


def test_settings_of_the_judge_are_saved_in_params_yaml_and_never_a_key(studio, checkout):
    before = (studio.root / "params.yaml").read_text()
    form = {"p:judge.model": "gpt-5-mini", "p:judge.max_cost": "3.5", "prompt": "x"}
    for wrong, said in (("sk-abcdefghijklmnop0123", "looks like a key"), ("[", "no YAML value")):
        refused = studio.ask("POST", "/judge/save", {**form, "p:judge.model": wrong})
        assert refused.headers["hx-retarget"] == "#refusal"
        assert said in refused.text
        assert wrong not in refused.text or wrong == "["
    assert (studio.root / "params.yaml").read_text() == before
    shown = studio.ask("POST", "/judge/save", form).text
    assert "judge.max_cost=3.5" in shown
    config = checkout.run(
        *("python3", "-m", "lathe", "config", "judge"), env={"PYTHONPATH": str(checkout.root / "src")}
    ).stdout
    assert "gpt-5-mini" in config
    assert "nothing to save" in studio.ask("POST", "/judge/save", form).text
    (studio.root / "params.yaml").write_text(before)


def test_a_remote_that_cannot_be_reached_is_told_in_words(studio, checkout):
    assert (
        "has none of this name" in studio.ask("GET", "/overview/remote?remote=none", headers={"HX-Request": "1"}).text
    )
    checkout.run("git", "remote", "add", "gone", "/nowhere/at/all.git")
    try:
        answer = studio.ask("GET", "/overview/remote?remote=gone", headers={"HX-Request": "true"})
    finally:
        checkout.run("git", "remote", "remove", "gone")
    assert answer.headers["hx-retarget"] == "#refusal"
    assert "dvc exp list gone" in answer.text
    assert "Traceback" not in answer.text


HOSTILE = "<script>window.hacked=1</script>\u001b[31m'\"><img src=x onerror=window.hacked=1>"


def test_hostile_data_is_text(studio):
    rows = [{"prompt": HOSTILE * (1 + row), "completion": HOSTILE} for row in range(12)]
    rows.append({"prompt": "x" * 100_000, "completion": ""})
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name = "hostile.jsonl"
    assert studio.ask("PUT", f"/api/data/{name}", body).status == 201
    text = studio.ask("GET", f"/data/check?path=data/local/{name}", headers={"HX-Request": "true"}).text
    assert "<script" not in text
    assert "\x1b" not in text
    assert "<img" not in text


EXAMPLES = 10  # of each operation, so that all end within the time of the tests


def test_no_request_breaks_the_api_or_its_description(studio):
    # Whatever a generated request would start is refused: it names no recipe, file or model that there is.
    headers = {"Authorization": f"Bearer {TOKEN}"}
    schema = schemathesis.openapi.from_url(f"{studio.address}/api/openapi.json", headers=headers)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    tried = 0
    quick = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )

    for operation in schema.get_all_operations():

        @quick
        @given(case=operation.ok().as_strategy())
        def try_operation(case: Any) -> None:
            case.call_and_validate(headers=headers, checks=checks, timeout=60)

        try_operation()
        tried += 1
    assert tried == 23


def test_nothing_of_the_studio_is_left_in_the_checkouts_git_status(studio, checkout):
    changed = checkout.run("git", "status", "--porcelain").stdout
    assert ".scratch" not in changed
    assert Path(studio.root / ".scratch/studio").is_dir()
