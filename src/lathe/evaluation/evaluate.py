"""Evaluation: one report per split, with the scores of every artifact, their intervals, and their differences.

Validation steers (gates, best file); test is only reported. Every score is a function of sums over rows, so that all
intervals and differences come from the same resamples of the same rows.
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
from lathe.common.jsonl import iterate_jsonl, read_jsonl
from lathe.config.params import BertScore
from lathe.evaluation import bootstrap, permutation_test, text_metrics
from lathe.evaluation.call_scores import compute_call_f1, match_calls, score_calls
from lathe.evaluation.clusters import number_clusters, sum_clusters
from lathe.evaluation.detectable import find_detectable_difference
from lathe.evaluation.metric_order import LOWER_IS_BETTER, orient_score
from lathe.evaluation.metrics import Array, compute_metric, make_combined
from lathe.evaluation.pairwise import read_pairs

# What artifacts are compared with: base, for the effect of training; merged, for that of quantization.
COMPARED_WITH = ("base", "merged")

# A row of data/generated, with `judge` and `bert_score` if there are such scores.
AnswerRow = dict[str, Any]
# The rows by artifact: answers to the same prompts, in the same order.
AnswersByArtifact = dict[str, list[AnswerRow]]


@dataclass(frozen=True)
class ScoreDefinition:
    """A score: its statistics of one row, which are summed over rows, and its value for sums, (..., k) -> (...)."""

    name: str
    get_statistics: Callable[[AnswerRow], text_metrics.Statistics]
    compute: Callable[[Array], Array]

    def compute_statistics(self, rows: Sequence[AnswerRow]) -> Array:
        """Return the statistics of all rows, (rows, k)."""
        return np.array([self.get_statistics(row) for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class Resampling:
    """The number of resamples, and the seed."""

    samples: int
    seed: int


def read_general_text(generated: Path, artifacts: Sequence[str]) -> AnswersByArtifact:
    """Read `<artifact>/general.jsonl` of the artifacts that have one; a row is a paragraph of general text."""
    files = {artifact: generated / artifact / "general.jsonl" for artifact in artifacts}
    return {artifact: read_jsonl(file) for artifact, file in files.items() if file.exists()}


def add_bert_score(splits: Sequence[AnswersByArtifact], settings: BertScore, *, seed: int, cache: Path) -> None:
    """Add the BERTScore of answer and reference to every row, as `bert_score`.

    Raises InputError if the encoder cannot be loaded, or does not fit the settings.
    """
    from lathe.evaluation import bert_score

    assert settings.model
    encoder = bert_score.Encoder(paths.MODEL_ENCODER, num_layers=settings.num_layers, max_length=settings.max_length)
    rows = [row for answers in splits for answer_rows in answers.values() for row in answer_rows if _is_answered(row)]
    pairs = {(row["completion"], row["reference"]) for row in rows}
    # One baseline for both splits, so that their scores can be compared.
    references = [row["reference"] for answers in splits for row in answers["base"] if _is_answered(row)]
    unrelated = bert_score.draw_unrelated_pairs(references, seed) if settings.baseline == "shuffled" else []
    scored = bert_score.compute_scores({*pairs, *unrelated}, encoder, batch_size=settings.batch_size, cache=cache)
    baseline = 0.0
    if unrelated:
        baseline = sum(scored[pair] for pair in unrelated) / len(unrelated)
    elif settings.baseline is not None:
        baseline = bert_score.read_baseline(paths.ROOT / settings.baseline, encoder.num_layers)
    for row in rows:
        row["bert_score"] = bert_score.rescale(scored[row["completion"], row["reference"]], baseline)


def read_answers(
    generated: Path,
    judged: Path | None,
    artifacts: Sequence[str],
    split: str,
    *,
    strip_thinking: bool,
    pairwise: bool = False,
) -> AnswersByArtifact:
    """Read `<artifact>/<split>.jsonl` of both folders; the judge's scores become `judge` of the rows.

    With `pairwise` they are 100 for an answer that wins against the other one and 0 for one that loses, and `pair` of a
    row is what `read_pairs` knows of it. With `strip_thinking`, completion and reference are what is said after a
    thought. Raises InputError if the artifacts did not answer the same rows.
    """
    answers: AnswersByArtifact = {}
    for artifact in artifacts:
        rows = read_jsonl(generated / artifact / f"{split}.jsonl")
        if not rows:
            raise InputError(
                f"{generated / artifact / split}.jsonl: holds no row; run `dvc repro` again", code="empty-file"
            )
        if strip_thinking:
            rows = [strip_thought(row) for row in rows]
        if judged is not None and pairwise:
            for number, pair in read_pairs(judged / artifact / f"{split}.jsonl").items():
                rows[number] |= {"judge": 100 * pair["preference"], "pair": pair}
        elif judged is not None:
            for verdict in read_jsonl(judged / artifact / f"{split}.jsonl"):
                rows[verdict["row"]]["judge"] = verdict["score"]
        answers[artifact] = rows
        first = artifacts[0]
        if [row["reference"] for row in rows] != [row["reference"] for row in answers[first]]:
            raise InputError(
                f"{generated / artifact / split}.jsonl: holds other rows than {first} has; run `dvc repro` again",
                code="different-rows",
            )
    return answers


def strip_thought(row: AnswerRow) -> AnswerRow:
    """Return the row with what is said after the thought as completion and reference."""
    if "answer" not in row:
        return row
    return {**row, "completion": row["answer"], "reference": row["reference_answer"]}


def define_scores(
    metrics: Sequence[str],
    *,
    normalize: text_metrics.Normalization,
    answer_pattern: str | None,
    bert_score_weight: float,
    judge_weight: float | None,
    judge_score: str = "judge",
) -> list[ScoreDefinition]:
    """Return the scores that are computed from rows, in the order of the report; `judge_weight` None: no judge.

    `judge_score` is `judge`, from 0 to 100, or `win_rate`, from 0 to 1.
    """
    text_statistics = text_metrics.select_statistics(metrics, normalize=normalize, answer_pattern=answer_pattern)
    statistics: dict[str, Callable[[AnswerRow], text_metrics.Statistics]] = {
        name: _cache_pair_statistics(of_pair) for name, of_pair in text_statistics.items()
    }
    statistics["tool_calls"] = lambda row: score_calls(row, score=match_calls)
    statistics["tool_calls_f1"] = lambda row: score_calls(row, score=compute_call_f1)
    statistics["bert_score"] = _get_bert_score_statistics
    scores = [_define_score(name, statistics[name]) for name in metrics]
    if judge_weight is not None:
        scores.append(_define_score(judge_score, JUDGE_STATISTICS[judge_score]))
    if "bert_score" in metrics:
        formula = make_combined(bert_score_weight, judge_weight)
        scores.append(
            ScoreDefinition(
                "combined", lambda row: (*_get_bert_score_statistics(row), *_get_judge_statistics(row)), formula
            )
        )
    scores += [
        _define_score("perplexity", lambda row: (_replace_none(row["nll"]), row["reference_tokens"])),
        _define_score("kl", _get_kl_statistics),
        _define_score("stop_rate", lambda row: (row["finish_reason"] == "stop", float(_is_answered(row)))),
    ]
    return scores


def _define_score(name: str, get_statistics: Callable[[AnswerRow], text_metrics.Statistics]) -> ScoreDefinition:
    return ScoreDefinition(name, get_statistics, functools.partial(_compute_score, name))


def _compute_score(name: str, sums: Array) -> Array:
    """Return the metric's value; NaN where nothing was summed, as no row was answered."""
    return np.where((sums == 0).all(axis=-1), np.nan, compute_metric(name, sums))


