# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""The server answers as the chat does, to those who have the key, on this machine alone."""

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

COMMAND = [sys.executable, "-m", "lathe"]


def environment(key: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "LATHE_API_KEY"}
    # What llama-cpp-python's own command would heed.
    stray = {"CONFIG_FILE": "/nowhere", "API_KEY": "stray", "HOST": "0.0.0.0", "N_CTX": "8", "CHAT_FORMAT": "llama-2"}
    return {**kept, **stray, "PYTHONPATH": str(paths.ROOT / "src"), **({"LATHE_API_KEY": key} if key else {})}


@contextmanager
def serving(gguf: Path, key: str | None) -> Iterator[tuple[str, str]]:
    """Start the server; yield its address and what it had logged by then."""
    server = subprocess.Popen(
        [*COMMAND, "serve", "--gguf", str(gguf), "--port", "0"], env=environment(key), stderr=subprocess.PIPE, text=True
    )
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


@pytest.fixture(scope="module")
def guarded(tiny: Made) -> Iterator[tuple[str, str]]:
    """A server with a key: its address and its log."""
    with serving(tiny.gguf, "the key") as started:
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
    # Bytes that are no character, which a random model writes, are left out by the one and marked by the other.
    assert answer.json()["choices"][0]["message"]["content"] + "\n" == said.replace("\ufffd", "")


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
        assert answer["choices"][0]["message"]["content"] == expected


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
