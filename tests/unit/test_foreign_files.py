"""Files as strangers bring them: what is read of each, or for what it is refused: other names, other kinds."""

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT
from refusals import refused

from lathe.config.presets import LocalDataset
from lathe.data.check_file import check_file
from lathe.data.split_files import require_data_files
from lathe.sources import fetch

TOWNS = ["Oslo", "Rome", "Lima", "Cairo", "Paris", "Tokyo", "Quito", "Delhi", "Perth", "Accra", "Sofia", "Minsk"]
ROWS = [{"prompt": f"Where is {town}?", "completion": f"{town} is far."} for town in TOWNS]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv(*header: str, first: str = "") -> bytes:
    lines = [",".join(header), *(f"{first and f'{number},'}{a},{b}" for number, (a, b) in enumerate(pairs()))]
    return ("\n".join(lines) + "\n").encode()


def pairs() -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in ROWS]


def parquet(**columns: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    table = {"prompt": [row["prompt"] for row in ROWS], "completion": [row["completion"] for row in ROWS], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), sink)
    return bytes(sink.getvalue())


def arrow(kind: str, value: Any) -> Any:
    import pyarrow

    return pyarrow.array([value] * len(ROWS), getattr(pyarrow, kind)())


def check(file: Path, **preset: Any) -> Any:
    return check_file(file, LocalDataset(source="local", path="data/local/x", **preset), seed=1, settings=LENIENT)


