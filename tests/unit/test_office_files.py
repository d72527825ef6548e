"""Files as people have them: every form, container and encoding keeps every answer and drops no row uncounted."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat
from refusals import refused

from lathe.common.jsonl import read_jsonl
from lathe.config.presets import LocalDataset
from lathe.data.check_file import check_file
from lathe.data.prepare import prepare
from lathe.data.text_encodings import guess_encoding

Rows = list[dict[str, Any]]

# Texts of four languages; among them what breaks files: delimiters, quotes, line ends, decimal commas.
RUSSIAN = [
    (f"Сколько стоит билет номер {number}; со скидкой?", f'Билет стоит {number},50 рублей, "на месте"')
    for number in range(12)
]
GERMAN = [
    (f"Wie groß ist Größe {number}?", f"Sie misst {number},5 cm; über Käse\nsteht nichts") for number in range(12)
]
POLISH = [
    (f"Ile kosztuje książka numer {number}?", f"Książka kosztuje {number},99 zł, a źródło jest tanie")
    for number in range(12)
]
JAPANESE = [(f"切符{number}はいくらですか。", f"切符は{number}円です。ありがとうございます。") for number in range(12)]
ENGLISH = [(f"What is {number} plus one, please?", f"It is {number + 1}") for number in range(12)]

Pairs = list[tuple[str, str]]


def as_columns(prompt: str, answer: str, **more: Any) -> Callable[[Pairs], Rows]:
    return lambda pairs: [{**more, prompt: question, answer: text} for question, text in pairs]


def as_messages(pairs: Pairs) -> Rows:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}
        for question, text in pairs
    ]


def as_sharegpt(pairs: Pairs) -> Rows:
    return [
        {"id": f"s{number}", "conversations": [{"from": "human", "value": one}, {"from": "gpt", "value": other}]}
        for number, (one, other) in enumerate(pairs)
    ]


def as_alpaca(pairs: Pairs) -> Rows:
    return [
        {"instruction": one, "input": "", "output": other, "system": "", "history": [["Hello.", "Hi."]] * (number % 2)}
        for number, (one, other) in enumerate(pairs)
    ]


def as_chatgpt(pairs: Pairs) -> Rows:
    """Conversations as ChatGPT exports them: a hidden system message, and an older answer that was replaced."""
    rows = []
    for number, (one, other) in enumerate(pairs):

        def node(name, parent, role, text, **more):
            content = {"content_type": "text", "parts": [text]}
            message = {
                "id": name,
                "author": {"role": role},
                "content": content,
                "recipient": "all",
                "metadata": {},
                **more,
            }
            return {"id": name, "message": message if role else None, "parent": parent, "children": []}

        hidden = {"metadata": {"is_visually_hidden_from_conversation": True}}
        nodes = [
            node("root", None, "", ""),
            node("sys", "root", "system", "", **hidden),
            node("ask", "sys", "user", one),
            node("old", "ask", "assistant", "an older answer"),
            node("new", "ask", "assistant", other),
        ]
        mapping = {each["id"]: each for each in nodes}
        rows.append({"title": f"t{number}", "create_time": 1.5, "mapping": mapping, "current_node": "new"})
    return rows


def as_label_studio(pairs: Pairs) -> Rows:
    return [
        {
            "id": number,
            "data": {"text": one},
            "annotations": [{"result": [{"from_name": "a", "type": "textarea", "value": {"text": [other]}}]}],
        }
        for number, (one, other) in enumerate(pairs)
    ]


def as_argilla(pairs: Pairs) -> Rows:
    return [
        {
            "id": str(number),
            "fields": {"question": one},
            "responses": {"answer": [{"value": other, "status": "submitted"}]},
        }
        for number, (one, other) in enumerate(pairs)
    ]


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def array(rows: Rows) -> str:
    return json.dumps(rows, ensure_ascii=False)


def indented(rows: Rows) -> str:
    return json.dumps(rows, ensure_ascii=False, indent=2)


def under_key(*keys: str) -> Callable[[Rows], str]:
    def write(rows: Rows) -> str:
        value: Any = rows
        for key in reversed(keys):
            value = {"version": 1, key: value}
        return json.dumps(value, ensure_ascii=False)

    return write


def separated(delimiter: str, *, first: str = "") -> Callable[[Rows], str]:
    def write(rows: Rows) -> str:
        text = io.StringIO()
        cells = [
            {key: value if isinstance(value, str | int) else json.dumps(value) for key, value in row.items()}
            for row in rows
        ]
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(cells)
        return first + text.getvalue()

    return write


PROMPTS, QUESTIONS = as_columns("prompt", "completion"), as_columns("question", "answer", id=7)
OTHERS = as_columns("Вопрос", "Ответ")
OTHER_KEYS = {"prompt": "Вопрос", "completion": "Ответ"}
TASKS = {"prompt": "data.text", "completion": "annotations.0.result.0.value.text.0"}
RECORDS = {"prompt": "fields.question", "completion": "responses.answer.0.value"}

# texts, form, file, how it is written, encoding, keys of the preset
FILES: list[tuple[Pairs, Callable[[Pairs], Rows], str, Callable[[Rows], str], str, dict[str, str]]] = [
    (ENGLISH, PROMPTS, "a.jsonl", jsonl, "utf-8", {}),
    (RUSSIAN, PROMPTS, "a.jsonl", jsonl, "utf-8-sig", {}),
    (RUSSIAN, PROMPTS, "a.jsonl.gz", jsonl, "cp1251", {}),
    (GERMAN, QUESTIONS, "a.jsonl", array, "utf-8", {}),
    (GERMAN, QUESTIONS, "a.jsonl", indented, "utf-8", {}),
    (RUSSIAN, as_messages, "a.jsonl", jsonl, "utf-16", {}),
    (RUSSIAN, as_messages, "a.json", array, "utf-16-le", {}),
    (ENGLISH, as_messages, "a.json", jsonl, "utf-8", {}),
    (ENGLISH, as_messages, "a.json.gz", jsonl, "utf-8", {}),
    (GERMAN, as_sharegpt, "a.json", array, "utf-8", {}),
    (GERMAN, as_sharegpt, "a.json", indented, "utf-16", {}),
    (GERMAN, as_sharegpt, "a.json.gz", array, "utf-8", {}),
    (ENGLISH, as_sharegpt, "a.json", under_key("data"), "utf-8", {}),
    (ENGLISH, as_sharegpt, "a.json", under_key("result", "items"), "utf-8", {"rows_key": "result.items"}),
    (RUSSIAN, PROMPTS, "a.json", under_key("rows"), "cp1251", {}),
    (ENGLISH, as_alpaca, "a.json", array, "utf-8", {}),
    (ENGLISH, as_alpaca, "a.json", array, "utf-8", {"format": "alpaca"}),
    (JAPANESE, as_alpaca, "a.jsonl", jsonl, "shift_jis", {}),
    (RUSSIAN, as_chatgpt, "conversations.json", array, "utf-8", {}),
    (ENGLISH, as_chatgpt, "conversations.json.gz", indented, "utf-8", {}),
    (GERMAN, as_label_studio, "tasks.json", array, "utf-8", TASKS),
    (GERMAN, as_argilla, "records.json", array, "utf-8", RECORDS),
    (GERMAN, as_argilla, "records.jsonl", jsonl, "utf-8", RECORDS),
    (ENGLISH, PROMPTS, "a.csv", separated(","), "utf-8", {}),
    (RUSSIAN, PROMPTS, "a.csv", separated(";"), "utf-8-sig", {}),
    (RUSSIAN, PROMPTS, "a.csv", separated(";"), "cp1251", {}),
    (RUSSIAN, OTHERS, "a.csv", separated(";"), "cp1251", OTHER_KEYS),
    (RUSSIAN, OTHERS, "a.csv", separated("\t"), "utf-16", OTHER_KEYS),
    (RUSSIAN, OTHERS, "a.csv", separated(";", first="sep=;\r\n"), "utf-16", OTHER_KEYS),
    (RUSSIAN, PROMPTS, "a.csv", separated("|"), "koi8-r", {}),
    (RUSSIAN, PROMPTS, "a.csv", separated(","), "cp866", {}),
    (RUSSIAN, PROMPTS, "a.csv.gz", separated(";"), "cp1251", {}),
    (GERMAN, QUESTIONS, "a.csv", separated(";"), "cp1252", {}),
    (GERMAN, QUESTIONS, "a.tsv", separated("\t"), "utf-8", {}),
    (GERMAN, QUESTIONS, "a.tsv.gz", separated("\t"), "utf-16", {}),
    (POLISH, QUESTIONS, "a.csv", separated(";"), "cp1250", {}),
    (POLISH, QUESTIONS, "a.csv", separated(";"), "iso8859-2", {"encoding": "iso8859-2"}),
    (JAPANESE, QUESTIONS, "a.csv", separated(","), "cp932", {}),
    (JAPANESE, QUESTIONS, "a.tsv", separated("\t"), "euc_jp", {}),
    (GERMAN, as_messages, "a.csv", separated(";"), "utf-8", {}),
    (ENGLISH, as_sharegpt, "a.tsv", separated("\t"), "utf-8", {}),
    (GERMAN, QUESTIONS, "a.csv", separated(";"), "latin-1", {"encoding": "latin-1", "delimiter": ";"}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_chat()


def read_all(folder: Path, tokenizer: Any, keys: dict[str, Any]) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Return all conversations that are left of a folder, and the report."""
    out = folder.parent / "out"
    out.mkdir()
    preset = LocalDataset(source="local", path="data/local/x", **keys)
    prepared = prepare(folder, preset, out, tokenizer=tokenizer, seed=1, max_length=4000, settings=LENIENT)
    rows = [row["messages"] for name in ("train", "validation", "test") for row in read_jsonl(out / f"{name}.jsonl")]
    return rows, prepared.report


