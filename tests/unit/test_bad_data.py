"""Bad data is refused in one line: file, line or row, field, and what was expected.

test_data.py has rows of messages and of two columns, and the account of dropped rows; here are the other formats and
the other kinds of file.
"""

import gzip
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from row_faults import check_fault

from lathe.config.presets import LocalDataset
from lathe.data.formats import RecordConverter
from lathe.data.messages import RowFault
from lathe.data.read_files import read_records
from lathe.data.split_files import find_data_files, find_split_files

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


# the preset's keys, the record (JSON text if a dict cannot express it), reason, field
BAD_ROWS: list[tuple[dict[str, Any], Any, str, str | None]] = [
    # ShareGPT
    (
        {},
        shared({"from": "narrator", "value": "x"}, GPT),
        "unknown_role",
        "conversations[0].from",
    ),
    (
        {},
        shared(HUMAN, {"from": "gpt", "value": 7}),
        "not_text",
        "conversations[1].value",
    ),
    ({}, shared(HUMAN, {"from": "gpt"}), "missing_key", "conversations[1].value"),
    (
        {},
        shared(HUMAN, {"from": "gpt", "value": " "}),
        "empty_answer",
        "conversations[1].value",
    ),
    (
        {},
        shared(HUMAN, None),
        "not_an_object",
        "conversations[1]",
    ),
    (
        {},
        {"conversations": "Human: q"},
        "not_a_list",
        "conversations",
    ),
    (
        {},
        shared(GPT, HUMAN),
        "roles_out_of_order",
        "conversations[0].from",
    ),
    (
        {},
        shared(HUMAN, {"from": "function_call", "value": "weather(Oslo)"}),
        "tool_call",
        "conversations[1].value",
    ),
    (
        {},
        shared(HUMAN, {"from": "function_call", "value": "{}"}),
        "tool_call",
        "conversations[1].value[0].name",
    ),
    (
        {},
        {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "another"},
        "two_system_messages",
        "system",
    ),
    # messages, tools
    (
        {},
        calling(function={"name": "f"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
    ),
    (
        {},
        calling(function={"name": "", "arguments": {}}),
        "tool_call",
        "messages[1].tool_calls[0].name",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": "{'a': 1}"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": "[1]"}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
    ),
    (
        {},
        calling(function={"name": "f", "arguments": {"x": "a<|im_end|>b"}}),
        "control_token",
        "messages[1].tool_calls[0].arguments",
    ),
    (
        {},
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": '
        '[{"name": "f", "arguments": {"deep": [{"x": 1, "x": 2}]}}]}]}',
        "duplicate_key",
        "messages[1].tool_calls[0].arguments.x",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": {"name": "f"}}),
        "tool_call",
        "messages[1].tool_calls",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [None]}),
        "tool_call",
        "messages[1].tool_calls[0]",
    ),
    (
        {},
        chat({**USER, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER),
        "tool_call",
        "messages[0].tool_calls",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{"}}),
        "tool_call",
        "messages[1].function_call[0].arguments",
    ),
    (
        {},
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}, USER, ANSWER),
        "roles_out_of_order",
        "messages[2].role",
    ),
    (
        {},
        chat(USER, {"role": "tool", "content": "x"}, ANSWER),
        "roles_out_of_order",
        "messages[1].role",
    ),
    (
        {},
        chat(USER, ANSWER, {"role": "tool", "content": "x"}),
        "no_answer",
        "messages",
    ),
    (
        {},
        chat(USER, ANSWER, {"role": "tool", "content": {"t": 3}}, ANSWER),
        "not_text",
        "messages[2].content",
    ),
    (
        {},
        {**chat(USER, ANSWER), "tools": [{"name": ""}]},
        "tools",
        "tools[0].name",
    ),
    (
        {},
        chat({"role": "user", "content": {"text": None}}, ANSWER),
        "not_text",
        "messages[0].content",
    ),
    # Alpaca
    (
        {},
        {"instruction": "i", "input": 5, "output": "o"},
        "not_text",
        "input",
    ),
    ({}, {"instruction": " ", "input": "", "output": "o"}, "empty_prompt", "instruction"),
    ({}, {"instruction": "i", "output": "\n"}, "empty_answer", "output"),
    # another schema than the first row's
    (
        {"format": "alpaca"},
        GOOD,
        "missing_column",
        "instruction",
    ),
    # preference pairs
    (
        {},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        "same_answers",
        "rejected",
    ),
    (
        {},
        {"prompt": "p", "chosen": "same", "rejected": " same\n"},
        "same_answers",
        "rejected",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [ANSWER]},
        "same_answers",
        "rejected",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "rejected",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": [USER]},
        "no_answer",
        "rejected",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": 5},
        "not_a_list",
        "rejected",
    ),
    (
        {},
        {"messages": [USER, ANSWER], "rejected": " "},
        "empty_answer",
        "rejected[0].content",
    ),
    ({}, {"prompt": "p", "chosen": "c", "rejected": ""}, "empty_answer", "rejected"),
    ({}, {"prompt": "", "chosen": "c", "rejected": "r"}, "empty_prompt", "prompt"),
    ({}, {"prompt": "p", "chosen": None, "rejected": "r"}, "not_text", "chosen"),
    (
        {},
        {"prompt": "p", "chosen": "c", "rejected": [ANSWER]},
        "not_alike",
        "rejected",
    ),
    (
        {},
        {"chosen": "c", "rejected": "r"},
        "no_prompt",
        "chosen",
    ),
    (
        {},
        {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        "empty_answer",
        "chosen",
    ),
    (
        {},
        {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "rejected",
    ),
    (
        {},
        {"prompt": "elsewhere", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
        "different_prompts",
        "chosen",
    ),
    (
        {},
        {"chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]},
        "roles_out_of_order",
        "chosen[0].role",
    ),
    # labels
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": 2},
        "label_out_of_range",
        "label",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": -1},
        "label_out_of_range",
        "label",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": "maybe"},
        "unknown_label",
        "label",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": True},
        "unknown_label",
        "label",
    ),
    (
        {"labels": ["no", "yes"]},
        {"text": "t", "label": 1.0},
        "unknown_label",
        "label",
    ),
    (
        {},
        {"text": "t", "label": 1},
        "unnamed_label",
        "label",
    ),
    (
        {},
        {"text": "t", "label": "1"},
        "unnamed_label",
        "label",
    ),
    ({}, {"text": "t", "label": None}, "not_text", "label"),
    ({}, {"text": "t", "label": " "}, "empty_answer", "label"),
    ({}, {"text": ["t"], "label": "x"}, "not_text", "text"),
]


@pytest.mark.parametrize(
    ("keys", "row", "reason", "field"),
    BAD_ROWS,
    ids=[f"{number}-{case[2]}" for number, case in enumerate(BAD_ROWS)],
)
def test_a_bad_row_is_refused_with_its_reason_and_field(tmp_path, keys, row, reason, field):
    (tmp_path / "data.jsonl").write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    (record,) = read_records(tmp_path / "data.jsonl")
    assert isinstance(record.value, dict)
    assert record.place == "data.jsonl:1"
    preset = LocalDataset(source="local", path="data/local/x", **keys)
    converter = RecordConverter(preset, record.value, "data.jsonl", CONTROL)
    with pytest.raises(RowFault) as caught:
        converter.convert(record.value)
    check_fault(caught.value.fault, reason, field)


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

# name, content, code, place
BAD_FILES = [
    ("x.jsonl.gz", b"", "empty-file", "x.jsonl.gz"),
    (
        "x.jsonl.gz",
        LINES,
        "misnamed-file",
        "x.jsonl.gz: is no gzip file by its first bytes; name it x.jsonl",
    ),
    (
        "x.jsonl.gz",
        compress(LINES)[:-12],
        "truncated-file",
        "x.jsonl.gz after row",
    ),
    (
        "x.csv.gz",
        compress(b"prompt,completion\nq,a\n" * 9)[:-8] + bytes(8),
        "truncated-file",
        "x.csv.gz after row",
    ),
    (
        "x.json.gz",
        compress(b"[]")[:4],
        "truncated-file",
        "x.json.gz after row 0",
    ),
    (
        "x.jsonl.gz",
        compress(b'{"a": "\xff"}'),
        "not-utf-8",
        "x.jsonl.gz:1",
    ),
    ("x.jsonl", compress(LINES), "misnamed-file", "x.jsonl: is a gzip file by its first bytes; name it x.jsonl.gz"),
    ("x.arrow", b"", "truncated-file", "x.arrow after row 0"),
    ("x.arrow", b"PAR1 nonsense", "truncated-file", "x.arrow after row 0"),
    ("x.arrow", STREAM[: len(STREAM) // 2], "truncated-file", "x.arrow after row"),
    (
        "x.arrow",
        STREAM[:-8],
        "truncated-file",
        "x.arrow after row 50",
    ),
    ("x.arrow", table(MANY, form="file")[:-20], "truncated-file", "x.arrow after row 0"),
    ("x.parquet", table(MANY)[:-20], "truncated-file", "x.parquet after row 0"),
    ("x.parquet", b"prompt,completion\n", "truncated-file", "x.parquet after row 0"),
    ("x.parquet", two_columns_of_one_name(), "duplicate-column", "x.parquet"),
    ("x.parquet", not_utf8(), "not-utf-8", "x.parquet after row 0"),
    ("x.parquet", table([])[:0], "truncated-file", "x.parquet after row 0"),
    (
        "x.csv.gz",
        compress(b'prompt,completion\n"q,a\n'),
        "not-csv",
        "x.csv.gz:2",
    ),
]


@pytest.mark.parametrize(("name", "content", "code", "place"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, code, place):
    (tmp_path / name).write_bytes(content)
    # Why a file is incomplete is said by gzip and Arrow, in words that change with their versions.
    truncated = code == "truncated-file"
    remedy = "; is it truncated?" if truncated else ""
    with refused(code, place, remedy, kept=not truncated) as caught:
        for _ in read_records(tmp_path / name):
            pass
    assert str(caught.value).startswith(place)


def test_a_file_of_another_schema_than_the_first_is_refused():
    converter = RecordConverter(LocalDataset(source="local", path="data/local/x"), list(GOOD), "a.jsonl", CONTROL)
    with refused("missing-column", "b.jsonl: ", "'prompt'", "prompt_completion", "'messages', 'id'"):
        converter.require_columns(["messages", "id"], "b.jsonl")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINES)


def test_folders_named_for_splits_give_their_files_to_them(tmp_path):
    put(tmp_path, "train/a.jsonl", "train/b.jsonl", "dev/x.jsonl", "Test/y.jsonl", "images/z.json", "README.md")
    names = find_data_files(tmp_path)
    assert list(names) == ["Test-y.jsonl", "dev-x.jsonl", "train-a.jsonl", "train-b.jsonl"]
    (tmp_path / "flat").mkdir()
    put(tmp_path / "flat", *names)
    splits = find_split_files(tmp_path / "flat")
    assert {split: [file.name for file in files] for split, files in splits.items()} == {
        "train": ["train-a.jsonl", "train-b.jsonl"],
        "validation": ["dev-x.jsonl"],
        "test": ["Test-y.jsonl"],
    }


def test_two_files_that_would_have_one_name_are_refused(tmp_path):
    put(tmp_path, "train/a.jsonl", "train-a.jsonl")
    with refused("ambiguous-file-names", "train/a.jsonl: ", "train-a.jsonl"):
        find_data_files(tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.arrow"])
def test_a_row_of_ten_megabytes_is_read_from_these_too(tmp_path, name):
    rows = [{"prompt": "q", "completion": "x" * 10_000_000}, GOOD]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(compress(lines, 1) if name.endswith(".gz") else table(rows, form="stream"))
    assert [row.value for row in read_records(tmp_path / name)] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted_in_a_gzip_file(tmp_path, suffix):
    text = {
        ".jsonl": json.dumps(GOOD) + "\r\n",
        ".json": json.dumps([GOOD], indent=1).replace("\n", "\r\n"),
        ".csv": "prompt,completion\r\na question,an answer\r\n",
    }[suffix]
    file = tmp_path / f"x{suffix}.gz"
    file.write_bytes(compress(b"\xef\xbb\xbf" + text.encode()))
    assert [row.value for row in read_records(file)] == [GOOD]


def test_a_nul_in_a_csv_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\nq,a\0b\n")
    (record,) = read_records(tmp_path / "x.csv")
    assert isinstance(record.value, dict)
    assert record.place == "x.csv:2"
    converter = RecordConverter(LocalDataset(source="local", path="data/local/x"), record.value, "x.csv", CONTROL)
    with pytest.raises(RowFault) as caught:
        converter.convert(record.value)
    check_fault(caught.value.fault, "invalid_unicode", "completion")
