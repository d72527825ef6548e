# ruff: noqa: F811 - fixtures are imported, then named as arguments
import io
import json
from typing import Any

import pytest
from gguf_models import Made, tiny  # noqa: F401 - fixture
from refusals import refused

from lathe.common.text import make_printable
from lathe.inference.chat import chat, read_tools
from lathe.inference.generate import Generator

OPTIONS: Any = {"max_new_tokens": 8, "n_ctx": 512, "threads": 1}


def answer(made: Made, *contents: str) -> str:
    """What the model says after these messages, of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    with Generator(made.gguf, n_parallel=1, n_ctx=512, threads=1) as generator:
        prompt = generator.chat_template.render(messages, add_generation_prompt=True)
        return generator.complete([prompt], max_new_tokens=8)[0].text


def talk(made: Made, requests: str, out: io.StringIO | None = None) -> str:
    out = out or io.StringIO()
    chat(made.gguf, prompt=None, source=io.StringIO(requests), out=out, **OPTIONS)
    return out.getvalue()


def shown(*answers: str) -> str:
    """Return what is printed of answers, in which a random model writes control characters too."""
    return "".join(f"{make_printable(text)}\n" for text in answers)


def test_a_prompt_is_answered_once(tiny: Made, capsys):
    chat(tiny.gguf, prompt="lamp on", **OPTIONS)
    assert capsys.readouterr().out == shown(answer(tiny, "lamp on"))


def test_a_conversation_remembers_until_it_is_reset(tiny: Made):
    first = answer(tiny, "lamp on")
    second = answer(tiny, "lamp on", first, "and off")
    assert second != answer(tiny, "and off")
    assert talk(tiny, "lamp on\nand off\n") == shown(first, second)
    assert talk(tiny, "lamp on\n/reset\nand off\n") == shown(first, answer(tiny, "and off"))


def test_exit_ends_and_empty_lines_are_passed_over(tiny: Made):
    assert talk(tiny, "\n\nlamp on\n/exit\nand off\n") == shown(answer(tiny, "lamp on"))


def test_ctrl_c_stops_the_answer_and_not_the_conversation(tiny: Made):
    class Interrupting(io.StringIO):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            if self.pieces == 3:
                raise KeyboardInterrupt
            return super().write(text)

    said = talk(tiny, "lamp on\n/reset\nand off\n", Interrupting())
    stopped, after = said.split(" …\n")
    assert shown(answer(tiny, "lamp on")).startswith(stopped)
    assert after == shown(answer(tiny, "and off"))


def test_a_request_too_long_is_refused_and_forgotten(tiny: Made):
    said = talk(tiny, "please " * 600 + "\nlamp on\n")
    refusal, after = said.split("or /reset\n")
    assert "leave no room for an answer in a context of 512" in refusal
    assert after == shown(answer(tiny, "lamp on"))


@pytest.mark.parametrize("system", ["be brief", "answer with JSON only"])
def test_a_system_message_stands_before_the_conversation(tiny: Made, system):
    out = io.StringIO()
    chat(tiny.gguf, prompt="lamp on", system=system, out=out, **OPTIONS)
    assert out.getvalue() != shown(answer(tiny, "lamp on"))


TOOL = {"name": "lamp", "parameters": {"type": "object", "properties": {}}}


def test_a_model_whose_template_writes_no_tools_is_offered_none(tiny: Made):
    with refused("template-ignores-tools", "random.gguf: its chat template writes no tools", "--tools"):
        chat(tiny.gguf, prompt="lamp on", tools=[{"type": "function", "function": TOOL}], **OPTIONS)


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        (None, "missing-file", "no such file"),
        ("{", "invalid-tools", "expected JSON"),
        ("[]", "invalid-tools", "holds no function"),
        ('[{"name": ""}]', "invalid-tools", "tools[0].name"),
    ],
)
def test_a_file_of_tools_that_is_none_is_refused_in_one_line(tmp_path, text, code, part):
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text)
    with refused(code, "--tools ", "tools.json", part):
        read_tools(file)


def test_the_tools_of_a_file_have_the_form_of_rows(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    assert read_tools(tmp_path / "tools.json") == [{"type": "function", "function": TOOL}]
