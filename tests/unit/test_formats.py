"""Every format of a dataset, from files as people have them, becomes the conversations that it means."""

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from samples import conversations, texts, tool_conversations

from lathe.common.errors import InputError
from lathe.config.presets import LocalDataset
from lathe.data.formats import Columns
from lathe.data.read_files import Fault, read_rows
from lathe.data.split_files import split_files

ROWS = 200
CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>")


def preset(**keys: Any) -> LocalDataset:
    return LocalDataset(source="local", path="data/local/x", **keys)


def read(folder: Path, keys: dict[str, Any] | None = None) -> tuple[Columns, list[Any]]:
    """Return how the train files of a folder are read, and the processed row, or the fault, of each of their rows."""
    columns, found = None, []
    for file in split_files(folder)["train"]:
        for row in read_rows(file):
            assert not isinstance(row.value, Fault), row
            columns = columns or Columns(preset(**(keys or {})), row.value, file.name, CONTROL)
            found.append({"messages": columns.conversation(row.value), **columns.extras(row.value)})
    assert columns
    return columns, found


def pair(prompt: str, answer: str, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def put(file: Path, rows: list[Any]) -> None:
    """Write the rows in the form that the file's name tells."""
    import pyarrow
    import pyarrow.parquet

    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif name.endswith(".json"):
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    elif name.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    else:
        table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(table, sink, row_group_size=64)
        else:
            make = pyarrow.ipc.new_file if "file" in name else pyarrow.ipc.new_stream
            with make(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=64)
        data = sink.getvalue()
    file.write_bytes(gzip.compress(data) if file.name.endswith(".gz") else data)


def shown(columns: Columns) -> dict[str, Any]:
    return {**columns.description, "detected": columns.detected}


FILES = [
    "data.jsonl",
    "data.json",
    "data.parquet",
    "data.arrow",
    "file.arrow",
    "data.jsonl.gz",
    "data.json.gz",
]
FLAT_FILES = [*FILES, "data.csv", "data.csv.gz"]


@pytest.mark.parametrize("name", FILES)
def test_messages_are_kept_with_system_and_every_turn(tmp_path, name):
    chats = conversations(ROWS, seed=1)
    put(tmp_path / name, [{"id": number, "messages": chat} for number, chat in enumerate(chats)])
    columns, rows = read(tmp_path)
    assert rows == [{"messages": chat} for chat in chats]
    assert shown(columns) == {"format": "messages", "messages": "messages", "detected": True}


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.arrow"])
def test_tool_calls_and_their_answers_are_kept(tmp_path, name):
    chats = tool_conversations(ROWS, seed=1)
    put(tmp_path / name, [{"messages": chat} for chat in chats])
    assert read(tmp_path)[1] == [{"messages": chat} for chat in chats]


def test_tool_calls_as_openai_writes_them_become_objects(tmp_path):
    chats = tool_conversations(ROWS, seed=2)
    written = json.loads(json.dumps(chats))
    for chat in written:
        chat[1]["content"] = None
        for call in chat[1]["tool_calls"]:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    put(tmp_path / "data.jsonl", [{"messages": chat, "tools": []} for chat in written])
    assert read(tmp_path)[1] == [{"messages": chat} for chat in chats]


SYNONYMS = {
    "system": ["system", "System"],
    "user": ["human", "user", "Human"],
    "assistant": ["gpt", "assistant", "chatgpt", "bot", "model", "GPT"],
}


@pytest.mark.parametrize("name", FILES)
def test_sharegpt_conversations_are_read_by_whoever_speaks(tmp_path, name):
    chats, chance = conversations(ROWS, seed=2), random.Random(2)
    rows = [
        {"conversations": [{"from": chance.choice(SYNONYMS[m["role"]]), "value": m["content"]} for m in chat]}
        for chat in chats
    ]
    put(tmp_path / name, rows)
    columns, found = read(tmp_path)
    assert found == [{"messages": chat} for chat in chats]
    assert shown(columns) == {"format": "sharegpt", "messages": "conversations", "detected": True}


def test_sharegpt_tool_calls_become_those_of_messages(tmp_path):
    chats = tool_conversations(ROWS, seed=4)
    rows = []
    for chat in chats:
        row = []
        for message in chat:
            if calls := message.get("tool_calls"):
                del calls[0]["id"]
                row.append({"from": "function_call", "value": json.dumps(calls[0]["function"])})
            else:
                speaker = {"user": "human", "assistant": "gpt", "tool": "observation"}[message["role"]]
                row.append({"from": speaker, "value": message["content"]})
                message.pop("name", None), message.pop("tool_call_id", None)
        rows.append({"conversations": row})
    put(tmp_path / "data.jsonl", rows)
    assert read(tmp_path)[1] == [{"messages": chat} for chat in chats]


def test_sharegpt_with_a_system_column_or_openais_keys_or_another_column_name(tmp_path):
    said, answered, system = texts(3 * ROWS, 3)[::3], texts(3 * ROWS, 3)[1::3], texts(3 * ROWS, 3)[2::3]
    rows = []
    for number, (request, answer, before) in enumerate(zip(said, answered, system, strict=True)):
        keys = ("from", "value", "human", "gpt") if number % 2 else ("role", "content", "user", "assistant")
        turns = [{keys[0]: keys[2], keys[1]: request}, {keys[0]: keys[3], keys[1]: answer}]
        rows.append({"turns": turns, "system": before})
    put(tmp_path / "data.jsonl", rows)
    columns, found = read(tmp_path, {"format": "sharegpt", "messages": "turns"})
    assert found == [pair(*three) for three in zip(said, answered, system, strict=True)]
    assert shown(columns) == {"format": "sharegpt", "messages": "turns", "system": "system", "detected": False}


@pytest.mark.parametrize("name", FLAT_FILES)
def test_alpaca_joins_instruction_and_input(tmp_path, name):
    asked, given, answered = texts(ROWS, 5), texts(ROWS, 6), texts(ROWS, 7)
    given = [text if number % 3 else "" for number, text in enumerate(given)]
    columns_of = zip(asked, given, answered, strict=True)
    rows = [{"instruction": a, "input": b, "output": c, "text": "ignored"} for a, b, c in columns_of]
    put(tmp_path / name, rows)
    columns, found = read(tmp_path)
    expected = [f"{a}\n\n{b}" if b else a for a, b in zip(asked, given, strict=True)]
    assert found == [pair(request, answer) for request, answer in zip(expected, answered, strict=True)]
    assert shown(columns) == {
        "format": "alpaca",
        "prompt": "instruction",
        "input": "input",
        "completion": "output",
        "detected": True,
    }


@pytest.mark.parametrize("name", FLAT_FILES)
@pytest.mark.parametrize(
    ("request_column", "answer_column", "form"),
    [("prompt", "completion", "prompt_completion"), ("question", "answer", "question_answer")],
)
def test_two_columns_are_a_request_and_its_answer(tmp_path, name, request_column, answer_column, form):
    asked, answered = texts(ROWS, 8), texts(ROWS, 9)
    put(tmp_path / name, [{request_column: a, answer_column: b} for a, b in zip(asked, answered, strict=True)])
    columns, found = read(tmp_path)
    assert found == [pair(*both) for both in zip(asked, answered, strict=True)]
    assert shown(columns) == {
        "format": form,
        "prompt": request_column,
        "completion": answer_column,
        "detected": True,
    }


@pytest.mark.parametrize("name", FLAT_FILES)
def test_plain_columns_are_put_into_a_template(tmp_path, name):
    topic, tone, answered = texts(ROWS, 10), texts(ROWS, 11), texts(ROWS, 12)
    rows = [{"topic": a, "tone": b, "text": c} for a, b, c in zip(topic, tone, answered, strict=True)]
    put(tmp_path / name, rows)
    template = "Write of {topic} in this tone: {tone} {{braces}}"
    _, found = read(tmp_path, {"prompt_template": template, "completion": "text"})
    assert found == [pair(template.format(**row), row["text"]) for row in rows]


@pytest.mark.parametrize("name", FLAT_FILES)
def test_a_preference_pair_of_texts_is_learnt_by_its_chosen_answer_and_kept(tmp_path, name):
    asked, better, worse = texts(ROWS, 13), texts(ROWS, 14), texts(ROWS, 15)
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(asked, better, worse, strict=True)]
    put(tmp_path / name, rows)
    columns, found = read(tmp_path)
    assert found == [
        {**pair(a, b), "rejected": [{"role": "assistant", "content": c}]}
        for a, b, c in zip(asked, better, worse, strict=True)
    ]
    assert shown(columns) == {
        "format": "preference",
        "prompt": "prompt",
        "completion": "chosen",
        "rejected": "rejected",
        "detected": True,
    }


