# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""Answers from servers: llama-server itself, whose answers are held against those in process, and faulty small ones."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from answer_server import KEY, MODEL, AnswerServer
from conftest import Checkout, copy_of
from generation_checkout import make_generation_checkout
from gguf_models import Made, countdown, learnt  # noqa: F401 - fixtures
from refusals import refused

from lathe.common import patient_requests
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.common.operating_system import start_command
from lathe.config.load import load
from lathe.config.params import Generate
from lathe.gguf.build_llama_server import SERVER, find_program
from lathe.gguf.llama_model import LlamaModel
from lathe.gguf.quantize import quantize
from lathe.inference import server_answers
from lathe.inference.generate import Completion, Generator
from lathe.inference.llama_server import build_environment, build_options
from lathe.inference.server_answers import KEY_VARIABLE, ServerEngine
from lathe.sources.builtin import household_commands

SETTINGS = {
    "generate.max_new_tokens": 12,
    "generate.n_ctx": 256,
    "generate.n_parallel": 8,
    "generate.few_shot": 3,
    "quantize.types": ["Q8_0"],
}
ARTIFACTS = ("base_few_shot", "merged", "Q8_0")
FILES = {"base": "base-f16", "merged": "merged-f16", "Q8_0": "Q8_0"}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_requests, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout with what the stage reads, in which every artifact has answered in process."""
    root = tmp_path_factory.mktemp("generate") / "lathe"
    checkout = make_generation_checkout(
        root, SETTINGS, {"train": 20, "validation": 12, "test": 20}, "switch on the attic lamp"
    )
    folder = checkout.root / "models/gguf"
    for name in ("base", "merged"):
        shutil.copy(learnt.gguf, folder / f"{name}-f16.gguf")
    quantize(learnt.gguf, folder / "Q8_0.gguf", type="Q8_0", threads=2)
    checkout.stage("generate", *ARTIFACTS)
    return checkout


@contextmanager
def serving(gguf: Path, *, key: str = KEY, n_ctx: int = 256) -> Iterator[str]:
    """Run llama-server as a user would on another machine."""
    program = find_program(SERVER)
    assert program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start_command(
        [str(program), *build_options(gguf, n_ctx, 4, 1, 8), "--host", "127.0.0.1", "--port", str(port)],
        env=build_environment(os.environ, key),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(400):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except (OSError, urllib.error.HTTPError):
                assert process.poll() is None
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def served_by(urls: dict[str, str]) -> dict[str, Any]:
    servers = [{"artifact": name, "url": url, "model": FILES[name]} for name, url in urls.items()]
    return {"generate.engine": "server", "generate.servers": servers}


needs_llama_server = pytest.mark.skipif(
    find_program(SERVER) is None, reason="llama-server is not built: make llama-server"
)


@needs_llama_server
def test_llama_server_gives_every_artifact_the_answers_that_it_gives_in_process(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.environment[KEY_VARIABLE] = KEY
    with (
        serving(made.root / "models/gguf/merged-f16.gguf") as merged,
        serving(made.root / "models/gguf/base-f16.gguf") as base,
        serving(made.root / "models/gguf/Q8_0.gguf") as quantized,
    ):
        checkout.set(served_by({"base": base, "merged": merged, "Q8_0": quantized}))
        for artifact in ARTIFACTS:
            shutil.rmtree(checkout.root / "data/generated" / artifact)
        done = checkout.stage("generate", *ARTIFACTS)
    assert KEY not in done.stderr
    same = rows = 0
    for artifact in ARTIFACTS:
        for split in ("validation", "test"):
            own = read_jsonl(made.root / f"data/generated/{artifact}/{split}.jsonl")
            theirs = read_jsonl(checkout.root / f"data/generated/{artifact}/{split}.jsonl")
            assert [row.pop("engine") for row in theirs] == ["server (llama-server)"] * len(own)
            assert [_without_answer(row) for row in theirs] == [_without_answer(row) for row in own]
            same += sum(one == two for one, two in zip(own, theirs, strict=True))
            rows += len(own)
            assert {row["finish_reason"] for row in theirs} <= {"stop", "length"}
        own_metrics, metrics = (each.json(f"metrics/generate/{artifact}.json") for each in (made, checkout))
        [described] = metrics.pop("engine")
        assert described["name"] == "server (llama-server)"
        assert set(own_metrics) == set(metrics)
        assert KEY not in (checkout.root / f"metrics/generate/{artifact}.json").read_text()
    print(f"{same} of {rows} answers are the same")
    assert same == rows == 3 * 32
    items = {item["item"]: item for item in checkout.json("metrics/timings/generate.json")["items"]}
    assert all("server_tokens_per_second" in items[artifact] for artifact in ARTIFACTS)
    assert not any("tokens_per_second" in items[artifact] for artifact in ARTIFACTS)


def _without_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("prompt", "reference", "nll", "reference_tokens", "kl")}


@needs_llama_server
def test_killed_and_started_again_it_asks_for_the_missing_answers_alone(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    with LlamaModel(made.root / "models/gguf/merged-f16.gguf", vocab_only=True) as model:
        expected = {
            row["prompt"]: row
            for split in ("validation", "test")
            for row in read_jsonl(made.root / f"data/generated/merged/{split}.jsonl")
        }
        with AnswerServer(lambda prompt: count(model, prompt), lambda body: say(expected[body["prompt"]])) as server:
            server.takes_tokens, server.delay_seconds = False, 0.05
            servers = [{"artifact": name, "url": server.url, "model": MODEL} for name in ("base", "merged", "Q8_0")]
            checkout.set({"generate.engine": "server", "generate.servers": servers, "generate.concurrency": 2})
            shutil.rmtree(checkout.root / "data/generated/merged")
            command = [sys.executable, "stages/generate.py", "merged"]
            running = subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, stderr=subprocess.DEVNULL)
            while len(server.asked) < 16 and running.poll() is None:
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
            running.wait()
            assert not (checkout.root / "data/generated/merged").exists()
            asked = len(server.asked)
            done = checkout.stage("generate", "merged")
            assert "resuming an interrupted run" in done.stderr
            assert len(server.asked) - asked <= 32 - asked + server_answers.CHECKED_ROWS
    for split in ("validation", "test"):
        rows = read_jsonl(checkout.root / f"data/generated/merged/{split}.jsonl")
        assert [row.pop("engine") for row in rows] == ["server (vllm)"] * len(rows)
        assert rows == read_jsonl(made.root / f"data/generated/merged/{split}.jsonl")


def say(row: dict[str, Any]) -> dict[str, Any]:
    usage = {"completion_tokens": row["tokens"]}
    return {"text": row["completion"], "finish_reason": row["finish_reason"], "usage": usage}


def count(model: LlamaModel, prompt: Any, *, adds_bos: bool = False) -> int:
    if not isinstance(prompt, str):
        return len(prompt)
    return len(model.tokenize(prompt)) + adds_bos


class Asked:
    """An engine in front of a server that knows the file's own answers, and what it has kept."""

    def __init__(self, generator: Generator, prompts: list[str]) -> None:
        self.generator, self.prompts = generator, prompts
        self.own = generator.complete(prompts, max_new_tokens=10)
        texts = {tuple(generator.tokenize(prompt)): own for prompt, own in zip(prompts, self.own, strict=True)}
        self.by_text: dict[Any, Completion] = {**dict(zip(prompts, self.own, strict=True)), **texts}
        self.kept: dict[int, Completion] = {}
        self.server = AnswerServer(
            lambda prompt: count(generator.model, prompt), lambda body: self.find(body["prompt"])
        )

    def find(self, prompt: Any) -> dict[str, Any]:
        own = self.by_text[prompt if isinstance(prompt, str) else tuple(prompt)]
        return {"text": own.text, "finish_reason": own.finish_reason, "usage": {"completion_tokens": own.tokens}}

    def ask(self, *, environment: dict[str, str] | None = None, model: str = MODEL, **changes: Any) -> None:
        engine = ServerEngine(
            *make_settings(self.server.url, model=model, **changes), environment if environment is not None else {}
        )
        engine.answer(
            self.generator,
            lambda: enumerate(self.prompts),
            max_new_tokens=10,
            finished=set(self.kept),
            keep=self.kept.__setitem__,
        )


