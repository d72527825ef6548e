"""From generated answers to one report per split: scores by artifact, how sure they are, and what each step cost.

Validation steers (gates, the best file), test is reported. Every number of a report is a function of sums over rows, so
that its interval and its differences come from the same resamples of the same rows.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.config.params import BertScore
from lathe.evaluation import bootstrap, permutation_test, text_metrics
from lathe.evaluation.metrics import LOWER_IS_BETTER, Array, combined, goodness, value

# What every artifact is compared with: what training gave, what quantization took.
COMPARED_WITH = ("base", "merged")

# One answer as `generate` wrote it, with the judge's mark and BERTScore where there are any.
Row = dict[str, Any]
# The rows of every artifact by its name: the same rows, in the same order.
Answers = dict[str, list[Row]]


@dataclass(frozen=True)
class Score:
    """What a score takes from a row, to be added up, and what it makes of the sums: (..., k) -> (...)."""

    name: str
    of_row: Callable[[Row], text_metrics.Statistics]
    of_sums: Callable[[Array], Array]

    def statistics(self, rows: Sequence[Row]) -> Array:
        """Return the statistics of rows, (rows, k)."""
        return np.array([self.of_row(row) for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class Sampling:
    """How often rows are resampled, and from which seed."""

    samples: int
    seed: int


def read_general(generated: Path, artifacts: Sequence[str]) -> Answers:
    """Read `<artifact>/general.jsonl` of the artifacts that have one, a row per paragraph."""
    files = {artifact: generated / artifact / "general.jsonl" for artifact in artifacts}
    return {artifact: read_jsonl(file) for artifact, file in files.items() if file.exists()}


def add_bert_score(splits: Sequence[Answers], settings: BertScore, *, seed: int, cache: Path) -> None:
    """Put into every row how alike completion and reference are to the encoder, as `bert_score`.

    Raises InputError where the encoder cannot be had, or does not fit what is asked of it.
    """
    from lathe.evaluation import bert_score

    assert settings.model
    encoder = bert_score.Encoder(paths.MODEL_ENCODER, num_layers=settings.num_layers, max_length=settings.max_length)
    rows = [row for answers in splits for of_artifact in answers.values() for row in of_artifact]
    pairs = {(row["completion"], row["reference"]) for row in rows}
    # One baseline for both splits, or their scores could not be compared.
    references = [row["reference"] for answers in splits for row in answers["base"]]
    unrelated = bert_score.unrelated_pairs(references, seed) if settings.baseline == "shuffled" else []
    scored = bert_score.scores({*pairs, *unrelated}, encoder, batch_size=settings.batch_size, cache=cache)
    baseline = 0.0
    if unrelated:
        baseline = sum(scored[pair] for pair in unrelated) / len(unrelated)
    elif settings.baseline is not None:
        baseline = bert_score.baseline_of_file(paths.ROOT / settings.baseline, encoder.num_layers)
    for row in rows:
        row["bert_score"] = bert_score.rescale(scored[row["completion"], row["reference"]], baseline)


def read_answers(generated: Path, judged: Path | None, artifacts: Sequence[str], split: str) -> Answers:
    """Read `<artifact>/<split>.jsonl` of both folders, the judge's marks into the rows' `judge`.

    Raises InputError where artifacts did not answer the same rows.
    """
    answers: Answers = {}
    for artifact in artifacts:
        rows = read_jsonl(generated / artifact / f"{split}.jsonl")
        if not rows:
            raise InputError(f"{generated / artifact / split}.jsonl: holds no row; run `dvc repro` again")
        if judged is not None:
            for verdict in read_jsonl(judged / artifact / f"{split}.jsonl"):
                rows[verdict["row"]]["judge"] = verdict["score"]
        answers[artifact] = rows
        first = artifacts[0]
        if [row["reference"] for row in rows] != [row["reference"] for row in answers[first]]:
            raise InputError(
                f"{generated / artifact / split}.jsonl: holds other rows than {first} has; run `dvc repro` again"
            )
    return answers


def row_scores(
    metrics: Sequence[str],
    *,
    normalize: text_metrics.Normalization,
    answer_pattern: str | None,
    bert_score_weight: float,
    judge_weight: float | None,
) -> list[Score]:
    """Return every score that is made from rows, in the order of the report; `judge_weight` is None without a judge."""
    of_texts = text_metrics.statistics(metrics, normalize=normalize, answer_pattern=answer_pattern)
    of_rows: dict[str, Callable[[Row], text_metrics.Statistics]] = {
        name: _of_texts(of_pair) for name, of_pair in of_texts.items()
    }
    of_rows["bert_score"] = lambda row: (row["bert_score"], 1.0)
    chosen = [Score(name, of_rows[name], functools.partial(value, name)) for name in metrics]
    if judge_weight is not None:
        chosen.append(Score("judge", _judged, functools.partial(value, "judge")))
    if "bert_score" in metrics:
        both = combined(bert_score_weight, judge_weight)
        chosen.append(Score("combined", lambda row: (row["bert_score"], 1.0, *_judged(row)), both))
    chosen += [
        Score(
            "perplexity",
            lambda row: (_number(row["nll"]), row["reference_tokens"]),
            functools.partial(value, "perplexity"),
        ),
        Score("kl", _kl, functools.partial(value, "kl")),
        Score("stop_rate", lambda row: (row["finish_reason"] == "stop", 1.0), functools.partial(value, "stop_rate")),
    ]
    return chosen


GENERAL = Score(
    "general_perplexity",
    lambda row: (_number(row["nll"]), row["tokens"]),
    functools.partial(value, "general_perplexity"),
)


def evaluate(
    answers: Answers, general: Answers, bytes_of: Mapping[str, int], scores: Sequence[Score], sampling: Sampling
) -> dict[str, dict[str, Any]]:
    """Return the report: by artifact every score, the file's bytes, and the lists `intervals` and `deltas`.

    A score is null where it does not apply. Lists, because DVC makes columns of everything else. `general` holds the
    paragraphs of general text of the artifacts that read them.
    """
    report: dict[str, dict[str, Any]] = {artifact: {} for artifact in answers}
    intervals: dict[str, list[dict[str, Any]]] = {artifact: [] for artifact in answers}
    deltas: dict[str, list[dict[str, Any]]] = {artifact: [] for artifact in answers}
    for rows, of_them in ((answers, scores), (general, [GENERAL])):
        measured = {artifact: _Measured(its, of_them, sampling) for artifact, its in rows.items()}
        for artifact in answers:
            for score in of_them:
                found = measured[artifact].values[score.name] if artifact in measured else None
                report[artifact][score.name] = _rounded(found)
            if artifact in measured:
                intervals[artifact] += measured[artifact].intervals()
        for artifact, reference in _comparisons(list(measured)):
            deltas[artifact] += measured[artifact].deltas(measured[reference], reference)
    return {
        artifact: {
            **values,
            "bytes": bytes_of[artifact],
            "intervals": intervals[artifact],
            "deltas": sorted(deltas[artifact], key=lambda delta: COMPARED_WITH.index(delta["to"])),
        }
        for artifact, values in report.items()
    }


def scored_rows(rows: Sequence[Row], scores: Sequence[Score], primary_metric: str) -> list[Row]:
    """Return the rows with their own scores, the worst first: by the primary metric, then by the others in their order.

    What does not apply to a row is null, and comes last.
    """
    values = {score.name: score.of_sums(score.statistics(rows)) for score in scores}
    scored = [
        {
            "row": index,
            **{key: row[key] for key in ("prompt", "reference", "completion", "finish_reason")},
            "scores": {name: _rounded(float(of_rows[index])) for name, of_rows in values.items()},
        }
        for index, row in enumerate(rows)
    ]
    order = sorted(values, key=lambda name: name != primary_metric)

    def badness(row: Row) -> list[tuple[bool, float]]:
        found = row["scores"]
        return [(found[name] is None, 0.0 if found[name] is None else goodness(name, found[name])) for name in order]

    return sorted(scored, key=badness)


def plot_rows(reports: Mapping[str, Mapping[str, Mapping[str, Any]]], primary_metric: str) -> list[dict[str, Any]]:
    """Flatten the reports of all splits to one row per split, artifact and score, for `dvc plots`.

    What is the better the lower it is has a scale of its own and is left out, unless it is the primary one.
    """
    rows = []
    for split, report in reports.items():
        for artifact, scores in report.items():
            ends = {interval["metric"]: interval for interval in scores["intervals"]}
            for metric, found in scores.items():
                if metric in LOWER_IS_BETTER - {primary_metric} or isinstance(found, list) or found is None:
                    continue
                rows.append(
                    {
                        "split": split,
                        "artifact": artifact,
                        "metric": metric,
                        "score": found,
                        "low": ends[metric]["low"] if metric in ends else found,
                        "high": ends[metric]["high"] if metric in ends else found,
                        "primary": "yes" if metric == primary_metric else "no",
                        "megabytes": round(scores["bytes"] / 1e6, 3),
                    }
                )
    return rows


class _Measured:
    """One artifact's scores on its rows, on resamples of them, and without each row in turn."""

    def __init__(self, rows: Sequence[Row], scores: Sequence[Score], sampling: Sampling) -> None:
        self.scores, self.sampling = scores, sampling
        tables = [score.statistics(rows) for score in scores]
        ends = np.cumsum([table.shape[1] for table in tables])
        self.columns = {
            score.name: slice(end - table.shape[1], end) for score, table, end in zip(scores, tables, ends, strict=True)
        }
        self.statistics = np.hstack(tables)
        self.sums = self.statistics.sum(axis=0)
        resampled = bootstrap.bootstrap_sums(self.statistics, sampling.samples, sampling.seed)
        left_out = bootstrap.left_out_sums(self.statistics)
        self.values = {name: float(found) for name, found in self._of(self.sums).items()}
        self.resampled, self.left_out = self._of(resampled), self._of(left_out)

    def _of(self, sums: Array) -> dict[str, Array]:
        return {score.name: score.of_sums(sums[..., self.columns[score.name]]) for score in self.scores}

    def intervals(self) -> list[dict[str, Any]]:
        found = []
        for name, observed in self.values.items():
            if math.isfinite(observed):
                ends = bootstrap.interval(observed, self.resampled[name], self.left_out[name])
                if ends is not None:
                    found.append({"metric": name, "low": _rounded(ends[0]), "high": _rounded(ends[1])})
        return found

    def deltas(self, other: "_Measured", to: str) -> list[dict[str, Any]]:
        swapped = permutation_test.swapped_sums(
            self.statistics - other.statistics, self.sampling.samples, self.sampling.seed
        )
        ours, theirs = self._of(self.sums - swapped), self._of(other.sums + swapped)
        found = []
        for name, observed in self.values.items():
            delta = observed - other.values[name]
            if not math.isfinite(delta):
                continue
            ends = bootstrap.interval(
                delta, self.resampled[name] - other.resampled[name], self.left_out[name] - other.left_out[name]
            )
            low, high = (None, None) if ends is None else map(_rounded, ends)
            p = permutation_test.p_value(delta, ours[name] - theirs[name])
            found.append(
                {"to": to, "metric": name, "delta": _rounded(delta), "low": low, "high": high, "p": round(p, 4)}
            )
        return found


