"""The studio's conversations: what a model is asked turn by turn, the parts of its answers, and rows made of them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusals import refused

from lathe.common import paths
from lathe.config.presets import Presets
from lathe.config.yaml_files import read_yaml
from lathe.models.chat_template import ChatTemplate
from lathe.studio import conversation
from lathe.studio.conversation import ChatAnswer, ChatTurn
from lathe.studio.helper import split_parts

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"  # type: ignore[union-attr, arg-type]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALL = {"name": "get_time", "arguments": {"zone": "UTC"}}
CALLING = ChatAnswer(text="<tool_call>…</tool_call>", thought="I look.", content="", calls=[CALL])


def make_template(name: str) -> ChatTemplate:
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(text, bos_token="", eos_token="<|im_end|>", adds_bos=False)


def say(text: str, role: Any = "user", **answers: ChatAnswer) -> ChatTurn:
    return ChatTurn(role=role, text=text, answers=answers)


def test_a_model_is_told_its_own_answers_and_no_turn_that_it_was_not_asked():
    turns = [
        say("one", a=ChatAnswer(text="1", content="1"), b=ChatAnswer(text="eins", content="eins")),
        say("two", b=ChatAnswer(text="zwei", content="zwei")),
        say("three"),
    ]
    told = {name: [message["content"] for message in conversation.build_messages(turns, name, "")] for name in "abc"}
    assert told == {"a": ["one", "1", "three"], "b": ["one", "eins", "two", "zwei", "three"], "c": ["three"]}
    assert conversation.build_messages(turns, "a", "Be kind.")[0] == {"role": "system", "content": "Be kind."}


def test_what_a_tool_says_answers_the_calls_before_it_a_line_each():
    two = CALLING.model_copy(update={"calls": [CALL, {"name": "get_time", "arguments": {"zone": "CET"}}]})
    first, second = conversation.build_messages([say("?", a=two), say("12\n13\n", "tool")], "a", "")[2:]
    assert (first["content"], first["tool_call_id"]) == ("12", "call_1")
    assert (second["content"], second["tool_call_id"]) == ("13", "call_2")
    with refused("other-calls", "has 2 calls", kept=False):
        conversation.build_messages([say("?", a=two), say("12", "tool")], "a", "")
    with refused("other-calls", "has 0 calls", kept=False):
        conversation.build_messages([say("?", a=ChatAnswer(text="x")), say("12", "tool")], "a", "")


def test_a_conversation_with_calls_is_rendered_by_a_real_template():
    turns = [say("What time is it?", a=CALLING), say("12:00", "tool", a=ChatAnswer(text="Noon.")), say("Sure?")]
    prompt = make_template("qwen3").render(
        conversation.build_messages(turns, "a", "Be kind."), add_generation_prompt=True, tools=[TOOL]
    )
    parts = ["Be kind.", "What time is it?", '"zone": "UTC"', "<tool_response>\n12:00", "Noon.", "Sure?"]
    places = [prompt.find(part) for part in parts]
    assert places == sorted(places)
    assert places[0] >= 0


@pytest.mark.parametrize(
    ("text", "thought", "content", "calls"),
    [
        ("<think>\nTwo and two.\n</think>\n\n4", "Two and two.", "4", []),
        ("<think>\nTwo and", "Two and", "", []),
        ("4", "", "4", []),
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", "", "", [CALL]),
        (
            f"<think>\nI look.\n</think>\n\nSo:\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
            "I look.",
            "So:",
            [CALL],
        ),
    ],
)
def test_thought_text_and_calls_of_an_answer_are_told_apart(text, thought, content, calls):
    parts = split_parts(make_template("qwen3"), "", text, [TOOL])
    assert parts == {"text": text, "thought": thought, "content": content, "calls": calls}
    assert split_parts(make_template("qwen3"), "", text, [])["calls"] == []


def test_the_page_holds_the_turns_and_what_it_sends_is_checked():
    turns = [say("one", a=CALLING)]
    assert conversation.read_turns(conversation.write_turns(turns)) == turns
    for text in ("{", '[{"role": "system", "text": "x"}]', json.dumps([{"role": "user", "text": "x"}] * 101)):
        with refused("invalid-conversation"):
            conversation.read_turns(text)
    for text in ("", " \n", "x" * 20_001):
        with refused("no-prompt", kept=False):
            conversation.begin_turn(text, "user")


def test_a_prompt_becomes_a_test_row_whose_earlier_answers_are_context(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(conversation, "TEST_ROWS", tmp_path / "data/local/test-rows.jsonl")
    turns = [say("one", a=ChatAnswer(text="1")), say("two", a=ChatAnswer(text="wrong"))]
    row = conversation.build_test_row(turns, "a", "Count.", [], "2", is_calls=False)
    assert row["messages"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    assert conversation.save_test_row(row) == 1
    other = conversation.build_test_row(turns[:1], "a", "", [TOOL], json.dumps([CALL]), is_calls=True)
    assert conversation.save_test_row(other) == 2
    with refused("row-exists", "test-rows.jsonl:1"):
        conversation.save_test_row(row)
    lines = conversation.TEST_ROWS.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row, other]
    with refused("invalid-row", "is empty"):
        conversation.build_test_row(turns, "a", "", [], " ", is_calls=False)
    with refused("invalid-row", kept=False):
        conversation.build_test_row(turns, "a", "", [], "get_time(", is_calls=True)


def test_the_entry_that_scores_the_rows_is_one_of_presets_yaml(toy_params):
    tree = read_yaml(paths.PRESETS)
    added = yaml.safe_load(conversation.write_mixture())["datasets"]
    tree["datasets"] |= added
    mixture = Presets.model_validate(tree).datasets["commands-and-rows"]
    assert {name: part.split for name, part in mixture.datasets.items()} == {"commands": None, "test-rows": "test"}