def answers_of(pairs: Pairs) -> set[tuple[str, str]]:
    return set(pairs)


@pytest.mark.parametrize(("pairs", "form", "name", "write", "encoding", "keys"), FILES)
def test_every_answer_of_an_office_file_is_kept_whole(tmp_path, tokenizer, pairs, form, name, write, encoding, keys):
    raw = tmp_path / "raw"
    raw.mkdir()
    content = write(form(pairs)).encode(encoding)
    (raw / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows, report = read_all(raw, tokenizer, keys)
    assert {(row[-2]["content"], row[-1]["content"]) for row in rows} == set(pairs)
    assert (report["rows"]["read"], report["rows"]["kept"], report["rows"]["dropped"]) == (len(pairs), len(pairs), 0)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("form", [PROMPTS, as_messages, as_sharegpt, as_label_studio, as_argilla])
def test_every_answer_of_a_table_is_kept_whole(tmp_path, tokenizer, form, name):
    import pyarrow
    import pyarrow.parquet

    raw = tmp_path / "raw"
    raw.mkdir()
    table = pyarrow.Table.from_pylist(form(RUSSIAN))
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, raw / name)
    else:
        with pyarrow.ipc.new_file(raw / name, table.schema) as writer:
            writer.write_table(table)
    keys = {as_label_studio: TASKS, as_argilla: RECORDS}.get(form, {})
    rows, _ = read_all(raw, tokenizer, keys)
    assert {(row[-2]["content"], row[-1]["content"]) for row in rows} == set(RUSSIAN)