def make_settings(url: str, *, model: str = MODEL, **changes: Any) -> tuple[Any, Generate]:
    changed = {"engine": "server", "timeout_seconds": 5.0, "max_retries": 2, "concurrency": 4, **changes}
    servers = [{"artifact": "merged", "url": url, "model": model}]
    settings = Generate.model_validate({**load().params.generate.model_dump(), "servers": servers, **changed})
    return settings.servers[0], settings


@pytest.fixture(scope="module")
def generator(learnt: Made) -> Iterator[Generator]:
    with Generator(learnt.gguf, n_parallel=8, n_ctx=256, threads=1) as generator:
        yield generator


@pytest.fixture
def asked(generator: Generator) -> Iterator[Asked]:
    template = generator.chat_template
    rows = household_commands.make_rows(1)["test"][:14]
    prompts = [template.render(row["messages"][:-1], add_generation_prompt=True) for row in rows]
    asked = Asked(generator, prompts)
    with asked.server:
        yield asked


def test_answers_are_kept_by_their_rows_and_asked_for_greedily_some_at_a_time(asked: Asked):
    asked.server.delay_seconds = 0.02
    asked.ask()
    assert asked.kept == dict(enumerate(asked.own))
    assert 1 < asked.server.most_at_once <= 4
    [first, *_] = asked.server.asked
    assert first["prompt"] == asked.generator.tokenize(asked.prompts[0])
    assert {key: first[key] for key in ("temperature", "max_tokens", "n", "repetition_penalty", "stream")} == {
        "temperature": 0,
        "max_tokens": 10,
        "n": 1,
        "repetition_penalty": 1.0,
        "stream": False,
    }
    assert all(asked.generator.model.is_end(token) for token in first["stop_token_ids"])


