"""Facts of the report: everything that the page shows, read from the files of the stages."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.git import find_head, try_git
from lathe.common.jsonl import read_jsonl
from lathe.config.artifacts import BASE, FEW_SHOT, MERGED
from lathe.config.export_params import list_gguf_types
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.provenance.lineage import hash_path
from lathe.reports.split_scores import SplitScores
from lathe.reports.values import Value, read_report, read_value

UNTRAINED = {BASE, FEW_SHOT}

SAMPLED_ROWS = 20
WORST_ROWS = 10  # of each artifact

# The training parameters that the page shows; dvc.lock has all of them.
KEY_PARAMETERS = (
    ("training", "method"),
    ("training", "tuning"),
    ("lora", "r"),
    ("lora", "lora_alpha"),
    ("lora", "target_modules"),
    ("lora", "num_layers"),
    ("quantization", "load_in_4bit"),
    ("quantization", "bnb_4bit_quant_type"),
    ("training", "learning_rate"),
    ("training", "lr_scheduler_type"),
    ("training", "num_train_epochs"),
    ("training", "max_steps"),
    ("training", "per_device_train_batch_size"),
    ("training", "gradient_accumulation_steps"),
    ("training", "max_length"),
    ("training", "precision"),
    ("training", "optim"),
    ("seed",),
)

# The folders of curves, and what they are called.
SIDES = {"train": "training", "eval": "validation"}

# The outputs that a file can be traced by, in the order of the pipeline.
TRACED = ("models/base", "data/raw", "data/processed", "models/adapter", "models/merged")


@dataclass(frozen=True)
class CheckoutCommit:
    """The commit of the checkout; `changed` if there are uncommitted changes outside of metrics/."""

    sha: str
    changed: bool


@dataclass(frozen=True)
class SampledAnswer:
    """An answer that one or several artifacts gave, word for word the same."""

    artifacts: list[str]
    text: str
    cut: bool  # it did not end by itself
    is_reference: bool


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, its reference and the answers of the artifacts."""

    row: int
    request: str
    reference: str
    answers: list[SampledAnswer]  # the reference first, if it was given

    @property
    def differs(self) -> bool:
        """Whether the answer of a trained artifact differs from the reference."""
        return any(not entry.is_reference and set(entry.artifacts) - UNTRAINED for entry in self.answers)


