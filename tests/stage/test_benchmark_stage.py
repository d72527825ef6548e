# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""The stage benchmark on a small model: what it writes, what the harness gives for the weights, what it refuses."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout, copy_of, make_checkout
from gguf_models import Made, learnt  # noqa: F401 - fixture
from refusals import refused

from lathe.common import paths
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.load import load
from lathe.evaluation import benchmark
from lathe.evaluation.benchmark import BenchmarkResults
from lathe.gguf.quantize import quantize
from lathe.inference.generate import Generator
from lathe.inference.harness_model import HarnessModel
from lathe.inference.journal import open_journal
from lathe.sources.builtin import household_commands

FOLDER = "experiments/own-tasks"
TASKS = ["own_choice", "own_answer", "own_text"]
ARTIFACTS = ["base", "merged", "Q8_0"]
DATA = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/{data}.jsonl\ntest_split: test\n"
FILES = {
    "own_choice": (
        "documents",
        "output_type: multiple_choice\n"
        'doc_to_text: "{{request}} ->"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
    ),
    "own_answer": (
        "documents",
        "output_type: generate_until\n"
        'doc_to_text: "{{request}} ->"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs:\n  until: [",", "\\n"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
    ),
    "own_text": (
        "texts",
        "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n    aggregation: weighted_perplexity\n    higher_is_better: false\n"
        "  - metric: bits_per_byte\n    aggregation: bits_per_byte\n    higher_is_better: false\n",
    ),
}


