"""A part of a large file: where a limit leaves most rows unused, they cost neither reading nor memory."""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_chat import LENIENT, byte_chat

from lathe.common.jsonl import read_jsonl
from lathe.config.presets import LocalDataset
from lathe.data import read_files
from lathe.data.part_of_file import MIN_ROWS, Part, choose_parts, count_rows, count_rows_to_read, spread
from lathe.data.prepare import prepare
from lathe.data.read_examples import ExampleFiles
from lathe.data.read_files import read_records

MANY = 100_000
LIMIT = 300


def make_row(number: int) -> dict[str, str]:
    return {"prompt": f"question {number} of many", "completion": f"answer {number}"}


def write(file: Path, count: int) -> Path:
    file.parent.mkdir(exist_ok=True)
    rows = map(make_row, range(count))
    name = file.name
    if ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    elif ".json" in name:
        write_array(file, count)
    elif ".csv" in name:
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_table(file, count)
    return file


def write_array(file: Path, count: int) -> None:
    with file.open("w") as target:
        for number in range(count):
            target.write(("," if number else "[") + "\n  " + json.dumps(make_row(number)))
        target.write("\n]\n")


def write_table(file: Path, count: int, *, group: int = 5000) -> None:
    import pyarrow
    import pyarrow.parquet

    numbers = range(count)
    table = pyarrow.table(
        {
            "prompt": [f"question {number} of many" for number in numbers],
            "completion": [f"answer {number}" for number in numbers],
        }
    )
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=group)
    else:
        make = pyarrow.ipc.new_stream if "stream" in file.name else pyarrow.ipc.new_file
        with make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)


FILES = ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "stream.arrow"]


def read(folder: Path, limit: int) -> tuple[list[Any], dict[str, Any]]:
    import re

    preset = LocalDataset(source="local", path="data/local/x", limits={"train": limit})
    files = ExampleFiles(folder, preset, re.compile("(?!)"))
    return list(files), next(iter(files.files.values()))


