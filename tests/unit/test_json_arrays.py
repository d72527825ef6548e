"""JSON files that are one array: read item by item, with the values and the errors of json.loads."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from lathe.common import paths
from lathe.data import json_arrays, text_files
from lathe.data.json_arrays import count_items, find_layout, iterate_items, open_text
from lathe.data.json_rows import count_rows_under, find_rows_key, iterate_rows
from lathe.data.json_text import skip_item
from lathe.data.read_files import read_records
from lathe.data.text_files import BY_CONTENT, TextForm


def decode(file: Path, form: TextForm = BY_CONTENT) -> list[Any]:
    return list(iterate_items(file, form, lambda _: skip_item))


def put(folder: Path, text: str, name: str = "a.json", encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def make_value(generator: random.Random, depth: int = 3) -> Any:
    kind = generator.randrange(8 if depth else 6)
    if kind == 0:
        return generator.choice([None, True, False, float("-inf"), 12345678901234567890123, -0.5e-10, 0, 1234567])
    if kind < 6:
        return "".join(generator.choices('ab "\\{}[],:\n\té漢🙂\ud800', k=generator.randrange(30)))
    if kind == 6:
        return [make_value(generator, depth - 1) for _ in range(generator.randrange(4))]
    return {str(number): make_value(generator, depth - 1) for number in range(generator.randrange(4))}


@pytest.mark.parametrize("chunk", [1, 2, 7, 50, 1 << 16])
@pytest.mark.parametrize(
    ("indent", "encoding"), [(None, "utf-8"), (1, "utf-8-sig"), (None, "utf-16"), (2, "utf-16-le")]
)
def test_items_are_those_of_json_loads_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent, encoding):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    generator = random.Random(1)
    for count in (0, 1, 25):
        values = [make_value(generator) for _ in range(count)]
        text = f" {json.dumps(values, indent=indent)} \n"
        file = put(tmp_path, text, encoding=encoding)
        assert find_layout(file, TextForm(encoding)) == "array"
        assert decode(file, TextForm(encoding)) == values
        assert count_items(file, TextForm(encoding)) == count


BROKEN = [
    '[{"a": 1},\n {"b": }]',
    '[{"a": 1},\n {"b": 2}',
    '[{"a": 1},\n {"b": 2',
    '[{"a": 1}\n {"b": 2}]',
    '[{"a": 1},\n {"b": "x',
    '[{"a": 1},\n {"b": "x\ny"}]',
    '[{"a": 1},\n {"b": "\\q"}]',
    '[{"a": 1},\n {"b": "\\u12"}]',
    '[{"a": 1},\n {"b" 2}]',
    '[{"a": 1},\n]',
    '[{"a": 1}]\n\n {"b": 2}',
    "[",
    "[tru]",
]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_wrong_is_said_as_json_loads_says_it(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as caught:
        decode(put(tmp_path, text))
    assert (caught.value.msg, caught.value.lineno, caught.value.colno) == (
        expected.value.msg,
        expected.value.lineno,
        expected.value.colno,
    )


@pytest.mark.parametrize(
    ("text", "name", "layout"),
    [
        ('[{"a": 1}]', "a.json", "array"),
        ('[{"a": 1}]', "a.jsonl", "array"),
        ('[\n{"a": 1},\n{"a": 2}\n]', "a.jsonl", "array"),
        ('[[{"role": "user", "content": "q"}]]', "a.json", "array"),
        ('[{"role": "user", "content": "q"}]\n[{"role": "user", "content": "p"}]', "a.jsonl", "lines"),
        ('[{"role": "user", "content": "q"}]\n[{"role": "user", "content": "p"}]', "a.json", "lines"),
        ('[{"from": "human", "value": "q"}]', "a.jsonl", "lines"),
        ("[1]\n[2]", "a.jsonl", "lines"),
        ('\n{"a": 1}\n\n{"a": 2}\n', "a.json", "lines"),
        ('{"a": 1}\n{"a"', "a.json", "lines"),
        ('{"a": [1]}\n', "a.json", "value"),
        ('{\n"a": [1]\n}\n', "a.json", "value"),
        ("", "a.json", "value"),
    ],
)
def test_the_layout_of_a_file_is_told_by_its_beginning(tmp_path, text, name, layout):
    assert find_layout(put(tmp_path, text, name), BY_CONTENT) == layout


def test_rows_before_a_fault_of_the_file_are_read_and_its_line_is_named(tmp_path):
    records = read_records(put(tmp_path, '[{"a": 1, "a": 2},\n {"b": "\\ud800"},\n {"c": }]'))
    assert next(records).value.reason == "duplicate_key"
    assert next(records).value == {"b": "\ud800"}
    with refused("not-json", "a.json:3", "column 8"):
        next(records)


def test_the_command_of_the_remedy_does_not_write_over_the_file(tmp_path):
    file = put(tmp_path, '[{"a": 1}]\n{"a": 2}', "a.jsonl")
    with refused("not-json", "a.jsonl:2", "`jq -c . a.jsonl > a.rows.jsonl`"):
        list(read_records(file))


def read_under(file: Path, form: TextForm = BY_CONTENT) -> list[Any]:
    key = form.rows_key or find_rows_key(open_text(file, form), file.name)
    rows = list(iterate_rows(open_text(file, form), key, file.name, lambda _: skip_item))
    assert count_rows_under(open_text(file, form), key, file.name) == len(rows)
    return rows


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key_are_those_of_json_loads_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    generator = random.Random(1)
    for count in (1, 25):
        rows = [{"a": make_value(generator)} for _ in range(count)]
        beside = {f"beside {number}": make_value(generator) for number in range(6)}
        content = {"n": {"x": [1, {"y": []}]}, "é ] }": [], **beside, "data": rows, "end": [[{"a": {}}]], "last": "]}"}
        file = put(tmp_path, f" {json.dumps(content, indent=indent)} \n")
        assert find_layout(file, BY_CONTENT) == "value"
        assert read_under(file) == rows
        deeper = {"none": {"data": [1]}, "result": [{"data": [2]}, {"more": 1, "data": rows}]}
        file = put(tmp_path, json.dumps(deeper, indent=indent))
        assert read_under(file, TextForm(rows_key="result.1.data")) == rows


@pytest.mark.parametrize("text", [f'{{"a": 1, "data": {text}, "b": [2]}}' for text in BROKEN if text[-1] != "2"])
@pytest.mark.parametrize("key", [None, "data", "b"])
def test_what_is_wrong_in_an_object_is_said_as_json_loads_says_it(tmp_path, text, key):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as caught:
        read_under(put(tmp_path, text), TextForm(rows_key=key))
    assert (caught.value.lineno, caught.value.colno) == (expected.value.lineno, expected.value.colno)


@pytest.mark.parametrize(
    ("text", "key", "code", "said"),
    [
        ('{"data": [{"a": 1}], "data": [{"a": 2}]}', None, "duplicate-key", "'data' twice"),
        ('{"x": 1, "data": [{"a": 1}], "data": []}', "data", "duplicate-key", "'data' twice"),
        ('{"data": [{"a": 1}]', None, "not-json", "a.json:1"),
        ('{"data": [{"a": 1}]} [2]', "data", "not-json", "a.json:1"),
        ('{"data": [{"a": 1}]}', "data.1.x", "no-such-key", "its keys: 'data'"),
        ('{"a": "x", "b": [1, 2], "c": []}', None, "not-an-array", "keys 'a', 'b', 'c'"),
        ('{"a": {"b": [1]}, "c": [1], "d": "x"}', None, "not-an-array", "keys 'a', 'c', 'd'"),
        ('{"a": [1, 2], "b": {"0": 1, "1": 2}}', None, "columns-not-rows", "orient='records'"),
        ("{}", None, "not-an-array", "keys none"),
        ('{"a": ' + 200_000 * "[" + 200_000 * "]" + "}", None, "not-json", "nested too deeply"),
    ],
)
def test_an_object_without_rows_is_refused(tmp_path, text, key, code, said):
    with refused(code, said, kept=len(text) < 1000):
        list(read_records(put(tmp_path, text), TextForm(rows_key=key)))


def test_a_first_line_of_any_length_tells_rows_from_an_object(tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "MOST_CHARACTERS_OF_A_LINE", 20)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 4)
    row = json.dumps({"prompt": "a long question", "completion": "an answer"})
    for text, layout in (
        (f"{row}\n{row}\n", "lines"),
        (f"{row}\r\n\r\n{row}", "lines"),
        (f"{row}\n", "value"),
        (row, "value"),
        (f"{row} {row}\n", "value"),
        (row[:-1], "value"),
    ):
        assert find_layout(put(tmp_path, text), BY_CONTENT) == layout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"version": 1, "data": [', '], "beside": [[1], [2]]}')])
@pytest.mark.parametrize("between", [",", ",\n"])
def test_memory_does_not_grow_with_the_rows(tmp_path, begin, end, between):
    peaks = []
    for count in (10_000, 100_000):
        row = json.dumps({"prompt": "question " * 20, "completion": "answer " * 20})
        file = put(tmp_path, begin + between.join([row] * count) + end, f"{count}.json")
        program = (
            "import re, sys\nfrom pathlib import Path\nfrom lathe.data.read_files import read_records\n"
            "count = sum(1 for _ in read_records(Path(sys.argv[1])))\n"
            "print(count, re.search('VmHWM:[^0-9]*([0-9]+)', Path('/proc/self/status').read_text())[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)], capture_output=True, text=True, cwd=paths.ROOT
        )
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 3000, peaks  # KiB; the files have 3.4 and 34 MB
