"""Forms in which people's rows come: each is read whole, or refused by the field that is not read; none is guessed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from lathe.config.presets import LocalDataset
from lathe.data.formats import RecordConverter
from lathe.data.null_arguments import is_padded
from lathe.data.read_examples import ExampleFiles
from lathe.data.row_checks import RowFault
from lathe.data.text_encodings import guess_encoding
from lathe.models.unicode_form import UnicodeRule

CONTROL = re.compile(r"<\|im_start\|>")
USER = {"role": "user", "content": "q"}
HUMAN = {"from": "human", "value": "q"}


def answer(text: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return answer(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def convert(row: dict[str, Any], **preset: Any) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Return the messages of a row, what is beside them, and what is not used; or its fault."""
    entry = LocalDataset(source="local", path="data/local/x", **preset)
    converter = RecordConverter(entry, row, "x.jsonl", CONTROL, is_padded=is_padded([row]))
    try:
        messages = converter.convert(row)
    except RowFault as error:
        return error.fault, {}, {}
    return messages, converter.get_extra_fields(row), dict(converter.unused)


PAIR = [USER, answer()]
CONTEXT = [USER, answer("old", train=False), USER, answer()]
WORSE = {"rejected": [answer("b")]}

DEFINITION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def use(number: int = 1, **more: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"t{number}", "name": "f", "input": {"n": number}, **more}


def result(content: Any, number: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": f"t{number}", "content": content, **more}],
    }


def used(*numbers: int) -> list[dict[str, Any]]:
    return [
        {"type": "function", "id": f"t{number}", "function": {"name": "f", "arguments": {"n": number}}}
        for number in numbers
    ]


def told(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"t{number}"}