def test_the_turns_before_in_alpaca_s_history_come_first(tmp_path, tokenizer):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.json").write_text(array(as_alpaca(ENGLISH)))
    rows, report = read_all(raw, tokenizer, {})
    assert sorted(len(row) for row in rows) == [2] * 6 + [4] * 6
    assert all([message["content"] for message in row[:2]] == ["Hello.", "Hi."] for row in rows if len(row) == 4)
    assert "unused" not in report


def test_a_conversation_of_chatgpt_with_a_tool_or_a_picture_is_dropped_and_counted(tmp_path, tokenizer):
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = as_chatgpt(ENGLISH)
    rows[0]["mapping"]["ask"]["message"]["content"] = {
        "content_type": "multimodal_text",
        "parts": [{"asset": "x"}, "y"],
    }
    rows[1]["mapping"]["old"]["message"]["author"] = {"role": "tool", "name": "browser"}
    rows[1]["current_node"] = "old"
    rows[2]["current_node"] = "missing"
    (raw / "conversations.json").write_text(array(rows))
    kept, report = read_all(raw, tokenizer, {})
    assert len(kept) == 9
    [train] = [part for part in report["splits"] if part["split"] == "train"]
    assert train["dropped"] == {"no_branch": 1, "not_text": 1, "tools": 1}
    assert report["columns"][0]["export"] == "chatgpt"