def test_token_ids_that_come_back_are_read_as_in_process(asked: Asked):
    def find(body: dict[str, Any]) -> dict[str, Any]:
        own = asked.find(body["prompt"])
        tokens = asked.generator.model.tokenize(own["text"])
        ends = [asked.generator.model.eos] if own["finish_reason"] == "stop" else []
        return {**own, "text": "another text", "token_ids": tokens + ends}

    asked.server.answer = find
    asked.ask()
    assert [asked.kept[number].text for number in range(14)] == [own.text for own in asked.own]
    assert [asked.kept[number].finish_reason for number in range(14)] == [own.finish_reason for own in asked.own]


@pytest.mark.parametrize(("takes_tokens", "takes_extensions"), list(itertools.product((True, False), repeat=2)))
def test_each_server_is_asked_in_the_most_exact_form_that_it_takes(asked: Asked, takes_tokens, takes_extensions):
    asked.server.takes_tokens, asked.server.takes_extensions = takes_tokens, takes_extensions
    asked.ask()
    assert asked.kept == dict(enumerate(asked.own))
    taken = asked.server.asked[-1]
    assert isinstance(taken["prompt"], str) != takes_tokens
    assert ("stop_token_ids" in taken) == takes_extensions
    assert len(asked.server.asked) <= 14 + 3


def test_a_bos_that_the_server_adds_is_left_out_of_the_text(asked: Asked):
    bos = asked.generator.model.get_token_text(asked.generator.model.bos)
    assert all(prompt.startswith(bos) for prompt in asked.prompts)
    asked.server.takes_tokens = False
    asked.server.read = lambda prompt: count(asked.generator.model, prompt, adds_bos=True)
    asked.by_text |= {prompt.removeprefix(bos): own for prompt, own in zip(asked.prompts, asked.own, strict=True)}
    asked.ask()
    assert asked.kept == dict(enumerate(asked.own))
    assert not any(body["prompt"].startswith(bos) for body in asked.server.asked[-14:])


def test_a_server_that_reads_prompts_as_other_tokens_is_refused_before_an_answer_is_kept(asked: Asked):
    asked.server.read = lambda prompt: 7
    asked.by_text = dict.fromkeys(asked.by_text, asked.own[0])
    asked.server.answer = lambda body: asked.find(asked.prompts[0])
    with refused("other-tokens", "as 7 tokens", "merged", kept=False):
        asked.ask()
    assert asked.kept == {}


def test_a_server_with_other_weights_is_refused_before_an_answer_is_kept(asked: Asked):
    asked.server.answer = lambda body: {
        "text": "attic" * 5,
        "finish_reason": "length",
        "usage": {"completion_tokens": 10},
    }
    with refused("other-weights", "its first answers are not those of", kept=False):
        asked.ask()
    assert asked.kept == {}
    assert len(asked.server.asked) == server_answers.CHECKED_ROWS