def put(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# name, content
READ: list[tuple[str, Callable[[], bytes]]] = [
    ("a.jsonl", lambda: b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n")),
    ("A B ñ имя.JSONL", lambda: jsonl(ROWS)),
    ("a.jsonl", lambda: jsonl(ROWS).replace(b"\n", b"\n\n \n")),
    ("a.jsonl.gz", lambda: gzip.compress(jsonl(ROWS[:5])) + gzip.compress(jsonl(ROWS[5:]))),
    ("a.json", lambda: jsonl(ROWS)),
    ("a.json", lambda: json.dumps({"data": ROWS, "version": 1}).encode()),
    ("a.csv", lambda: csv("prompt", "completion")),
    ("a.csv", lambda: csv("", "prompt", "completion", first="n")),  # as pandas writes row numbers
    ("a.parquet", lambda: parquet(at=arrow("date32", 3), price=arrow("float64", 1.5), meta=arrow("binary", b"\xff"))),
    ("a.jsonl", lambda: jsonl([{**row, "score": float("nan"), "n": 10**400} for row in ROWS])),
]


@pytest.mark.parametrize(("name", "content"), READ)
def test_a_file_of_rows_is_read_whole(tmp_path, name, content):
    file = put(tmp_path, name, content())
    assert check(file)["rows"] == {"read": len(ROWS), "usable": len(ROWS), "unusable": 0}


# name, content, code, parts of the message
REFUSED: list[tuple[str, Callable[[], bytes], str, tuple[str, ...]]] = [
    ("a.jsonl", lambda: gzip.compress(jsonl(ROWS)), "misnamed-file", ("a.jsonl: is a gzip file", "name it a.jsonl.gz")),
    ("a.jsonl", parquet, "misnamed-file", ("is a Parquet file", "name it a.parquet")),
    ("a.csv", lambda: b"PK\x03\x04" + bytes(100), "misnamed-file", ("ZIP archive or a spreadsheet", "as CSV in UTF-8")),
    ("a.csv", lambda: b"\xd0\xcf\x11\xe0" + bytes(100), "misnamed-file", ("older Excel",)),
    ("a.jsonl", lambda: b"\x28\xb5\x2f\xfd" + bytes(100), "misnamed-file", ("is a zstd file", "zstd -d")),
    ("a.json", lambda: bz2.compress(jsonl(ROWS)), "misnamed-file", ("is a bzip2 file", "bzip2 -d")),
    ("a.txt", lambda: b"SQLite format 3\0" + bytes(100), "misnamed-file", ("SQLite", "sqlite3 -json")),
    ("a.jsonl.gz", lambda: jsonl(ROWS), "misnamed-file", ("is no gzip file", "name it a.jsonl if")),
    (
        "a.json",
        lambda: json.dumps({f"id-{number}": row for number, row in enumerate(ROWS)}).encode(),
        "rows-under-keys",
        ("'id-0', 'id-1'", "jq -c '.[]'"),
    ),
    (
        "a.csv",
        lambda: csv("Question", "Answer "),
        "unknown-format",
        ('perhaps prompt: Question and completion: "Answer "',),
    ),
    (
        "a.jsonl",
        lambda: jsonl([{"prompt": "q", "response": "a", "rating": 1}]),
        "unknown-format",
        ("perhaps prompt: prompt and completion: response",),
    ),
    (
        "a.jsonl",
        lambda: jsonl([{"custom_id": "x", "body": {"model": "m", "messages": []}}]),
        "unknown-format",
        ("perhaps messages: body.messages",),
    ),
    ("a.jsonl", lambda: jsonl([{"x": 1, "y": 2}]), "unknown-format", ("(messages, prompt + completion",)),
    ("rows", lambda: jsonl(ROWS), "no-data-files", ("rows: is no data file by its name", "*.jsonl")),
]


@pytest.mark.parametrize(("name", "content", "code", "parts"), REFUSED)
def test_what_is_no_such_file_is_refused_for_what_it_is(tmp_path, name, content, code, parts):
    file = put(tmp_path, name, content())
    with refused(code, *parts, kept=False) as caught:
        check(file)
    assert "\n" not in str(caught.value)


def test_fetch_refuses_a_misnamed_file_before_it_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.paths, "ROOT", tmp_path)
    monkeypatch.setattr(fetch.paths, "DATA_LOCAL", tmp_path / "data/local")
    put(tmp_path, "data/local/a/train.jsonl", gzip.compress(jsonl(ROWS)))
    (tmp_path / "out").mkdir()
    with refused("misnamed-file", "data/local/a: train.jsonl: is a gzip file", kept=False):
        fetch.fetch_dataset(LocalDataset(source="local", path="data/local/a"), tmp_path / "out", seed=1)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("inner", ["data", "en"])
def test_of_a_repository_of_the_hub_the_folder_with_the_rows_is_named(tmp_path, inner):
    put(tmp_path, f"{inner}/train-00000-of-00001.parquet", b"x")
    put(tmp_path, ".git/config", b"x")
    put(tmp_path, "README.md", b"x")
    with refused("no-data-files", f"its folder {inner} holds some: give mine/{inner}", kept=False):
        require_data_files(tmp_path, "mine")


# the value of the second row's answer, how it is described
VALUES: list[tuple[Callable[[], bytes], str]] = [
    (lambda: jsonl([ROWS[0], {**ROWS[1], "completion": 3}]), "is the number 3; expected text"),
    (lambda: jsonl([ROWS[0], {**ROWS[1], "completion": {"a": 1}}]), "is an object; expected text"),
    (
        lambda: jsonl(ROWS[:1]) + b'{"prompt": "q", "completion": ' + b"9" * 5000 + b"}",
        "an integer has more than 4300 digits",
    ),
    (lambda: jsonl([ROWS[0], {**ROWS[1], "completion": "\ud83d"}]), "holds half a surrogate pair"),
    (lambda: jsonl([ROWS[0], {**ROWS[1], "completion": "a\0"}]), "holds a NUL character"),
    (lambda: jsonl(ROWS[:1]) + b'{"prompt": "q", "completion": "a", "completion": "b"}', "occurs twice in one object"),
]


@pytest.mark.parametrize(("content", "said"), VALUES)
def test_a_value_that_is_no_text_is_a_fault_of_its_row(tmp_path, content, said):
    report = check(put(tmp_path, "a.jsonl", content()))
    assert report["rows"]["read"] == 2
    [(_, faults)] = report["faults"].items()
    [case] = faults["first"]
    assert case["at"] == "a.jsonl:2"
    assert said in case["problem"]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("binary", b"a", "is binary data; expected text"),
        ("timestamp", None, None),
        ("date32", 3, "is the time 1970-01-04; expected text"),
    ],
)
def test_a_column_of_another_type_is_named_in_words(tmp_path, kind, value, said):
    if said is None:
        import datetime

        import pyarrow

        column: Any = pyarrow.array([datetime.datetime(2024, 1, 1)] * len(ROWS))
        said = "is the time 2024-01-01 00:00:00"
    else:
        column = arrow(kind, value)
    report = check(put(tmp_path, "a.parquet", parquet(completion=column)))
    [(_, faults)] = report["faults"].items()
    assert said in faults["first"][0]["problem"]


def test_links_to_files_are_read_as_the_files(tmp_path):
    put(tmp_path, "elsewhere/rows.jsonl", jsonl(ROWS))
    (tmp_path / "mine").mkdir()
    os.symlink(tmp_path / "elsewhere/rows.jsonl", tmp_path / "mine/train.jsonl")
    assert check(tmp_path / "mine")["rows"]["read"] == len(ROWS)