def write_tasks(folder: Path) -> None:
    """Write three tasks and a group of two, with their documents."""
    folder.mkdir(parents=True)
    rows = household_commands.make_rows(1)["validation"][:24]
    devices = ["light", "radio", "heater"]
    documents = [
        {
            "request": row["messages"][0]["content"],
            "answer": " action is on",
            "choices": devices,
            "label": n % 3,
            "room": n // 3,
        }
        for n, row in enumerate(rows)
    ]
    write_jsonl(documents, folder / "documents.jsonl")
    write_jsonl(
        [{"text": f"switch on the {device} at {n}:30"} for n in range(4) for device in devices], folder / "texts.jsonl"
    )
    for name, (data, rest) in FILES.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + DATA.format(folder=FOLDER, data=data) + rest)
    (folder / "other_choice.yaml").write_text("include: own_choice.yaml\ntask: other_choice\nnum_fewshot: 0\n")
    (folder / "both.yaml").write_text(
        "group: both_choices\ntask: [own_choice, other_choice]\n"
        "aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n    weight_by_size: true\n"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout whose three files were asked the tasks; to be copied, not changed."""
    checkout = make_checkout(tmp_path_factory.mktemp("benchmark") / "lathe")
    write_tasks(checkout.root / FOLDER)
    checkout.set(
        {
            "quantize.types": ["Q8_0"],
            "generate.n_parallel": 8,
            "benchmark.tasks": TASKS,
            "benchmark.include_path": FOLDER,
            "benchmark.limit": 12,
        }
    )
    folder = checkout.root / "models/gguf"
    folder.mkdir(parents=True)
    for name in ("base", "merged"):
        shutil.copy(learnt.gguf, folder / f"{name}-f16.gguf")
    quantize(learnt.gguf, folder / "Q8_0.gguf", type="Q8_0", threads=2)
    checkout.stage("benchmark")
    return checkout


def outputs(checkout: Checkout, artifact: str) -> dict[str, bytes]:
    folders = [checkout.root / name / artifact for name in ("data/benchmark", "metrics/benchmark")]
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.json*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for folder, file in files}


@pytest.fixture
def measure(made: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BenchmarkResults]:
    """Asks the base tasks in this process, with other values of the section benchmark."""
    shutil.copytree(made.root / FOLDER, tmp_path / FOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    chosen = load(made.root / "params.yaml", made.root / "presets.yaml").params.benchmark

    def measure_base(**changes: Any) -> BenchmarkResults:
        settings = chosen.model_copy(update=changes)
        tasks = benchmark.load_tasks(settings)
        gguf = made.root / "models/gguf/base-f16.gguf"
        with (
            open_journal(tmp_path / "journal", "a") as journal,
            Generator(gguf, n_parallel=8, n_ctx=512, threads=1) as generator,
        ):
            model = HarnessModel(generator, journal, max_length=512, chooses_rows=False)
            return benchmark.run_tasks(model, tasks, settings)

    return measure_base


def test_scores_are_those_of_the_harness_own_backend_on_the_weights(made: Checkout, learnt: Made, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(made.root)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(learnt.folder), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=TASKS,
        limit=12,
        bootstrap_iters=10,
        task_manager=TaskManager(include_path=FOLDER, include_defaults=False),
    )
    measured = {task: made.json(f"metrics/benchmark/merged/{task}.json")[task] for task in TASKS}
    for task, score in (("own_choice", "acc"), ("own_answer", "exact_match")):
        assert measured[task][score] == pytest.approx(results["results"][task][f"{score},none"], abs=1e-6), task
        assert measured[task][f"{score}_stderr"] == pytest.approx(
            results["results"][task][f"{score}_stderr,none"], rel=1e-4
        )
    for score in ("word_perplexity", "bits_per_byte"):
        assert measured["own_text"][score] == pytest.approx(results["results"]["own_text"][f"{score},none"], rel=5e-3)
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in results["samples"]["own_answer"]}
    rows = read_jsonl(made.root / "data/benchmark/merged/own_answer/own_answer.jsonl")
    assert {row["doc_id"]: row["responses"]["none"] for row in rows} == answers


def test_every_document_has_its_scores(made: Checkout):
    for artifact in ARTIFACTS:
        for task in TASKS:
            described = made.json(f"data/benchmark/{artifact}/{task}/tasks.json")
            assert described["asked"] == [task]
            assert described["tasks"][task]["of_documents"] == (12 if task == "own_text" else 24)
            rows = read_jsonl(made.root / f"data/benchmark/{artifact}/{task}/{task}.jsonl")
            assert [row["doc_id"] for row in rows] == list(range(12))
            assert all(row["statistics"].keys() == described["tasks"][task]["scores"].keys() for row in rows)
            assert {row["doc_hash"] for row in rows} == {
                row["doc_hash"] for row in read_jsonl(made.root / f"data/benchmark/base/{task}/{task}.jsonl")
            }
        choices = read_jsonl(made.root / f"data/benchmark/{artifact}/own_choice/own_choice.jsonl")
        accuracy = sum(row["statistics"]["acc"][0] for row in choices) / 12
        measured = made.json(f"metrics/benchmark/{artifact}/own_choice.json")["own_choice"]
        assert measured["acc"] == pytest.approx(accuracy, abs=1e-5)
    assert outputs(made, "base") == outputs(made, "merged"), "one file under two names"
    assert not list((made.root / ".scratch/benchmark").iterdir())


def test_an_item_is_named_as_dvc_names_it(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    expected = outputs(checkout, "Q8_0")
    for name in ("data/benchmark/Q8_0", "metrics/benchmark/Q8_0"):
        shutil.rmtree(checkout.root / name)
    for task in TASKS:
        checkout.stage("benchmark", "--task", task, "--artifact", "Q8_0")
    assert outputs(checkout, "Q8_0") == expected
    done = checkout.stage("benchmark", "--task", "own_choice", "--artifact", "Q4_0", check=False)
    assert done.returncode == 2
    assert "benchmark Q4_0/own_choice: no such item; known: base/own_choice" in done.stderr


def test_the_chat_template_and_examples_change_the_prompts(made: Checkout, measure):
    before = read_jsonl(made.root / "data/benchmark/base/own_choice/own_choice.jsonl")[:4]
    for changes in ({"apply_chat_template": True}, {"system_instruction": "Say what it is."}):
        rows = measure(tasks=["own_choice"], limit=4, **changes).rows["own_choice"]
        assert [row["doc_hash"] for row in rows] == [row["doc_hash"] for row in before]
        assert all(row["responses"] != other["responses"] for row, other in zip(rows, before, strict=True))


def test_a_group_has_the_scores_of_its_tasks_together(measure):
    results = measure(tasks=["both_choices"], limit=6)
    summary = results.summarize(cut=0)
    assert list(summary) == ["both_choices", "tasks", "cut"]
    assert results.groups["both_choices"]["tasks"] == ["own_choice", "other_choice"]
    assert results.groups["both_choices"]["documents"] == 12
    values = [results.tasks[name]["scores"]["acc"]["value"] for name in ("own_choice", "other_choice")]
    assert summary["both_choices"]["acc"] == pytest.approx(sum(values) / 2, abs=1e-5)


def test_killed_and_started_again_it_goes_on_from_what_was_answered(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe").without_preloading()
    expected = outputs(checkout, "merged")
    folder = checkout.root / "data/benchmark/merged/own_choice"
    shutil.rmtree(folder)
    journals = checkout.root / ".scratch/benchmark"
    command = [sys.executable, "stages/benchmark.py", "merged/own_choice"]
    running = subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, stderr=subprocess.DEVNULL)
    while running.poll() is None and not any(file.stat().st_size > 400 for file in journals.glob("*.jsonl")):
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not folder.exists()
    done = checkout.stage("benchmark", "merged/own_choice")
    assert "resuming an interrupted run" in done.stderr
    assert outputs(checkout, "merged") == expected
    assert not list(journals.iterdir())


def test_what_cannot_be_measured_is_refused(measure, tmp_path):
    with refused("unknown-task", "'own_chioce' is no task", FOLDER, "did you mean 'own_choice'?"):
        measure(tasks=["own_chioce"])
    with refused("task-refused", "lm-evaluation-harness refuses them", "own_choice"):
        measure(tasks=["own_choice", "both_choices"])
    with refused("missing-folder", "benchmark.include_path: experiments/nowhere: no such folder"):
        measure(include_path="experiments/nowhere")
    file = tmp_path / FOLDER / "own_answer.yaml"
    whole = file.read_text()
    file.write_text(whole.replace("documents.jsonl", "nowhere.jsonl"))
    with refused("task-not-loaded", "own_answer: cannot be loaded", "nowhere.jsonl", kept=False):
        measure(tasks=["own_answer"])
    file.write_text(whole.replace("max_gen_toks: 12", "do_sample: true"))
    with refused("generation-not-greedy", "sampled answers", "do_sample to false"):
        measure(tasks=["own_answer"])
    file.write_text(f"{whole}metric_list: [\n")
    with refused("task-file", "own_answer.yaml:", "not valid YAML", "mend it"):
        measure(tasks=["own_answer"])
    file.write_text(whole + "unsafe_code: true\n")
    with refused("task-not-supported", "own_answer runs code that the model writes"):
        measure(tasks=["own_answer"])


def test_a_refusal_is_one_line_and_nothing_is_written(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.set({"benchmark.tasks": ["own_chioce"]})
    before = outputs(checkout, "base")
    done = checkout.stage("benchmark", check=False)
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr
    assert outputs(checkout, "base") == before
    assert not list((checkout.root / "data/benchmark").rglob(".*"))


def test_a_gate_on_a_task_that_is_not_measured_is_refused_before_the_training(made: Checkout, tmp_path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.set({"evaluate.gates": ["merged.own_chioce.acc >= 0.5"]})
    done = checkout.run(
        sys.executable, "-m", "lathe", "check", check=False, env={"PYTHONPATH": str(checkout.root / "src")}
    )
    assert done.returncode == 2
    assert "names the task own_chioce" in done.stderr
    assert "did you mean 'own_choice'?" in done.stderr


def test_the_folder_of_tasks_must_be_there_though_none_is_named(toy_params: Path):
    text = toy_params.read_text()
    toy_params.write_text(text.replace("include_path: experiments/benchmark", "include_path: experiments/nowhere"))
    with refused("missing-folder", "experiments/nowhere: no such folder"):
        benchmark.check_benchmark(load(toy_params, paths.PRESETS).params)


def test_a_missing_package_is_named_with_what_installs_it(toy_params: Path, monkeypatch):
    text = toy_params.read_text()
    assert "  tasks: [] #" in text
    toy_params.write_text(text.replace("  tasks: [] #", "  tasks: [mmlu] #"))
    params = load(toy_params, paths.PRESETS).params
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("missing-extra", "benchmark.tasks", "lm_eval is not installed", "make setup EXTRAS=benchmark"):
        benchmark.check_benchmark(params)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("own_choice.acc", None),
        ("own_answer.exact_match_strict", None),  # of a filter, of which nothing is known before
        ("other_choice.acc", None),  # of the file that it includes
        ("both_choices.acc", None),
        ("both_choices.f1", "both_choices.f1"),
        ("own_text.bits_per_byte", None),
        ("own_choice.f1", "'merged.own_choice.f1 > 0' names own_choice.f1, which no task of benchmark.tasks has"),
        ("own_text.acc", "own_text.acc"),
        ("two.exact_match", None),
        ("two.bleu", "two.bleu"),
    ],
)
def test_a_gate_with_a_metric_that_no_task_has_is_refused_before_the_training(toy_params, tmp_path, score, said):
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks/two.yaml").write_text("group: two\ntask: [own_choice, own_answer]\n")
    params = load(toy_params, paths.PRESETS).params
    benchmarked = params.benchmark.model_copy(
        update={"tasks": [*TASKS, "both_choices", "two"], "include_path": str(tmp_path / "tasks")}
    )
    gated = params.evaluate.model_copy(update={"gates": [f"merged.{score} > 0"]})
    params = params.model_copy(update={"benchmark": benchmarked, "evaluate": gated})
    if said is None:
        benchmark.check_benchmark(params)
    else:
        with refused("unknown-score", said, kept=False):
            benchmark.check_benchmark(params)
