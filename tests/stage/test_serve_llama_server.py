# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""llama-server behind the limits: many requests at once, streams, tools, and what happens when it dies."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from gguf_models import Made, tiny  # noqa: F401 - fixture
from refusals import refused
from test_serve import COMMAND, chat_with, environment, post, schema_of, serving

from lathe.gguf.build_llama_server import SERVER, find_program
from lathe.inference import serve
from lathe.inference.llama_server import LlamaServer
from lathe.inference.serve_requests import CHAT, COMPLETION, SAMPLING, STREAMING

pytestmark = pytest.mark.skipif(find_program(SERVER) is None, reason="llama-server is not built: make llama-server")

KEY = {"Authorization": "Bearer the key"}


@pytest.fixture(scope="module")
def served(tiny: Made) -> Iterator[str]:
    with serving(tiny.gguf, "the key", SERVER) as (address, _):
        yield address


def find_engine(address: str) -> psutil.Process:
    """Return the llama-server of the server at an address."""
    port = int(address.rsplit(":", 1)[1].split("/")[0])
    for process in psutil.Process().children(recursive=True):
        if any(each.laddr.port == port for each in process.net_connections() if each.status == "LISTEN"):
            [engine] = process.children()
            return engine
    raise AssertionError(port)


async def stream(client: httpx2.AsyncClient, address: str, **more: Any) -> tuple[str, str | None]:
    """Return the text of a streamed answer, and why it ended."""
    text, reason = "", None
    body = chat_with(stream=True, **more)
    async with client.stream("POST", f"{address}/chat/completions", json=body, headers=KEY) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line[6:])["choices"]
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    return text, reason


def test_a_stream_has_the_text_of_the_whole_answer(served):
    whole = post(served, "/v1/chat/completions", chat_with(max_tokens=24)).json()["choices"][0]

    async def ask() -> tuple[str, str | None]:
        async with httpx2.AsyncClient(timeout=60) as client:
            return await stream(client, served, max_tokens=24)

    assert asyncio.run(ask()) == (whole["message"]["content"], whole["finish_reason"])


def test_sixty_four_requests_at_once_are_all_answered_as_one_alone(served):
    async def ask_all() -> list[tuple[str, str | None]]:
        async with httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(stream(client, served, max_tokens=16) for _ in range(64)))

    answers = asyncio.run(ask_all())
    assert len(answers) == 64
    assert len(set(answers)) == 1


def test_an_answer_has_probabilities_and_stops_at_a_text(served):
    answer = post(served, "/v1/chat/completions", chat_with(max_tokens=8, logprobs=True, top_logprobs=3)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content[0]["top_logprobs"]) == 3
    text = answer["choices"][0]["message"]["content"]
    piece = next(part["token"] for part in content[2:] if part["token"].strip() and part["token"].isascii())
    stopped = post(served, "/v1/chat/completions", chat_with(max_tokens=8, stop=[piece])).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == text.partition(piece)[0]


def test_a_completion_of_a_text_has_sixteen_tokens_unless_it_says_more(served):
    answer = post(served, "/v1/completions", {"prompt": "lamp"}).json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (
        post(served, "/v1/completions", {"prompt": ["lamp"], "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    )


def test_a_drawn_answer_depends_on_its_seed(served):
    def draw(seed: int) -> str:
        body = chat_with(max_tokens=12, temperature=1.5, seed=seed)
        return str(post(served, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"])

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


REFUSED = {
    "a slot": (chat_with(id_slot=0), "id_slot: is not supported"),
    "adapters": (chat_with(lora=[{"id": 0, "scale": 1.0}]), "lora: is not supported"),
    "a schema beside OpenAI's": (chat_with(json_schema={"$ref": "#"}), "json_schema: is not supported"),
    "a grammar's triggers": (chat_with(grammar_lazy=True), "grammar_lazy: is not supported"),
    "more tokens than any": (chat_with(n_predict=10**9), "n_predict: is not supported"),
    "answers by another name": (chat_with(n_cmpl=4), "n_cmpl: is not supported"),
    "what it computed": (chat_with(verbose=True), "verbose: is not supported"),
    "an image": (
        chat_with(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]),
        "messages[0].content",
    ),
    "not a number": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "a number that is none"),
    "a bias for a text": (chat_with(logit_bias=[["lamp", 5]]), "logit_bias: must be an object"),
    "a template's messages": (chat_with(chat_template_kwargs={"messages": "x"}), "messages is not to be set"),
    "a template's list": (chat_with(chat_template_kwargs={"x": [1]}), "x must be a number"),
    "tools where there are none": (
        chat_with(tools=[{"type": "function", "function": {"name": "f"}}]),
        "the model's chat template writes none",
    ),
    "an enumeration without end": (
        schema_of({"enum": [str(number) for number in range(5000)]}),
        "more than 1000 parts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_server_would_do_beside_openai_s_protocol_is_refused(served, name):
    body, part = REFUSED[name]
    answer = post(served, "/v1/chat/completions", body)
    assert (answer.status_code, part in answer.text) == (400, True), answer.text


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2, 3], [[1], [2]], {"prompt_string": "x"}, 5])
def test_one_text_is_completed_at_a_time_and_no_token_ids(served, prompt):
    answer = post(served, "/v1/completions", {"prompt": prompt})
    assert (answer.status_code, "must be one text" in answer.text) == (400, True), answer.text


def test_values_of_a_wrong_type_or_size_are_answered_and_the_engine_lives_on(served):
    before = find_engine(served).pid
    strange = [True, -1, 0, 1e308, -1e308, 2**63, "x", [], [1], {}, {"a": 1}]
    for key in sorted((SAMPLING | STREAMING | CHAT) - {"messages"}):
        for value in strange:
            if key == "stream" and value is True:
                continue
            body = chat_with(**{"temperature": 0.7, "max_tokens": 2, key: value})
            assert post(served, "/v1/chat/completions", body).status_code in (200, 400, 500), (key, value)
    for key in sorted(COMPLETION - {"prompt"}):
        for value in strange:
            assert post(served, "/v1/completions", {"prompt": "x", "max_tokens": 2, key: value}).status_code < 501
    for content in ("\ud800", "\x00", "<|im_end|>" * 50, ""):
        body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2}).encode()
        assert post(served, "/v1/chat/completions", body).status_code in (200, 400)
    assert find_engine(served).pid == before


