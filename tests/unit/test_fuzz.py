"""Files that are broken at random, thousands of them: each is read, or refused in one line; no process ends of one.

A part of it runs with the other tests; `make test-all` tries for ten minutes, from other seeds each day.
"""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fuzz_readers
import gguf_models
import hostile_gguf
import pyarrow
import pyarrow.parquet
import pytest

from lathe.common import trial_load
from lathe.common.errors import InputError
from lathe.gguf.description import describe_gguf
from lathe.gguf.llama_library import load_library
from lathe.gguf.llama_model import LlamaModel

ALL = bool(os.environ.get("LATHE_ALL_TESTS"))
SECONDS = 600 / len(fuzz_readers.READERS) if ALL else 2
FIRST_SEED = datetime.date.today().toordinal() * 1_000_000 if ALL else 0
MOST_FINDINGS = 10

PAIRS = [{"prompt": f"q{n}", "completion": f"a{n}", "n": n, "tags": ["x", None]} for n in range(50)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(50)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files of every format, in the folder FORMAT/NAME; the smallest that have every part."""
    root = tmp_path_factory.mktemp("corpus")
    for kind in fuzz_readers.READERS:
        (root / kind).mkdir()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = root / "safetensors/llama"
    gguf_models.make_llama(model, lambda _: None, **shape)
    for kind in ("tokenizer", "config"):
        shutil.copytree(model, root / kind / "llama")
    for name in ("whole", "vocabulary"):
        (root / "gguf" / name).mkdir()
    whole = gguf_models.convert(model, root / "gguf/whole/model.gguf")
    gguf_models.rewrite(whole, root / "gguf/vocabulary/model.gguf", tensors=False)
    for name, rows in (("pairs", PAIRS), ("chats", CHATS)):
        table = pyarrow.Table.from_pylist(rows)
        for kind in ("parquet", "arrow", "jsonl"):
            (root / kind / name).mkdir()
        pyarrow.parquet.write_table(table, root / "parquet" / name / "train.parquet")
        with pyarrow.ipc.new_file(str(root / "arrow" / name / "train.arrow"), table.schema) as file:
            file.write_table(table)
        (root / "jsonl" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "csv/pairs").mkdir()
    lines = "".join(f'"{row["prompt"]} ""x""","{row["completion"]},\n"\n' for row in PAIRS)
    (root / "csv/pairs/train.csv").write_text(f"prompt,completion\n{lines}")
    return root


@pytest.mark.heavy
@pytest.mark.parametrize("kinds", list(fuzz_readers.READERS) if ALL else [",".join(fuzz_readers.READERS)])
def test_a_broken_file_is_read_or_refused_in_one_line(corpus: Path, tmp_path: Path, kinds: str) -> None:
    log, seed, seconds, findings = tmp_path / "log", FIRST_SEED, SECONDS, list[str]()
    while len(findings) < MOST_FINDINGS:
        done = subprocess.run(
            [sys.executable, fuzz_readers.__file__, kinds, str(corpus), str(seed), str(seconds), str(log)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=len(kinds.split(",")) * SECONDS + 300,
        )
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        findings = [f"{line['kind']} {line['seed']}: {line['problem']}" for line in lines if "problem" in line]
        if done.returncode == 0:
            break
        # The process ended in the middle of a file: that is one, and the next seed follows.
        last = lines[-1]
        problem = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
        with log.open("a") as file:
            file.write(json.dumps({**last, "problem": problem}) + "\n")
        findings.append(f"{last['kind']} {last['seed']}: {problem}")
        seed, seconds = last["seed"] + 1, min(seconds, 10)
        kinds = kinds[kinds.index(last["kind"]) :]
    assert not findings, "\n\n".join(findings)
    counts = {line["kind"]: line["done"] - FIRST_SEED for line in lines if "done" in line}
    assert all(count >= 5 for count in counts.values()), f"too few were tried to mean anything: {counts}"


@pytest.mark.heavy
def test_the_corpus_is_read(corpus: Path) -> None:
    for name, vocab_only in (("whole", False), ("whole", True), ("vocabulary", True)):
        with LlamaModel(corpus / "gguf" / name / "model.gguf", vocab_only=vocab_only) as model:
            assert model.n_vocab == 400
    file = corpus / "gguf/whole/model.gguf"
    assert trial_load._load_in_fork(file, load_library(), False)[0] == 0
    assert trial_load._load_in_new_process(file, False)[0] == 0


@pytest.mark.parametrize("name", hostile_gguf.HEADERS)
def test_a_header_that_lies_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file.gguf"
    file.write_bytes(hostile_gguf.HEADERS[name])
    if name in {"file-type-nan", "offset-huge"}:  # what they say concerns the values of tensors alone
        assert describe_gguf(file)["parameters"] == 32
    else:
        with pytest.raises(InputError) as refusal:
            describe_gguf(file)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError) as refused:
        LlamaModel(file, vocab_only=True)
    assert "\n" not in str(refused.value)


@pytest.mark.heavy
def test_a_file_that_ends_llama_cpp_is_refused_by_a_process_that_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Two tokens of one text: an assertion of llama.cpp, which ends the process."""
    good = (corpus / "gguf/vocabulary/model.gguf").read_bytes()
    tokens = good.index(b"tokenizer.ggml.tokens")
    file = tmp_path / "twice.gguf"
    file.write_bytes(good[:tokens] + good[tokens:].replace(b"<0x00>", b"<0x01>", 1))
    for code, said in (
        trial_load._load_in_fork(file, load_library(), True),
        trial_load._load_in_new_process(file, True),
    ):
        assert code == -signal.SIGABRT
        assert "ASSERT" in said
    for _ in range(2):
        with pytest.raises(InputError, match=r"llama\.cpp ends the process as it reads it"):
            LlamaModel(file, vocab_only=True)
