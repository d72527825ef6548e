"""What is wrong with data is said in one line: file, line or row, field, and what was expected.

Rows of messages and of two columns are in test_data.py, with the account of what is dropped; here are the other formats
and the other kinds of file.
"""

import gzip
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lathe.common.errors import InputError
from lathe.config.presets import LocalDataset
from lathe.data.formats import Columns
from lathe.data.messages import RowFault
from lathe.data.read_files import Fault, read_rows
from lathe.data.split_files import data_files, split_files

compress = partial(gzip.compress, mtime=0)  # the same bytes, and so the same name of a test, whenever it is collected
CONTROL = re.compile(r"<\|im_end\|>")
GOOD = {"prompt": "a question", "completion": "an answer"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def calling(**call: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "content": "", "tool_calls": [call]})


def shared(*turns: Any) -> dict[str, Any]:
    return {"conversations": list(turns)}


# the preset's keys, the row (as JSON text where only text can say it), reason, field, problem
BAD_ROWS: list[tuple[dict[str, Any], Any, str, str | None, str]] = [
    # ShareGPT
    (
        {},
        shared({"from": "narrator", "value": "x"}, GPT),
        "unknown_role",
        "conversations[0].from",
        "is the text 'narrator'; expected one of system, human, user, gpt, assistant, chatgpt, bot, model, "
        "function_call, tool_call, tool, observation, function_response, tool_response",
    ),
    (
        {},
        shared(HUMAN, {"from": "gpt", "value": 7}),
        "not_text",
        "conversations[1].value",
        "is the number 7; expected text",
    ),
    ({}, shared(HUMAN, {"from": "gpt"}), "missing_key", "conversations[1].value", "is missing; the message has 'from'"),
    (
        {},
        shared(HUMAN, {"from": "gpt", "value": " "}),
        "empty_answer",
        "conversations[1].value",
        "is empty; expected text",
    ),
    (
        {},
        shared(HUMAN, None),
        "not_an_object",
        "conversations[1]",
        "is null; expected an object with from and value",
    ),
    (
        {},
        {"conversations": "Human: q"},
        "not_a_list",
        "conversations",
        "is the text 'Human: q'; expected a list of {from, value} objects",
    ),
    (
        {},
        shared(GPT, HUMAN),
        "roles_out_of_order",
        "conversations[0].from",
        "assistant comes first; expected system or user",
    ),
    (
        {},
        shared(HUMAN, {"from": "function_call", "value": "weather(Oslo)"}),
        "tool_call",
        "conversations[1].value",
        "is the text 'weather(Oslo)'; expected JSON",
    ),
    (
        {},
        shared(HUMAN, {"from": "function_call", "value": "{}"}),
        "tool_call",
        "conversations[1].value[0].name",
        "is missing; the call has none",
    ),
    (
        {},
        {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "another"},
        "two_system_messages",
        "system",
        "is given though the messages begin with one; expected one of them",
    ),
    # messages, tools
    (
        {},
        calling(function={"name": "f"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
        "is missing; the call has 'name'",
    ),
    (
        {},
        calling(function={"name": "", "arguments": {}}),
        "tool_call",
        "messages[1].tool_calls[0].name",
        "is empty; expected the function's name",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": "{'a': 1}"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
        "is the text \"{'a': 1}\"; expected JSON",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": "[1]"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
        "is a list; expected an object, or JSON text of one",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": {"x": "a<|im_end|>b"}}),
        "control_token",
        "messages[1].tool_calls[0].arguments",
        "holds the model's control token '<|im_end|>'",
    ),
    (
        {},
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": '
        '[{"name": "f", "arguments": {"deep": [{"x": 1, "x": 2}]}}]}]}',
        "duplicate_key",
        "messages[1].tool_calls[0].arguments.x",
        "occurs twice in one object; expected once",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": {"name": "f"}}),
        "tool_call",
        "messages[1].tool_calls",
        "is an object; expected a list of calls",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [None]}),
        "tool_call",
        "messages[1].tool_calls[0]",
        "is null; expected an object with name and arguments",
    ),
    (
        {},
        chat({**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER),
        "tool_call",
        "messages[0].tool_calls",
        "are a user message's; expected only the assistant's",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}),
        "tool_call",
        "messages[1].function_call",
        "is not supported; expected tool_calls",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}, USER, ANSWER),
        "roles_out_of_order",
        "messages[2].role",
        "user follows the assistant's tool call; expected tool",
    ),
    (
        {},
        chat(USER, {"role": "tool", "content": "x"}, ANSWER),
        "roles_out_of_order",
        "messages[1].role",
        "tool follows user; expected assistant",
    ),
    (
        {},
        chat(USER, ANSWER, {"role": "tool", "content": "x"}),
        "no_answer",
        "messages",
        "ends with tool; expected an assistant message last",
    ),
    (
        {},
        chat(USER, ANSWER, {"role": "tool", "content": {"t": 3}}, ANSWER),
        "not_text",
        "messages[2].content",
        "is an object; expected text",
    ),
    (
        {},
        {**chat(USER, ANSWER), "tools": [{"name": "f"}]},
        "tools",
        "tools",
        "is not supported; put the definitions of the tools into a system message",
    ),
    (
        {},
        chat({"role": "user", "content": {"text": None}}, ANSWER),
        "not_text",
        "messages[0].content",
        "is an object; expected text",
    ),
    # Alpaca
    (
        {},
        {"instruction": "i", "input": 5, "output": "o"},
        "not_text",
        "input",
        "is the number 5; expected text",
    ),
    ({}, {"instruction": " ", "input": "", "output": "o"}, "empty_prompt", "instruction", "is empty; expected text"),
    ({}, {"instruction": "i", "output": "\n"}, "empty_answer", "output", "is empty; expected text"),
    # another schema than the first row's
    (
        {"format": "alpaca"},
        GOOD,
        "missing_column",
        "instruction",
        "is missing; the row has 'prompt', 'completion'",
    ),
    # preference pairs
    (
        {},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        "same_answers",
        "rejected",
        "is equal to chosen; expected another answer",
    ),
    (
        {},
        {"prompt": "p", "chosen": "same", "rejected": " same\n"},
        "same_answers",
        "rejected",
        "is equal to chosen; expected another answer",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [ANSWER]},
        "same_answers",
        "rejected",
        "is equal to messages; expected another answer",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "rejected",
        "answers another conversation than messages; expected the same up to the last message",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [USER]},
        "no_answer",
        "rejected",
        "ends with user; expected an assistant message last",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": 5},
        "not_a_list",
        "rejected",
        "is the number 5; expected a list of {role, content} objects",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": " "},
        "empty_answer",
        "rejected[0].content",
        "is empty; expected text",
    ),
    ({}, {"prompt": "p", "chosen": "c", "rejected": ""}, "empty_answer", "rejected", "is empty; expected text"),
    ({}, {"prompt": "", "chosen": "c", "rejected": "r"}, "empty_prompt", "prompt", "is empty; expected text"),
    ({}, {"prompt": "p", "chosen": None, "rejected": "r"}, "not_text", "chosen", "is null; expected text"),
    (
        {},
        {"prompt": "p", "chosen": "c", "rejected": [ANSWER]},
        "not_alike",
        "rejected",
        "is a list but chosen is the text 'c'; expected both alike",
    ),
    (
        {},
        {"chosen": "c", "rejected": "r"},
        "no_prompt",
        "chosen",
        r"is a text beside no prompt column; expected one, or a transcript that begins with '\n\nHuman:'",
    ),
    (
        {},
        {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        "empty_answer",
        "chosen",
        "has an empty turn of Assistant; expected text",
    ),
    (
        {},
        {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "rejected",
        "answers another conversation than chosen; expected the same up to the last message",
    ),
    (
        {},
        {"prompt": "elsewhere", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "chosen",
        "does not hold the prompt; expected the conversation it begins",
    ),
    (
        {},
        {"chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        "roles_out_of_order",
        "chosen[0].role",
        "assistant comes first; expected system or user",
    ),
    # labels
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": 2},
        "label_out_of_range",
        "label",
        "is the number 2; expected 0 to 1, a place in the preset's `labels`",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": -1},
        "label_out_of_range",
        "label",
        "is the number -1; expected 0 to 1, a place in the preset's `labels`",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": "maybe"},
        "unknown_label",
        "label",
        "is the text 'maybe'; expected one of 'no', 'yes', or its number from 0",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": True},
        "unknown_label",
        "label",
        "is true; expected one of 'no', 'yes', or its number from 0",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": 1.0},
        "unknown_label",
        "label",
        "is the number 1.0; expected one of 'no', 'yes', or its number from 0",
    ),
    (
        {},
        {"text": "t", "label": 1},
        "unnamed_label",
        "label",
        "is the number 1; expected the label's text; name the labels in the dataset's preset (`labels`), or give it "
        "prompt and completion",
    ),
    (
        {},
        {"text": "t", "label": "1"},
        "unnamed_label",
        "label",
        "is the text '1'; expected the label's text; name the labels in the dataset's preset (`labels`), or give it "
        "prompt and completion",
    ),
    ({}, {"text": "t", "label": None}, "not_text", "label", "is null; expected text"),
    ({}, {"text": "t", "label": " "}, "empty_answer", "label", "is empty; expected text"),
    ({}, {"text": ["t"], "label": "x"}, "not_text", "text", "is a list; expected text"),
]


@pytest.mark.parametrize(
    ("keys", "row", "reason", "field", "problem"),
    BAD_ROWS,
    ids=[f"{number}-{case[2]}" for number, case in enumerate(BAD_ROWS)],
)
def test_a_bad_row_is_named_with_field_and_what_was_expected(tmp_path, keys, row, reason, field, problem):
    (tmp_path / "data.jsonl").write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    (found,) = read_rows(tmp_path / "data.jsonl")
    assert isinstance(found.value, dict)
    assert found.at == "data.jsonl:1"
    preset = LocalDataset(source="local", path="data/local/x", **keys)
    columns = Columns(preset, found.value, "data.jsonl", CONTROL)
    with pytest.raises(RowFault) as refused:
        columns.conversation(found.value)
    assert refused.value.fault == Fault(reason, field, problem)


def table(rows: list[dict[str, Any]], *, form: str = "parquet") -> bytes:
    import pyarrow
    import pyarrow.parquet

    made, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if form == "parquet":
        pyarrow.parquet.write_table(made, sink, row_group_size=10)
    else:
        make = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
        with make(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=10)
    return sink.getvalue()


def two_columns_of_one_name() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    made = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(made, sink)
    return sink.getvalue()


def not_utf8() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    broken = pyarrow.array([b"good", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), sink)
    return sink.getvalue()


MANY = [{**GOOD, "prompt": f"question {number}"} for number in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in MANY).encode()
STREAM = table(MANY, form="stream")

# name, content, a pattern of the whole message
BAD_FILES = [
    ("x.jsonl.gz", b"", "x.jsonl.gz: holds no row; give a file with data or remove it"),
    (
        "x.jsonl.gz",
        LINES,
        r"x.jsonl.gz after row 0: not a whole gzip file: Not a gzipped file \(b'\{\"'\); is it cut short\?",
    ),
    (
        "x.jsonl.gz",
        compress(LINES)[:-12],
        r"x.jsonl.gz after row \d+: not a whole gzip file: Compressed file ended before the end-of-stream marker was "
        r"reached; is it cut short\?",
    ),
    (
        "x.csv.gz",
        compress(b"prompt,completion\nq,a\n" * 9)[:-8] + bytes(8),
        r"x.csv.gz after row \d+: not a whole gzip file: CRC check failed .*; is it cut short\?",
    ),
    (
        "x.json.gz",
        compress(b"[]")[:4],
        r"x.json.gz after row 0: not a whole gzip file: .*; is it cut short\?",
    ),
    (
        "x.jsonl.gz",
        compress(b'{"a": "\xff"}'),
        "x.jsonl.gz:1: byte 0xff is not UTF-8; save the file as UTF-8",
    ),
    ("x.jsonl", compress(LINES), "x.jsonl:1: byte 0x8b is not UTF-8; save the file as UTF-8"),
    ("x.arrow", b"", r"x.arrow after row 0: not a whole Arrow file: .*; is it cut short\?"),
    ("x.arrow", b"PAR1 nonsense", r"x.arrow after row 0: not a whole Arrow file: .*; is it cut short\?"),
    ("x.arrow", STREAM[: len(STREAM) // 2], r"x.arrow after row \d+: not a whole Arrow file: .*; is it cut short\?"),
    (
        "x.arrow",
        STREAM[:-8],
        r"x.arrow after row 50: not a whole Arrow file: the end mark of the stream is missing; is it cut short\?",
    ),
    ("x.arrow", table(MANY, form="file")[:-20], r"x.arrow after row 0: not a whole Arrow file: .*; is it cut short\?"),
    ("x.parquet", table(MANY)[:-20], r"x.parquet after row 0: not a whole Parquet file: .*; is it cut short\?"),
    ("x.parquet", b"prompt,completion\n", r"x.parquet after row 0: not a whole Parquet file: .*; is it cut short\?"),
    ("x.parquet", two_columns_of_one_name(), "x.parquet: the header names 'prompt' twice; rename one of them"),
    ("x.parquet", not_utf8(), "x.parquet after row 0: a text is not UTF-8; write the file anew"),
    ("x.parquet", table([])[:0], r"x.parquet after row 0: not a whole Parquet file: .*; is it cut short\?"),
    (
        "x.csv.gz",
        compress(b'prompt,completion\n"q,a\n'),
        "x.csv.gz:2: the quote opened in this row is never closed; close it",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        for _ in read_rows(tmp_path / name):
            pass
    assert re.fullmatch(message, str(refused.value)), str(refused.value)


def test_a_file_of_another_schema_than_the_first_is_refused(tmp_path):
    columns = Columns(LocalDataset(source="local", path="data/local/x"), list(GOOD), "a.jsonl", CONTROL)
    with pytest.raises(InputError) as refused:
        columns.require(["messages", "id"], "b.jsonl")
    assert str(refused.value) == (
        "b.jsonl: no row has the column 'prompt', which the format prompt_completion needs; its columns: "
        "'messages', 'id'"
    )


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINES)


def test_folders_named_for_splits_give_their_files_to_them(tmp_path):
    put(tmp_path, "train/a.jsonl", "train/b.jsonl", "dev/x.jsonl", "Test/y.jsonl", "images/z.json", "README.md")
    names = data_files(tmp_path)
    assert list(names) == ["Test-y.jsonl", "dev-x.jsonl", "train-a.jsonl", "train-b.jsonl"]
    (tmp_path / "flat").mkdir()
    put(tmp_path / "flat", *names)
    splits = split_files(tmp_path / "flat")
    assert {split: [file.name for file in files] for split, files in splits.items()} == {
        "train": ["train-a.jsonl", "train-b.jsonl"],
        "validation": ["dev-x.jsonl"],
        "test": ["Test-y.jsonl"],
    }


def test_two_files_that_would_have_one_name_are_refused(tmp_path):
    put(tmp_path, "train/a.jsonl", "train-a.jsonl")
    with pytest.raises(InputError, match=r"^train/a.jsonl: train-a.jsonl lies beside its folder; keep one of them$"):
        data_files(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.arrow"])
def test_a_row_of_ten_megabytes_is_read_from_these_too(tmp_path, name):
    rows = [{"prompt": "q", "completion": "x" * 10_000_000}, GOOD]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(compress(lines, 1) if name.endswith(".gz") else table(rows, form="stream"))
    assert [row.value for row in read_rows(tmp_path / name)] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted_in_a_gzip_file(tmp_path, suffix):
    text = {
        ".jsonl": json.dumps(GOOD) + "\r\n",
        ".json": json.dumps([GOOD], indent=1).replace("\n", "\r\n"),
        ".csv": "prompt,completion\r\na question,an answer\r\n",
    }[suffix]
    file = tmp_path / f"x{suffix}.gz"
    file.write_bytes(compress(b"\xef\xbb\xbf" + text.encode()))
    assert [row.value for row in read_rows(file)] == [GOOD]


def test_a_nul_in_a_csv_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\nq,a\0b\n")
    (row,) = read_rows(tmp_path / "x.csv")
    assert isinstance(row.value, dict)
    columns = Columns(LocalDataset(source="local", path="data/local/x"), row.value, "x.csv", CONTROL)
    with pytest.raises(RowFault) as refused:
        columns.conversation(row.value)
    assert (row.at, str(refused.value.fault)) == (
        "x.csv:2",
        "completion holds a NUL character; expected text without",
    )