@pytest.mark.parametrize("name", FILES)
def test_of_many_rows_no_more_are_read_than_a_limit_needs_and_they_lie_all_over_the_file(tmp_path, name, monkeypatch):
    write(tmp_path / "raw" / name, MANY)
    made = []
    record = read_files.RawRecord
    monkeypatch.setattr(read_files, "RawRecord", lambda *args: made.append(args[0]) or record(*args))
    examples, facts = read(tmp_path / "raw", LIMIT)
    assert len(examples) == len(made) == facts["rows"] == MIN_ROWS - name.endswith(".csv")  # its header is a line too
    assert facts["not_read"] == MANY - len(examples)
    numbers = [int(example.value["messages"][1]["content"].split()[1]) for example in examples]
    assert numbers == sorted(set(numbers))
    counts = [sum(start <= number < start + MANY // 10 for number in numbers) for start in range(0, MANY, MANY // 10)]
    assert all(abs(count - MIN_ROWS // 10) <= 1 for count in counts), counts
    offset = {"jsonl": 1, "csv": 2}.get(name.removesuffix(".gz").rpartition(".")[2], 1)
    for example, number in list(zip(examples, numbers, strict=True))[:: MIN_ROWS // 7]:
        assert int(example.place.replace(":", " ").split()[-1]) == number + offset


@pytest.mark.parametrize("name", [name for name in FILES if name != "rows.csv"])
def test_a_file_that_is_no_larger_is_read_whole(tmp_path, name):
    write(tmp_path / "raw" / name, MIN_ROWS)
    examples, facts = read(tmp_path / "raw", LIMIT)
    assert len(examples) == MIN_ROWS
    assert not facts.get("not_read")


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes of the process in /proc")
def test_of_a_parquet_file_only_the_row_groups_that_are_wanted_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    text = ["x" * 100 + str(number) for number in range(MANY)]
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": text, "completion": text}),
        file,
        row_group_size=100,
        compression="none",
        use_dictionary=False,
    )
    part = spread(count_rows(file), 500, stretches=100)
    before = count_bytes_read()
    assert len(list(read_records(file, part=part))) == 500
    assert count_bytes_read() - before < file.stat().st_size / 4


def count_bytes_read() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


def test_rows_of_several_files_are_read_in_the_share_that_each_has(tmp_path):
    sizes = {"a.jsonl": 30_000, "b.jsonl": 60_000, "c.jsonl": 10}
    files = [write(tmp_path / name, count) for name, count in sizes.items()]
    parts = choose_parts(files, 20_000)
    assert [sum(map(length, parts[file].ranges)) for file in files] == [6665, 13331, 2]
    assert choose_parts(files, 90_010) == choose_parts(files, None) == {}


def length(limits: tuple[int, int]) -> int:
    return limits[1] - limits[0]


@pytest.mark.parametrize(
    ("total", "rows", "stretches"), [(7, 3, 100), (1000, 999, 100), (1001, 3, 10), (5, 5, 100), (10, 1, 10)]
)
def test_a_part_has_its_number_of_rows_and_each_of_them_once(total, rows, stretches):
    part = spread(total, rows, stretches)
    numbers = [number for number in range(total) if part.holds(number)]
    assert len(numbers) == rows
    assert numbers == [number for start, stop in part.select(0, total) for number in range(start, stop)]
    assert part.select(2, 4) == Part(tuple(part.select(2, 4)), total).select(0, total)


@pytest.mark.parametrize(
    ("limits", "split", "present", "rows"),
    [
        (None, "train", ["train"], None),
        ({"test": 5}, "train", ["train"], None),  # train itself is wanted whole
        ({"train": 8000}, "train", ["train"], 32_000),
        ({"train": 8000, "test": 1000}, "train", ["train"], 36_000),  # test is taken from it
        ({"train": 8000, "test": 1000}, "train", ["train", "test"], 32_000),
        ({"train": 8000, "test": 1000}, "test", ["train", "test"], MIN_ROWS),
    ],
)
def test_the_number_of_rows_to_read_goes_by_the_limit(limits, split, present, rows):
    assert count_rows_to_read(limits, split, dict.fromkeys(present)) == rows


def test_preprocess_keeps_the_limit_and_counts_what_it_has_not_read(tmp_path):
    write(tmp_path / "raw/rows.jsonl", 30_000)
    reports = []
    for out in (tmp_path / "first", tmp_path / "second"):
        out.mkdir()
        preset = LocalDataset(source="local", path="raw", limits={"train": LIMIT, "validation": 10, "test": 20})
        prepared = prepare(
            tmp_path / "raw", preset, out, tokenizer=byte_chat(), seed=1, max_length=400, settings=LENIENT
        )
        reports.append(prepared.report)
        assert [len(read_jsonl(out / f"{name}.jsonl")) for name in ("train", "validation", "test")] == [LIMIT, 10, 20]
    assert reports[0] == reports[1]
    rows = reports[0]["rows"]
    assert (rows["read"], rows["not_read"]) == (MIN_ROWS, 10_000)
    assert rows["kept"] + rows["dropped"] == rows["read"]


# What a row that is not read costs (microseconds): its end is found, or it is decoded once to count it and once to pass
# it over. One that is read takes ten.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "microseconds"), [("rows.jsonl", 2.5), ("rows.json", 6)])
def test_of_two_million_rows_a_limit_costs_what_its_rows_cost(tmp_path, name, microseconds):
    import resource
    import time

    spent = {}
    for count in (40_000, 2_000_000):
        write(tmp_path / f"raw{count}" / name, count)
        began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        examples, facts = read(tmp_path / f"raw{count}", 8000)
        spent[count] = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        assert (len(examples), facts["not_read"]) == (32_000, count - 32_000)
    assert spent[2_000_000][0] - spent[40_000][0] < 2 * microseconds
    assert spent[2_000_000][1] < 30_000  # KiB


@pytest.mark.slow
def test_of_two_million_rows_in_parquet_only_the_wanted_groups_are_decoded(tmp_path):
    import time

    (tmp_path / "raw").mkdir()
    write_table(tmp_path / "raw/rows.parquet", 2_000_000, group=20_000)
    began = time.process_time()
    examples, facts = read(tmp_path / "raw", 8000)
    assert (len(examples), facts["not_read"]) == (32_000, 1_968_000)
    assert time.process_time() - began < 5
