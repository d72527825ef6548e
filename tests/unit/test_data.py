"""Preparation: files of every kind become validated, disjoint splits, and every row is accounted for."""

import csv
import io
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from refusals import refused
from row_faults import check_fault

from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.params import Preprocess
from lathe.data.prepare import prepare
from lathe.data.read_files import Fault, read_records

LENIENT = Preprocess(
    validation_fraction=0.1,
    test_fraction=0.1,
    max_dropped_fraction=1.0,
    normalize_unicode=False,
    too_long="drop",
    max_truncated_fraction=1.0,
    max_overlap_fraction=1.0,
    added_tokens=[],
    supervise="all",
    chat_template_kwargs={},
)

GOOD = {"prompt": "a question", "completion": "an answer"}


@dataclass
class Preset:
    format: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    prompt_template: str | None = None
    rejected: str | None = None
    tools: str | None = None
    thought: str | None = None
    labels: list[str] | None = None
    system_prompt: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    rows_key: str | None = None
    limits: dict[str, int] | None = None


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte and per chat marker, so that lengths can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.content == 'REFUSE' %}{{ raise_exception('no such word') }}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@dataclass
class Outcome:
    """What the stage would leave: the rows of each split as its file holds them, and the report."""

    splits: dict[str, list[dict]]
    report: dict

    def of(self, split: str) -> dict:
        """What the report counts in a split."""
        return next(entry for entry in self.report["splits"] if entry["split"] == split)

    def examples(self, split: str) -> dict:
        """The rows of a split that the report names."""
        return next(entry for entry in self.report["examples"] if entry["split"] == split)


