"""Rows as clients, `datasets` and TRL write them today: parts of a content, JSON columns, padding, unpaired answers."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat
from refusals import refused

from lathe.config.presets import LocalDataset
from lathe.data.formats import RecordConverter
from lathe.data.messages import RowFault
from lathe.data.prepare import prepare
from lathe.data.read_examples import ExampleFiles
from lathe.data.read_files import read_records
from lathe.models.loss_mask import encode
from lathe.models.unicode_form import UnicodeRule, find_unicode_form

CONTROL = re.compile(r"<\|im_start\|>")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def convert(*rows: dict[str, Any]) -> list[Any]:
    """Return the messages of each row, or its fault."""
    converter = RecordConverter(LocalDataset(source="local", path="data/local/x"), rows[0], "x.jsonl", CONTROL)
    results: list[Any] = []
    for row in rows:
        try:
            results.append(converter.convert(row))
        except RowFault as error:
            results.append(error.fault)
    return results


def chat(content: Any, answer: Any = "yes", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer, **more}]}


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_the_text_parts_of_a_content_are_joined(kind):
    parts = [{"type": kind, "text": "one "}, {"type": kind, "text": "two", "cache_control": {"type": "ephemeral"}}]
    [messages] = convert(chat(parts, parts[1:]))
    assert [message["content"] for message in messages] == ["one two", "two"]


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "has the type 'image_url'"),
        ({"type": "tool_use", "name": "f", "input": {}}, "has the type 'tool_use'"),
        ({"type": "text"}, "is an object"),
        ("words", "is the text 'words'"),
        (None, "is null"),
    ],
)
def test_a_part_that_is_no_text_is_a_fault_that_names_it(part, shown):
    [fault] = convert(chat([{"type": "text", "text": "what is this?"}, part]))
    assert (fault.reason, fault.field) == ("not_text", "messages[0].content[1]")
    assert fault.problem.startswith(shown)


def test_parts_are_checked_for_control_tokens_and_must_hold_text():
    control, empty = convert(chat([{"type": "text", "text": "<|im_start|>"}]), chat([]))
    assert (control.reason, control.field) == ("control_token", "messages[0].content[0].text")
    assert empty.reason == "empty_prompt"


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "timer", "arguments": arguments}}


CONVERSATION = [
    {"role": "user", "content": "Timer for Oslo"},
    {"role": "assistant", "content": "", "tool_calls": [call({"minutes": 5}), call({"city": "Oslo"})]},
    {"role": "tool", "name": "timer", "content": "done"},
    {"role": "tool", "name": "timer", "content": "done too"},
    {"role": "assistant", "content": "Both are set."},
]


def test_nulls_with_which_arrow_fills_objects_are_no_values(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CONVERSATION}]), tmp_path / "x.parquet")
    [row] = [record.value for record in read_records(tmp_path / "x.parquet")]
    assert row == {"messages": CONVERSATION}
    [messages] = convert(row)
    assert [one["function"]["arguments"] for one in messages[1]["tool_calls"]] == [{"minutes": 5}, {"city": "Oslo"}]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_that_datasets_keeps_as_json_text_are_decoded(tmp_path, suffix):
    from datasets import Dataset, Features, Json, List, Value

    whole = Dataset.from_dict({"messages": [CONVERSATION]}, features=Features({"messages": List(Json())}))
    parts = [{"type": "text", "text": "Say hello"}]
    mixed = Dataset.from_dict(
        {"messages": [chat(parts, "Hello")["messages"]]},
        features=Features({"messages": List({"role": Value("string"), "content": Json()})}),
    )
    for number, (dataset, expected) in enumerate([(whole, CONVERSATION), (mixed, chat(parts, "Hello")["messages"])]):
        file = tmp_path / f"{number}{suffix}"
        if suffix == ".parquet":
            dataset.to_parquet(str(file))
        else:
            folder = tmp_path / f"saved{number}"
            dataset.save_to_disk(str(folder))
            [saved] = folder.glob("*.arrow")
            saved.rename(file)
        [row] = [record.value for record in read_records(file)]
        assert row == {"messages": expected}
        [messages] = convert(row)
        assert messages[0]["content"] in ("Timer for Oslo", "Say hello")


def test_text_in_a_json_column_that_is_no_json_stays_as_it_is(tmp_path):
    import pyarrow
    import pyarrow.parquet

    features = {"info": {"features": {"prompt": {"_type": "Json"}, "completion": {"_type": "Value"}}}}
    table = pyarrow.Table.from_pylist(
        [{"prompt": '"quoted"', "completion": "a"}, {"prompt": "plain", "completion": "b"}]
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert [record.value["prompt"] for record in read_records(tmp_path / "x.parquet")] == ["quoted", "plain"]


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Say something", "completion": "no"},
        {"instruction": "Say something", "output": "no"},
        {"question": "Say something", "answer": "no"},
        chat("Say something", "no"),
    ],
    ids=lambda columns: "+".join(columns),
)
def test_an_answer_that_is_labelled_unwanted_is_not_learnt(columns):
    unwanted, wanted, unlabelled = convert({**columns, "label": False}, {**columns, "label": True}, columns)
    assert (unwanted.reason, unwanted.field) == ("unwanted_answer", "label")
    assert wanted == unlabelled
    assert wanted[-1]["content"] == "no"


def test_the_label_of_a_classification_may_be_false():
    [fault] = convert({"text": "a", "label": False})
    assert fault.reason != "unwanted_answer"


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
def test_a_pointer_of_git_lfs_is_named_for_what_it_is(tmp_path: Path, name):
    (tmp_path / name).write_text(POINTER)
    with refused("lfs-pointer", f"{name}: is a pointer of Git LFS", "git lfs pull"):
        list(read_records(tmp_path / name))


def long_chat(*marks: dict[str, Any]) -> dict[str, Any]:
    """A question and an answer for each of the marks, which the answer has."""
    turns = [
        message
        for number, mark in enumerate(marks)
        for message in (
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}", **mark},
        )
    ]
    return {"messages": turns}


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
@pytest.mark.parametrize("on", [{}, {"weight": 1}, {"weight": None}, {"train": True}])
def test_an_answer_of_weight_0_is_context(on, off):
    first, last, only = convert(long_chat(off, on), long_chat(on, off), long_chat(off))
    assert [message.get("train") for message in first] == [None, False, None, None]
    assert last == convert(long_chat(on))[0]  # nothing learns from what comes after
    assert (only.reason, only.field) == ("no_answer", "messages")


@pytest.mark.parametrize(
    ("mark", "field"),
    [({"weight": 0.5}, "weight"), ({"weight": "0"}, "weight"), ({"weight": 2}, "weight"), ({"train": "no"}, "train")],
)
def test_a_mark_that_is_neither_is_a_fault(mark, field):
    [fault] = convert(long_chat(mark))
    assert (fault.reason, fault.field) == ("mark", f"messages[1].{field}")


def test_a_request_cannot_be_marked_as_learnt():
    row = long_chat({})
    row["messages"][0]["train"] = True
    [fault] = convert(row)
    assert (fault.reason, fault.field) == ("mark", "messages[0].train")
    row["messages"][0]["train"] = False
    assert [len(messages) for messages in convert(row)] == [2]


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_only_answers_to_be_learnt_are_supervised(supervise):
    tokenizer = byte_chat()
    [messages] = convert(long_chat({}, {"weight": 0}, {}))
    [row] = encode(tokenizer, [messages], supervise=supervise)
    text = tokenizer.decode(
        [token for token, is_supervised in zip(row.input_ids, row.supervised, strict=True) if is_supervised]
    )
    assert "answer 2" in text
    assert ("answer 0" in text) == (supervise == "all")
    assert "answer 1" not in text
    assert "answer 1" in tokenizer.decode(row.input_ids)


def nfc_chat() -> Any:
    """A tokenizer that composes text, as Qwen's does."""
    from tokenizers import normalizers

    tokenizer = byte_chat()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    return tokenizer