@dataclass(frozen=True)
class Search:
    """A study of `lathe search`, and its best score over the trials if it has one objective."""

    study: Value
    course: Value | None

    @property
    def objectives(self) -> list[str]:
        """The scores that were optimized."""
        return [objective.content["metric"] for objective in self.study.get("objectives") or ()]

    @property
    def trials(self) -> list[Value]:
        """Its trials, the best ones first."""
        best = self.study.content["best"]
        trials = list(self.study.get("trials") or ())
        return sorted(trials, key=lambda each: each.content["experiment"] not in best)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of training: the files of training and validation that have it."""

    name: str
    series: dict[str, Value]


@dataclass(frozen=True)
class ReportFacts:
    """Everything that the page shows; what the pipeline has not written yet is None or empty."""

    root: Path
    seed: int
    primary_metric: str
    commit: CheckoutCommit | None
    lock: Value | None
    stale: list[str]
    model: Value | None
    dataset: Value | None
    parameters: list[tuple[str, Value]]
    digests: list[tuple[str, Value, Value | None]]
    curves: list[Curve]
    training: Value | None
    freeze_proof: Value | None
    merge: Value | None
    estimate: Value | None
    splits: dict[str, SplitScores]
    parts: dict[str, dict[str, SplitScores]]  # scores of each dataset of a mixture alone, by split
    gates: Value | None
    pairwise: Value | None
    tasks: dict[str, SplitScores]
    sampled: dict[str, SplitScores]
    measured: dict[str, Value]
    data: Value | None
    lengths: Value | None
    samples: list[Sample]
    requests: list[str]
    worst: dict[str, list[Value]]
    reasons: dict[str, dict[int, str]]
    timings: list[tuple[str, Value]]
    searches: list[Search]

    @cached_property
    def best(self) -> str | None:
        """The artifact with the best validation score, a quantized one if there are any; None without scores."""
        if "validation" not in self.splits:
            return None
        report = self.splits["validation"].report.content
        scored = [name for name in report if report[name].get(self.primary_metric) is not None]
        quantized = list_gguf_types(scored)
        candidates = quantized or [name for name in scored if name == MERGED]
        return choose_best_artifact(report, candidates, self.primary_metric) if candidates else None

    @property
    def headline(self) -> tuple[str, SplitScores] | None:
        """The split that is reported: test, or validation where there is no test yet."""
        return next(((name, self.splits[name]) for name in ("test", "validation") if name in self.splits), None)

    @property
    def formats(self) -> dict[str, str]:
        """The format that each dataset of a mixture was read in."""
        columns = self.data.content["columns"] if self.data else []
        return {each["dataset"]: each.get("format", "") for each in columns if "dataset" in each}

    @property
    def origins(self) -> list[tuple[str, Value]]:
        """Where the base model, the dataset, and the datasets of a mixture are from."""
        parts = list(self.dataset.get("datasets") or ()) if self.dataset else []
        named = [("base model", self.model), ("dataset", self.dataset)]
        named += [("dataset of the mixture", part) for part in parts]
        return [(what, source) for what, source in named if source]

    def request(self, row: int) -> str | None:
        """Return the prompt of a validation row; None if the data are not here."""
        return self.requests[row] if row < len(self.requests) else None

    def rows(self, artifact: str, split: str) -> Value | None:
        """Return how many rows of a split the artifact answered."""
        measured = self.measured.get(artifact)
        splits = measured.get("splits") if measured else None
        return next((entry.get("rows") for entry in splits or () if entry.content["split"] == split), None)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The metrics of an experiment that its row shows, each with its file and the keys there."""
        summary = "metrics/evaluate/summary.json"
        names = list(dict.fromkeys([MERGED, self.best or MERGED]))
        primary = {f"{name}.{self.primary_metric}": (summary, self.primary_metric, name) for name in names}
        return {
            **primary,
            "best.bytes": (summary, "best", "bytes"),
            "validation loss": ("metrics/train/metrics.json", "eval", "loss"),
            "gates passed": (summary, "gates_passed"),
        }

    def speed(self, artifact: str) -> Value | None:
        """Return the tokens that the artifact generated per second."""
        generate = dict(self.timings).get("generate")
        items = list(generate.get("items") or ()) if generate else []
        item = next((entry for entry in items if entry.content["item"] == artifact), None)
        return item.get("tokens_per_second") if item else None


def gather_facts(root: Path, *, seed: int, primary_metric: str) -> ReportFacts:
    """Read the files of the stages below `root`; `seed` chooses the sampled rows.

    Raises InputError if there are none, or if a file is damaged.
    """
    if not any((root / "metrics").rglob("*.json")):
        raise InputError(
            f"{root / 'metrics'}: nothing has been measured; run `make repro` first", code="nothing-measured"
        )
    reports = {name: read_report(root, f"metrics/evaluate/{name}.json") for name in ("validation", "test")}
    splits = {name: SplitScores(report) for name, report in reports.items() if report}
    artifacts = list(dict.fromkeys(name for split in splits.values() for name in split.artifacts))
    lock = read_value(root, "dvc.lock")
    requests = _read_requests(root)
    return ReportFacts(
        root=root,
        seed=seed,
        primary_metric=primary_metric,
        commit=_read_commit(root),
        lock=lock,
        stale=_list_stale(root, lock),
        model=_read_origin(root, "model"),
        dataset=_read_origin(root, "dataset"),
        parameters=_select_parameters(lock),
        digests=_list_digests(lock),
        curves=_read_curves(root),
        training=read_value(root, "metrics/train/metrics.json"),
        freeze_proof=read_value(root, "metrics/train/freeze_proof.json"),
        merge=read_value(root, "metrics/merge/report.json"),
        estimate=read_value(root, "metrics/estimate/training.json"),
        splits=splits,
        parts=_read_parts(root),
        gates=read_report(root, "metrics/evaluate/gates.json"),
        pairwise=read_report(root, "metrics/evaluate/pairwise.json"),
        tasks=_read_scores(root, "benchmark"),
        sampled=_read_scores(root, "samples"),
        measured={name: value for name in artifacts if (value := read_value(root, f"metrics/generate/{name}.json"))},
        data=read_value(root, "metrics/preprocess/report.json"),
        lengths=read_value(root, "metrics/preprocess/lengths.csv"),
        samples=_sample_rows(root, artifacts, requests, seed),
        requests=requests,
        worst=_read_worst(root, artifacts),
        reasons=_read_reasons(root, artifacts),
        timings=_read_timings(root),
        searches=_read_searches(root),
    )


