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
from lathe.data import text_files
from lathe.data.json_arrays import count_items, find_layout, iterate_items, skip_item
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_array(tmp_path):
    peaks = []
    for count in (1000, 100_000):
        row = json.dumps({"prompt": "question " * 20, "completion": "answer " * 20})
        file = put(tmp_path, "[" + ",\n".join([row] * count) + "]", f"{count}.json")
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
    assert peaks[1] - peaks[0] < 3000, peaks  # KiB; the file has 34 MB