@pytest.fixture
def run(raw, tokenizer, tmp_path):
    """Prepare the folder `raw` with a preset and lenient settings; keywords change one of them."""

    def prepare_raw(preset=None, *, max_length=1000, seed=42, cluster_by=None, **changes):
        out = tmp_path / "processed"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        settings = LENIENT.model_copy(update=changes)
        prepared = prepare(
            raw,
            preset or Preset(),
            out,
            tokenizer=tokenizer,
            seed=seed,
            max_length=max_length,
            settings=settings,
            cluster_by=cluster_by,
        )
        assert sorted(file.name for file in out.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
        splits = {name: read_jsonl(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
        return Outcome(splits, prepared.report)

    return prepare_raw


def pairs(count, start=0):
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(start, start + count)]


def as_bytes(rows, suffix) -> bytes:
    match suffix:
        case ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        case ".json":
            return json.dumps(rows, ensure_ascii=False, indent=1).encode()
        case ".csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            return text.getvalue().encode()
        case ".parquet":
            import pyarrow
            import pyarrow.parquet

            table = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
            return table.getvalue()
    raise ValueError(suffix)


def put(folder, name, rows) -> None:
    (folder / name).write_bytes(as_bytes(rows, Path(name).suffix))


def put_splits(folder, train) -> None:
    """Write train.jsonl as given and sound validation and test files beside it."""
    (folder / "train.jsonl").write_bytes(train)
    put(folder, "validation.jsonl", pairs(2, start=1000))
    put(folder, "test.jsonl", pairs(2, start=2000))


def prompts(prepared, split) -> set[str]:
    return {row["messages"][-2]["content"] for row in prepared.splits[split]}


def dropped(prepared, split="train") -> dict[str, int]:
    return prepared.of(split)["dropped"]


def assert_the_account_adds_up(prepared):
    report = prepared.report
    for split in report["splits"]:
        name = split["split"]
        came = split["read"] + split["taken_from_train"]
        assert came == split["kept"] + split["given_to_others"] + sum(split["dropped"].values()), name
        assert split["kept"] == len(prepared.splits[name])
    rows = report["rows"]
    assert rows["read"] == rows["kept"] + rows["dropped"] == sum(file["rows"] for file in report["files"])


TRICKY = [
    {"prompt": 'quotes " and, commas\nand lines', "completion": "ответ «да» 🍎"},
    {"prompt": "tabs\tand \\ slashes", "completion": " leading and trailing "},
    *pairs(30),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(raw, run, suffix):
    put(raw, f"data{suffix}", TRICKY)
    prepared = run()
    prepared_rows = {
        (row["messages"][0]["content"], row["messages"][1]["content"])
        for rows in prepared.splits.values()
        for row in rows
    }
    assert prepared_rows == {(row["prompt"], row["completion"]) for row in TRICKY}
    assert prepared.report["files"] == [{"file": f"data{suffix}", "split": "train", "format": suffix[1:], "rows": 32}]
    assert_the_account_adds_up(prepared)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(raw, run, suffix):
    text = as_bytes(pairs(30), suffix).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    (raw / f"data{suffix}").write_bytes(b"\xef\xbb\xbf" + text)
    prepared = run(max_dropped_fraction=0.0)
    assert [prepared.report["rows"][key] for key in ("read", "kept", "dropped")] == [30, 30, 0]


def test_one_row_becomes_one_line_of_messages(raw, run, tmp_path):
    put_splits(raw, as_bytes([{"prompt": "Вопрос", "completion": "a\u2028b"}], ".jsonl"))
    write_jsonl(run().splits["train"], tmp_path / "train.jsonl")
    expected = (
        '{"messages":[{"role":"user","content":"Вопрос"},{"role":"assistant","content":"a\u2028b"}]}\n'
    ).encode()
    assert (tmp_path / "train.jsonl").read_bytes() == expected
    assert read_jsonl(tmp_path / "train.jsonl") == [json.loads(expected)]


def test_a_harmed_or_missing_jsonl_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file; run the stage that writes it"):
        read_jsonl(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(InputError, match=r"train.jsonl:2: not a JSON line; run the stage that writes it again"):
        read_jsonl(tmp_path / "train.jsonl")


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_column_of_messages_is_kept_as_it_is(raw, run, suffix):
    put(raw, f"train{suffix}", [{"messages": CHAT}])
    put(raw, f"validation{suffix}", [{"messages": CHAT[1:3]}])
    put(raw, f"test{suffix}", [{"messages": CHAT[3:]}])
    prepared = run()
    assert prepared.splits["train"] == [{"messages": CHAT}]
    assert prepared.report["columns"] == [{"format": "messages", "messages": "messages", "detected": True}]


@pytest.mark.parametrize(
    ("preset", "row", "messages", "columns"),
    [
        (
            Preset(prompt="question", completion="answer"),
            {"question": "q", "answer": "a", "other": 1},
            [("user", "q"), ("assistant", "a")],
            {"format": "prompt_completion", "prompt": "question", "completion": "answer", "detected": False},
        ),
        (
            Preset(prompt_template="{instruction}\n\n{input} {{x}}", completion="output"),
            {"instruction": "Add", "input": "", "output": "3"},
            [("user", "Add\n\n {x}"), ("assistant", "3")],
            {
                "format": "prompt_completion",
                "prompt_template": "{instruction}\n\n{input} {{x}}",
                "completion": "output",
                "detected": False,
            },
        ),
        (
            Preset(messages="chat", system_prompt="Be kind."),
            {"chat": CHAT[1:3]},
            [("system", "Be kind."), ("user", "a"), ("assistant", "b")],
            {"format": "messages", "messages": "chat", "detected": False},
        ),
        (
            Preset(messages="chat", system_prompt="Be kind."),
            {"chat": CHAT[:3]},
            [("system", "Be brief."), ("user", "a"), ("assistant", "b")],
            {"format": "messages", "messages": "chat", "detected": False},
        ),
        (
            Preset(messages="chat"),
            {"chat": [{"role": "system", "content": ""}, *CHAT[1:3]]},
            [("user", "a"), ("assistant", "b")],
            {"format": "messages", "messages": "chat", "detected": False},
        ),
    ],
)
def test_a_preset_says_how_columns_become_messages(raw, run, preset, row, messages, columns):
    put(raw, "train.jsonl", [row])
    for split in ("validation", "test"):
        other = {name: [{"role": "user", "content": split}, ANSWER] if name == "chat" else split for name in row}
        put(raw, f"{split}.jsonl", [other])
    prepared = run(preset)
    (example,) = prepared.splits["train"]
    assert [(message["role"], message["content"]) for message in example["messages"]] == messages
    assert prepared.report["columns"] == [columns]


def line(**columns) -> bytes:
    return json.dumps(columns).encode()


def chat(*messages) -> bytes:
    return json.dumps({"messages": messages}).encode()


SYSTEM = {"role": "system", "content": "s"}

BAD_LINES = [
    # name, the line, reason, field
    (
        "line cut short",
        b'{"prompt": "q", "comp',
        "malformed_json",
        None,
    ),
    ("two values", b'{"a": 1} {"b": 2}', "malformed_json", None),
    (
        "single quotes",
        b"{'prompt': 'q'}",
        "malformed_json",
        None,
    ),
    (
        "raw NUL",
        b'{"prompt": "q\0", "completion": "a"}',
        "malformed_json",
        None,
    ),
    ("deep", b"[" * 100_000, "malformed_json", None),
    ("a list", b"[1, 2]", "not_an_object", None),
    ("a text", b'"text"', "not_an_object", None),
    ("null", b"null", "not_an_object", None),
    (
        "key twice",
        b'{"prompt": "q", "prompt": "r", "completion": "a"}',
        "duplicate_key",
        "prompt",
    ),
    ("no answer column", line(prompt="q"), "missing_column", "completion"),
    ("no columns", b"{}", "missing_column", "prompt"),
    ("null answer", line(prompt="q", completion=None), "not_text", "completion"),
    ("number", line(prompt=12, completion="a"), "not_text", "prompt"),
    ("NaN", b'{"prompt": NaN, "completion": "a"}', "not_text", "prompt"),
    ("true", line(prompt="q", completion=True), "not_text", "completion"),
    ("list", line(prompt=["q"], completion="a"), "not_text", "prompt"),
    ("object", line(prompt={}, completion="a"), "not_text", "prompt"),
    ("empty prompt", line(prompt="", completion="a"), "empty_prompt", "prompt"),
    ("blank answer", line(prompt="q", completion=" \n"), "empty_answer", "completion"),
    (
        "NUL",
        line(prompt="q", completion="a\0"),
        "invalid_unicode",
        "completion",
    ),
    (
        "lone surrogate",
        b'{"prompt": "q\\ud83d", "completion": "a"}',
        "invalid_unicode",
        "prompt",
    ),
    (
        "control token",
        line(prompt="q", completion="a<|im_end|>b"),
        "control_token",
        "completion",
    ),
    (
        "refused by the template",
        line(prompt="REFUSE", completion="a"),
        "template",
        None,
    ),
    (
        "too long",
        line(prompt="q", completion="a" * 1000),
        "too_long",
        None,
    ),
]

BAD_CHATS = [
    (
        "a text",
        b'{"messages": "q"}',
        "not_a_list",
        "messages",
    ),
    ("null", b'{"messages": null}', "not_a_list", "messages"),
    ("none", chat(), "no_answer", "messages"),
    (
        "null message",
        chat(None, ANSWER),
        "not_an_object",
        "messages[0]",
    ),
    (
        "key twice",
        b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}',
        "duplicate_key",
        "messages[0].role",
    ),
    ("no content", chat({"role": "user"}), "missing_key", "messages[0].content"),
    (
        "ShareGPT keys",
        chat({"from": "human", "value": "q"}),
        "missing_key",
        "messages[0].role",
    ),
    (
        "unknown role",
        chat({"role": "human", "content": "q"}, ANSWER),
        "unknown_role",
        "messages[0].role",
    ),
    (
        "null role",
        chat({"role": None, "content": "q"}, ANSWER),
        "unknown_role",
        "messages[0].role",
    ),
    (
        "content of parts",
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "q"}}]}, ANSWER),
        "not_text",
        "messages[0].content[0]",
    ),
    (
        "null content",
        chat({"role": "user", "content": None}, ANSWER),
        "not_text",
        "messages[0].content",
    ),
    (
        "tool call without arguments",
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}),
        "tool_call",
        "messages[1].tool_calls[0].arguments",
    ),
    (
        "empty question",
        chat({"role": "user", "content": " "}, ANSWER),
        "empty_prompt",
        "messages[0].content",
    ),
    (
        "empty answer",
        chat(USER, {"role": "assistant", "content": ""}),
        "empty_answer",
        "messages[1].content",
    ),
    (
        "empty system in the middle",
        chat(USER, {"role": "system", "content": ""}, ANSWER),
        "empty_prompt",
        "messages[1].content",
    ),
    (
        "question last",
        chat(USER, ANSWER, USER),
        "no_answer",
        "messages",
    ),
    ("system alone", chat(SYSTEM), "no_answer", "messages"),
    (
        "answer first",
        chat(ANSWER, USER, ANSWER),
        "roles_out_of_order",
        "messages[0].role",
    ),
    (
        "two questions",
        chat(USER, USER, ANSWER),
        "roles_out_of_order",
        "messages[1].role",
    ),
    (
        "two system messages",
        chat(SYSTEM, SYSTEM, USER, ANSWER),
        "roles_out_of_order",
        "messages[1].role",
    ),
    (
        "disorder behind an empty system message",
        chat({"role": "system", "content": ""}, USER, ANSWER, ANSWER),
        "roles_out_of_order",
        "messages[3].role",
    ),
    (
        "lone surrogate",
        b'{"messages": [{"role": "user", "content": "\\udc00"}, {"role": "assistant", "content": "a"}]}',
        "invalid_unicode",
        "messages[0].content",
    ),
]