GENERAL_PERPLEXITY = _define_score("general_perplexity", lambda row: (_replace_none(row["nll"]), row["tokens"]))


def evaluate(
    answers: AnswersByArtifact,
    general: AnswersByArtifact,
    bytes_of: Mapping[str, int],
    scores: Sequence[ScoreDefinition],
    resampling: Resampling,
) -> dict[str, dict[str, Any]]:
    """Return the report: for each artifact every score, the file's `bytes`, and the lists `intervals` and `deltas`.

    A score that does not apply is None. Intervals and deltas are lists because DVC shows everything else as columns.
    `general` holds the rows of general text, of the artifacts that have any; `bytes_of` the file sizes. The
    `detectable` of a delta is the smallest true difference that these rows would have shown with a power of 80 %.
    """
    report: dict[str, dict[str, Any]] = {artifact: {} for artifact in answers}
    intervals: dict[str, list[dict[str, Any]]] = {artifact: [] for artifact in answers}
    deltas: dict[str, list[dict[str, Any]]] = {artifact: [] for artifact in answers}
    for rows_of, definitions in ((answers, scores), (general, [GENERAL_PERPLEXITY])):
        scored = {artifact: _ArtifactScores(rows, definitions, resampling) for artifact, rows in rows_of.items()}
        for artifact in answers:
            for definition in definitions:
                value = scored[artifact].values[definition.name] if artifact in scored else None
                report[artifact][definition.name] = _round_score(value)
            if artifact in scored:
                intervals[artifact] += scored[artifact].compute_intervals()
        for artifact, reference in _list_comparisons(list(scored)):
            deltas[artifact] += scored[artifact].compute_deltas(scored[reference], reference)
    return {
        artifact: {
            **values,
            "bytes": bytes_of[artifact],
            "intervals": intervals[artifact],
            "deltas": sorted(deltas[artifact], key=lambda delta: COMPARED_WITH.index(delta["to"])),
        }
        for artifact, values in report.items()
    }


