"""What a whole run of the pipeline leaves, made up: numbers that hold together, answers that differ here and there."""

import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from toy import load_toy, toy_text

from lathe.common import paths
from lathe.evaluation.summary import summarize
from lathe.sources.builtin import household_commands

ARTIFACTS = ("base", "base_few_shot", "merged", "Q8_0", "Q4_K_M", "Q4_1")
BYTES = dict(zip(ARTIFACTS, (2776320, 2776320, 2776416, 1486176, 890976, 922464), strict=True))
WRONG = dict(zip(ARTIFACTS, (1.0, 0.82, 0.024, 0.024, 0.03, 0.055), strict=True))  # share of the answers
KL = {"Q8_0": 0.000041, "Q4_K_M": 0.0031, "Q4_1": 0.0127}
METRICS = ("exact_match", "json_valid", "json_fields", "rouge_l")
SPLITS = ("validation", "test")


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(file: Path, rows: list[Any]) -> None:
    """Write a JSONL file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(file: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    """Write a CSV or TSV file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [delimiter.join(rows[0]), *(delimiter.join(map(str, row.values())) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build(root: Path, rows: int = 200, *, judged: bool = False) -> None:
    """Write metrics, data, dvc.lock and dvc.yaml under `root`."""
    chance = random.Random(3)
    held_out = {split: household_commands.make_rows(1)[split][:rows] for split in SPLITS}
    for split, conversations in held_out.items():
        write_lines(root / f"data/processed/{split}.jsonl", conversations)
        for artifact in ARTIFACTS:
            _answers(root, artifact, split, conversations, chance, judged=judged)
    for split in SPLITS:
        write_json(root / f"metrics/evaluate/{split}.json", [_report(root, split, judged=judged)])
    _gates(root)
    _measured(root, rows, chance)
    _training(root, chance)
    _data_report(root)
    shutil.copyfile(paths.ROOT / "dvc.yaml", root / "dvc.yaml")
    lock(root)


def _answers(
    root: Path, artifact: str, split: str, conversations: list[Any], chance: random.Random, *, judged: bool
) -> None:
    generated, scored, verdicts = [], [], []
    for number, row in enumerate(conversations):
        request, reference = (message["content"] for message in row["messages"])
        wrong = chance.random() < WRONG[artifact]
        completion = _mistake(reference, artifact, chance) if wrong else reference
        prompt = f"<s><|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        answer = {"prompt": prompt, "reference": reference, "completion": completion, "finish_reason": "stop"}
        kl = round(KL[artifact] * chance.uniform(0.5, 1.5), 6) if artifact in KL else None
        generated.append({**answer, "tokens": 20, "nll": 0.11, "reference_tokens": 19, "kl": kl})
        scores = _scores(completion, reference)
        if judged:
            scores["judge"] = 100 if completion == reference else chance.randint(5, 60)
            reason = "The same." if completion == reference else "Something else is asked of the house."
            verdicts.append({"row": number, "score": scores["judge"], "reason": reason})
        scored.append({"row": number, **answer, "scores": scores})
    write_lines(root / f"data/generated/{artifact}/{split}.jsonl", generated)
    if judged:
        write_lines(root / f"data/judged/{artifact}/{split}.jsonl", verdicts)
    scored.sort(key=lambda row: (row["scores"]["exact_match"], row["scores"]["rouge_l"]))
    write_lines(root / f"data/scored/{artifact}/{split}.jsonl", scored)


def _mistake(reference: str, artifact: str, chance: random.Random) -> str:
    if artifact == "base":
        return "the the kitchen and then turn " * 3
    answer = json.loads(reference)
    if "room" in answer:
        answer["room"] = chance.choice(["attic", "cellar", "garage"])
    else:
        answer["action"] = "off"
    return json.dumps(answer, separators=(",", ":"))


def _scores(completion: str, reference: str) -> dict[str, float]:
    same = float(completion == reference)
    is_json = float(completion.startswith("{"))
    return {"exact_match": same, "json_valid": is_json, "json_fields": same or 0.667 * is_json, "rouge_l": same or 0.41}


def _report(root: Path, split: str, *, judged: bool) -> dict[str, Any]:
    rows = {
        artifact: sorted(
            (json.loads(line) for line in (root / f"data/scored/{artifact}/{split}.jsonl").open()),
            key=lambda row: row["row"],
        )
        for artifact in ARTIFACTS
    }
    metrics = [*METRICS, "judge"] if judged else list(METRICS)
    report: dict[str, Any] = {}
    for artifact in ARTIFACTS:
        columns = {name: [row["scores"][name] for row in rows[artifact]] for name in metrics}
        means = {name: round(sum(column) / len(column), 4) for name, column in columns.items()}
        report[artifact] = {
            **means,
            **({"combined": round(0.4 * means["rouge_l"] + 0.6 * means["judge"] / 100, 4)} if judged else {}),
            "perplexity": 1347.344
            if artifact == "base"
            else 81.22
            if artifact == "base_few_shot"
            else 1.0064 + KL.get(artifact, 0),
            "kl": KL.get(artifact),
            "general_perplexity": None if artifact == "base_few_shot" else 212.4 if artifact == "base" else 655.1,
            "stop_rate": 1.0,
            "bytes": BYTES[artifact],
            "intervals": [_interval(name, column) for name, column in columns.items()],
            "deltas": [
                {"to": to, **_delta(name, columns[name], [row["scores"][name] for row in rows[to]])}
                for to in ("base", "merged")
                if ARTIFACTS.index(to) < ARTIFACTS.index(artifact)
                for name in metrics
            ],
        }
    return report


def _interval(name: str, column: list[float]) -> dict[str, Any]:
    mean, error = _mean_and_error(column)
    return {"metric": name, "low": round(mean - error, 4), "high": round(mean + error, 4)}


def _delta(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    mean, error = _mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])
    p = 1.0 if error == 0 else round(2 * (1 - 0.5 * (1 + math.erf(abs(mean) / (error / 1.96) / math.sqrt(2)))), 4)
    ends = {"low": round(mean - error, 4), "high": round(mean + error, 4)}
    return {"metric": name, "delta": round(mean, 4), **ends, "p": p}


def _mean_and_error(column: list[float]) -> tuple[float, float]:
    mean = sum(column) / len(column)
    return mean, 1.96 * math.sqrt(sum((x - mean) ** 2 for x in column) / len(column) / len(column))


def _gates(root: Path) -> None:
    [report] = json.loads((root / "metrics/evaluate/validation.json").read_text())
    found = {}
    for name in ("Q8_0", "Q4_K_M", "Q4_1"):
        margin = round(report[name]["exact_match"] - report["merged"]["exact_match"] + 0.03, 4)
        found[f"{name}.exact_match >= merged.exact_match - 0.03"] = {"passed": margin >= 0, "margin": margin}
    passed = all(gate["passed"] for gate in found.values())
    write_json(root / "metrics/evaluate/gates.json", [{"passed": passed, "gates": found}])
    summary = summarize(report, ("Q8_0", "Q4_K_M", "Q4_1"), "exact_match", passed=passed)
    write_json(root / "metrics/evaluate/summary.json", summary)


def _measured(root: Path, rows: int, chance: random.Random) -> None:
    items = []
    for artifact in ARTIFACTS:
        report = {split: json.loads((root / f"metrics/evaluate/{split}.json").read_text())[0] for split in SPLITS}
        splits = [
            {"split": split, "perplexity": report[split][artifact]["perplexity"], "rows": rows} for split in SPLITS
        ]
        facts = {"splits": splits, "file": [{"bytes": BYTES[artifact]}]}
        write_json(root / f"metrics/generate/{artifact}.json", facts)
        speed = {"tokens_per_second": round(chance.uniform(2500, 3800), 1)}
        items.append({"item": artifact, "seconds": 5.83, "peak_memory_bytes": 101806080, **speed})
    timing = {"seconds": 34.98, "peak_memory_bytes": 101806080, "items": items}
    write_json(root / "metrics/timings/generate.json", [timing])
    write_json(root / "metrics/timings/evaluate.json", [{"seconds": 1.33, "peak_memory_bytes": 79523840}])
    for name in ("Q8_0", "Q4_K_M", "Q4_1"):
        write_json(root / f"metrics/quantize/{name}.json", {"bits_per_weight": 5.0652})


def _training(root: Path, chance: random.Random) -> None:
    folder = root / "metrics/train/plots/metrics"
    steps = range(5, 301, 5)
    loss = {step: 7.2 * math.exp(-step / 22) + 0.004 * chance.uniform(0.7, 1.5) for step in steps}
    columns = {
        "train/loss": loss,
        "train/learning_rate": {step: 0.006 * min(step / 30, 0.5 + 0.5 * math.cos(step / 96)) for step in steps},
        "train/grad_norm": {step: 4 * math.exp(-step / 60) * chance.uniform(0.6, 1.3) for step in steps},
        "eval/loss": {step: 7.2 * math.exp(-step / 24) + 0.007 for step in range(50, 301, 50)},
    }
    for name, column in columns.items():
        rows = [{"step": step, name.partition("/")[2]: value} for step, value in column.items()]
        write_table(folder / f"{name}.tsv", rows, "\t")
    final = {"train": {"loss": loss[300], "tokens": 381600}, "step": 300, "eval": {"loss": columns["eval/loss"][300]}}
    write_json(root / "metrics/train/metrics.json", final)
    write_json(root / "metrics/train/freeze_proof.json", {"trained_tensors": 28, "frozen_tensors": 20, "moved": []})
    merged = {"tensors_total": 20, "tensors_changed": 14, "largest_change": 0.278}
    write_json(root / "metrics/merge/report.json", merged)
    parts = {"weights": 1004448, "adapter": 524288, "activations": 59396872}
    memory = [{"part": part, "bytes": size} for part, size in parts.items()]
    estimate = {"steps_per_epoch": 75, "steps": 300, "memory_bytes": 60925608, "memory": memory}
    write_json(root / "metrics/estimate/training.json", estimate)
    timing = {"seconds": 138.68, "peak_memory_bytes": 1967390720, "tokens_per_second": 13470.8}
    write_json(root / "metrics/timings/train.json", [timing])
    model = {"name": "tiny", "source": "builtin", "files": 7, "bytes": 2770378}
    write_json(root / "metrics/fetch/model.json", {"origin": [model]})
    dataset = {"name": "commands", "source": "builtin", "files": 3, "bytes": 1033375}
    write_json(root / "metrics/fetch/dataset.json", {"origin": [dataset]})


def _data_report(root: Path) -> None:
    lengths = {"min": 18, "p50": 40, "p90": 51, "p99": 58, "max": 61}
    reads = [("train", 2412, {"duplicate": 9, "empty answer": 3}), ("validation", 500, {}), ("test", 500, {})]
    splits = [
        {
            "split": name,
            "read": read,
            "kept": read - sum(dropped.values()),
            "dropped": dropped,
            "truncated": {"rows": 0, "side": None, "tokens": 0, "supervised_tokens": 0},
            "tokens": {"prompt": lengths, "answer": lengths, "total": lengths},
            "supervised_tokens": 42223,
            "supervised_share": 0.4426,
        }
        for name, read, dropped in reads
    ]
    empty = {"at": "train.jsonl:17", "field": "messages", "problem": "the answer is empty"}
    rule = "at least 80% of a row's sequences of 5 words are in the other split"
    report = {
        "rows": {"read": 3412, "kept": 3400, "dropped": 12, "truncated": 0, "nearly_in_another_split": 4},
        "supervised_tokens": 42223,
        "columns": [{"format": "messages", "detected": True}],
        "splits": splits,
        "near_overlap": [{"splits": "test_in_train", "rule": rule, "rows": 4, "checked": 500, "share": 0.008}],
        "examples": [{"split": "train", "dropped": {"empty answer": [empty]}}],
    }
    write_json(root / "metrics/preprocess/report.json", report)
    rows = [
        {"split": "train", "part": part, "tokens": at, "rows": round(420 * math.exp(-(((at - middle) / 7) ** 2)))}
        for part, middle in (("prompt", 22), ("answer", 18), ("total", 40))
        for at in range(0, 64, 2)
    ]
    write_table(root / "metrics/preprocess/lengths.csv", rows, ",")


def lock(root: Path) -> None:
    """Write a dvc.lock that names the metrics as they are now."""
    used = yaml.safe_load(toy_text())
    parameters = {name: used[name] for name in ("seed", "training", "sft", "lora", "quantization")}
    folders = [
        {"path": name, "hash": "md5", "md5": hashlib.md5(name.encode()).hexdigest() + ".dir", "size": 2770378}
        for name in ("models/base", "data/raw", "data/processed", "models/adapter", "models/merged")
    ]
    ggufs = [
        {"path": f"models/gguf/{name}.gguf", "hash": "md5", "md5": hashlib.md5(name.encode()).hexdigest(), "size": size}
        for name, size in BYTES.items()
        if name not in {"base", "base_few_shot", "merged"}
    ]
    metrics = [
        {
            "path": str(file.relative_to(root)),
            "hash": "md5",
            "md5": hashlib.md5(file.read_bytes()).hexdigest(),
            "size": file.stat().st_size,
        }
        for file in sorted((root / "metrics/evaluate").glob("*.json"))
    ]
    stages = {
        "train": {"cmd": "train", "params": {"params.yaml": parameters}, "outs": folders},
        "quantize": {"cmd": "quantize", "outs": ggufs},
        "evaluate": {"cmd": "evaluate", "outs": metrics},
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))