@pytest.mark.parametrize(
    ("good", "bad", "reason", "field"),
    [pytest.param(json.dumps(GOOD).encode(), *case[1:], id=case[0]) for case in BAD_LINES]
    + [pytest.param(chat(USER, ANSWER), *case[1:], id=f"messages: {case[0]}") for case in BAD_CHATS],
)
def test_a_bad_row_is_dropped_counted_and_shown(raw, run, good, bad, reason, field):
    if b"messages" in good:
        (raw / "validation.jsonl").write_bytes(chat({"role": "user", "content": "v"}, ANSWER))
        (raw / "test.jsonl").write_bytes(chat({"role": "user", "content": "t"}, ANSWER))
        (raw / "train.jsonl").write_bytes(good + b"\n\n" + bad + b"\n")
    else:
        put_splits(raw, good + b"\n\n" + bad + b"\n")
    prepared = run()
    assert dropped(prepared) == {reason: 1}
    [(shown_reason, [example])] = prepared.examples("train")["dropped"].items()
    assert example["at"] == "train.jsonl:3"
    fault = Fault(shown_reason, example["field"], example["problem"])
    check_fault(fault, reason, field)
    assert_the_account_adds_up(prepared)

    rows = 4 if b"messages" in good else 6
    limit = "preprocess.max_dropped_fraction 0.0"
    with refused("too-many-dropped", f"train.jsonl:3: {reason}: {fault}; ", f"1 of {rows} rows", limit, kept=False):
        run(max_dropped_fraction=0.0)