def test_a_prompt_that_is_too_long_is_refused_with_its_length(served):
    answer = post(served, "/v1/chat/completions", chat_with(messages=[{"role": "user", "content": "lamp " * 5000}]))
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]


def test_nothing_of_the_disk_or_of_other_addresses_is_shown(served, tiny):
    assert httpx2.get(f"{served}/models", headers=KEY).json()["data"][0]["id"] == tiny.gguf.stem
    for path in (
        "/props",
        "/slots",
        "/slots/0?action=save",
        "/metrics",
        "/health",
        "/v1/health",
        "/",
        "/lora-adapters",
    ):
        for method in ("GET", "POST"):
            answer = httpx2.request(method, f"{served.removesuffix('/v1')}{path}", headers=KEY, json={"filename": "x"})
            assert answer.status_code == 404
    answer = post(served, "/v1/chat/completions", chat_with(model="../../etc/passwd"))
    assert answer.json()["model"] == tiny.gguf.stem
    assert str(tiny.gguf.parent) not in answer.text
    assert "access-control-allow-origin" not in answer.headers


def test_the_engine_is_reached_by_its_parent_alone(served):
    engine = find_engine(served)
    assert not engine.net_connections("inet")
    command = engine.cmdline()
    socket = Path(command[command.index("--host") + 1])
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    given = engine.environ()
    assert given["LLAMA_API_KEY"] not in command
    assert "the key" not in given.values()
    assert "LATHE_API_KEY" not in given
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(socket))) as client:
        body = {"prompt": "x", "n_predict": 1}
        assert client.post("http://engine/completion", json=body, headers=KEY).status_code == 401
        assert client.get("http://engine/props").status_code == 401


def test_a_killed_engine_is_started_again_and_requests_have_an_answer_meanwhile(tiny):
    with serving(tiny.gguf, "the key", SERVER) as (address, _):
        first = find_engine(address)
        first.kill()
        statuses = set()
        end = time.monotonic() + 30
        while (answer := post(address, "/v1/chat/completions", chat_with())).status_code != 200:
            statuses.add(answer.status_code)
            assert answer.json()["error"]["type"] == "server_error"
            assert time.monotonic() < end
        assert statuses <= {502, 503}
        assert find_engine(address).pid != first.pid


def test_a_stream_that_the_engine_leaves_ends_with_an_error(tiny):
    with serving(tiny.gguf, "the key", SERVER) as (address, _):
        body = chat_with(stream=True, max_tokens=400, logit_bias={"2": -100, "4": -100})
        lines = []
        with httpx2.stream("POST", f"{address}/chat/completions", json=body, headers=KEY, timeout=60) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if not lines:
                    find_engine(address).kill()
                lines += [line] if line else []
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "send the request again" in error["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_ends_with_its_parent(tiny, number):
    command = [*COMMAND, "serve", "--gguf", str(tiny.gguf), "--port", "0", "--engine", SERVER, "--parallel", "2"]
    with subprocess.Popen(command, env=environment("the key"), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        assert any("http://" in line for line in server.stderr)
        [engine] = psutil.Process(server.pid).children()
        os.kill(server.pid, number)
        server.wait(10)
        engine.wait(10)


def test_a_client_that_goes_away_leaves_its_slot_to_others(served):
    body = chat_with(stream=True, max_tokens=400, logit_bias={"2": -100, "4": -100})
    for _ in range(8):  # twice as many as there are slots
        with httpx2.stream("POST", f"{served}/chat/completions", json=body, headers=KEY, timeout=60) as response:
            next(response.iter_lines())
    began = time.monotonic()
    assert post(served, "/v1/chat/completions", chat_with(max_tokens=1)).status_code == 200
    assert time.monotonic() - began < 10


def test_a_program_that_cannot_serve_is_said_in_one_line(tiny, tmp_path):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'error: no such option' >&2\nexit 1\n")
    program.chmod(0o755)
    server = LlamaServer(program, tiny.gguf, n_ctx=64, parallel=1, threads=1, connections=4)
    with refused("llama-server-fails", "no such option", "--engine llama-cpp-python", kept=False), server:
        pass


@pytest.mark.parametrize(
    ("parallel", "code", "said"),
    [("auto", "llama-server-not-built", "make llama-server"), (0, "number-too-small", "must be at least 1")],
)
def test_an_engine_that_is_not_built_and_no_requests_at_once_are_refused(tiny, monkeypatch, parallel, code, said):
    monkeypatch.setattr(serve, "find_program", lambda name: None)
    with refused(code, said):
        serve.serve(tiny.gguf, port=0, api_key=None, n_ctx=64, threads=1, engine=SERVER, parallel=parallel)