def test_the_unicode_form_of_a_tokenizer_is_found():
    assert find_unicode_form(byte_chat()) is None
    assert find_unicode_form(nfc_chat()) == "NFC"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("10 \u2126", "holds '\u2126' (U+2126), which the model's tokenizer reads as '\u03a9' (U+03A9) by NFC"),
        (
            "cafe\u0301",
            "holds 'e\u0301' (U+0065 U+0301), which the model's tokenizer reads as '\u00e9' (U+00E9) by NFC",
        ),
        ("\u09df", "(U+09DF)"),
        ("a\u0301\u0323", "holds 'a\u0301' (U+0061 U+0301)"),
    ],
)
def test_text_that_only_the_tokenizer_would_compose_is_a_fault_or_composed(tmp_path, text, shown):
    form = find_unicode_form(nfc_chat())
    assert form
    for row in (chat(text), chat("what?", text)):
        converter, composing = (
            RecordConverter(
                LocalDataset(source="local", path="data/local/x"),
                row,
                "x.jsonl",
                CONTROL,
                UnicodeRule(form, normalizes),
            )
            for normalizes in (False, True)
        )
        with pytest.raises(RowFault) as caught:
            converter.convert(row)
        assert caught.value.fault.reason == "not_normalized"
        assert shown in caught.value.fault.problem
        assert "preprocess.normalize_unicode" in caught.value.fault.problem
        [question, answer] = composing.convert(row)
        assert unicodedata.normalize("NFC", text) in (question["content"], answer["content"])
        assert convert(row)[0][0]["content"] in (text, "what?")  # another tokenizer leaves it as it is