def test_as_many_bad_rows_as_allowed_are_dropped_and_one_more_is_refused(raw, run):
    bad = [{"prompt": "q"}] * 5
    put(raw, "train.jsonl", pairs(95) + bad)
    assert dropped(run(max_dropped_fraction=0.05)) == {"missing_column": 5}
    put(raw, "train.jsonl", pairs(94) + bad + bad[:1])
    with refused("too-many-dropped", "train.jsonl:95: missing_column: ", "6 of 100 rows are unusable"):
        run(max_dropped_fraction=0.05)


def test_at_most_five_examples_are_shown_per_reason(raw, run):
    put(raw, "train.jsonl", pairs(30) + [{"prompt": "q"}] * 7)
    examples = run().examples("train")["dropped"]["missing_column"]
    assert [example["at"] for example in examples] == [f"train.jsonl:{number}" for number in range(31, 36)]


@pytest.mark.parametrize(
    ("name", "rows", "at"),
    [
        ("train.csv", b'prompt,completion\n"two\nlines",a\nq,\nr,b\n', "train.csv:4"),
        (
            "train.json",
            b'[{"prompt": "p", "completion": "a"},\n\n {"prompt": "q", "completion": ""}]',
            "train.json row 2",
        ),
        (
            "train.parquet",
            as_bytes([GOOD, {"prompt": "q", "completion": ""}], ".parquet"),
            "train.parquet row 2",
        ),
    ],
)
def test_a_bad_row_is_named_by_line_or_row_number(raw, run, name, rows, at):
    (raw / name).write_bytes(rows)
    put(raw, "validation.jsonl", pairs(1, 100))
    put(raw, "test.jsonl", pairs(1, 200))
    (example,) = run().examples("train")["dropped"]["empty_answer"]
    assert example["at"] == at