def read_dataset_names(processed: Path) -> list[str]:
    """Return the name of the dataset of each row of a processed split of a mixture; [] without one."""
    names = [row.get("dataset") for row in iterate_jsonl(processed)]
    return [str(name) for name in names] if all(names) else []


def evaluate_datasets(
    answers: AnswersByArtifact,
    names: Sequence[str],
    bytes_of: Mapping[str, int],
    scores: Sequence[ScoreDefinition],
    resampling: Resampling,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the report on the rows of each dataset alone, by its name; nothing where one dataset has all of them.

    `names` are those of the split's rows, of which the first were answered.
    """
    asked = list(names[: len(next(iter(answers.values())))])
    distinct = list(dict.fromkeys(asked))
    if len(distinct) < 2:
        return {}
    return {
        name: evaluate(
            {
                artifact: [row for row, of in zip(rows, asked, strict=True) if of == name]
                for artifact, rows in answers.items()
            },
            {},
            bytes_of,
            scores,
            resampling,
        )
        for name in distinct
    }


def score_rows(rows: Sequence[AnswerRow], scores: Sequence[ScoreDefinition], primary_metric: str) -> list[AnswerRow]:
    """Return the rows with their own scores, the worst first: by the primary metric, then by the others in order.

    A score that does not apply to a row is None; such rows come last.
    """
    values = {definition.name: definition.compute(definition.compute_statistics(rows)) for definition in scores}
    scored = [
        {
            "row": index,
            **{key: row[key] for key in ("prompt", "reference", "completion", "finish_reason")},
            "scores": {name: _round_score(float(of_rows[index])) for name, of_rows in values.items()},
        }
        for index, row in enumerate(rows)
    ]
    order = sorted(values, key=lambda name: name != primary_metric)

    def get_sort_key(row: AnswerRow) -> list[tuple[bool, float]]:
        own = row["scores"]
        return [(own[name] is None, 0.0 if own[name] is None else orient_score(name, own[name])) for name in order]

    return sorted(scored, key=get_sort_key)


def make_plot_rows(reports: Mapping[str, Mapping[str, Mapping[str, Any]]], primary_metric: str) -> list[dict[str, Any]]:
    """Return one row per split, artifact and score of all reports, for `dvc plots`.

    Scores of which lower is better are left out, as they have another scale; the primary metric is always included.
    """
    rows = []
    for split, report in reports.items():
        for artifact, scores in report.items():
            ends = {interval["metric"]: interval for interval in scores["intervals"]}
            for metric, value in scores.items():
                if metric in LOWER_IS_BETTER - {primary_metric} or isinstance(value, list) or value is None:
                    continue
                rows.append(
                    {
                        "split": split,
                        "artifact": artifact,
                        "metric": metric,
                        "score": value,
                        "low": ends[metric]["low"] if metric in ends else value,
                        "high": ends[metric]["high"] if metric in ends else value,
                        "primary": "yes" if metric == primary_metric else "no",
                        "megabytes": round(scores["bytes"] / 1e6, 3),
                    }
                )
    return rows


class _ArtifactScores:
    """One artifact's scores: on its rows, on resamples of them, and with each row left out.

    Where rows have clusters, these are resampled and left out as a whole.
    """

    def __init__(
        self, rows: Sequence[AnswerRow], definitions: Sequence[ScoreDefinition], resampling: Resampling
    ) -> None:
        self.definitions, self.resampling = definitions, resampling
        tables = [definition.compute_statistics(rows) for definition in definitions]
        self.counted = {
            definition.name: _are_counts(table) for definition, table in zip(definitions, tables, strict=True)
        }
        ends = np.cumsum([table.shape[1] for table in tables])
        self.columns = {
            definition.name: slice(end - table.shape[1], end)
            for definition, table, end in zip(definitions, tables, ends, strict=True)
        }
        self.statistics = sum_clusters(np.hstack(tables), number_clusters(rows))
        self.is_clustered = len(self.statistics) < len(rows)
        self.sums = self.statistics.sum(axis=0)
        resampled = bootstrap.resample_sums(self.statistics, resampling.samples, resampling.seed)
        left_out = bootstrap.jackknife_sums(self.statistics)
        self.values = {name: float(value) for name, value in self._compute_values(self.sums).items()}
        self.resampled, self.left_out = self._compute_values(resampled), self._compute_values(left_out)

    def _compute_values(self, sums: Array) -> dict[str, Array]:
        return {
            definition.name: definition.compute(sums[..., self.columns[definition.name]])
            for definition in self.definitions
        }

    def compute_intervals(self) -> list[dict[str, Any]]:
        intervals = []
        for name, observed in self.values.items():
            if math.isfinite(observed):
                ends = bootstrap.compute_interval(observed, self.resampled[name], self.left_out[name])
                if ends is not None:
                    intervals.append({"metric": name, "low": _round_score(ends[0]), "high": _round_score(ends[1])})
        return intervals

    def compute_deltas(self, other: "_ArtifactScores", to: str) -> list[dict[str, Any]]:
        changes = permutation_test.permute_sums(
            self.statistics - other.statistics, self.resampling.samples, self.resampling.seed
        )
        ours, theirs = self._compute_values(self.sums - changes), self._compute_values(other.sums + changes)
        deltas = []
        for name, observed in self.values.items():
            delta = observed - other.values[name]
            if not math.isfinite(delta):
                continue
            resampled = self.resampled[name] - other.resampled[name]
            ends = bootstrap.compute_interval(delta, resampled, self.left_out[name] - other.left_out[name])
            low, high = (None, None) if ends is None else map(_round_score, ends)
            p = permutation_test.compute_p_value(delta, ours[name] - theirs[name])
            units = len(self.statistics)
            smallest = find_detectable_difference(resampled, units, counts=self.counted[name] and other.counted[name])
            deltas.append(
                {
                    "to": to,
                    "metric": name,
                    "delta": _round_score(delta),
                    "low": low,
                    "high": high,
                    "p": round(p, 4),
                    "detectable": _round_score(smallest),
                    **({"clusters": units} if self.is_clustered else {}),
                }
            )
        return deltas


def _are_counts(statistics: Array) -> bool:
    """Tell whether every row that counts is right or wrong, so that the score is a share of rows."""
    if statistics.shape[1] != 2:
        return False
    return bool(np.isin(statistics, (0.0, 1.0)).all() and (statistics[:, 0] <= statistics[:, 1]).all())


def _list_comparisons(artifacts: Sequence[str]) -> list[tuple[str, str]]:
    """Return (artifact, artifact to compare with): all others with base, and all but base with merged."""
    return [
        (artifact, reference)
        for artifact in artifacts
        for reference in COMPARED_WITH
        if reference in artifacts and artifact not in (reference, "base")
    ]


def _cache_pair_statistics(
    compute: text_metrics.PairStatistics,
) -> Callable[[AnswerRow], text_metrics.Statistics]:
    # Many artifacts give the same answer to a prompt.
    cached = functools.cache(compute)
    without_answer = tuple(0.0 for _ in compute("", ""))
    return lambda row: cached(row["completion"], row["reference"]) if _is_answered(row) else without_answer


def _is_answered(row: AnswerRow) -> bool:
    """Tell whether a row was answered; a document is not, and counts for its likelihood alone."""
    return row["finish_reason"] is not None


def _get_bert_score_statistics(row: AnswerRow) -> text_metrics.Statistics:
    return (row["bert_score"], 1.0) if _is_answered(row) else (0.0, 0.0)


def _get_judge_statistics(row: AnswerRow) -> text_metrics.Statistics:
    score = row.get("judge")
    return (0.0, 0.0) if score is None else (score, 1.0)


def _get_win_rate_statistics(row: AnswerRow) -> text_metrics.Statistics:
    score, rows = _get_judge_statistics(row)
    return score / 100, rows


JUDGE_STATISTICS = {"judge": _get_judge_statistics, "win_rate": _get_win_rate_statistics}


def _get_kl_statistics(row: AnswerRow) -> text_metrics.Statistics:
    """Return (sum of the KL divergence over the row's tokens, tokens): a row holds the mean over its tokens."""
    tokens = row["reference_tokens"]
    return _replace_none(row["kl"]) * tokens, tokens


def _replace_none(value: float | None) -> float:
    return math.nan if value is None else value


def _round_score(value: float | None) -> float | None:
    """Return the value rounded to 4 decimals, a small one to 3 significant digits; None for NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    if abs(value) < 1e-12:  # 0 up to rounding errors
        return 0.0
    return round(value, max(4, 2 - math.floor(math.log10(abs(value)))))