PRETEND = """\
import json, pathlib, sys
import yaml
rate = yaml.safe_load(open("params.yaml"))["training"]["learning_rate"]
scores = json.load(open("whole.json"))
scores["exact_match"]["merged"] = round(1 - rate, 4)
pathlib.Path("metrics/evaluate/summary.json").write_text(json.dumps(scores))
"""


def pretend(checkout: Any) -> None:
    """Let the checkout, where `build` was, have a pipeline of one stage that takes no time, committed."""
    root = checkout.root
    shutil.copyfile(root / "metrics/evaluate/summary.json", root / "whole.json")
    (root / "pretend.py").write_text(PRETEND)
    stage = {
        "cmd": "python3 pretend.py",
        "deps": ["pretend.py", "whole.json"],
        "params": ["training.learning_rate", "lora.r"],
        "metrics": [{"metrics/evaluate/summary.json": {"cache": False}}],
    }
    tree = {"stages": {"evaluate": stage}, "metrics": ["metrics/train/metrics.json"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump(tree))
    checkout.run("dvc", "repro", "--quiet")
    checkout.commit()


SEARCH = """\
study: {name}
sampler: random
startup_trials: 1
seed: 1
n_trials: 9
timeout_seconds: null
objectives: {objectives}
space:
  training.learning_rate: {{type: float, low: 0.001, high: 0.02, log: true}}
  quantize.types: {{type: categorical, choices: [[Q8_0], [Q4_K_M], [Q8_0, Q4_K_M]]}}
"""
SCORES = ("quantized.exact_match, direction: maximize", "quantized.bytes, direction: minimize")


def search(root: Path) -> None:
    """Write what two studies found, of one score and of two, with a trial that failed; none of them ran anything."""
    from optuna.storages import InMemoryStorage

    from lathe.experiments.search import results, search_file
    from lathe.experiments.search.study import Study

    params = load_toy().params.model_dump()
    for name, scores in (("learning", SCORES[:1]), ("a-study-with-a-name-that-is-rather-long", SCORES)):
        file = root / f"experiments/search/{name}.yaml"
        objectives = ", ".join(f"{{metric: {score}}}" for score in scores)
        file.write_text(SEARCH.format(name=name, objectives=f"[{objectives}]"))
        with mock.patch.object(paths, "SCRATCH", root / ".scratch"):
            study = Study(search_file.read_plan(file, params, name), InMemoryStorage(), params, is_local=True)
        study.check_setting({"overrides": {"training.num_train_epochs": "2"}})
        while (trial := study.take_trial(9, may_begin=True)) is not None:
            values = study.choose_values(trial)
            if trial.number == 5:
                study.fail(trial, f"train: error: {'no answer at all, ' * 20}")
                continue
            rate = values["training.learning_rate"]
            study.finish(trial, [rate**0.1, 8e5 + 4e7 * rate][: len(scores)], "c0ffee" * 6)  # none is best in both
        results.write_results(study, root / "metrics/search" / name)