def test_a_csv_row_with_a_field_too_many_is_dropped(raw, run):
    (raw / "train.csv").write_bytes(b"prompt,completion\nq,a\nr,b,c\n")
    put(raw, "validation.jsonl", pairs(1, 100))
    put(raw, "test.jsonl", pairs(1, 200))
    (example,) = run().examples("train")["dropped"]["wrong_field_count"]
    assert example == {"at": "train.csv:3", "field": None, "problem": "has 3 fields; expected 2 as in the header"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_of_ten_megabytes_is_read(raw, suffix):
    rows = [{"prompt": "q", "completion": "x" * 10_000_000}, GOOD]
    put(raw, f"train{suffix}", rows)
    assert [row.value for row in read_records(raw / f"train{suffix}")] == rows


BAD_FILES = [
    # name, content, code, place
    ("data.jsonl", b"", "empty-file", "data.jsonl"),
    ("data.jsonl", b"\n \n", "empty-file", "data.jsonl"),
    ("data.json", b"", "empty-file", "data.json"),
    ("data.json", b"[]", "empty-file", "data.json"),
    ("data.csv", b"", "empty-file", "data.csv"),
    ("data.csv", b"prompt,completion\n", "empty-file", "data.csv"),
    (
        "data.jsonl",
        b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xff", "completion": "a"}\n',
        "not-utf-8",
        "data.jsonl:2",
    ),
    (
        "data.json",
        b'[{"prompt": "q",\n "completion": "\xe9"}]',
        "not-utf-8",
        "data.json:2",
    ),
    (
        "data.csv",
        "prompt,completion\nq,é\n".encode("latin-1"),
        "not-utf-8",
        "data.csv:2",
    ),
    (
        "data.jsonl",
        json.dumps(GOOD).encode("utf-16")[:-1],
        "not-in-encoding",
        "data.jsonl after line 0",
    ),
    (
        "data.json",
        b'[{"prompt": "q", "completion": "a"},\n{"prompt": "r"',
        "not-json",
        "data.json:2",
    ),
    (
        "data.json",
        b'{"prompt": "q",\n"completion": "a"}\n{"prompt": "r",\n"completion": "b"}',
        "not-json",
        "data.json:3",
    ),
    (
        "data.json",
        b'{"data": []}',
        "not-an-array",
        "data.json:1",
    ),
    ("data.json", b"[" * 100_000, "not-json", "data.json"),
    (
        "data.csv",
        b'prompt,completion\nq,a\n"r,b\ns,c\n',
        "not-csv",
        "data.csv:3",
    ),
    (
        "data.csv",
        b'prompt,completion\nq,"a"b\n',
        "not-csv",
        "data.csv:2",
    ),
    ("data.csv", b"prompt,,completion\nq,x,a\n", "unnamed-column", "data.csv:1"),
    ("data.csv", b"prompt,prompt\nq,a\n", "duplicate-column", "data.csv:1"),
    (
        "data.jsonl",
        b'{"title": "q", "body": "a"}\n',
        "unknown-format",
        "data.jsonl",
    ),
    (
        "data.md",
        b"text",
        "not-a-data-file",
        "data.md",
    ),
    (
        "test.jsonl",
        json.dumps(GOOD).encode(),
        "missing-split",
        "test.jsonl",
    ),
]


@pytest.mark.parametrize(("name", "content", "code", "place"), BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused(raw, run, name, content, code, place):
    (raw / name).write_bytes(content)
    with refused(code, place) as caught:
        run()
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize("cut", [4, 100, -10])
def test_a_truncated_parquet_file_is_refused(raw, run, cut):
    (raw / "data.parquet").write_bytes(as_bytes(pairs(50), ".parquet")[:cut])
    with refused("truncated-file", "data.parquet after row 0: ", "Parquet", "; is it truncated?", kept=False):
        run()


def test_an_empty_folder_is_refused(run):
    with refused("no-data-file", "raw: ", "*.jsonl, *.json"):
        run()


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (
            ["train.jsonl", "extra.jsonl"],
            "extra.jsonl",
        ),
        (
            ["train.jsonl", "training.jsonl"],
            "training.jsonl",
        ),
        (
            ["train.csv", "train.jsonl"],
            "train.jsonl",
        ),
        (
            ["dev.jsonl", "train.jsonl", "val.jsonl"],
            "val.jsonl",
        ),
    ],
)
def test_ambiguous_file_names_are_refused(raw, run, names, place):
    for name in names:
        put(raw, name, pairs(10))
    with refused("ambiguous-file-names", f"{place}: "):
        run()


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("training.json", "valid.json", "test.json"),
        ("train-00000-of-00001.parquet", "val-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("Train.csv", "DEV.csv", "test_v2.csv"),
        ("train.jsonl", "eval.csv", "test.parquet"),
    ],
)
def test_files_are_found_by_the_name_of_their_split(raw, run, names):
    for start, name in zip((0, 100, 200), names, strict=True):
        put(raw, name, pairs(5, start))
    (raw / ".gitignore").write_text("*")
    prepared = run()
    assert prompts(prepared, "train") == {f"question {n}" for n in range(5)}
    assert prompts(prepared, "validation") == {f"question {n}" for n in range(100, 105)}
    assert prompts(prepared, "test") == {f"question {n}" for n in range(200, 205)}


@pytest.mark.parametrize(
    ("preset", "code", "place", "value"),
    [
        (
            Preset(prompt="question", completion="completion"),
            "missing-column",
            "train.jsonl",
            "'question'",
        ),
        (
            Preset(prompt_template="{prompt} {context}", completion="completion"),
            "missing-column",
            "train.jsonl",
            "'context'",
        ),
        (
            Preset(prompt_template="{prompt", completion="completion"),
            "invalid-template",
            "presets.yaml",
            "'{prompt'",
        ),
        (
            Preset(prompt_template="prompt} ", completion="completion"),
            "invalid-template",
            "presets.yaml",
            "'prompt} '",
        ),
        (
            Preset(prompt_template="{}", completion="completion"),
            "invalid-template",
            "presets.yaml",
            "'{}'",
        ),
        (
            Preset(prompt_template="{prompt!r:>10}", completion="completion"),
            "invalid-template",
            "presets.yaml",
            "'{prompt!r:>10}'",
        ),
        (
            Preset(prompt_template="Say it", completion="completion"),
            "invalid-template",
            "presets.yaml",
            "'Say it'",
        ),
        (
            Preset(prompt="prompt"),
            "incomplete-columns",
            "presets.yaml",
            "prompt_template",
        ),
    ],
)
def test_a_preset_that_does_not_fit_the_columns_is_refused(raw, run, preset, code, place, value):
    put(raw, "train.jsonl", pairs(30))
    with refused(code, f"{place}: ", value):
        run(preset)


