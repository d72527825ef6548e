"""Chat templates in llama.cpp's own Jinja engine: it writes what Lathe writes, or `fetch` says where it does not."""

from pathlib import Path

import pytest
import trl
from refusals import refused

from lathe.common import paths
from lathe.gguf import jinja_engine
from lathe.gguf.check_template import check_template
from lathe.models.answer_split import split_answer
from lathe.models.chat_template import ChatTemplate
from lathe.models.message_form import ANSWER, QUESTION
from lathe.models.template_error import TemplateError

ENGINE = jinja_engine.find_engine(paths.LLAMA_CPP)
needs_engine = pytest.mark.skipif(
    ENGINE is None,
    reason="`python -m lathe.gguf.install_converter` builds llama.cpp's Jinja engine with a C++ compiler",
)
TEMPLATES = [
    *(paths.LLAMA_CPP / "models/templates").glob("*.jinja"),
    *(Path(trl.__file__).parent / "chat_templates").glob("*.jinja"),
    *(paths.ROOT / "src/lathe/models/templates").glob("*.jinja"),
]
# It escapes the quotes of JSON in Python, as its author cannot have meant.
OTHERWISE = {"meetkai-functionary-medium-v3.1"}
CENTRED = "{% for m in messages %}{{ m.content | center(20) }}<|im_end|>{% endfor %}"


def make_template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "<s>", "</s>", adds_bos=False)


def ask(text: str, llama_cpp: Path = paths.LLAMA_CPP) -> bool:
    return check_template(make_template(text), llama_cpp=llama_cpp, shown="model mine")


def is_taken(text: str) -> bool:
    """Tell whether Lathe can train on the template at all."""
    try:
        split_answer(make_template(text), [QUESTION, {"role": "assistant", "content": ANSWER}])
    except TemplateError:
        return False
    return True


@needs_engine
def test_every_template_that_can_be_trained_on_is_written_alike(caplog):
    taken = [file for file in sorted(TEMPLATES) if is_taken(file.read_text())]
    assert len(taken) > 80
    for file in taken:
        caplog.clear()
        assert ask(file.read_text())
        assert bool(caplog.messages) == (file.stem in OTHERWISE), f"{file}: {caplog.messages}"


@needs_engine
def test_a_template_that_llama_cpp_cannot_run_is_refused_in_one_line():
    with refused("template-not-run", "model mine", "line 1: ", "center") as caught:
        ask(CENTRED)
    assert "\n" not in str(caught.value)


@needs_engine
def test_what_llama_cpp_writes_otherwise_is_said(caplog):
    assert ask((paths.LLAMA_CPP / "models/templates/meetkai-functionary-medium-v3.1.jinja").read_text())
    assert [message.partition(" otherwise")[0] for message in caplog.messages] == [
        f"model mine: llama.cpp's Jinja engine writes {case}"
        for case in ("a request with tools", "a call of a tool", "the result of a tool")
    ]
    assert "lathe serve" in caplog.text


@needs_engine
def test_a_template_that_asks_for_the_date_gets_that_of_training(caplog):
    file = next(file for file in TEMPLATES if file.name == "meta-llama-Llama-3.2-3B-Instruct.jinja")
    assert "strftime_now" in file.read_text()
    assert ask(file.read_text())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("script", "part"),
    [("echo broken >&2; exit 3", "it crashes: broken"), ("sleep 9", "does not end within 0.2 seconds")],
)
def test_an_engine_that_crashes_or_does_not_end_is_told(tmp_path, monkeypatch, script, part):
    monkeypatch.setattr(jinja_engine, "LIMIT_SECONDS", 0.2)
    program = tmp_path / jinja_engine.PROGRAM
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with refused("template-not-run", part):
        ask(CENTRED, tmp_path)


def test_without_the_engine_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LLAMA_CPP", tmp_path)
    assert not ask(CENTRED, tmp_path)
