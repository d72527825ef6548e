# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""The generate stage on small models: what it writes, what it goes on with, how much memory it takes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest
import yaml
from conftest import Checkout, copy_of
from generation_checkout import make_generation_checkout
from gguf_models import Made, learnt  # noqa: F401 - fixture

from lathe.common import paths
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.gguf.quantize import quantize
from lathe.inference import few_shot, held_out
from lathe.inference.generate import Generator
from lathe.inference.held_out import HeldOutRun
from lathe.inference.journal import open_journal
from lathe.models.answer_split import split_answer
from lathe.models.chat_template import ChatTemplate
from lathe.sources.builtin import household_commands

SETTINGS = {
    "generate.max_new_tokens": 12,
    "generate.n_ctx": 256,
    "generate.n_parallel": 8,
    "generate.few_shot": 3,
    "quantize.types": ["Q4_K_M"],
}
GENERAL = "switch on the attic lamp\n\nthe kitchen radio is on\nand loud\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout with what the stage reads, in which every artifact has been asked."""
    root = tmp_path_factory.mktemp("generate") / "lathe"
    checkout = make_generation_checkout(root, SETTINGS, {"train": 40, "validation": 14, "test": 17}, GENERAL)
    folder = checkout.root / "models/gguf"
    for name in ("base", "merged"):
        shutil.copy(learnt.gguf, folder / f"{name}-f16.gguf")
    quantize(learnt.gguf, folder / "Q4_K_M.gguf", type="Q4_K_M", threads=2)
    checkout.stage("generate")
    return checkout


def outputs(checkout: Checkout, artifact: str) -> dict[str, bytes]:
    files = [*(checkout.root / "data/generated" / artifact).iterdir(), measured(checkout, artifact)]
    return {file.name: file.read_bytes() for file in files}


def measured(checkout: Checkout, artifact: str):
    return checkout.root / f"metrics/generate/{artifact}.json"


def test_sizes_that_are_auto_come_from_the_lengths_of_the_held_out_rows(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.set({f"generate.{key}": "auto" for key in ("max_new_tokens", "n_ctx", "n_parallel")})
    lengths = {"tokens": {"max": 20}, "conversation_tokens": {"max": 60}}
    report = {"splits": [{"split": split, "kept": 9, "references": lengths} for split in ("validation", "test")]}
    (checkout.root / "metrics/preprocess/report.json").write_text(json.dumps(report))
    checkout.stage("generate", "merged")
    assert checkout.json("metrics/generate/merged.json")["sizes"] == [
        {"max_new_tokens": 32, "n_ctx": 512, "n_parallel": 32}
    ]
    longer = read_jsonl(checkout.root / "data/generated/merged/test.jsonl")
    shorter = read_jsonl(made.root / "data/generated/merged/test.jsonl")
    assert max(row["tokens"] for row in longer) > max(row["tokens"] for row in shorter) == 12
    cut = [(one["completion"][:8], two["completion"][:8]) for one, two in zip(longer, shorter, strict=True)]
    assert all(one == two for one, two in cut), "the same answers, not cut as early"


def test_every_row_has_its_answer_and_its_likelihood(made: Checkout):
    for artifact in ("base", "base_few_shot", "merged", "Q4_K_M"):
        facts = made.json(f"metrics/generate/{artifact}.json")
        figures = {split["split"]: split for split in facts["splits"]}
        for split, count in (("validation", 14), ("test", 17)):
            rows = read_jsonl(made.root / f"data/generated/{artifact}/{split}.jsonl")
            examples = read_jsonl(made.root / f"data/processed/{split}.jsonl")
            assert [row["reference"] for row in rows] == [row["messages"][-1]["content"] for row in examples]
            assert len(rows) == figures[split]["rows"] == count
            for row in rows:
                assert list(row) == [
                    *("prompt", "reference", "completion", "finish_reason"),
                    *("tokens", "nll", "reference_tokens", "kl"),
                ]
                assert 1 <= row["tokens"] <= 12
                assert (row["kl"] is None) == (artifact != "Q4_K_M")
            tokens = sum(row["reference_tokens"] for row in rows)
            assert figures[split]["perplexity"] == pytest.approx(math.exp(sum(row["nll"] for row in rows) / tokens))
            assert figures[split]["stop_rate"] == pytest.approx(
                sum(row["finish_reason"] == "stop" for row in rows) / count, abs=1e-4
            )
            if artifact == "Q4_K_M":
                mean = sum(row["kl"] * row["reference_tokens"] for row in rows) / tokens
                assert figures[split]["kl"] == pytest.approx(mean, rel=1e-5)
                assert 0 < mean < 1
            else:
                assert figures[split]["kl"] is None
        assert facts["file"][0]["bytes"] > 1000


def test_general_text_is_scored_paragraph_by_paragraph_but_not_behind_examples(made: Checkout):
    for artifact in ("base", "merged", "Q4_K_M"):
        rows = read_jsonl(made.root / f"data/generated/{artifact}/general.jsonl")
        assert [row["text"] for row in rows] == ["switch on the attic lamp", "the kitchen radio is on\nand loud"]
        perplexity = math.exp(sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows))
        assert made.json(f"metrics/generate/{artifact}.json")["file"][0]["general_perplexity"] == pytest.approx(
            perplexity
        )
    assert made.json("metrics/generate/base_few_shot.json")["file"][0]["general_perplexity"] is None
    assert not (made.root / "data/generated/base_few_shot/general.jsonl").exists()