def test_missing_splits_are_taken_from_train(raw, run):
    put(raw, "data.jsonl", pairs(200))
    prepared = run()
    assert [prepared.of(name)["kept"] for name in ("train", "validation", "test")] == [160, 20, 20]
    assert prepared.of("train")["given_to_others"] == 40
    everything = prompts(prepared, "train") | prompts(prepared, "validation") | prompts(prepared, "test")
    assert len(everything) == 200
    assert_the_account_adds_up(prepared)


def test_a_given_split_is_not_added_to(raw, run):
    put(raw, "train.jsonl", pairs(100))
    put(raw, "test.jsonl", pairs(7, 500))
    prepared = run()
    assert prompts(prepared, "test") == {f"question {n}" for n in range(500, 507)}
    assert [len(prepared.splits[name]) for name in ("train", "validation")] == [90, 10]


def test_reordering_or_splitting_the_input_changes_no_row_of_the_output(raw, run):
    rows = pairs(300) + pairs(20) + [{"prompt": " question  3", "completion": "answer 3\n"}]
    preset = Preset(limits={"train": 150, "validation": 20})
    put(raw, "data.jsonl", rows)
    whole = run(preset)
    random.Random(1).shuffle(rows)
    (raw / "data.jsonl").unlink()
    put(raw, "a.jsonl", rows[:100])
    put(raw, "b.jsonl", rows[100:])
    shuffled = run(preset)
    assert shuffled.splits == whole.splits
    assert shuffled.report["splits"] == whole.report["splits"]


def test_another_seed_gives_another_membership(raw, run):
    put(raw, "data.jsonl", pairs(300))
    assert prompts(run(seed=1), "test") != prompts(run(seed=2), "test")
    assert prompts(run(seed=1), "test") == prompts(run(seed=1), "test")


def test_the_system_prompt_does_not_move_rows_between_splits(raw, run):
    put(raw, "data.jsonl", pairs(100))
    assert prompts(run(Preset(system_prompt="Be brief.")), "test") == prompts(run(), "test")


def test_a_row_added_moves_at_most_one_prompt_per_boundary(raw, run):
    put(raw, "data.jsonl", pairs(200))
    before = run()
    put(raw, "data.jsonl", pairs(201))
    after = run()
    assert len(prompts(before, "test") - prompts(after, "test")) <= 1
    assert len(prompts(before, "validation") - prompts(after, "validation")) <= 2


def test_duplicates_are_removed_though_white_space_or_unicode_form_differ(raw, run):
    same = [
        {"prompt": "café  au\nlait", "completion": "yes"},
        {"prompt": "cafe\u0301 au lait ", "completion": " yes"},
        {"prompt": "café au lait", "completion": "no"},
    ]
    put_splits(raw, as_bytes(same, ".jsonl"))
    prepared = run(max_dropped_fraction=0.0)
    assert dropped(prepared) == {"duplicate": 1}
    (example,) = prepared.examples("train")["dropped"]["duplicate"]
    assert {example["at"], example["problem"].removeprefix("the same as ")} == {"train.jsonl:1", "train.jsonl:2"}
    assert {row["messages"][1]["content"].strip() for row in prepared.splits["train"]} == {"yes", "no"}


def test_a_prompt_of_two_splits_stays_in_test_before_validation_before_train(raw, run):
    put(raw, "train.jsonl", pairs(10))
    put(raw, "validation.jsonl", pairs(4, 8))
    put(raw, "test.jsonl", [*pairs(3, 11), {"prompt": "question 0", "completion": "another answer"}])
    prepared = run(max_dropped_fraction=0.0)
    assert prompts(prepared, "test") == {"question 0", "question 11", "question 12", "question 13"}
    assert prompts(prepared, "validation") == {f"question {n}" for n in (8, 9, 10)}
    assert prompts(prepared, "train") == {f"question {n}" for n in range(1, 8)}
    assert prepared.report["overlap"] == [
        {"splits": "train_in_test", "rows": 1},
        {"splits": "train_in_validation", "rows": 2},
        {"splits": "validation_in_test", "rows": 1},
    ]
    assert prepared.examples("validation")["dropped"]["in_other_split"] == [
        {"at": "validation.jsonl:4", "field": None, "problem": "its prompt is that of test.jsonl:1 in test"}
    ]
    assert_the_account_adds_up(prepared)


def test_answers_to_one_prompt_stay_in_one_split(raw, run):
    rows = [{"prompt": f"question {n % 50}", "completion": f"answer {n}"} for n in range(200)]
    put(raw, "data.jsonl", rows)
    prepared = run()
    assert [len(prompts(prepared, name)) for name in ("train", "validation", "test")] == [40, 5, 5]
    assert [len(prepared.splits[name]) for name in ("train", "validation", "test")] == [160, 20, 20]


