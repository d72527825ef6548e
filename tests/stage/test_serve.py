# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""The server answers as the chat does, to those who have the key, on this machine alone, whichever engine it has."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from gguf_models import Made, tiny  # noqa: F401 - fixture

from lathe.common import paths
from lathe.gguf.build_llama_server import SERVER, find_program

IS_BUILT = pytest.mark.skipif(find_program(SERVER) is None, reason="llama-server is not built: make llama-server")
ENGINES = ["llama-cpp-python", pytest.param(SERVER, marks=IS_BUILT)]
COMMAND = [sys.executable, "-m", "lathe"]


def environment(key: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "LATHE_API_KEY"}
    # What llama-cpp-python's own command would heed.
    stray = {"CONFIG_FILE": "/nowhere", "API_KEY": "stray", "HOST": "0.0.0.0", "N_CTX": "8", "CHAT_FORMAT": "llama-2"}
    return {**kept, **stray, "PYTHONPATH": str(paths.ROOT / "src"), **({"LATHE_API_KEY": key} if key else {})}


@contextmanager
def serving(gguf: Path, key: str | None, engine: str = "llama-cpp-python") -> Iterator[tuple[str, str]]:
    """Start the server; yield its address and what it had logged by then."""
    command = [*COMMAND, "serve", "--gguf", str(gguf), "--port", "0", "--engine", engine, "--parallel", "4"]
    server = subprocess.Popen(command, env=environment(key), stderr=subprocess.PIPE, text=True)
    assert server.stderr
    said = ""
    try:
        for line in server.stderr:
            said += line
            if found := re.search(r"http://\S+/v1", line):
                yield found[0], said
                break
        else:
            raise AssertionError(said)
    finally:
        server.terminate()
        server.wait(10)
        server.stderr.close()