def put(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


# name, content, code, parts of the message
REFUSED: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("a.xlsx", "PK", "convert-first", ("a.xlsx", "soffice --headless --convert-to csv a.xlsx")),
    ("a.xls", "x", "convert-first", ("a.xls", "soffice")),
    ("a.ods", "x", "convert-first", ("a.ods", "soffice")),
    ("a.zip", "PK", "convert-first", ("a.zip", "unzip a.zip")),
    ("a.tar.gz", "x", "convert-first", ("a.tar.gz", "tar xf")),
    ("a.jsonl.zst", "x", "convert-first", ("a.jsonl.zst", "zstd -d")),
    ("a.ndjson", "{}", "convert-first", ("a.ndjson", "mv a.ndjson a.jsonl")),
    ("tasks.json", array(as_label_studio(ENGLISH)), "name-columns", tuple(f"{k}: {v}" for k, v in TASKS.items())),
    ("rec.json", array(as_argilla(ENGLISH)), "name-columns", tuple(f"{k}: {v}" for k, v in RECORDS.items())),
    (
        "a.json",
        '{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}',
        "columns-not-rows",
        ("a.json:1",),
    ),
    ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', "several-lists", ("'train', 'test'", "rows_key: train")),
    ("a.json", json.dumps(as_messages(ENGLISH)[0]), "not-an-array", ("a.json:1", "'messages'")),
    ("a.json", '{\n"a": 1\n}\n{\n"a": 2\n}\n', "not-json", ("a.json:4", "jq -c . a.json")),
]


@pytest.mark.parametrize(("name", "content", "code", "parts"), REFUSED)
def test_what_cannot_be_read_is_refused_with_what_makes_it_readable(tmp_path, name, content, code, parts):
    file = put(tmp_path, name, content)
    with refused(code, *parts):
        check_file(file, LocalDataset(source="local", path="data/local/x"), seed=1, settings=LENIENT)


def test_a_spreadsheet_beside_files_that_are_read_is_not_left_out_in_silence(tmp_path):
    put(tmp_path, "train.jsonl", jsonl(PROMPTS(ENGLISH)))
    put(tmp_path, "test.xlsx", "PK")
    with refused("convert-first", "test.xlsx"):
        check_file(tmp_path, LocalDataset(source="local", path="data/local/x"), seed=1, settings=LENIENT)


def test_a_named_key_without_a_list_is_refused(tmp_path):
    file = put(tmp_path, "a.json", '{"data": {"x": 1}}')
    with refused("no-such-key", "'data.y'", "'data'"):
        preset = LocalDataset(source="local", path="data/local/x", rows_key="data.y")
        check_file(file, preset, seed=1, settings=LENIENT)


def test_a_path_that_a_record_lacks_is_a_fault_of_its_row(tmp_path, tokenizer):
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = as_label_studio(ENGLISH)
    rows[3]["annotations"] = []
    put(raw, "tasks.json", array(rows))
    _, report = read_all(raw, tokenizer, TASKS)
    [train] = [part for part in report["splits"] if part["split"] == "train"]
    assert train["dropped"] == {"missing_column": 1}


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1253", "Πόσο κοστίζει το εισιτήριο για την Αθήνα;"),
        ("cp1254", "Lütfen mutfaktaki ışığı açın. Güneşli bir gün değil, şimdi yağmur yağıyor."),
        ("cp1255", "בבקשה תדליק את האור במטבח. כמה עולה כרטיס לירושלים?"),
        ("gb18030", "请打开厨房的灯。去北京的票多少钱?我想知道明天的天气怎么样。"),
        ("big5", "請打開廚房的燈。去台北的票多少錢?我想知道明天的天氣怎麼樣。"),
        ("cp949", "부엌 불을 켜 주세요. 서울까지 표가 얼마입니까?"),
        ("utf-16-be", "Привет, мир"),
        ("utf-32", "Привет, мир"),
    ],
)
@pytest.mark.parametrize("times", [1, 20])
def test_encodings_of_other_scripts_are_told_by_their_letters(encoding, text, times):
    content = f"prompt;answer\n{f'{text};{text}' + chr(10)}" * times
    assert guess_encoding(content.encode(encoding)) == encoding
