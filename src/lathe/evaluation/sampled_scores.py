"""Scores of sampled answers: means over several answers to each row, how much they vary, and pass@k.

All of them are functions of sums over rows, so that intervals and differences come from resamples of the rows, as for
greedy answers: the samples of a row belong together.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lathe.common.errors import InputError
from lathe.common.jsonl import iterate_jsonl
from lathe.common.paths import remove_unless
from lathe.config.artifacts import get_file_name
from lathe.evaluation.clusters import CLUSTER
from lathe.evaluation.evaluate import AnswerRow, Resampling, ScoreDefinition, evaluate, strip_thought
from lathe.evaluation.metrics import compute_metric
from lathe.evaluation.text_metrics import Statistics

# Scores that say whether an answer is right, and those that need more than the answer and its reference.
PASSING = ("exact_match", "tool_calls")
_NOT_OF_SAMPLES = ("bert_score", "judge", "win_rate", "combined", "perplexity", "kl")


def list_sampled(files: Sequence[str]) -> list[str]:
    """Return the artifacts whose files are listed in sampling.files: `merged` for merged-f16."""
    return [name.removesuffix("-f16") for name in files]


def remove_unlisted_files(folder: Path, files: Sequence[str]) -> None:
    """Remove what is kept, in `folder/FILE`, of files that were taken off the list."""
    remove_unless(folder, lambda path: path.name in files or not path.is_dir())


def read_samples(file: Path, *, strip_thinking: bool) -> list[AnswerRow]:
    """Return the rows of a split that an artifact sampled, each with its answers under `samples`.

    Raises InputError if there are none, or the rows do not have equally many.
    """
    rows: dict[int, list[AnswerRow]] = {}
    for answer in iterate_jsonl(file):
        rows.setdefault(answer["row"], []).append(strip_thought(answer) if strip_thinking else answer)
    if len({len(answers) for answers in rows.values()}) != 1:
        raise InputError(f"{file}: no row, or rows with more samples than others; run `dvc repro`", code="samples")
    return [{"row": number, "samples": answers} for number, answers in rows.items()]


def evaluate_samples(
    folder: Path,
    artifacts: Sequence[str],
    split: str,
    answered: Sequence[AnswerRow],
    scores: Sequence[ScoreDefinition],
    bytes_of: Mapping[str, int],
    resampling: Resampling,
    *,
    strip_thinking: bool,
) -> dict[str, dict[str, Any]]:
    """Return the report of a split on `folder/FILE/SPLIT.jsonl`, as `evaluate` has it; {} without artifacts.

    Each score is the mean over all answers. `NAME_pass_at_K` is the share of rows of which at least one of K answers is
    right, estimated from all samples without bias (Chen et al. 2021, Evaluating Large Language Models Trained on Code).
    `spread` has for each score the standard deviation between runs that draw one answer to each row; `samples` is how
    many were drawn. `answered` are the rows of the split as they were answered greedily, with their clusters. Scores
    that need more than an answer and its reference are left out. Raises InputError as `read_samples`, and if the
    artifacts answered other rows.
    """
    if not artifacts:
        return {}
    names = {artifact: get_file_name(artifact).removesuffix(".gguf") for artifact in artifacts}
    files = {artifact: folder / name / f"{split}.jsonl" for artifact, name in names.items()}
    answers = {artifact: read_samples(file, strip_thinking=strip_thinking) for artifact, file in files.items()}
    first = artifacts[0]
    asked = [(row["row"], row["samples"][0]["reference"]) for row in answers[first]]
    samples = len(answers[first][0]["samples"])
    for artifact, rows in answers.items():
        own = [(row["row"], row["samples"][0]["reference"]) for row in rows]
        if own != asked or len(rows[0]["samples"]) != samples:
            raise InputError(
                f"{files[artifact]}: holds other rows or samples than {first} has; run `dvc repro` again",
                code="different-rows",
            )
    of_answers = [score for score in scores if score.name not in _NOT_OF_SAMPLES]
    for row in (row for rows in answers.values() for row in rows):
        row[CLUSTER] = answered[row["row"]].get(CLUSTER)
    definitions = [ScoreDefinition(score.name, partial(_average, score), score.compute) for score in of_answers]
    for score in (score for score in of_answers if score.name in PASSING):
        for k in list_pass_sizes(samples):
            name = f"{score.name}_pass_at_{k}"
            definitions.append(ScoreDefinition(name, partial(_pass_at, score, k), partial(compute_metric, score.name)))
    report = evaluate(answers, {}, bytes_of, definitions, resampling)
    for artifact, rows in answers.items():
        report[artifact]["samples"] = samples
        report[artifact]["spread"] = [
            {"metric": score.name, "deviation": deviation}
            for score in of_answers
            if (deviation := _compute_spread(score, rows, samples)) is not None
        ]
    return report


def list_pass_sizes(samples: int) -> list[int]:
    """Return the K of pass@K that are shown: 2, 4, 8, … up to the number of samples, and that number."""
    return sorted({2**power for power in range(1, samples.bit_length())} | {samples})


def compute_pass_at(k: int, *, samples: int, right: float) -> float:
    """Return the probability that k of the samples, drawn without putting back, hold one of those that are right."""
    wrong = samples - round(right)
    return 1 - math.comb(wrong, k) / math.comb(samples, k)


def _average(score: ScoreDefinition, row: AnswerRow) -> Statistics:
    counted = [score.get_statistics(answer) for answer in row["samples"]]
    return [sum(values) / len(counted) for values in zip(*counted, strict=True)]


def _pass_at(score: ScoreDefinition, k: int, row: AnswerRow) -> Statistics:
    counted = [score.get_statistics(answer) for answer in row["samples"]]
    if not all(weight for _, weight in counted):
        return (0.0, 0.0)  # the score does not apply to the row, such as calls where there are no tools
    return (compute_pass_at(k, samples=len(counted), right=sum(value for value, _ in counted)), 1.0)


def _compute_spread(score: ScoreDefinition, rows: Sequence[AnswerRow], samples: int) -> float | None:
    values = [
        float(score.compute(score.compute_statistics([row["samples"][sample] for row in rows]).sum(axis=0)))
        for sample in range(samples)
    ]
    return float(f"{statistics.stdev(values):.4g}") if np.isfinite(values).all() else None