def test_the_same_examples_stand_before_every_request(made: Checkout):
    train = read_jsonl(made.root / "data/processed/train.jsonl")
    assert made.json("metrics/generate/base_few_shot.json")["few_shot_examples"] == 3
    shown = set()
    for split in ("validation", "test"):
        plain = read_jsonl(made.root / f"data/generated/base/{split}.jsonl")
        for row, bare in zip(read_jsonl(made.root / f"data/generated/base_few_shot/{split}.jsonl"), plain, strict=True):
            start = bare["prompt"].index("<|im_start|>")
            assert row["prompt"].endswith(bare["prompt"][start:])
            shown.add(row["prompt"].removesuffix(bare["prompt"][start:]))
    [examples] = shown
    held = [row for row in train if all(message["content"] in examples for message in row["messages"])]
    assert len(held) == examples.count("assistant") == 3


def test_finished_work_leaves_no_journal(made: Checkout):
    assert list((made.root / ".scratch/generate").iterdir()) == []


@pytest.mark.parametrize("artifact", ["Q4_K_M", "base_few_shot"])
def test_killed_and_started_again_it_goes_on_from_the_rows_already_done(made: Checkout, artifact):
    expected = outputs(made, artifact)
    shutil.rmtree(made.root / "data/generated" / artifact)
    measured(made, artifact).unlink()
    journals = made.root / ".scratch/generate"
    command = [sys.executable, "stages/generate.py", artifact]
    kills = lines = 0
    while True:
        running = subprocess.Popen(command, cwd=made.root, env=made.environment, stderr=subprocess.PIPE, text=True)
        while running.poll() is None:
            count = sum(len(read_lines(journal)) for journal in journals.glob("*.jsonl"))
            if kills < 2 and count >= lines + 12:
                running.send_signal(signal.SIGKILL)
                kills, lines = kills + 1, count
            time.sleep(0.002)
        assert running.stderr
        log = running.stderr.read()
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL, log
        assert not (made.root / "data/generated" / artifact).exists()
        [journal] = journals.glob("*.jsonl")
        with journal.open("ab") as file:
            file.write(b'["test/answers",3,{"te')  # as a kill in the midst of a write leaves it
    assert kills == 2
    assert any(f"resuming an interrupted run: {n} steps are finished" in log for n in (lines, lines + 1)), log
    assert outputs(made, artifact) == expected
    assert list(journals.iterdir()) == []


