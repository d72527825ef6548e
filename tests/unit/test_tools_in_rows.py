"""Rows with tools and thoughts: every form that they have in files, what is refused, and what is not used."""

import json
import re
import shutil
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat
from refusals import refused

from lathe.config.presets import LocalDataset
from lathe.data.formats import RecordConverter
from lathe.data.prepare import prepare
from lathe.data.row_checks import RowFault
from lathe.models.templates.builtin_templates import read_template

CONTROL = re.compile(r"<\|im_start\|>")
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BARE: dict[str, Any] = {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": BARE}
CALL: dict[str, Any] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "assistant", "content": "3 degrees."},
]


def convert(row: dict[str, Any], **preset: Any) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Return the messages of a row, what is beside them, and what is not used; or its fault."""
    converter = RecordConverter(LocalDataset(source="local", path="data/local/x", **preset), row, "x.jsonl", CONTROL)
    try:
        messages = converter.convert(row)
    except RowFault as error:
        return error.fault, {}, {}
    return messages, converter.get_extra_fields(row), dict(converter.unused)


@pytest.mark.parametrize(
    "given",
    [
        [WRAPPED],
        [BARE],
        [{**BARE, "type": "function"}],
        WRAPPED,
        json.dumps([WRAPPED]),
        [json.dumps(BARE)],
        [{"name": "weather", "description": "Weather of a city", "input_schema": SCHEMA}],
        [{**WRAPPED, "function": {**BARE, "strict": None, "parameters": {**SCHEMA, "minutes": None}}}],
    ],
    ids=["wrapped", "bare", "of responses", "one", "text", "texts", "of anthropic", "with nulls"],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_definitions_of_tools_have_one_form_whatever_theirs_is(given, column):
    messages, extra, unused = convert({"messages": CHAT, column: given, "parallel_tool_calls": False})
    assert extra == {"tools": [WRAPPED]}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert (messages[1]["content"], messages[2]["tool_call_id"], unused) == ("", "c1", {})


def test_a_default_of_null_stays_where_the_schema_allows_null():
    schema = {"type": "object", "properties": {"a": {"type": ["string", "null"], "default": None}, "b": None}}
    _, extra, _ = convert(
        {"messages": CHAT[-1:] and CHAT[:1] + CHAT[3:], "tools": [{"name": "f", "parameters": schema}]}
    )
    [tool] = extra["tools"]
    assert tool["function"]["parameters"]["properties"] == {"a": {"type": ["string", "null"], "default": None}}


@pytest.mark.parametrize(
    ("tools", "field", "problem"),
    [
        ("{", "tools", "expected JSON"),
        ([3], "tools[0]", "is the number 3"),
        ([{"type": "web_search"}], "tools[0].type", "expected 'function'"),
        ([{"function": []}], "tools[0].function", "expected an object"),
        ([{"description": "x"}], "tools[0].name", "is missing"),
        ([{"name": " "}], "tools[0].name", "expected the function's name"),
        ([{"name": "f", "description": 3}], "tools[0].description", "expected text"),
        ([{"name": "f", "parameters": "x"}], "tools[0].parameters", "expected the JSON Schema of an object"),
        ([{"name": "f", "parameters": {"city": {"type": "str"}}}], "tools[0].parameters", "expected a JSON Schema"),
        ([{"name": "f", "parameters": {"type": "string"}}], "tools[0].parameters.type", "expected 'object'"),
        ([{"name": "f", "parameters": {"properties": []}}], "tools[0].parameters.properties", "expected an object"),
        ([{"name": "f", "parameters": {"properties": {"a": 1}}}], "tools[0].parameters.properties.a", "JSON Schema"),
        ([{"name": "f", "parameters": {**SCHEMA, "required": "a"}}], "tools[0].parameters.required", "list of names"),
        ([BARE, WRAPPED], "tools[1].name", "expected each name once"),
        ([{"name": "<|im_start|>"}], "tools[0]", "control token"),
    ],
)
def test_a_definition_that_is_none_is_a_fault_that_names_its_place(tools, field, problem):
    fault, _, _ = convert({"messages": CHAT, "tools": tools})
    assert fault.field == field
    assert problem in fault.problem


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{**BARE, "name": "other"}]}, "messages[1].tool_calls[0].name"),
        ({"tools": [BARE], "functions": [BARE]}, "functions"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [*CHAT[:2], {**CHAT[2], "tool_call_id": "c2"}, CHAT[3]]}, "messages[2].tool_call_id"),
        ({"messages": [{**CHAT[0], "tool_call_id": "c2"}, *CHAT[1:]]}, "messages[0].tool_call_id"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [CALL, CALL]}, *CHAT[2:]], "parallel_tool_calls": False},
         "messages[1].tool_calls"),
        ({"messages": [CHAT[0], {**CHAT[1], "function_call": CALL["function"]}, *CHAT[2:]]},
         "messages[1].function_call"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_faults(change, field):
    fault, _, _ = convert({"messages": CHAT, **change})
    assert fault.field == field


def test_the_older_form_of_openai_is_read():
    chat = [
        {"role": "developer", "content": "Be kind."},
        CHAT[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "3"},
        CHAT[3],
    ]
    messages, extra, _ = convert({"messages": chat, "functions": [BARE]})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ]
    assert messages[3]["name"] == "weather"
    assert extra == {"tools": [WRAPPED]}


def test_preferences_in_openais_form_are_pairs_with_tools():
    better, worse = (
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "No."},
    )
    row = {
        "input": {"messages": CHAT[:1], "tools": [WRAPPED], "parallel_tool_calls": True},
        "preferred_output": [better],
        "non_preferred_output": [worse],
    }
    messages, extra, unused = convert(row)
    assert messages[-1]["tool_calls"][0]["function"]["name"] == "weather"
    assert extra == {"rejected": [worse], "tools": [WRAPPED]}
    assert unused == {}
    fault, _, _ = convert({**row, "input": {**row["input"], "audio": {"a": 1}}})
    assert (fault.reason, fault.field) == ("not_read", "input.audio")
    assert convert({**row, "non_preferred_output": [better]})[0].reason == "same_answers"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_kept_by_any_of_its_names(key):
    messages, _, unused = convert({"messages": [CHAT[0], {"role": "assistant", "content": "4", key: "2 and 2"}]})
    assert messages[-1] == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert not unused
    messages, _, _ = convert({"question": "2 + 2?", "answer": "4", key: "2 and 2"})
    assert messages[-1]["reasoning_content"] == "2 and 2"


def test_a_thought_among_the_parts_of_a_content_is_kept():
    parts = [{"type": "thinking", "thinking": "2 and 2"}, {"type": "text", "text": "4"}]
    messages, _, _ = convert({"messages": [CHAT[0], {"role": "assistant", "content": parts}]})
    assert messages[-1] == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"reasoning": "a", "thinking": "b"}, "reasoning"),
        ({"reasoning_content": ["a"]}, "reasoning_content"),
        ({"reasoning_content": "a", "content": "<think>b</think>c"}, "reasoning_content"),
    ],
)
def test_two_thoughts_or_one_that_is_no_text_are_faults(answer, field):
    fault, _, _ = convert({"messages": [CHAT[0], {"role": "assistant", "content": "4", **answer}]})
    assert fault.field == f"messages[1].{field}"
    asked, _, _ = convert({"messages": [{**CHAT[0], "thinking": "hm"}, CHAT[3]]})
    assert asked.field == "messages[0].thinking"


@pytest.mark.parametrize(
    "column", ["images", "audio", "weight", "train", "chat_template_kwargs", "documents", "refusal"]
)
def test_a_column_that_changes_what_is_learnt_is_refused_unless_it_is_empty(column):
    for value in ([1], {"a": 1}, "x", 0.5):
        fault, _, _ = convert({"messages": CHAT, column: value})
        assert (fault.reason, fault.field) == ("not_read", column)
    for value in (None, "", [], {}, "[]"):
        assert convert({"messages": CHAT, column: value})[2] == {}


def test_a_key_of_a_message_that_changes_what_is_learnt_is_refused():
    for key in ("audio", "images", "refusal", "tools"):
        fault, _, _ = convert({"messages": [CHAT[0], {**CHAT[3], key: ["x"]}]})
        assert (fault.reason, fault.field) == ("not_read", f"messages[1].{key}")


def test_what_nothing_reads_is_counted_by_name_and_what_says_where_a_row_is_from_is_not():
    converter = RecordConverter(LocalDataset(source="local", path="data/local/x"), ["messages"], "x.jsonl", CONTROL)
    for number in range(3):
        chat = [{**CHAT[0], "mood": "gay", "id": 3}, {**CHAT[3], "mood": "sad"}]
        converter.convert({"messages": chat, "id": number, "source": "x", "topic": "t" if number else None})
    assert converter.unused == {"key mood of messages": 3, "column topic": 2}


def test_columns_that_a_preset_does_not_name_are_counted_whatever_they_are_called():
    row = {"ask": "a", "say": "b", "images": ["x"], "tools": "knife, pan", "label": "soup"}
    messages, extra, unused = convert(row, prompt="ask", completion="say")
    assert [message["content"] for message in messages] == ["a", "b"]
    assert extra == {}
    assert unused == {"column images": 1, "column tools": 1, "column label": 1}
    _, extra, unused = convert({**row, "defs": [BARE]}, prompt="ask", completion="say", tools="defs")
    assert extra == {"tools": [WRAPPED]}
    assert "column defs" not in unused


@pytest.mark.parametrize("value", [0, 1, "true", "False"])
def test_a_label_that_may_say_whether_an_answer_is_wanted_is_refused(value):
    assert convert({"prompt": "a", "completion": "b", "label": value})[0].field == "label"
    assert convert({"prompt": "a", "completion": "b", "label": "soup"})[2] == {"column label": 1}


def test_the_history_beside_a_prompt_becomes_earlier_turns():
    row = {"instruction": "and now?", "output": "bad", "history": [["how?", "fine"]]}
    messages, _, _ = convert(row)
    assert [message["content"] for message in messages] == ["how?", "fine", "and now?", "bad"]
    assert convert({**row, "history": []})[0][0]["content"] == "and now?"
    for wrong, field in (
        ("x", "history"),
        (["x"], "history[0]"),
        ([["x"]], "history[0]"),
        ([["x", ""]], "history[0][1]"),
    ):
        assert convert({**row, "history": wrong})[0].field == field


def write(raw, rows) -> None:
    raw.mkdir()
    (raw / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_rows(**columns: Any) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Weather {number}?"}, *CHAT[1:]], "tools": [BARE], **columns}
        for number in range(30)
    ]


def prepare_rows(tmp_path, rows, template: str) -> Any:
    tokenizer = byte_chat()
    tokenizer.chat_template = template
    write(tmp_path / "raw", rows)
    (tmp_path / "out").mkdir()
    preset = LocalDataset(source="local", path="data/local/x")
    return prepare(
        tmp_path / "raw", preset, tmp_path / "out", tokenizer=tokenizer, seed=1, max_length=2000, settings=LENIENT,
        processes=1,
    )  # fmt: skip


def test_tools_reach_the_processed_rows_and_the_tokens(tmp_path):
    prepared = prepare_rows(tmp_path, make_rows(topic="x"), read_template("chatml-tools"))
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert {json.dumps(row["tools"]) for row in rows} == {json.dumps([WRAPPED])}
    assert prepared.report["unused"] == [{"name": "column topic", "rows": 30}]
    [train] = [split for split in prepared.report["splits"] if split["split"] == "train"]
    assert train["tokens"]["prompt"]["min"] > len(json.dumps(BARE))  # a token is a byte


def test_a_template_that_ignores_tools_is_refused_before_anything_is_written(tmp_path):
    with refused("template-ignores-tools", "train.jsonl:1: the row has tools", "template: chatml-tools"):
        prepare_rows(tmp_path, make_rows(), byte_chat().chat_template)


def test_the_report_says_that_calls_cannot_be_read_from_what_a_template_writes(tmp_path):
    plain = read_template("chatml-tools")
    assert "unread_calls" not in prepare_rows(tmp_path, make_rows(), plain).report
    written = "{'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    sentence = "call.function.name + ' with ' + (call.function.arguments.items() | map('join', ' is ') | join(' and '))"
    unread = plain.replace(written, sentence)
    shutil.rmtree(tmp_path / "raw")
    shutil.rmtree(tmp_path / "out")
    assert prepare_rows(tmp_path, make_rows(), unread).report["unread_calls"] is True


def test_rows_that_differ_in_tools_or_thoughts_are_no_duplicates(tmp_path):
    rows = [{**row, "tools": [BARE, {"name": f"f{number}"}]} for number, row in enumerate(make_rows())]
    same = {"role": "user", "content": "the same"}
    rows += [{"messages": [same, {**CHAT[3], "thinking": f"thought {n}"}], "tools": [BARE]} for n in range(5)]
    for row in rows[:5]:
        row["messages"] = [same, *row["messages"][1:]]
    prepared = prepare_rows(tmp_path, rows, read_template("chatml-tools"))
    assert prepared.report["rows"]["kept"] == 35