# what it is, the row, its messages, what is beside them, what is not used
FORMS: list[tuple[str, dict[str, Any], list[Any], dict[str, Any], dict[str, int]]] = [
    ("mark of ms-swift", chat(USER, answer("old", loss=False), USER, answer(loss=True)), CONTEXT, {}, {}),
    ("mark of axolotl", chat(USER, answer("old", training=False), USER, answer()), CONTEXT, {}, {}),
    ("weights as numbers", chat(USER, answer("old", weight=0.0), USER, answer(weight=1.0)), CONTEXT, {}, {}),
    ("weights with nulls", chat({**USER, "weight": None}, answer("old", weight=0), USER, answer()), CONTEXT, {}, {}),
    ("prompt and answer of TRL", {"prompt": [USER], "completion": [answer()]}, PAIR, {}, {}),
    ("earlier answers of TRL", {"prompt": [USER, answer("old"), USER], "completion": [answer()]}, CONTEXT, {}, {}),
    ("prompt of messages", {"prompt": [USER], "completion": "a"}, PAIR, {}, {}),
    ("answer of messages", {"question": "q", "answer": [answer()]}, PAIR, {}, {}),
    ("prompt of ShareGPT's messages", {"prompt": [HUMAN], "completion": [gpt("a")]}, PAIR, {}, {}),
    (
        "messages as JSON text",
        {"prompt": json.dumps([USER]), "completion": json.dumps([answer()], indent=1)},
        PAIR,
        {},
        {},
    ),
    ("JSON that is no message", {"prompt": "q", "completion": '[{"a": 1}]'}, [USER, answer('[{"a": 1}]')], {}, {}),
    (
        "pair as JSON text",
        {"prompt": "q", "chosen": json.dumps(PAIR), "rejected": json.dumps([USER, answer("b")])},
        PAIR,
        WORSE,
        {},
    ),
    ("pair of single messages", {"prompt": "q", "chosen": answer(), "rejected": answer("b")}, PAIR, WORSE, {}),
    ("pair of LLaMA-Factory", {"conversations": [HUMAN], "chosen": gpt("a"), "rejected": gpt("b")}, PAIR, WORSE, {}),
    ("worse answer as JSON text", chat(*PAIR, rejected=json.dumps([answer("b")])), PAIR, WORSE, {}),
    ("object of lists", {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, PAIR, {}, {}),
    ("ShareGPT's object of lists", {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, PAIR, {}, {}),
    ("parts without a type", chat({"role": "user", "content": [{"text": "q"}]}, answer([{"text": "a"}])), PAIR, {}, {}),
    (
        "parts with more keys",
        chat(USER, answer([{"type": "text", "text": "a", "annotations": [1], "image": None}])),
        PAIR,
        {},
        {"key annotations of content parts": 1},
    ),
    ("result of Llama's tools", chat(USER, call({}), {"role": "ipython", "content": "3"}, answer()), [], {}, {}),
    ("wanted by LLaMA-Factory", {"conversations": [HUMAN, gpt("a")], "kto_tag": True}, PAIR, {}, {}),
    ("wanted in a table", {"prompt": "q", "completion": "a", "desirable": "TRUE"}, PAIR, {}, {}),
    (
        "a flag beside a class",
        {"text": "q", "label": "a", "is_correct": False},
        PAIR,
        {},
        {"column is_correct": 1},
    ),
    (
        "a column of that name that says something else",
        {"prompt": "q", "completion": "a", "is_correct": "B"},
        PAIR,
        {},
        {"column is_correct": 1},
    ),
    *(
        (f"thought as {key}", chat(USER, answer(**{key: given})), [USER, answer(reasoning_content="hm")], {}, {})
        for key, given in {
            "thought": "hm",
            "thoughts": "hm",
            "reasoning_text": "hm",
            "chain_of_thought": "hm",
            "reasoning_details": [{"type": "reasoning.text", "text": "h"}, {"type": "reasoning.text", "text": "m"}],
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
        }.items()
    ),
    (
        "thought beside its encrypted parts",
        chat(USER, answer(reasoning="hm", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])),
        [USER, answer(reasoning_content="hm")],
        {},
        {},
    ),
    (
        "calls and results as Anthropic's parts",
        chat(USER, answer([{"type": "text", "text": "Let me see."}, use()]), result("3"), answer()),
        [USER, answer("Let me see.", tool_calls=used(1)), told("3"), answer()],
        {},
        {},
    ),
    (
        "several of them, with a thought, and results as parts",
        chat(
            USER,
            answer([{"type": "thinking", "thinking": "hm"}, use(1), use(2)]),
            {
                "role": "user",
                "content": [
                    *result([{"type": "text", "text": "3"}], 1)["content"],
                    *result(None, 2, is_error=True, cache_control={"type": "ephemeral"})["content"],
                ],
            },
            answer(),
            tools=[{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
        ),
        [USER, answer("", reasoning_content="hm", tool_calls=used(1, 2)), told("3"), told("", 2), answer()],
        {"tools": [DEFINITION]},
        {"key is_error of messages": 1, "key cache_control of messages": 1},
    ),
    (
        "a system message of parts",
        chat(*PAIR, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]),
        [{"role": "system", "content": "Be brief."}, *PAIR],
        {},
        {},
    ),
    ("a wanted answer in words", chat(*PAIR, label="desirable"), PAIR, {}, {}),
    ("a label that says something else", chat(*PAIR, label="geography"), PAIR, {}, {"column label": 1}),
    ("a scratchpad", chat(USER, answer(scratchpad="hm")), [USER, answer(reasoning_content="hm")], {}, {}),
    (
        "column cot",
        {"question": "q", "answer": "a", "cot": "hm"},
        [USER, answer(reasoning_content="hm")],
        {},
        {},
    ),
]


@pytest.mark.parametrize(("row", "messages", "extra", "unused"), [f[1:] for f in FORMS], ids=[f[0] for f in FORMS])
def test_a_form_is_read_whole(row, messages, extra, unused):
    found = convert(row)
    if messages:
        assert found == (messages, extra, unused)
    else:
        assert [message["role"] for message in found[0]] == ["user", "assistant", "tool", "assistant"]


# the row, reason, field
FAULTS: list[tuple[dict[str, Any], str, str]] = [
    (chat(USER, answer(loss=0.3)), "mark", "messages[1].loss"),
    (chat({**USER, "loss": True}, answer()), "mark", "messages[0].loss"),
    (chat(USER, answer(weight=0.5)), "mark", "messages[1].weight"),
    (chat(USER, answer(loss_weight=0.5)), "not_read", "messages[1].loss_weight"),
    (chat(USER, answer(train_detail=[{"begin_offset": 0}])), "not_read", "messages[1].train_detail"),
    (chat(USER, answer(masked=True)), "not_read", "messages[1].masked"),
    (chat(USER, answer(channel="analysis")), "not_read", "messages[1].channel"),
    ({"prompt": "q", "completion": "a", "loss_scale": 2.0}, "not_read", "loss_scale"),
    # an answer that is context cannot be the better or the worse one
    (chat(USER, answer(), USER, answer("c", weight=0), rejected="b"), "mark", "messages"),
    ({"chosen": [USER, answer(train=False)], "rejected": [USER, answer("b")]}, "mark", "chosen"),
    ({"chosen": PAIR, "rejected": [USER, answer("b", weight=0)]}, "mark", "rejected"),
    (
        {
            "input": {"messages": [USER]},
            "preferred_output": [answer(weight=0)],
            "non_preferred_output": [answer("b")],
        },
        "mark",
        "preferred_output",
    ),
    ({"prompt": [USER], "completion": [answer(train=False)]}, "mark", "completion"),
    # unwanted answers
    ({"prompt": [USER], "completion": [answer()], "label": False}, "unwanted_answer", "label"),
    ({"conversations": [HUMAN, gpt("a")], "kto_tag": False}, "unwanted_answer", "kto_tag"),
    ({"prompt": "q", "completion": "a", "desirable": "false"}, "unwanted_answer", "desirable"),
    ({"question": "q", "answer": "a", "is_correct": False}, "unwanted_answer", "is_correct"),
    (chat(*PAIR, accepted=0), "unwanted_answer", "accepted"),
    (chat(*PAIR, label="undesirable"), "unwanted_answer", "label"),
    ({"prompt": "q", "completion": "a", "label": "Thumbs down"}, "unwanted_answer", "label"),
    ({"question": "q", "answer": "a", "kto_tag": "rejected"}, "unwanted_answer", "kto_tag"),
    # Anthropic's parts in another order than that of messages
    (chat(USER, answer([use(), {"type": "text", "text": "done"}])), "not_text", "messages[1].content[0]"),
    (
        chat(
            USER, answer([use()]), {"role": "user", "content": [*result("3")["content"], {"type": "image"}]}, answer()
        ),
        "not_text",
        "messages[2].content[0]",
    ),
    (chat(USER, answer([use()]), result("3", 2), answer()), "tool_call", "messages[2].tool_call_id"),
    (chat(USER, answer([use(input="x")]), result("3"), answer()), "tool_call", "x"),
    # lists that are no messages
    ({"prompt": ["q"], "completion": "a"}, "not_text", "prompt"),
    ({"question": "q", "answer": ["a", "b"]}, "not_text", "answer"),
    ({"prompt": "q", "completion": [{"text": "a"}]}, "not_text", "completion"),
    ({"messages": [[USER, answer()]]}, "not_an_object", "messages[0]"),
    ({"messages": {"role": ["user"], "content": ["q", "a"]}}, "not_a_list", "messages"),
    ({"prompt": [USER, answer()], "completion": "a"}, "roles_out_of_order", "completion[0].role"),
    # thoughts
    (chat(USER, answer(thought="one", reasoning_content="two")), "thought", "messages[1].thought"),
    (chat(USER, answer(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])), "thought", "x"),
    ({"prompt": "q", "completion": "a", "cot": "one", "thinking": "two"}, "thought", "cot"),
    ({"prompt": "q", "completion": [answer(thinking="one")], "cot": "two"}, "thought", "cot"),
    # calls
    (chat(USER, call('{"a": 1, "a": 2}')), "duplicate_key", "messages[1].tool_calls[0].arguments.a"),
    (chat(USER, call({"a": float("nan")})), "tool_call", "messages[1].tool_calls[0].arguments"),
    # a control token that parts make where they meet
    (chat({"role": "user", "content": [{"text": "<|im_"}, {"text": "start|>"}]}, answer()), "control_token", "x"),
]


@pytest.mark.parametrize(("row", "reason", "field"), FAULTS)
def test_a_form_that_is_not_read_is_a_fault_that_names_its_place(row, reason, field):
    fault, _, _ = convert(row)
    assert (fault.reason, field if field == "x" else fault.field) == (reason, field)


@pytest.mark.parametrize(
    ("rows", "padded"),
    [
        ([chat({**USER, "tool_calls": None}, call({"a": 1, "b": None}))], True),  # messages of a table
        ([chat(USER, call({"a": 1, "b": None}), USER, call({"a": None, "b": 2}, "g"))], True),  # arguments of a table
        ([chat(USER, call({"a": 1, "b": None}), USER, call({"a": 1, "b": None}))], False),  # one function: its own
        ([chat(USER, call({"a": None}), USER, call({"b": 1}, "g"))], False),
        ([chat(USER, call({"a": 1}), USER, call({"a": 2}, "g"))], False),
        ([chat(*PAIR)], False),
    ],
)
def test_rows_of_a_table_that_was_written_as_json_are_told(rows, padded):
    assert is_padded(rows) is padded


def test_null_arguments_that_no_call_had_are_left_out_and_counted(tmp_path: Path):
    """The rows as pyarrow gives them back, written as JSON: what `to_json` of `datasets` and pandas does."""
    import pyarrow

    rows = [
        chat(USER, call({"city": "Oslo", "at": {"hour": 3}}, "weather"), {"role": "tool", "content": "3"}, answer()),
        chat(USER, call({"minutes": 5}, "timer"), {"role": "tool", "content": "done"}, answer("b")),
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pyarrow.Table.from_pylist(rows).to_pylist()))
    assert '"minutes": null' in file.read_text()
    files = ExampleFiles(tmp_path, LocalDataset(source="local", path="x"), CONTROL)
    values: list[Any] = [example.value for example in files]
    calls = [value["messages"][1]["tool_calls"][0]["function"]["arguments"] for value in values]
    assert calls == [{"city": "Oslo", "at": {"hour": 3}}, {"minutes": 5}]
    assert files.unused == {"null arguments of calls": 2}


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}),
        ({"type": "object", "properties": {"a": {}, "b": {}}}, {"a": 1, "b": None}),  # its own, as it was given
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"a": 1, "b": None}),
        ({}, {"a": 1, "b": None}),
    ],
)
def test_a_null_argument_that_the_function_does_not_have_is_left_out(parameters, kept):
    messages, _, unused = convert(
        chat(USER, call({"a": 1, "b": None}), tools=[{"name": "f", "parameters": parameters}])
    )
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == kept
    assert unused == ({} if "b" in kept else {"null arguments of calls": 1})


