"""`lathe data`: what it says of a file, and that preprocess says the same."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from byte_chat import LENIENT, Bench, byte_chat, chat
from refusals import refused

from lathe.commands import data as data_commands
from lathe.common import paths, row_report
from lathe.config.presets import LocalDataset, MixtureDataset, Presets
from lathe.data.check_file import check_file
from lathe.data.check_text import format_check, make_preset
from lathe.data.prepare import prepare
from lathe.data.read_files import find_text_form, read_records
from lathe.data.text_encodings import guess_encoding
from lathe.data.text_files import TextForm

PRESET = LocalDataset(source="local", path="rows")


def checked(source, preset=PRESET, **changes):
    return check_file(source, preset, seed=42, settings=LENIENT.model_copy(update=changes))


def put(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def pairs(count):
    return [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(count)]


def test_it_judges_as_preprocess_does(tmp_path):
    bench = Bench(tmp_path, byte_chat())
    rows = [chat(f"q{number}", "a") for number in range(20)]
    bench.put("train.jsonl", [*rows, rows[3], chat("", "a"), chat("q", " "), {"text": "x"}, {"messages": "x"}])
    bench.put("test.jsonl", [rows[5], chat("other", "a")])
    found, report = checked(bench.raw), bench.run().report
    dropped = {reason: fault["rows"] for reason, fault in {**found["faults"], **found["removed"]}.items()}
    counted: dict[str, int] = {}
    shown: dict[str, list] = {}
    for split in report["splits"]:
        for reason, count in split["dropped"].items():
            counted[reason] = counted.get(reason, 0) + count
    for split in report["examples"]:
        for reason, cases in split["dropped"].items():
            shown[reason] = shown.get(reason, []) + [(case["at"], case["problem"]) for case in cases]
    assert dropped == counted
    cases = {**found["faults"], **found["removed"]}
    assert {reason: [(case["at"], case["problem"]) for case in cases[reason]["first"]] for reason in cases} == shown
    assert found["splits"] == {split["split"]: split["kept"] for split in report["splits"]}
    assert found["reads"]["messages"] == report["columns"][0]["messages"]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"question": "q", "answer": "a"}, "question_answer"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"text": "q", "label": "a"}, "classification"),
    ],
)
def test_the_format_is_found_by_the_columns(tmp_path, record, form):
    found = checked(put(tmp_path / "rows.jsonl", [record]))
    assert (found["format"], found["detected"], found["columns"]) == (form, True, list(record))


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("rows.csv", as_csv(pairs(9)).encode(), {"format": "csv", "encoding": "UTF-8", "delimiter": ","}),
        (
            "rows.csv.gz",
            gzip.compress(as_csv(pairs(9)).encode("utf-8-sig")),
            {"format": "csv.gz", "encoding": "UTF-8 with a byte order mark", "delimiter": ","},
        ),
        ("rows.json", json.dumps(pairs(9)).encode(), {"format": "json", "encoding": "UTF-8"}),
    ],
)
def test_encoding_and_delimiter_are_named(tmp_path, name, content, facts):
    (tmp_path / name).write_bytes(content)
    (file,) = checked(tmp_path / name)["files"]
    assert file == {"file": name, "split": "train", "rows": 9, **facts}


def test_a_parquet_file_has_no_encoding(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs(9)), tmp_path / "rows.parquet")
    (file,) = checked(tmp_path / "rows.parquet")["files"]
    assert file == {"file": "rows.parquet", "split": "train", "rows": 9, "format": "parquet"}


def test_a_folder_is_read_as_its_splits(tmp_path):
    (tmp_path / "train").mkdir()
    put(tmp_path / "train/rows.jsonl", pairs(9))
    put(tmp_path / "test.jsonl", [{"prompt": "q", "completion": "a"}])
    found = checked(tmp_path)
    assert {file["file"]: file["split"] for file in found["files"]} == {
        "train-rows.jsonl": "train",
        "test.jsonl": "test",
    }


def test_lengths_are_characters_and_an_estimate_of_tokens(tmp_path):
    rows = [{"prompt": "q" * number, "completion": "a" * 2 * number} for number in range(1, 101)]
    found = checked(put(tmp_path / "rows.jsonl", rows))
    assert found["characters"] == {
        "prompt": {"p50": 50, "p95": 95, "max": 100},
        "answer": {"p50": 100, "p95": 190, "max": 200},
    }
    assert found["estimated_tokens"]["answer"] == {"p50": 25, "p95": 48, "max": 50}


def test_what_would_stop_preprocess_is_said(tmp_path):
    file = put(tmp_path / "rows.jsonl", [*pairs(8), {}, {}])
    assert checked(file, max_dropped_fraction=0.2)["refusals"] == []
    (refusal,) = checked(file, max_dropped_fraction=0.1)["refusals"]
    assert "2 of 10 rows" in refusal
    (refusal,) = checked(put(tmp_path / "rows.jsonl", pairs(2)))["refusals"]
    assert "2 different prompts" in refusal


LONG = " ".join(f"word{number}" for number in range(40))


def test_near_duplicates_between_splits_are_those_that_preprocess_finds(tmp_path):
    bench = Bench(tmp_path, byte_chat())
    bench.put("train.jsonl", [chat(f"{number} {LONG}", f"a{number}") for number in range(4)] + [chat("q", "a")])
    bench.put("validation.jsonl", [chat("other", "a")])
    bench.put("test.jsonl", [chat(f"9 {LONG}", "a9"), chat("something else", "a")])
    found = checked(bench.raw, max_overlap_fraction=0.5)
    assert found["near_overlap"] == bench.run().report["near_overlap"]
    assert {near["splits"]: near["rows"] for near in found["near_overlap"]} == {
        "test_in_train": 1,
        "test_in_validation": 0,
        "validation_in_train": 0,
    }
    assert found["refusals"] == []
    assert "alike       1 of 2 test rows are nearly in train" in list(format_check(found, bench.raw, None))
    with refused("too-much-overlap", kept=False) as caught:
        bench.run(max_overlap_fraction=0.4)
    (refusal,) = checked(bench.raw, max_overlap_fraction=0.4)["refusals"]
    assert str(caught.value) == refusal


# Files of another form.


QUESTIONS = [
    {"вопрос": "Сколько стоит; и где?", "ответ": "Сто рублей\nздесь"},
    {"вопрос": 'Где "это"', "ответ": "Hello, там"},
    {"вопрос": "Когда", "ответ": "Завтра"},
]


def write(file, content):
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.mark.parametrize("name", ["my rows.csv", "my rows.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1251", "koi8-r", "cp866", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_file_is_read_in_its_encoding_and_by_its_delimiter(tmp_path, name, encoding, delimiter):
    file = write(tmp_path / name, as_csv(QUESTIONS, delimiter).encode(encoding))
    assert [record.value for record in read_records(file)] == QUESTIONS
    found, found_delimiter = find_text_form(file)
    assert (found, found_delimiter) == (encoding.removesuffix("-sig"), delimiter)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1251", "koi8-r", "utf-16"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_json_is_read_in_its_encoding(tmp_path, name, encoding):
    lines = [json.dumps(row, ensure_ascii=False) for row in QUESTIONS]
    text = "\n".join(lines) if ".jsonl" in name else f"[{', '.join(lines)}]"
    assert [record.value for record in read_records(write(tmp_path / name, text.encode(encoding)))] == QUESTIONS


def test_excel_s_first_line_names_the_delimiter(tmp_path):
    file = write(tmp_path / "x.csv", b"sep=;\r\nprompt;completion\r\na,b;c\r\n")
    assert [(record.place, record.value) for record in read_records(file)] == [
        ("x.csv:3", {"prompt": "a,b", "completion": "c"})
    ]


@pytest.mark.parametrize(
    ("content", "delimiter"),
    [
        ("prompt,completion\na;b,c;d\ne;f,g;h\n", ","),  # the same number of semicolons in every row
        ("name, first;age\nAnna;5\nBob;6\n", ";"),  # commas in the header alone
        ("text\none; two\nthree\nfour\n", ","),  # one column
        ("prompt;completion\na;b\nc\nd;e\nf;g\n", ";"),  # a damaged row
        ("a;b\tc\td\n1;2\t3\t4\n", "\t"),  # more columns
    ],
)
def test_the_delimiter_is_the_one_that_gives_rows_the_same_columns(tmp_path, content, delimiter):
    assert find_text_form(write(tmp_path / "x.csv", content.encode())) == ("utf-8", delimiter)


def test_the_preset_names_what_a_file_does_not_tell(tmp_path):
    rows = [{"prompt": "a|b", "completion": "caf\xe9"}]
    file = write(tmp_path / "rows.csv", as_csv(rows, ";").encode("latin-1"))
    with refused("not-utf-8", "rows.csv:2: byte 0xe9", "encoding: cp1251"):
        list(read_records(file))
    assert [record.value for record in read_records(file, TextForm("latin-1", ";"))] == rows
    with refused("unknown-encoding", "encoding 'latin-99' is not known", kept=False):
        list(read_records(file, TextForm("latin-99")))
    with refused("not-in-encoding", "rows.csv after line 0: is not utf-16"):
        list(read_records(file, TextForm("utf-16")))
    preset = LocalDataset(source="local", path="rows", encoding="latin-1", delimiter=";")
    [facts] = checked(file, preset)["files"]
    assert (facts["encoding"], facts["delimiter"]) == ("iso8859-1", ";")


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("Straße, schön und Käse", "cp1252", "cp1252"),
        ("ЗАГОЛОВОК;ОТВЕТ", "cp1251", "cp1251"),
        ("日本語のテキスト", "shift_jis", "cp932"),
        ("x", "latin-1", None),
    ],
)
def test_an_encoding_is_named_only_where_the_letters_tell_it(text, encoding, expected):
    assert guess_encoding(text.encode(encoding) + (b"\xff" if encoding == "latin-1" else b"")) == expected


def test_a_damaged_utf_8_file_is_of_no_other_encoding():
    assert guess_encoding("Сколько стоит? ".encode() * 9 + b"\xd1 x") is None


# The command.


@pytest.fixture
def run(capsys, toy_params):
    def run(source, prompt=None, completion=None, as_json=False):
        usable = data_commands.check_data(source, prompt=prompt, completion=completion, as_json=as_json)
        return usable, capsys.readouterr().out

    return run


def test_the_command_prints_faults_with_their_place_and_an_entry_that_can_be_pasted(tmp_path, run):
    rows = [{"ask": f"q{number}", "reply": "a"} for number in range(30)]
    file = put(tmp_path / "Мои Rows_2.jsonl", [*rows, *[{"ask": "", "reply": "a"}] * 7])
    usable, text = run(file, "ask", "reply")
    assert not usable
    assert "37: 30 can be used, 7 would be dropped (7 empty prompt)" in text
    assert text.count("empty prompt: ask is empty") == 5
    assert "rows_2.jsonl:31: empty prompt" in text.lower()
    assert "  and 2 more" in text
    assert "preprocess would stop: 7 of 37 rows are unusable" in text
    import yaml

    (name,) = (entry := yaml.safe_load(text[text.index("\ndatasets:") :]))["datasets"]
    assert name == "rows-2"
    presets = Presets.model_validate({"models": {}, **entry})
    assert (presets.datasets[name].prompt, presets.datasets[name].completion) == ("ask", "reply")


def test_a_clean_file_is_usable_and_json_has_the_same(tmp_path, run):
    file = put(tmp_path / "rows.jsonl", pairs(30))
    usable, text = run(file, as_json=True)
    found = json.loads(text)
    assert usable
    assert found["rows"] == {"read": 30, "usable": 30, "unusable": 0}
    assert found["preset"] == {"rows": {"source": "local", "path": "data/local/rows.jsonl"}}


def test_an_entry_of_presets_yaml_says_how_its_file_is_read(tmp_path, run, monkeypatch):
    presets = tmp_path / "presets.yaml"
    file = put(tmp_path / "rows.jsonl", [{"ask": f"q{number}", "reply": "a"} for number in range(30)])
    text = paths.PRESETS.read_text()
    entry = f"datasets:\n  mine:\n    source: local\n    path: {file}\n    prompt: ask\n    completion: reply\n"
    presets.write_text(text.replace("datasets:\n", entry, 1))
    monkeypatch.setattr(paths, "PRESETS", presets)
    usable, text = run(file)
    assert usable
    assert "mine, of presets.yaml" in text
    assert "datasets:" not in text


def test_a_mixture_of_presets_yaml_is_checked_by_its_name_as_preprocess_mixes_it(tmp_path, run, monkeypatch):
    folder = tmp_path / "data/local"
    folder.mkdir(parents=True)
    put(folder / "support.jsonl", [*pairs(100), {"prompt": "no answer"}])
    (folder / "prose.txt").write_text("".join(f"paragraph {number}\n\n" for number in range(30)))
    parts = {
        "support": {"source": "local", "path": "data/local/support.jsonl", "weight": 0.9},
        "prose": {"source": "local", "path": "data/local/prose.txt", "format": "text", "weight": 0.1, "split": "train"},
    }
    preset = MixtureDataset.model_validate({"source": "mixture", "datasets": parts})
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    presets = tmp_path / "presets.yaml"
    presets.write_text(json.dumps({"models": {}, "datasets": {"mixed": {"source": "mixture", "datasets": parts}}}))
    monkeypatch.setattr(paths, "PRESETS", presets)
    usable, text = run(Path("mixed"))
    assert not usable, "a row has no answer"
    lines = text.splitlines()
    assert lines[0] == "preset      mixed, of presets.yaml"
    assert "dataset     prose: text (document: text), as named" in lines
    assert "  30 rows can be used: 9 for training (10.1% of all), 0 validation, 0 test" in lines
    assert "  100 rows can be used: 80 for training (89.9% of all), 10 validation, 10 test" in lines
    assert any("support/support.jsonl:101: missing column" in line for line in lines)
    assert "datasets:" not in lines
    found = json.loads(run(Path("mixed"), as_json=True)[1])
    for name, file in (("support", "support.jsonl"), ("prose", "prose.txt")):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / file).symlink_to(folder / file)
    (tmp_path / "out").mkdir()
    report = prepare(
        tmp_path / "raw",
        preset,
        tmp_path / "out",
        tokenizer=byte_chat(),
        seed=data_commands.load().params.seed,
        max_length=1000,
        settings=LENIENT,
    ).report
    keys = ("dataset", "read", "train", "validation", "test", "share_of_train")
    assert [{key: part[key] for key in keys} for part in found["datasets"]] == [
        {key: part[key] for key in keys} for part in report["datasets"]
    ]
    # A file that only a mixture names is read as it says.
    assert run(folder / "prose.txt")[1].startswith("preset      mixed, prose, of presets.yaml\n")


def test_a_preset_of_the_hub_that_is_not_here_is_refused_with_what_fetches_it(run):
    with refused("not-fetched", "gsm8k", "dvc repro fetch@dataset"):
        run(Path("gsm8k"))


def test_unknown_columns_are_refused_with_the_options_that_name_them(tmp_path, run):
    file = put(tmp_path / "rows.jsonl", [{"q": "a", "a": "b"}])
    with refused("unknown-format", "rows.jsonl: ", "'q', 'a'", "--prompt COLUMN --completion COLUMN"):
        run(file)
    with refused("missing-option", "--completion"):
        run(file, prompt="q")
    with refused("missing-column", "rows.jsonl: ", "'ask'"):
        run(file, "ask", "a")


def test_a_path_without_data_is_refused(tmp_path, run):
    with refused("no-such-file", "none.jsonl", kept=False):
        run(tmp_path / "none.jsonl")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with refused("convert-first", "rows.xlsx", "csv", kept=False):
        run(tmp_path / "rows.xlsx")


def test_the_name_of_an_entry_is_a_new_one(tmp_path):
    known = ["alpaca", "alpaca-2"]
    assert list(make_preset(tmp_path / "Alpaca.jsonl.gz", known, prompt=None, completion=None)) == ["alpaca-3"]
    assert list(make_preset(tmp_path / "данные.csv", known, prompt=None, completion=None)) == ["mine"]
    inside = paths.DATA_LOCAL / "a/rows.csv"
    assert make_preset(inside, [], prompt=None, completion=None)["rows"]["path"] == "data/local/a/rows.csv"


def test_ten_thousand_rows_take_less_than_two_seconds_and_no_heavy_package(tmp_path):
    rows = [{"prompt": f"question {number} " * 8, "completion": f"answer {number} " * 20} for number in range(10_000)]
    file = put(tmp_path / "rows.jsonl", rows)
    program = (
        "import json, sys, time\n"
        "sys.argv = ['lathe', 'data', sys.argv[1]]\n"
        "from lathe.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([code, time.process_time(), sorted(sys.modules)]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    taken = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)],
            capture_output=True,
            text=True,
            check=True,
            cwd=paths.ROOT,
            env=environment,
        )
        code, seconds, modules = json.loads(done.stdout.splitlines()[-1])
        assert code == 0
        assert not {"torch", "transformers", "dvc", "llama_cpp", "datasets", "pandas"} & set(modules)
        taken.append(seconds)
    assert min(taken) < 2, taken


def test_preprocess_says_how_it_has_read_a_file():
    files = [
        {"file": "a.csv", "encoding": "cp1251", "delimiter": ";"},
        {"file": "b.csv", "delimiter": "\t"},
        {"file": "c"},
    ]
    assert row_report.list_unusual_forms({"files": files}) == [
        "a.csv: read as cp1251, delimiter ';'; if that is wrong, name it in the dataset's preset",
        "b.csv: read as delimiter '\\t'; if that is wrong, name it in the dataset's preset",
    ]
    assert row_report.list_unusual_forms({}) == []


def test_a_delimiter_that_excel_names_is_told_and_one_that_is_none_is_refused(tmp_path, run):
    content = "prompt^completion\r\n" + "a,b^c\r\n" * 30
    _, text = run(write(tmp_path / "x.csv", f"sep=^\r\n{content}".encode()))
    assert "columns separated by '^'" in text
    with refused("bad-delimiter", "x.csv:1", "'sep=::'"):
        run(write(tmp_path / "x.csv", b"sep=::\r\nprompt::completion\r\na::c\r\n"))
