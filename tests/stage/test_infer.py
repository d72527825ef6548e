# ruff: noqa: F811 - fixtures are imported, then named as arguments
import io
import json
import subprocess
import sys

import pytest
from gguf_models import Made, learnt  # noqa: F401 - fixture
from refusals import refused

from lathe.common import paths
from lathe.inference.generate import Generator
from lathe.inference.infer import infer
from lathe.inference.kv_cache import KVCache
from lathe.models.chat_template import ChatTemplate


@pytest.fixture
def generator(learnt: Made):
    with Generator(learnt.gguf, n_parallel=8, n_ctx=256, threads=1) as opened:
        yield opened


def answered(generator, file):
    out = io.BytesIO()
    infer(generator, file, out, max_new_tokens=12)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def expected(generator, messages):
    prompt = generator.chat_template.render(messages, add_generation_prompt=True)
    [completion] = generator.complete([prompt], max_new_tokens=12)
    return {"completion": completion.text, "finish_reason": completion.finish_reason}


def user(text):
    return {"role": "user", "content": text}


def test_lines_come_back_in_their_order_with_their_answers_and_their_other_keys(generator, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "prompt": f"lamp {n} on" + " please" * (n % 5), "note": "é"} for n in range(40)]
    rows[7] = {
        "messages": [{"role": "system", "content": "be brief"}, user("on"), {"role": "assistant", "content": "?"}]
    }
    rows[7]["messages"].append(user("the lamp"))
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    found = answered(generator, file)
    for row, line in zip(rows, found, strict=True):
        assert line == {**row, **expected(generator, row.get("messages") or [user(row["prompt"])])}
        assert list(line) == [*row, "completion", "finish_reason"]
    assert {line["finish_reason"] for line in found} == {"stop", "length"}
    assert len({line["completion"] for line in found}) > 8


def test_answers_are_written_while_later_lines_are_still_unread(generator, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"lamp {n}"}) + "\n" for n in range(60)))
    fed = []
    feed = KVCache.feed_to_end
    monkeypatch.setattr(KVCache, "feed_to_end", lambda self, rows: fed.extend(rows) or feed(self, rows))

    behind = []

    class Noting(io.BytesIO):
        def write(self, written):
            behind.append(len(fed))
            return super().write(written)

    infer(generator, file, Noting(), max_new_tokens=4)
    assert behind[0] < len(fed) / 2


@pytest.mark.parametrize(
    ("line", "code", "parts"),
    [
        ("not json", "not-json", ()),
        (b"\xff", "not-json", ()),
        ("[1]", "not-an-object", ("a list",)),
        ("{}", "not-a-request", ("neither prompt nor messages",)),
        ('{"prompt": "a", "messages": []}', "not-a-request", ("both prompt and messages",)),
        ('{"prompt": 3}', "not-a-request", ("prompt is the number 3",)),
        ('{"prompt": " "}', "not-a-request", ("prompt is empty",)),
        ('{"prompt": "a", "completion": "b"}', "not-a-request", ("completion is",)),
        ('{"messages": "a"}', "not-a-request", ("messages is the text 'a'",)),
        ('{"messages": []}', "not-a-request", ("messages is empty",)),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "not-a-request", ("messages[0].role is the text 'boss'",)),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "not-a-request",
            ("messages ends with assistant", "user or tool"),
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "not-a-request",
            ("messages[1].role user follows user",),
        ),
        (json.dumps({"prompt": "lamp " * 400}), "prompt-too-long", ("context of 256",)),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line_before_anything_is_written(generator, tmp_path, line, code, parts):
    file, out = tmp_path / "prompts.jsonl", io.BytesIO()
    content = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b'{"prompt": "lamp on"}\n\n' + content + b'\n{"prompt": "lamp off"}\n')
    with refused(code, *parts) as caught:
        infer(generator, file, out, max_new_tokens=4)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)
    assert out.getvalue() == b""


def test_each_line_is_rendered_once(generator, tmp_path, monkeypatch):
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate,
        "render",
        lambda self, messages, **options: rendered.append(messages[-1]["content"]) or render(self, messages, **options),
    )
    requests = [f"lamp {n}" for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in requests))
    assert len(answered(generator, tmp_path / "prompts.jsonl")) == 20
    assert [text for text in rendered if text in requests] == requests


def test_an_empty_file_is_refused(generator, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n")
    with refused("no-requests", f"{tmp_path}/prompts.jsonl: "):
        answered(generator, tmp_path / "prompts.jsonl")


def command(*arguments, given=None):
    return subprocess.run(
        [sys.executable, "-m", "lathe", "infer", *map(str, arguments)],
        cwd=paths.ROOT,
        input=given,
        capture_output=True,
        text=True,
    )


def test_the_command_writes_a_whole_file_or_none(learnt: Made, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "lamp on"}\n{"prompt": "radio off"}\n')
    assert command("--file", file, "--gguf", learnt.gguf, "--out", out).returncode == 0
    written = out.read_text()
    assert [json.loads(line)["prompt"] for line in written.splitlines()] == ["lamp on", "radio off"]
    printed = command("--file", file, "--gguf", learnt.gguf)
    assert (printed.returncode, printed.stdout) == (0, written)
    piped = command("--file", "-", "--gguf", learnt.gguf, given=file.read_text())
    assert (piped.returncode, piped.stdout) == (0, written)
    file.write_text('{"prompt": "lamp on"}\n{"promt": "radio off"}\n')
    bad = command("--file", file, "--gguf", learnt.gguf, "--out", out)
    assert bad.returncode == 2
    assert bad.stderr == f"error: {file}:2: it has neither prompt nor messages; give one of them\n"
    assert out.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    missing = command("--file", tmp_path / "none", "--gguf", learnt.gguf)
    assert missing.returncode == 2
    assert (
        missing.stderr
        == f"error: --file {tmp_path / 'none'}: no such file; give JSON Lines, each with a prompt or messages\n"
    )