def read_lines(file) -> list[bytes]:
    try:
        return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []


def test_a_journal_is_used_for_the_same_files_parameters_and_code_alone(tmp_path, monkeypatch):
    held_out_code = held_out.list_code()
    (tmp_path / "one").write_text("1")
    (tmp_path / "also one").write_text("1")
    (tmp_path / "two").write_text("2")
    names = [
        held_out.compute_fingerprint({"gguf": tmp_path / file}, determines)
        for file, determines in (("one", {"n_ctx": 1}), ("also one", {"n_ctx": 1}), ("two", {"n_ctx": 1}), ("one", {}))
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    monkeypatch.setattr(held_out, "list_code", lambda: held_out_code[1:])
    assert held_out.compute_fingerprint({"gguf": tmp_path / "one"}, {"n_ctx": 1}) not in names


def test_the_code_that_names_a_journal_is_the_code_that_the_stage_depends_on():
    stages = yaml.safe_load((paths.ROOT / "dvc.yaml").read_text())["stages"]
    deps = {dep for dep in stages["generate_few_shot"]["deps"] if dep.startswith("src/")}
    assert deps == {file.relative_to(paths.ROOT).as_posix() for file in held_out.list_code()}


@pytest.mark.parametrize(("count", "chosen"), [(2, 2), (40, 40), (50, 40)])
def test_examples_are_drawn_by_the_seed_and_fewer_are_the_first_of_more(count, chosen):
    rows = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "yes"}]} for n in range(40)
    ]
    drawn = few_shot.draw_examples(rows, count, seed=1)
    assert len(drawn) == chosen
    assert few_shot.draw_examples(iter(rows), 50, seed=1)[:count] == drawn
    assert few_shot.draw_examples(rows, count, seed=2) != drawn
    assert sorted(few_shot.draw_examples(rows, 50, seed=3), key=lambda row: int(row["messages"][0]["content"])) == rows


def test_a_systems_message_stays_in_front_and_those_of_examples_are_left_out():
    def row(name: str):
        messages = [
            {"role": "system", "content": f"be {name}"},
            {"role": "user", "content": name},
            {"role": "assistant", "content": f"{name}!"},
        ]
        return {"messages": messages}

    [example] = few_shot.draw_examples([row("brief")], 1, seed=1)
    whole = few_shot.insert_examples([example], row("kind"))
    assert [message["content"] for message in whole["messages"]] == ["be kind", "brief", "brief!", "kind", "kind!"]


def test_as_many_examples_are_shown_as_leave_the_longest_request_its_room(learnt: Made, tmp_path, caplog):
    rows = household_commands.make_rows(1)["train"][:30]
    examples = few_shot.draw_examples(rows[10:], 8, seed=1)
    counts = {}
    for n_ctx in (60, 130, 200, 330, 1000):
        with Generator(learnt.gguf, n_parallel=8, n_ctx=n_ctx, threads=1) as generator:
            caplog.clear()
            with open_journal(tmp_path, str(n_ctx)) as journal:
                count, prompts = few_shot.store_prompts(
                    HeldOutRun(generator, journal), examples, {"test": lambda: rows[:10]}, max_new_tokens=20
                )
                stored = [prompt for prompt, *_ in prompts["test"]]
            fitting = examples[:count]
            assert stored == shown(generator, fitting, rows[:10])
            counts[n_ctx] = count
            assert bool(caplog.messages) == (len(fitting) < 8)
            longest = max(len(generator.tokenize(prompt)) for prompt in shown(generator, fitting, rows[:10]))
            assert longest + 20 <= n_ctx or not fitting
            if len(fitting) < 8:
                one_more = shown(generator, examples[: len(fitting) + 1], rows[:10])
                assert max(len(generator.tokenize(prompt)) for prompt in one_more) + 20 > n_ctx
            if not fitting:
                assert "0 of 8 examples fit" in caplog.text
                assert "base_few_shot is measured as base is" in caplog.text
    assert counts[60] == 0
    assert counts[1000] == 8
    assert len(set(counts.values())) >= 4