def test_limits_keep_so_many_rows_and_count_the_others(raw, run):
    put(raw, "data.jsonl", pairs(200))
    prepared = run(Preset(limits={"train": 30, "test": 500}), max_dropped_fraction=0.0)
    assert [len(prepared.splits[name]) for name in ("train", "validation", "test")] == [30, 20, 20]
    assert dropped(prepared) == {"over_limit": 130}
    assert prompts(prepared, "train") < prompts(run(), "train")
    assert_the_account_adds_up(prepared)


def test_too_few_rows_to_split_are_refused(raw, run):
    put(raw, "data.jsonl", pairs(2))
    with refused("too-few-prompts", "2 different prompts", "test and validation"):
        run()
    put(raw, "data.jsonl", pairs(3))
    assert [len(rows) for rows in run().splits.values()] == [1, 1, 1]


def test_a_split_of_which_nothing_is_left_is_refused(raw, run):
    put(raw, "train.jsonl", pairs(5))
    put(raw, "validation.jsonl", pairs(2, 100))
    put(raw, "test.jsonl", pairs(5))
    with refused("empty-split", "no usable train row", "5 in_other_split"):
        run()


def test_the_report_counts_tokens_per_split(raw, run):
    # <|im_start|> user \n . <|im_end|> \n <|im_start|> assistant \n = 1+4+1 + prompt + 1+1 + 1+9+1 tokens
    train = [{"prompt": "q" * n, "completion": "a" * 9} for n in range(1, 11)]
    put_splits(raw, as_bytes(train, ".jsonl"))
    report = run().of("train")
    assert report["tokens"] == {
        "prompt": {"min": 20, "p50": 24, "p90": 28, "p99": 29, "max": 29},
        "answer": {"min": 10, "p50": 10, "p90": 10, "p99": 10, "max": 10},
        "total": {"min": 30, "p50": 34, "p90": 38, "p99": 39, "max": 39},
    }
    assert report["supervised_tokens"] == 100
    assert report["supervised_share"] == round(100 / 345, 4)


def test_a_row_that_just_fits_is_kept(raw, run):
    put_splits(raw, as_bytes([{"prompt": "q", "completion": "a" * 49}, {"prompt": "r", "completion": "a"}], ".jsonl"))
    assert dropped(run(max_length=70)) == {}
    assert dropped(run(max_length=69)) == {"too_long": 1}


def test_the_report_is_json_names_no_folder_and_is_the_same_twice(raw, run):
    put(raw, "data.jsonl", [*pairs(100), {"prompt": "q"}])
    text = json.dumps(run().report, sort_keys=True)
    assert text == json.dumps(run().report, sort_keys=True)
    assert str(raw.parent) not in text


def test_supervising_the_last_turn_alone_lowers_the_share(raw, run):
    long_chat = {"messages": CHAT}
    rows = [long_chat, *({"messages": [{"role": "user", "content": str(n)}, ANSWER]} for n in range(20))]
    put(raw, "train.jsonl", rows[:1])
    put(raw, "validation.jsonl", rows[1:10])
    put(raw, "test.jsonl", rows[10:])
    every, last = (run(supervise=turns).of("train")["supervised_tokens"] for turns in ("all", "last"))
    assert (every, last) == (4, 2)


def test_a_preference_pair_keeps_its_rejected_answer_in_the_processed_row(raw, run):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    put(raw, "data.jsonl", rows)
    prepared = run(max_dropped_fraction=0.0)
    prepared_rows = {
        (row["messages"][0]["content"], row["messages"][1]["content"], row["rejected"][0]["content"])
        for split in prepared.splits.values()
        for row in split
    }
    assert prepared_rows == {tuple(row.values()) for row in rows}
    assert prepared.report["columns"][0]["format"] == "preference"