@pytest.mark.parametrize("prompt", ["none", "text", "list"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_preference_pair_of_messages_is_whole_or_goes_on_from_its_prompt(tmp_path, name, prompt):
    chats, worse = conversations(ROWS, seed=16), texts(ROWS, 17)
    rows: list[dict[str, Any]] = []
    for chat, text in zip(chats, worse, strict=True):
        rejected = {"role": "assistant", "content": text}
        if prompt == "list":
            rows.append({"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [rejected]})
        else:
            rows.append({"chosen": chat, "rejected": [*chat[:-1], rejected]})
        if prompt == "text":
            rows[-1]["prompt"] = chat[-2]["content"]
    put(tmp_path / name, rows)
    assert read(tmp_path)[1] == [
        {"messages": chat, "rejected": [{"role": "assistant", "content": text}]}
        for chat, text in zip(chats, worse, strict=True)
    ]


def test_a_preference_pair_of_transcripts_needs_no_prompt(tmp_path):
    chats, worse = conversations(ROWS, seed=18, system=False), texts(ROWS, 19)
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    rows = []
    for chat, text in zip(chats, worse, strict=True):
        *before, chosen = [names[message["role"]] + message["content"] for message in chat]
        rows.append({"chosen": "".join([*before, chosen]), "rejected": "".join([*before, names["assistant"] + text])})
    put(tmp_path / "data.jsonl", rows)
    stripped = [[{**message, "content": message["content"].strip()} for message in chat] for chat in chats]
    assert read(tmp_path)[1] == [
        {"messages": chat, "rejected": [{"role": "assistant", "content": text.strip()}]}
        for chat, text in zip(stripped, worse, strict=True)
    ]


@pytest.mark.parametrize("given", ["answer", "conversation", "text"])
def test_a_conversation_may_have_an_answer_to_reject_beside_it(tmp_path, given):
    chats, worse = conversations(ROWS, seed=20), texts(ROWS, 21)
    expected = [
        {"messages": chat, "rejected": [{"role": "assistant", "content": text}]}
        for chat, text in zip(chats, worse, strict=True)
    ]
    rows: list[dict[str, Any]] = [dict(row) for row in expected]
    for row, text in zip(rows, worse, strict=True):
        if given == "conversation":
            row["rejected"] = [*row["messages"][:-1], *row["rejected"]]
        elif given == "text":
            row["rejected"] = text
    rows.append({"messages": chats[0], "rejected": None})
    put(tmp_path / "data.jsonl", rows)
    columns, found = read(tmp_path)
    assert found == [*expected, {"messages": chats[0]}]
    assert shown(columns) == {
        "format": "messages",
        "messages": "messages",
        "rejected": "rejected",
        "detected": True,
    }


def test_a_preference_pair_may_have_other_column_names(tmp_path):
    put(tmp_path / "data.jsonl", [{"q": "Why?", "good": "Because.", "bad": "No.", "system": "not read"}])
    columns, found = read(tmp_path, {"prompt": "q", "completion": "good", "rejected": "bad"})
    assert found == [{**pair("Why?", "Because."), "rejected": [{"role": "assistant", "content": "No."}]}]
    assert columns.description["format"] == "preference"


LABELS = ["negative", "neutral", "positive"]


@pytest.mark.parametrize("name", FLAT_FILES)
@pytest.mark.parametrize("form", ["number", "text"])
def test_a_label_is_answered_by_its_text(tmp_path, name, form):
    said = texts(ROWS, 20)
    places = [random.Random(text).randrange(3) for text in said]
    labels: list[Any] = places if form == "number" else [LABELS[place] for place in places]
    put(tmp_path / name, [{"text": a, "label": b} for a, b in zip(said, labels, strict=True)])
    columns, found = read(tmp_path, {"labels": LABELS} if form == "number" else {})
    assert found == [pair(text, LABELS[place]) for text, place in zip(said, places, strict=True)]
    assert columns.description["format"] == "classification"


def test_a_label_goes_with_a_prompt_template_too(tmp_path):
    put(tmp_path / "data.jsonl", [{"text": "Fine!", "label": 2}])
    keys = {"format": "classification", "labels": LABELS, "prompt_template": "Which mood? {text}"}
    assert read(tmp_path, keys)[1] == [pair("Which mood? Fine!", "positive")]


def test_a_dataset_as_save_to_disk_writes_it_gives_its_label_names(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    from lathe.data.split_files import data_files

    said = texts(ROWS, 21)
    places = [random.Random(text).randrange(3) for text in said]
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    dataset = Dataset.from_dict({"text": said, "label": places}, features=features)
    DatasetDict({"train": dataset, "test": dataset.select(range(5))}).save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "data.parquet")
    files = data_files(tmp_path / "saved")
    assert list(files) == ["test-data-00000-of-00001.arrow", "train-data-00000-of-00001.arrow"]
    for folder, sources in (("arrow", files), ("parquet", {"data.parquet": tmp_path / "data.parquet"})):
        (tmp_path / folder).mkdir()
        for name, file in sources.items():
            (tmp_path / folder / name).symlink_to(file)
        assert read(tmp_path / folder)[1] == [pair(text, LABELS[at]) for text, at in zip(said, places, strict=True)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "system": "s"},
        {"question": "a", "answer": "b", "system": "s"},
        {"instruction": "a", "output": "b", "system": "s"},
    ],
)
def test_a_system_column_comes_first_where_it_is_not_empty(tmp_path, row):
    without = {key: value for key, value in row.items() if key != "system"}
    put(tmp_path / "data.jsonl", [without, {**row, "system": ""}, {**row, "system": None}, row])
    assert read(tmp_path)[1] == [*[pair("a", "b")] * 3, pair("a", "b", "s")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [], "prompt": "a", "completion": "b"},
            "data.jsonl: its columns 'messages', 'prompt', 'completion' fit the formats messages and "
            "prompt_completion; say in the dataset's preset which one is meant (format: messages)",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "messages": []},
            "data.jsonl: its columns 'prompt', 'chosen', 'rejected', 'messages' fit the formats messages and "
            "preference; say in the dataset's preset which one is meant (format: messages)",
        ),
        (
            {"instruction": "a", "context": "b", "response": "c"},
            "data.jsonl: has the columns 'instruction', 'context', 'response'; expected those of a format (messages; "
            "conversations; instruction + output; prompt + completion; question + answer; chosen + rejected; "
            "text + label); name yours in the dataset's preset (messages, prompt + completion, prompt_template + "
            "completion)",
        ),
    ],
)
def test_columns_that_fit_several_formats_or_none_are_refused(tmp_path, row, message):
    put(tmp_path / "data.jsonl", [row])
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert str(refused.value) == message