def shown(generator, examples, rows):
    template = generator.chat_template
    return [split_answer(template, few_shot.insert_examples(examples, row)["messages"]).prompt for row in rows]


@pytest.fixture
def renderings(monkeypatch) -> Counter[str]:
    """How often each request was rendered as a prompt, and how often with its answer, by the last message."""
    counts: Counter[str] = Counter()
    render = ChatTemplate.render

    def count_rendering(self, messages, **options):
        counts[messages[-1]["content"]] += 1
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", count_rendering)
    return counts


def conversation(number: int):
    return {
        "messages": [
            {"role": "user", "content": f"lamp {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }


ONCE = {text: 1 for n in range(12) for text in (f"lamp {n}", f"answer {n}")}


def test_a_row_is_rendered_once_as_a_prompt_and_once_with_its_answer(learnt: Made, tmp_path, renderings):
    def measure():
        with open_journal(tmp_path, "work") as journal, Generator(learnt.gguf, n_parallel=4, n_ctx=256, threads=1) as g:
            run = HeldOutRun(g, journal, against=g)
            prompts = run.store_prompts("test", map(conversation, range(12)))
            run.measure_split("test", prompts, tmp_path / "out", max_new_tokens=4)

    measure()
    assert {text: count for text, count in renderings.items() if text in ONCE} == ONCE
    written = (tmp_path / "out").read_bytes()
    renderings.clear()
    measure()  # from the journal, which was not removed
    assert not renderings.keys() & ONCE.keys()
    assert (tmp_path / "out").read_bytes() == written


def test_behind_examples_that_fit_a_row_is_rendered_once_too(learnt: Made, tmp_path, renderings):
    examples = [conversation(number) for number in range(100, 103)]
    with open_journal(tmp_path, "work") as journal, Generator(learnt.gguf, n_parallel=4, n_ctx=512, threads=1) as g:
        run = HeldOutRun(g, journal)
        splits = {"test": lambda: map(conversation, range(12))}
        count, prompts = few_shot.store_prompts(run, examples, splits, max_new_tokens=4)
        run.measure_split("test", prompts["test"], tmp_path / "out", max_new_tokens=4)
    assert count == 3
    assert {text: count for text, count in renderings.items() if text in ONCE} == ONCE


def short(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"lamp {number}"}, {"role": "assistant", "content": "on"}]}


MEASURE = r"""
import json, re, sys
from pathlib import Path
from lathe.inference.held_out import HeldOutRun, iterate_rows
from lathe.inference.generate import Generator
from lathe.inference.journal import open_journal

model, file, folder = map(Path, sys.argv[1:])
with open_journal(folder, "work") as journal, Generator(model, n_parallel=32, n_ctx=512, threads=1) as generator:
    run = HeldOutRun(generator, journal)
    prompts = run.store_prompts("test", iterate_rows(file, max_rows=None))
    facts = run.measure_split("test", prompts, folder / "out.jsonl", max_new_tokens=2)
# Not getrusage: its peak begins with that of the process that forked this one.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"rows": facts["rows"], "peak": peak << 10}))
"""


def test_memory_does_not_grow_with_the_number_of_rows(learnt: Made, tmp_path):
    peaks = {}
    for count in (1_000, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_jsonl(map(short, range(count)), folder / "rows.jsonl")
        command = [sys.executable, "-c", MEASURE, str(learnt.gguf), str(folder / "rows.jsonl"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        measured = json.loads(done.stdout)
        assert measured["rows"] == count
        peaks[count] = measured["peak"]
    print({count: f"{peak / 2**20:.1f} MiB" for count, peak in peaks.items()})
    # 9,000 rows of prompts, references, token ids and answers would be some 20 MB; the places of 18,000 lines are 2.
    assert peaks[10_000] - peaks[1_000] < 6 << 20