def _read_scores(root: Path, name: str) -> dict[str, SplitScores]:
    report = read_report(root, f"metrics/evaluate/{name}.json")
    return {name: SplitScores(scores) for name, scores in report.items() if scores.content} if report else {}


def _read_parts(root: Path) -> dict[str, dict[str, SplitScores]]:
    report = read_report(root, "metrics/evaluate/datasets.json")
    if not report:
        return {}
    return {split: {name: SplitScores(part) for name, part in parts.items()} for split, parts in report.items()}


def _read_origin(root: Path, fetched: str) -> Value | None:
    metrics = read_value(root, f"metrics/fetch/{fetched}.json")
    return metrics.get("origin", 0) if metrics else None


def _read_searches(root: Path) -> list[Search]:
    studies = sorted((root / "metrics/search").glob("*/study.json"))
    names = [str(file.relative_to(root).parent) for file in studies]
    return [
        Search(study, read_value(root, f"{name}/course.tsv"))
        for name in names
        if (study := read_value(root, f"{name}/study.json"))
    ]


def _select_parameters(lock: Value | None) -> list[tuple[str, Value]]:
    """Return the key parameters that the adapter was trained with; params.yaml may have changed since."""
    used = lock.get("stages", "train", "params", "params.yaml") if lock else None
    if used is None:
        return []
    parameters = [(".".join(steps), used.get(*steps)) for steps in KEY_PARAMETERS]
    in_4_bits = used.get("quantization", "load_in_4bit")
    applies = {
        "lora": used.content["training"]["tuning"] == "lora",
        "quantization.bnb_4bit_quant_type": bool(in_4_bits and in_4_bits.content),
    }
    return [
        (name, value)
        for name, value in parameters
        if value is not None and applies.get(name, applies.get(name.partition(".")[0], True))
    ]


def _list_digests(lock: Value | None) -> list[tuple[str, Value, Value | None]]:
    """Return path, digest and bytes of the outputs that a file can be traced by."""
    outs = {out.content["path"]: out for out in _iterate_outputs(lock)}
    names = [*TRACED, *(path for path in outs if path.startswith("models/gguf/"))]
    traced = [(name, outs[name].get("md5"), outs[name].get("size")) for name in names if name in outs]
    return [(name, digest, size) for name, digest, size in traced if digest]


def _list_stale(root: Path, lock: Value | None) -> list[str]:
    """Return the files of metrics/ that differ from dvc.lock."""
    return [
        path
        for path, digest in ((out.content["path"], out.content.get("md5", "")) for out in _iterate_outputs(lock))
        if path.startswith("metrics/") and (root / path).is_file() and hash_path(root / path) != digest
    ]


def _iterate_outputs(lock: Value | None) -> Iterator[Value]:
    for _, stage in lock.get("stages").items() if lock else ():  # type: ignore[union-attr]
        yield from stage.get("outs") or ()


def _read_commit(root: Path) -> CheckoutCommit | None:
    sha = find_head(root)
    if sha is None:
        return None
    shown = ("--", ".", ":!metrics", ":!dvc.lock")
    changes = try_git("status", "--porcelain", "--untracked-files=no", *shown, root=root)
    return CheckoutCommit(sha, changed=bool(changes))