def ask(address: str, key: str, text: str, **more: object) -> httpx2.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, **more}
    return httpx2.post(f"{address}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


@pytest.fixture(scope="module", params=ENGINES)
def guarded(tiny: Made, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A server with a key: its address and its log."""
    with serving(tiny.gguf, "the key", request.param) as started:
        yield started


@pytest.mark.parametrize("text", ["lamp on", "Größe, 敏捷 🙂?"])
def test_an_answer_is_that_of_the_chat_where_the_request_leaves_sampling_open(guarded, tiny, text):
    answer = ask(guarded[0], "the key", text, max_tokens=64)
    assert answer.status_code == 200
    said = subprocess.run(
        [*COMMAND, "chat", "--gguf", str(tiny.gguf), "--prompt", text],
        env=environment(None),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Bytes that are no character, which a random model writes, are left out by one and marked by another.
    content = answer.json()["choices"][0]["message"]["content"]
    assert content.replace("\ufffd", "") + "\n" == said.replace("\ufffd", "")


def test_a_conversation_is_rendered_by_the_template_of_training(guarded, tiny):
    turns = [("system", "be brief"), ("user", "lamp on"), ("assistant", "yes"), ("user", "and off")]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = ask(guarded[0], "the key", "", messages=messages).json()
    text = "<s>" + "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    from lathe.inference.generate import Generator

    with Generator(tiny.gguf, n_parallel=1, n_ctx=512, threads=1) as generator:
        prompt = f"{text}<|im_start|>assistant\n"
        assert answer["usage"]["prompt_tokens"] == len(generator.tokenize(prompt))
        expected = generator.complete([prompt], max_new_tokens=12)[0].text.replace("\ufffd", "")
        assert answer["choices"][0]["message"]["content"].replace("\ufffd", "") == expected


def test_an_answer_names_the_model_and_not_its_path(guarded, tiny):
    messages = [{"role": "user", "content": "lamp on"}]
    key = {"Authorization": "Bearer the key"}
    request = {"messages": messages, "max_tokens": 2}
    answer = httpx2.post(f"{guarded[0]}/chat/completions", json=request, headers=key, timeout=60).json()
    assert answer["model"] == tiny.gguf.stem


def test_without_the_key_nothing_is_answered(guarded):
    address, said = guarded
    assert ask(address, "another key", "lamp on").status_code == 401
    assert httpx2.post(f"{address}/chat/completions", json={"messages": []}).status_code == 401
    assert httpx2.get(f"{address}/models").status_code == 401
    assert "LATHE_API_KEY" not in said
    assert "the key" not in said


def test_without_a_key_in_the_environment_it_warns_and_answers(tiny):
    with serving(tiny.gguf, None) as (address, said):
        assert "LATHE_API_KEY is not set" in said
        assert ask(address, "any", "lamp on").status_code == 200


def test_it_listens_on_this_machine_alone(guarded):
    port = int(guarded[0].rsplit(":", 1)[1].split("/")[0])
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    found = [line.split()[1] for line in listening.splitlines() if f":{port:04X}" in line and " 0A " in line]
    assert found == [f"0100007F:{port:04X}"]


def test_a_port_in_use_and_one_that_is_none_are_refused_in_one_line(tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for wrong, message in ((port, "not to be had (Address already in use)"), (70000, "no port")):
            done = subprocess.run(
                [*COMMAND, "serve", "--gguf", str(tiny.gguf), "--port", str(wrong)],
                env=environment(None),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: --port {wrong}: {message}")
            assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    done = subprocess.run(
        [*COMMAND, "serve", "--gguf", str(tmp_path / "a.gguf"), "--port", "0"],
        env=environment(None),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*a\.gguf: llama\.cpp cannot load it .*\n", done.stderr)


def post(address: str, path: str, body: object, key: str = "the key", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    root = address.removesuffix("/v1")
    sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
    return httpx2.post(f"{root}{path}", content=content, headers=sent, timeout=60)


def chat_with(**more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "lamp on"}], "max_tokens": 4, **more}


def schema_of(schema: object) -> dict[str, object]:
    return chat_with(response_format={"type": "json_object", "schema": schema})


def nest(part: dict[str, object], depth: int, key: str = "items", **more: object) -> dict[str, object]:
    for _ in range(depth):
        part = {"type": "array", key: part, **more}
    return part


EXPONENTIAL = {
    "$ref": "#/$defs/r0",
    "$defs": {
        **{f"r{n}": {"anyOf": [{"$ref": f"#/$defs/r{n + 1}"}, {"$ref": f"#/$defs/r{n + 1}"}]} for n in range(40)},
        "r40": {"const": ""},
    },
}
HOSTILE = {
    "a grammar": (chat_with(grammar='root ::= root "a" | "a"'), 400, "grammar: is not supported"),
    "a schema of itself": (schema_of({"$ref": "#"}), 400, "expected #/$defs/NAME"),
    "a schema in a circle": (
        schema_of({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}),
        400,
        "refers to itself",
    ),
    "a schema elsewhere": (schema_of({"$ref": "file:///etc/passwd"}), 400, "expected #/$defs/NAME"),
    "an exponential schema": (schema_of(EXPONENTIAL), 400, "more than"),
    "nested repetitions": (schema_of(nest({"type": "null"}, 3, maxItems=1000)), 400, "maxItems 1000"),
    "a pattern": (schema_of({"type": "string", "pattern": "^(a{1000}){1000}$"}), 400, "`pattern`"),
    "a deep schema": (schema_of(nest({"type": "null"}, 60)), 400, "more than 32 deep"),
    "a deep request": (chat_with(user=nest({}, 200)), 400, "more than 100 deep"),
    "a schema of a called tool": (
        chat_with(
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
            tool_choice={"type": "function", "function": {"name": "f"}},
        ),
        400,
        "expected #/$defs/NAME",
    ),
    "a bias on a token that is none": (chat_with(logit_bias={"999999999": 1}), 400, "is no token"),
    "a bias below nothing": (chat_with(logit_bias={"-1": 1}), 400, "is no token"),
    "many stops": (chat_with(stop=["x"] * 10_000), 400, "at most 16"),
    "many probabilities": (chat_with(logprobs=True, top_logprobs=10**9), 400, "at most 20"),
    "many answers": (chat_with(n=10_000), 400, "one answer"),
    "no JSON": (b"{", 400, "no JSON"),
    "JSON without end": (b"[" * 500_000, 400, "no JSON"),
    "no object": (b"[1]", 400, "expected an object"),
    "no messages": ({}, 400, "messages"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_request_that_would_end_or_hold_the_server_is_refused_and_the_next_is_answered(guarded, name):
    body, status, part = HOSTILE[name]
    answer = post(guarded[0], "/v1/chat/completions", body)
    assert (answer.status_code, part in answer.text) == (status, True), answer.text
    assert ask(guarded[0], "the key", "lamp on", max_tokens=2).status_code == 200


@pytest.mark.parametrize("nested", [True, False])
def test_an_answer_is_held_to_a_schema_with_references(guarded, nested):
    schema = {
        "type": "object",
        "properties": {"on": {"$ref": "#/$defs/flag"}, "off": {"$ref": "#/$defs/flag"}},
        "required": ["on", "off"],
        "$defs": {"flag": {"type": "boolean"}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    wanted = wanted if nested else {"type": "json_object", "schema": schema}
    answer = post(guarded[0], "/v1/chat/completions", chat_with(response_format=wanted, max_tokens=200)).json()
    content = json.loads(answer["choices"][0]["message"]["content"])
    assert sorted(content) == ["off", "on"]
    assert {type(value) for value in content.values()} == {bool}


def test_other_addresses_of_the_engine_are_not_there(guarded):
    for path in ("/extras/detokenize", "/extras/tokenize", "/v1/embeddings", "/docs", "/openapi.json"):
        assert post(guarded[0], path, {"tokens": [999999999], "input": "x"}).status_code == 404
    assert httpx2.get(f"{guarded[0]}/chat/completions").status_code == 405


def test_a_large_body_is_refused_before_it_is_read_and_with_a_wrong_key_not_read_at_all(guarded):
    host, port = guarded[0].removeprefix("http://").removesuffix("/v1").split(":")
    for key, status in (("the key", "413"), ("another", "401")):
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
                "Content-Type: application/json\r\nContent-Length: 60000000\r\n\r\n".encode()
            )
            assert connection.recv(1000).decode().startswith(f"HTTP/1.1 {status}")  # nothing of the body was sent
    chunks = (b"x" * 100_000 for _ in range(600))
    with pytest.raises(httpx2.HTTPError):  # the connection is closed while it sends
        httpx2.post(
            f"{guarded[0]}/chat/completions", content=chunks, headers={"Authorization": "Bearer the key"}, timeout=60
        ).raise_for_status()
    assert ask(guarded[0], "the key", "lamp on", max_tokens=2).status_code == 200


def test_pages_of_other_origins_and_names_of_other_hosts_are_refused(tiny, guarded):
    assert post(guarded[0], "/v1/chat/completions", chat_with(), Host="evil.example").status_code == 403
    assert post(guarded[0], "/v1/chat/completions", chat_with(), Host="localhost:1").status_code == 200
    with serving(tiny.gguf, None) as (address, _):
        assert post(address, "/v1/chat/completions", chat_with(), Origin="https://evil.example").status_code == 403
        assert post(address, "/v1/chat/completions", chat_with(), Origin="http://localhost:3000").status_code == 200