def test_arguments_of_calls_are_composed_too():
    call = {"name": "find", "arguments": {"place": "cafe\u0301"}}
    row = chat("where?", "", tool_calls=[call])
    row["messages"] += [{"role": "tool", "content": "here"}, {"role": "assistant", "content": "here"}]
    preset = LocalDataset(source="local", path="data/local/x")
    messages = RecordConverter(preset, row, "x.jsonl", CONTROL, UnicodeRule("NFC", True)).convert(row)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"place": "caf\u00e9"}


def test_preprocess_counts_the_rows_that_it_drops(tmp_path):
    rows = [{"prompt": f"How far is {n} km?", "completion": f"{n} km"} for n in range(30)]
    rows += [{"prompt": "How much?", "completion": f"{n} \u2126"} for n in range(3)]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for normalizes, kept in ((False, 30), (True, 33)):
        out = tmp_path / str(normalizes)
        out.mkdir()
        settings = LENIENT.model_copy(update={"normalize_unicode": normalizes})
        preset = LocalDataset(source="local", path="data/local/x")
        prepared = prepare(
            raw, preset, out, tokenizer=nfc_chat(), seed=1, max_length=999, settings=settings, processes=1
        )
        written = "".join(file.read_text(encoding="utf-8") for file in out.glob("*.jsonl"))
        assert written.count("\n") == kept
        assert "\u2126" not in written
        assert ("not_normalized" in json.dumps(prepared.report)) != normalizes


def read_examples(folder: Path, *rows: dict[str, Any]) -> tuple[ExampleFiles, list[Any]]:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ExampleFiles(folder, LocalDataset(source="local", path="data/local/x"), CONTROL)
    return files, [example.value for example in files]


def test_the_format_is_found_by_the_columns_of_the_first_rows_not_of_the_first_alone(tmp_path):
    rows = [{"output": "lost"}, *[{"instruction": f"ask {number}", "output": "yes"} for number in range(3)]]
    files, values = read_examples(tmp_path / "alpaca", *rows)
    assert files.columns["format"] == "alpaca"
    assert files.files["train.jsonl"]["rows"] == 4
    assert (values[0].reason, values[0].field) == ("missing_column", "instruction")
    assert [value["messages"][0]["content"] for value in values[1:]] == ["ask 0", "ask 1", "ask 2"]


def test_where_the_first_rows_fit_several_formats_the_first_row_decides(tmp_path):
    files, values = read_examples(tmp_path / "mixed", chat("hi"), {"prompt": "ask", "completion": "yes"})
    assert files.columns["format"] == "messages"
    assert (values[1].reason, values[1].field) == ("missing_column", "messages")


def test_rows_that_cannot_be_read_do_not_decide_the_format(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    lines = ["{broken"] * 150 + [json.dumps({"question": "who?", "answer": "me"})]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ExampleFiles(folder, LocalDataset(source="local", path="data/local/x"), CONTROL)
    values = [example.value for example in files]
    assert len(values) == 151
    assert values[-1]["messages"][0]["content"] == "who?"
    assert files.columns["format"] == "question_answer"