def _read_curves(root: Path) -> list[Curve]:
    """Return the curves, the losses first; those of training and validation with one name are one."""
    folder = root / "metrics/train/plots/metrics"
    found: dict[str, dict[str, Value]] = {}
    for file in sorted(folder.rglob("*.tsv")):
        parts = list(file.relative_to(folder).with_suffix("").parts)
        side = next((part for part in parts if part in SIDES), None)
        table = read_value(root, str(file.relative_to(root)))
        if side and table and table.content:
            parts.remove(side)
            found.setdefault("/".join(parts), {})[SIDES[side]] = table
    names = sorted(found, key=lambda name: (not name.endswith("loss"), name))
    return [Curve(name, dict(sorted(found[name].items()))) for name in names if name != "tokens"]


def _sample_rows(root: Path, artifacts: Sequence[str], requests: list[str], seed: int) -> list[Sample]:
    """Return the same rows of the validation split for the same seed, in their order."""
    answered = _read_answers(root, artifacts)
    if not answered:
        return []
    rows = min(len(answers) for answers in answered.values())
    first = next(iter(answered.values()))
    asked = [row for row in range(rows) if first[row]["finish_reason"] is not None]  # and no document
    chosen = sorted(random.Random(seed).sample(asked, min(SAMPLED_ROWS, len(asked))))
    return [_build_sample(row, answered, requests) for row in chosen]


def _read_answers(root: Path, artifacts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    files = {name: root / f"data/generated/{name}/validation.jsonl" for name in artifacts}
    return {name: read_jsonl(file) for name, file in files.items() if file.is_file()}


def _read_requests(root: Path) -> list[str]:
    """Return the prompt of each validation row, without the template's markers; empty if the data are not here."""
    rows = read_value(root, "data/processed/validation.jsonl")
    return ["\n\n".join(_format_turns(row["messages"][:-1])) for row in rows.content] if rows else []


def _format_turns(messages: list[dict[str, Any]]) -> list[str]:
    contents = [str(message.get("content") or "") for message in messages]
    if len(messages) == 1:
        return contents
    return [f"{message['role']}: {content}" for message, content in zip(messages, contents, strict=True)]


def _build_sample(row: int, answered: dict[str, list[dict[str, Any]]], requests: list[str]) -> Sample:
    first = next(iter(answered.values()))[row]
    answers: dict[tuple[str, bool], list[str]] = {}
    for name, rows in answered.items():
        cut = rows[row]["finish_reason"] != "stop"
        answers.setdefault((rows[row]["completion"], cut), []).append(name)
    return Sample(
        row=row,
        request=requests[row] if row < len(requests) else first["prompt"],
        reference=first["reference"],
        answers=sorted(
            (
                SampledAnswer(names, text, cut=cut, is_reference=text == first["reference"])
                for (text, cut), names in answers.items()
            ),
            key=lambda answer: not answer.is_reference,
        ),
    )


def _read_worst(root: Path, artifacts: Sequence[str]) -> dict[str, list[Value]]:
    """Return each artifact's first scored validation rows, worst first, but those whose answer is the reference."""
    found: dict[str, list[Value]] = {}
    for name in artifacts:
        rows = read_value(root, f"data/scored/{name}/validation.jsonl")
        if rows:
            asked = (row for row in rows if row.content["finish_reason"] is not None)  # and no document
            wrong = (row for row in asked if row.content["completion"] != row.content["reference"])
            found[name] = list(itertools.islice(wrong, WORST_ROWS))
    return found


def _read_reasons(root: Path, artifacts: Sequence[str]) -> dict[str, dict[int, str]]:
    """Return the judge's reasons by artifact and validation row; empty without a judge."""
    verdicts = {name: read_value(root, f"data/judged/{name}/validation.jsonl") for name in artifacts}
    return {
        name: {verdict["row"]: verdict["reason"] for verdict in listed.content}
        for name, listed in verdicts.items()
        if listed
    }


def _read_timings(root: Path) -> list[tuple[str, Value]]:
    """Return the timings of each stage, in the order of dvc.yaml."""
    files = {file.stem: file for file in sorted((root / "metrics/timings").glob("*.json"))}
    pipeline = read_value(root, "dvc.yaml")
    order = list(pipeline.content["stages"]) if pipeline else []
    names = sorted(files, key=lambda name: order.index(name) if name in order else len(order))
    return [(name, value) for name in names if (value := read_report(root, f"metrics/timings/{name}.json"))]