FAULTS = {
    "429": (429, b'{"error": {"message": "slow down"}}'),
    "500": (500, b"Internal Server Error"),
    "503": (503, b"<html>"),
    "no JSON": b"<html>the lamp is on</html>",
    "half a JSON": b'{"choices": [{"te',
    "no choices": b'{"choices": []}',
    "no text": b'{"choices": [{"text": null, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}',
    "a list": b"[1]",
    "silence": None,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_went_wrong_is_asked_again(asked: Asked, fault):
    if fault == FAULTS["no text"]:
        asked.server.read = lambda prompt: 1 if prompt is None else count(asked.generator.model, prompt)
        fault = fault.replace(b"1}", str(len(asked.generator.tokenize(asked.prompts[0]))).encode() + b"}")
    asked.server.faults = [fault, fault]
    asked.ask(timeout_seconds=0.5)
    assert asked.kept == dict(enumerate(asked.own))
    assert len(asked.server.asked) == 14 + 2


def test_what_goes_wrong_for_ever_ends_the_run_and_keeps_what_has_come(asked: Asked):
    def find(body: dict[str, Any]) -> dict[str, Any]:
        if len(asked.server.asked) > 11:
            return {"text": None}
        return asked.find(body["prompt"])

    asked.server.answer = find
    with refused("malformed-answer", "after 3 attempts", "run again: finished ones are kept", kept=False):
        asked.ask(concurrency=1)
    assert sorted(asked.kept) == list(range(11))
    before = len(asked.server.asked)
    asked.server.answer = lambda body: asked.find(body["prompt"])
    asked.ask()
    assert len(asked.server.asked) - before == 3
    assert asked.kept == dict(enumerate(asked.own))


def test_a_server_that_never_answers_is_given_up_after_the_last_attempt(asked: Asked):
    asked.server.faults = [None] * 3
    with refused("unavailable", "generate.timeout_seconds, 0.2", kept=False):
        asked.ask(timeout_seconds=0.2)
    assert asked.kept == {}


def test_an_answer_that_the_servers_own_context_cut_is_refused(asked: Asked):
    asked.server.answer = lambda body: {"text": "on", "finish_reason": "length", "usage": {"completion_tokens": 3}}
    with refused("answer-cut", "after 3 of 10 tokens", "256 tokens", kept=False):
        asked.ask()


def test_an_answer_longer_than_was_asked_for_is_refused(asked: Asked):
    asked.server.answer = lambda body: {"text": "on" * 99, "finish_reason": "stop", "usage": {"completion_tokens": 99}}
    with refused("answer-too-long", "has 99 tokens, and 10 were asked for", kept=False):
        asked.ask()


def test_a_response_without_end_is_no_answer(asked: Asked, monkeypatch):
    monkeypatch.setattr("lathe.common.http_session._MAX_RESPONSE_BYTES", 1 << 16)
    asked.server.answer = lambda body: {"text": "on" * (1 << 16), "usage": {"completion_tokens": 5}}
    with refused("malformed-answer", "is longer than", kept=False):
        asked.ask(max_retries=0)


def test_the_key_is_sent_and_never_shown(asked: Asked):
    asked.server.key = KEY
    asked.ask(environment={KEY_VARIABLE: KEY})
    assert set(asked.server.authorizations) == {f"Bearer {KEY}"}
    asked.kept.clear()
    for environment in ({}, {KEY_VARIABLE: "sk-another-key"}):
        with pytest.raises(InputError) as caught:
            asked.ask(environment=environment)
        assert caught.value.code == "invalid-key"
        assert f"set {KEY_VARIABLE}" in str(caught.value)
        assert "sk-another-key" not in str(caught.value)
    with refused("invalid-key", KEY_VARIABLE, kept=False):
        asked.ask(environment={KEY_VARIABLE: "two words"})


def test_a_model_that_the_server_does_not_list_is_refused_before_a_row_is_sent(asked: Asked):
    with refused("unknown-model", "'other'", "known there: merged", kept=False):
        asked.ask(model="other")
    asked.server.models = None
    asked.server.faults = [(404, b'{"error": {"message": "The model does not exist."}}')]
    with refused("unknown-model", "does not exist", "generate.servers", kept=False):
        asked.ask(model="other")
    assert asked.kept == {}


def test_a_server_that_is_not_there_is_said_at_once(asked: Asked):
    asked.server.__exit__()
    with refused("unavailable", "cannot be reached", "start it", kept=False):
        asked.ask(max_retries=0)


def test_a_prompt_that_fills_the_context_is_named(asked: Asked):
    asked.prompts.append("lamp " * 300)
    with refused("prompt-too-long", "row 14", kept=False):
        asked.ask()