def pair_of(prompt: str, chosen: str, rejected: str) -> dict:
    """A row as it is processed."""
    asked, answered = {"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}
    return {"messages": [asked, answered], "rejected": [{**answered, "content": rejected}]}


def put_pairs(folder: Path, train: list[dict]) -> None:
    """Write train.jsonl as given and sound conversations without pairs beside it."""
    put(folder, "train.jsonl", train)
    for name in ("validation", "test"):
        put(folder, f"{name}.jsonl", [{"messages": pair_of(name, "a", "b")["messages"]}])


def test_rows_keep_their_order_and_splits_whatever_answer_is_to_be_rejected(raw, run):
    """Whoever learns from the answers alone learns the same with pairs as without."""
    rows = [pair_of(f"q{n}", f"good {n}", f"bad {n}") for n in range(40)]
    kept = []
    for rejected in (None, "bad", "worse"):
        put(raw, "data.jsonl", [{**row, "rejected": rejected and f"{rejected} {n}"} for n, row in enumerate(rows)])
        splits = run().splits
        kept.append({name: [row["messages"] for row in split] for name, split in splits.items()})
    assert kept[0] == kept[1] == kept[2]


def test_pairs_that_differ_in_the_rejected_answer_alone_are_no_duplicates(raw, run):
    put_pairs(raw, [pair_of("q", "good", worse) for worse in ("bad", "worse", "bad")])
    prepared = run()
    assert dropped(prepared) == {"duplicate": 1}
    assert len(prepared.splits["train"]) == 2


def test_a_rejected_answer_that_is_too_long_drops_its_row(raw, run):
    put_pairs(raw, [pair_of("q", "a", "b" * 50), pair_of("r", "a", "b")])
    prepared = run(max_length=71)
    assert dropped(prepared) == {}
    assert prepared.of("train")["tokens"]["rejected"]["max"] == 71
    prepared = run(max_length=70)
    assert dropped(prepared) == {"too_long": 1}
    (example,) = prepared.examples("train")["dropped"]["too_long"]
    assert example["at"] == "train.jsonl:1"
    check_fault(Fault("too_long", example["field"], example["problem"]), "too_long", "rejected")
    assert "71 tokens long" in example["problem"]
    assert "training.max_length 70" in example["problem"]
    assert "rejected" not in prepared.of("test")["tokens"]


@pytest.mark.parametrize(("chosen", "rejected"), [("a" * 4, "b" * 50), ("a" * 50, "b" * 4), ("a" * 50, "b" * 49)])
@pytest.mark.parametrize("side", ["prompt", "answer"])
def test_a_pair_that_is_too_long_is_cut_so_that_both_answers_fit(raw, run, side, chosen, rejected):
    put_pairs(raw, [pair_of("q" * 30, chosen, rejected)])
    prepared = run(max_length=80, too_long=f"truncate_{side}", max_truncated_fraction=1.0)
    (row,) = prepared.splits["train"]
    (asked, better), (worse,) = row["messages"], row["rejected"]
    assert prepared.of("train")["truncated"]["rows"] == 1
    lengths = prepared.of("train")["tokens"]
    assert max(lengths["total"]["max"], lengths["rejected"]["max"]) == 80
    cut = [len(asked["content"]) < 30, len(better["content"]) < len(chosen), len(worse["content"]) < len(rejected)]
    assert cut == ([True, False, False] if side == "prompt" else [False, len(chosen) > 30, len(rejected) > 30])


@pytest.mark.parametrize("side", ["prompt", "answer"])
def test_a_pair_of_which_no_pair_would_be_left_is_dropped(raw, run, side):
    put_pairs(raw, [pair_of("q", "a" * 50 + "b", "a" * 50 + "c"), pair_of("r", "a", "b")])
    prepared = run(max_length=60, too_long=f"truncate_{side}", max_truncated_fraction=1.0)
    assert dropped(prepared) == {"too_long": 1}


def test_rows_that_differ_in_their_tool_calls_alone_are_no_duplicates(raw, run, tokenizer):
    def calling(question, city):
        call = {"name": "weather", "arguments": {"city": city}}
        user = {"role": "user", "content": question}
        return {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    plain = tokenizer.chat_template
    tokenizer.chat_template = plain.replace(
        "message.content + '", "message.content + (message.tool_calls or '')|string + '"
    )
    try:
        for name, cities in (("train", ["Oslo", "Rome", "Rome"]), ("validation", ["Bonn"]), ("test", ["Bern"])):
            put(raw, f"{name}.jsonl", [calling(name, city) for city in cities])
        prepared = run()
    finally:
        tokenizer.chat_template = plain
    assert dropped(prepared) == {"duplicate": 1}
    assert len(prepared.splits["train"]) == 2
    assert all(row["messages"][1]["tool_calls"] for row in prepared.splits["train"])


def test_rows_keep_what_they_are_clustered_by_and_no_row_moves_to_another_split(raw, run):
    rows = [{**row, "source": [None, "book", 7, ["a"]][n % 4]} for n, row in enumerate(pairs(40))]
    write_jsonl(rows, raw / "train.jsonl")
    plain, clustered = run(), run(cluster_by="source")
    for split, examples in clustered.splits.items():
        assert [{"messages": row["messages"]} for row in examples] == plain.splits[split]
        for row in examples:
            number = int(row["messages"][0]["content"].split()[1])
            assert row.get("cluster") == [None, "book", "7", '["a"]'][number % 4]


def test_a_column_to_cluster_by_that_no_file_has_is_refused_with_the_near_one(raw, run):
    write_jsonl([{**row, "source": "book"} for row in pairs(20)], raw / "train.jsonl")
    with refused("no-such-column", "evaluate.cluster_by", "'sourc'", "did you mean 'source'?"):
        run(cluster_by="sourc")