def test_the_named_format_decides_where_several_fit(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "question": "d", "answer": "e"}
    put(tmp_path / "data.jsonl", [row])
    assert read(tmp_path, {"format": "question_answer"})[1] == [pair("d", "e")]
    assert read(tmp_path, {"format": "preference"})[1][0]["messages"] == pair("a", "b")["messages"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"format": "sharegpt", "prompt": "a", "completion": "b"},
            "the format sharegpt is read from one column; name it in messages, and nothing else",
        ),
        (
            {"format": "alpaca", "messages": "m"},
            "messages does not go with the format alpaca; it belongs to messages and sharegpt",
        ),
        (
            {"format": "alpaca", "labels": ["a"]},
            "labels does not go with the format alpaca; it belongs to classification",
        ),
        ({"messages": "m", "rejected": "r"}, "messages does not go with the format preference; it belongs to"),
        ({"rejected": "r", "labels": ["a"]}, "labels does not go with the format preference; it belongs to"),
    ],
)
def test_keys_that_do_not_go_with_the_format_are_refused(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preset(**keys)


def test_reading_takes_one_batch_of_a_file_and_not_the_whole(tmp_path):
    """What is asked for is read: a fault far behind is not met."""
    rows = [{"prompt": "p" * 100, "completion": str(number)} for number in range(5000)]
    for name in ("data.jsonl", "data.csv", "data.jsonl.gz", "data.arrow"):
        put(tmp_path / name, rows)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4] + b'\xff"')
        source = read_rows(tmp_path / name)
        assert [next(source).value for _ in range(100)] == rows[:100], name
