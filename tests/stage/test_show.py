"""`python -m lathe inspect` prints rows as training reads them."""

import gzip
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
from refusals import refused
from ruamel.yaml import YAML

from lathe.common import paths
from lathe.data import inspect
from lathe.models.tokenizer import load_tokenizer

ROWS = [
    [{"role": "user", "content": f"switch on lamp {n}"}, {"role": "assistant", "content": f'{{"lamp": {n}}}'}]
    for n in range(5)
]


SETTINGS = SimpleNamespace(supervise="all", chat_template_kwargs={})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def processed(tmp_path, monkeypatch, small_model):
    """A checkout's root with the small model and a few processed rows."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "DATA_PROCESSED", tmp_path / "data/processed")
    monkeypatch.setattr(paths, "MODEL_BASE", tmp_path / "models/base")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shutil.copytree(small_model, tmp_path / "models/base", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "data/processed").mkdir(parents=True)
    write(tmp_path, [{"messages": chat} for chat in ROWS])
    return tmp_path


def write(root, rows) -> None:
    (root / "data/processed/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shown(out=None, **changes) -> str:
    out = out or io.StringIO()
    inspect.show_examples(
        "train", **{"rows": 1, "row": None, "ids": False, "settings": SETTINGS, "out": out, **changes}
    )
    return out.getvalue()


def test_supervised_tokens_are_between_marks_and_all_else_is_shown_too(processed):
    header, text = shown().split("\n", maxsplit=1)
    assert header.startswith("train.jsonl:1: ")
    assert text == (
        '<s><|im_start|>user\nswitch on lamp 0<|im_end|>\n<|im_start|>assistant\n«{"lamp": 0}<|im_end|>»\n\n'
    )


def test_a_terminal_gets_colours_unless_it_wants_none(processed, monkeypatch):
    assert '\x1b[32m{"lamp": 0}<|im_end|>\x1b[0m' in shown(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert '«{"lamp": 0}<|im_end|>»' in shown(Terminal())


def test_every_token_is_listed_with_its_id(processed):
    from transformers import AutoTokenizer

    header, *lines = shown(ids=True).rstrip().splitlines()
    ids = [int(line.split()[0]) for line in lines]
    assert header.startswith(f"train.jsonl:1: {len(ids)} tokens, ")
    text = AutoTokenizer.from_pretrained(processed / "models/base").decode(ids)
    assert "switch on lamp 0<|im_end|>" in text
    supervised = [line for line in lines if "«" in line]
    assert f", {len(supervised)} of them supervised" in header
    assert supervised[-1].endswith("«'<|im_end|>'»")


def test_the_last_turn_alone_or_every_one_is_marked(processed):
    write(processed, [{"messages": ROWS[0] + ROWS[1]}])
    assert shown().count("«") == 2
    last = SimpleNamespace(supervise="last", chat_template_kwargs={})
    assert shown(settings=last).count("«") == 1


def test_rows_are_chosen_by_count_or_number(processed):
    assert shown(rows=3).count("train.jsonl:") == 3
    assert shown(rows=100).count("train.jsonl:") == 5
    (header,) = [line for line in shown(row=4).splitlines() if line.startswith("train.jsonl:")]
    assert header.startswith("train.jsonl:4: ")
    assert "lamp 3" in shown(row=4)


def test_a_row_cannot_steer_the_terminal_and_its_rejected_answer_is_told_apart(processed):
    chat = [{"role": "user", "content": "a\x1b[2Jb\rc"}, ROWS[0][1]]
    write(processed, [{"messages": chat, "rejected": [{"role": "assistant", "content": "worse\x07"}]}])
    text = shown()
    assert "a\\u001b[2Jb\\u000dc" in text
    assert re.search(r"^rejected answer, \d+ tokens: worse\\u0007$", text, re.MULTILINE)
    assert not {"\x1b", "\r", "\x07"} & set(text)


def test_the_token_ids_of_an_answer_to_reject_are_shown_too(processed):
    write(processed, [{"messages": ROWS[0], "rejected": [{"role": "assistant", "content": "worse"}]}])
    _, said = shown(ids=True).split("rejected answer, ")
    count, _, lines = said.partition(" tokens: worse\n")
    tokenizer = load_tokenizer(processed / "models/base")
    tokens = [int(line.split()[0]) for line in lines.splitlines() if line]
    assert len(tokens) == int(count)
    assert tokenizer.decode(tokens).strip() == f"worse{tokenizer.eos_token}"


@pytest.mark.parametrize(
    ("remove", "changes", "code", "place"),
    [
        ("data/processed", {}, "missing-file", "data/processed/train.jsonl: "),
        ("models/base", {}, "missing-model", "models/base: "),
        (None, {"row": 6}, "row-out-of-range", "--row 6: data/processed/train.jsonl has 5 rows"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(processed, remove, changes, code, place):
    if remove:
        shutil.rmtree(processed / remove)
    with refused(code, place):
        shown(**changes)


def test_a_harmed_row_is_named(processed):
    (processed / "data/processed/train.jsonl").write_text('{"messages": []\n')
    with refused("not-json", "data/processed/train.jsonl:1: "):
        shown()


def test_a_base_model_gets_its_template_at_fetch_and_inspect_shows_it(small_checkout):
    """Through the real scripts: a model without a template, ShareGPT in folders by split, gzip."""
    checkout, presets = small_checkout, YAML()
    base = checkout.root / "models/local/small"
    checkout.run("dvc", "unprotect", "models/local/small")
    (base / "chat_template.jinja").unlink()
    for split, start, count in (("train", 0, 30), ("validation", 100, 4), ("test", 200, 4)):
        folder = checkout.root / "data/local/talks" / split
        folder.mkdir(parents=True)
        lines = [
            json.dumps({"conversations": [{"from": "human", "value": f"lamp {n}?"}, {"from": "gpt", "value": "on"}]})
            for n in range(start, start + count)
        ]
        (folder / "part-0.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tree = presets.load(checkout.root / "presets.yaml")
    tree["datasets"]["talks"] = {"source": "local", "path": "data/local/talks"}
    tree["models"]["small"]["template"] = "plain"
    presets.dump(tree, checkout.root / "presets.yaml")
    checkout.set({"dataset": "talks"})
    checkout.stage("fetch")
    checkout.stage("preprocess")
    report = checkout.json("metrics/preprocess/report.json")
    assert report["columns"] == [{"format": "sharegpt", "messages": "conversations", "detected": True}]
    assert sorted(each["file"] for each in report["files"]) == [
        f"{name}-part-0.jsonl.gz" for name in ("test", "train", "validation")
    ]
    checkout.environment["PYTHONPATH"] = str(checkout.root / "src")
    printed = checkout.run("python3", "-m", "lathe", "inspect", "--split", "test", "--row", "2").stdout
    assert "Assistant:\n«on<|im_end|>»" in printed
    refused = checkout.run("python3", "-m", "lathe", "inspect", "--rows", "0", check=False)
    assert (refused.returncode, refused.stderr) == (2, "error: --rows 0: must be at least 1; rows are counted from 1\n")
