# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""The stage sample on a small model: what it draws, that it is drawn again alike, and resumed after a kill."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import Checkout, copy_of, make_checkout
from gguf_models import Made, learnt  # noqa: F401 - fixture

from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.gguf.quantize import quantize
from lathe.inference.generate import Generator
from lathe.sources.builtin import household_commands

FILES = ["merged-f16", "Q8_0"]
SETTINGS = {
    "generate.max_new_tokens": 12,
    "generate.n_ctx": 256,
    "generate.n_parallel": 8,
    "quantize.types": ["Q8_0"],
    "sampling.files": FILES,
    "sampling.samples": 4,
    "sampling.temperature": 1.0,
}
ROWS = {"validation": 9, "test": 7}


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout whose two files were sampled; to be copied, not changed."""
    checkout = make_checkout(tmp_path_factory.mktemp("sample") / "lathe")
    checkout.set(SETTINGS)
    (checkout.root / "data/processed").mkdir(parents=True)
    for split, count in ROWS.items():
        rows = household_commands.make_rows(1)[split][:count]
        write_jsonl(rows, checkout.root / f"data/processed/{split}.jsonl")
    folder = checkout.root / "models/gguf"
    folder.mkdir(parents=True)
    shutil.copy(learnt.gguf, folder / "merged-f16.gguf")
    quantize(learnt.gguf, folder / "Q8_0.gguf", type="Q8_0", threads=2)
    checkout.stage("sample")
    return checkout


def outputs(checkout: Checkout, name: str) -> dict[str, bytes]:
    files = [*(checkout.root / "data/sampled" / name).iterdir(), checkout.root / f"metrics/sample/{name}/rows.json"]
    return {file.name: file.read_bytes() for file in files}


def test_each_row_has_its_answers(made: Checkout):
    for name in FILES:
        for split, count in ROWS.items():
            answers = read_jsonl(made.root / f"data/sampled/{name}/{split}.jsonl")
            assert [(answer["row"], answer["sample"]) for answer in answers] == [
                (row, sample) for row in range(count) for sample in range(4)
            ]
            distinct = {(answer["row"], answer["completion"]) for answer in answers}
            assert len(distinct) > count, "answers to a row differ"
        assert made.json(f"metrics/sample/{name}/rows.json") == {
            "splits": [{"split": split, "rows": count, "samples": 4} for split, count in ROWS.items()]
        }
    assert not list((made.root / ".scratch/sample").iterdir())


def test_drawn_one_row_at_a_time_they_are_the_same(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    shutil.rmtree(checkout.root / "data/sampled/merged-f16")
    checkout.set({"generate.max_rows": 3})
    checkout.stage("sample", "--file", "merged-f16")
    for split in ROWS:
        few = read_jsonl(checkout.root / f"data/sampled/merged-f16/{split}.jsonl")
        assert few == read_jsonl(made.root / f"data/sampled/merged-f16/{split}.jsonl")[:12]


def test_the_coldest_answers_are_the_greedy_ones_and_another_seed_draws_others(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.set({"sampling.temperature": 1e-6, "sampling.samples": 2})
    checkout.stage("sample", "merged-f16")
    cold = read_jsonl(checkout.root / "data/sampled/merged-f16/test.jsonl")
    with Generator(made.root / "models/gguf/merged-f16.gguf", n_parallel=8, n_ctx=256, threads=2) as generator:
        conversations = [row["messages"][:-1] for row in read_jsonl(made.root / "data/processed/test.jsonl")]
        prompts = [generator.chat_template.render(messages, add_generation_prompt=True) for messages in conversations]
        greedy = [completion.text for completion in generator.complete(prompts, max_new_tokens=12)]
    assert [answer["completion"] for answer in cold] == [text for text in greedy for _ in range(2)]
    checkout.set({"sampling.temperature": 1.0, "sampling.samples": 4, "seed": 5})
    checkout.stage("sample", "merged-f16")
    assert outputs(checkout, "merged-f16")["test.jsonl"] != outputs(made, "merged-f16")["test.jsonl"]


def test_killed_and_started_again_it_goes_on_from_what_was_drawn(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe").without_preloading()
    expected = outputs(checkout, "Q8_0")
    shutil.rmtree(checkout.root / "data/sampled/Q8_0")
    journals = checkout.root / ".scratch/sample"
    command = [sys.executable, "stages/sample.py", "Q8_0"]
    running = subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, stderr=subprocess.DEVNULL)
    while running.poll() is None and not any(file.stat().st_size > 300 for file in journals.glob("*.jsonl")):
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (checkout.root / "data/sampled/Q8_0").exists()
    assert "resuming an interrupted run" in checkout.stage("sample", "Q8_0").stderr
    assert outputs(checkout, "Q8_0") == expected
    assert not list(journals.iterdir())


def test_a_file_that_is_not_made_is_refused(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    for name, remedy in (("merged", "did you mean 'merged-f16'?"), ("Q4_K_M", "known: Q8_0, base-f16, merged-f16")):
        checkout.set({"sampling.files": [name]})
        done = checkout.stage("sample", check=False)
        assert done.returncode == 2
        assert f"sampling.files lists '{name}', which is not made" in done.stderr
        assert remedy in done.stderr