def _comparisons(artifacts: Sequence[str]) -> list[tuple[str, str]]:
    """Return (artifact, what it is compared with): everything with base, and everything but base with merged."""
    return [
        (artifact, reference)
        for artifact in artifacts
        for reference in COMPARED_WITH
        if reference in artifacts and artifact not in (reference, "base")
    ]


def _of_texts(of_pair: text_metrics.OfPair) -> Callable[[Row], text_metrics.Statistics]:
    # Many artifacts answer a row with the same words.
    known = functools.cache(of_pair)
    return lambda row: known(row["completion"], row["reference"])


def _judged(row: Row) -> text_metrics.Statistics:
    mark = row.get("judge")
    return (0.0, 0.0) if mark is None else (mark, 1.0)


def _kl(row: Row) -> text_metrics.Statistics:
    """KL divergence is a mean over the row's tokens: weighted by them, rows make the mean over all tokens."""
    tokens = row["reference_tokens"]
    return _number(row["kl"]) * tokens, tokens


def _number(found: float | None) -> float:
    return math.nan if found is None else found


def _rounded(found: float | None) -> float | None:
    """Round to 4 decimals, small numbers to 3 digits; None for what is no number."""
    if found is None or not math.isfinite(found):
        return None
    if abs(found) < 1e-12:  # what rounding left of 0
        return 0.0
    return round(found, max(4, 2 - math.floor(math.log10(abs(found)))))