def test_maps_and_lists_of_fixed_length_in_arrow_are_objects_and_lists(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    function = pyarrow.struct(
        [("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]
    )
    message = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(pyarrow.struct([("function", function)]))),
        ]
    )
    asked = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [("city", "Oslo")]}}]}
    table = pyarrow.table({"messages": pyarrow.array([[USER, asked]], pyarrow.list_(message, 2))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    [example] = ExampleFiles(tmp_path, LocalDataset(source="local", path="x"), CONTROL)
    value: Any = example.value
    assert value["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"city": "Oslo"}}


def read(folder: Path, name: str, content: bytes, **keys: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the texts of the rows of a file, or the reasons of their faults, and what is said of the file."""
    (folder / name).write_bytes(content)
    files = ExampleFiles(folder, LocalDataset(source="local", path="x", **keys), CONTROL)
    values = [example.value for example in files]
    rows = [[m["content"] for m in v["messages"]] if isinstance(v, dict) else v.reason for v in values]
    return rows, files.files[name]


TABLES = [
    ("old Mac's lines", "a.csv", b'prompt,completion\rq,a\r"q 2","a\n2"\r', [["q", "a"], ["q 2", "a\n2"]]),
    ("old Mac's objects", "a.jsonl", b'{"prompt": "q", "completion": "a"}\r', [["q", "a"]]),
    ("columns once used", "a.csv", b"prompt;completion;;\r\nq;a;;\r\nq 2;a 2\r\n", [["q", "a"], ["q 2", "a 2"]]),
    ("rows once used", "a.csv", b"prompt;completion\r\nq;a\r\n;\r\n;\r\n", [["q", "a"]]),
    ("text beside the columns", "a.csv", b"prompt,completion,\nq,a,note\n", ["unnamed_column"]),
    (
        "English of an office",
        "a.csv",
        "prompt,completion\r\nDon’t…,“a” – 5 €\r\n".encode("cp1252"),
        [["Don’t…", "“a” – 5 €"]],
    ),
    ("bare conversations", "a.jsonl", (json.dumps(PAIR) + "\n").encode() * 2, [["q", "a"]] * 2),
    (
        "unwanted rows of a table",
        "a.csv",
        b"prompt,completion,kto_tag\nq,a,True\nq 2,a 2,False\n",
        [["q", "a"], "unwanted_answer"],
    ),
    ("an array of them", "a.json", json.dumps([[HUMAN, gpt("a")]]).encode(), [["q", "a"]]),
]


@pytest.mark.parametrize(("name", "content", "rows"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
def test_a_table_is_read_as_programs_write_it(tmp_path, name, content, rows):
    assert read(tmp_path, name, content)[0] == rows


def test_the_encoding_of_english_with_typographic_quotes_is_said(tmp_path):
    assert read(tmp_path, "a.csv", "prompt,completion\nIt’s,£3\n".encode("cp1252"))[1]["encoding"] == "cp1252"
    assert guess_encoding("Łukasz".encode("cp1250")) is None  # £ukasz, with cp1252


@pytest.mark.parametrize(
    ("header", "keys"),
    [("prompt\tcompletion", {}), ("ask\treply", {"prompt": "ask", "completion": "reply"})],
)
def test_a_table_in_excels_unicode_text_is_no_raw_text(tmp_path, header, keys):
    content = f"{header}\r\nq\ta\r\n".encode("utf-16")
    with refused("table-as-text", "a.txt", "a.tsv"):
        read(tmp_path, "a.txt", content, **keys)
    (tmp_path / "a.txt").rename(tmp_path / "a.tsv")
    assert read(tmp_path, "a.tsv", content, **keys)[0] == [["q", "a"]]


def test_a_raw_text_with_tabs_is_one(tmp_path):
    text = "question\tanswer of the day\nmore"
    assert read(tmp_path, "a.txt", text.encode())[0] == [[text]]
    assert read(tmp_path, "a.txt", b"prompt\tcompletion\nq\ta", format="text")[0] == [["prompt\tcompletion\nq\ta"]]


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"system_prompt": "Say <|im_start|>"}, "system_prompt"),
        ({"prompt_template": "{prompt}<|im_start|>", "completion": "completion"}, "prompt_template"),
        ({"labels": ["<|im_start|>", "b"], "prompt": "prompt", "completion": "completion"}, "labels"),
    ],
)
def test_a_text_of_the_preset_with_a_control_token_is_refused(tmp_path, keys, field):
    with refused("preset-text", f"presets.yaml: {field}"):
        read(tmp_path, "a.jsonl", b'{"prompt": "q", "completion": "a"}\n', **keys)


def test_a_column_with_the_thought_is_named_by_the_preset(tmp_path):
    keys = {"prompt": "problem", "completion": "solution", "thought": "deepseek_reasoning"}
    row = {"problem": "q", "solution": "a", "deepseek_reasoning": "hm", "reasoning": "another"}
    messages, _, unused = convert(row, **keys)
    assert messages == [USER, answer(reasoning_content="hm")]
    assert unused == {"column reasoning": 1}
    assert convert({**row, "deepseek_reasoning": None}, **keys)[0] == PAIR
    assert convert({**row, "deepseek_reasoning": 3}, **keys)[0].field == "deepseek_reasoning"
    nested = {"problem": "q", "solution": "a", "meta": {"thought": "hm"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(nested))
    [example] = ExampleFiles(
        tmp_path, LocalDataset(source="local", path="x", **{**keys, "thought": "meta.thought"}), CONTROL
    )
    assert example.value["messages"] == [USER, answer(reasoning_content="hm")]


@pytest.mark.parametrize("key", ["thought", "tools"])
def test_a_column_that_the_preset_names_and_no_row_has_is_refused(tmp_path, key):
    with refused("missing-column", "a.jsonl: no row has the column 'think'", key):
        read(
            tmp_path,
            "a.jsonl",
            b'{"prompt": "q", "completion": "a", "thinks": "hm"}\n',
            **{"prompt": "prompt", "completion": "completion", key: "think"},
        )


def test_texts_of_the_preset_are_normalised_as_those_of_rows_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "e", "completion": "\u2126"}))
    keys = {"prompt_template": "{prompt}\u0301", "completion": "completion", "system_prompt": "e\u0301"}
    files = ExampleFiles(
        tmp_path, LocalDataset(source="local", path="x", **keys), CONTROL, UnicodeRule("NFC", normalizes=True)
    )
    [example] = files
    assert [message["content"] for message in example.value["messages"]] == ["\u00e9", "\u03a9"]
    assert files.system_prompt == "\u00e9"
