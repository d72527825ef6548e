"""Scores: names of the metrics and other scores, and the remedy for a score that is not computed."""

from typing import Literal, get_args

from lathe.common.text import did_you_mean

# The metrics that evaluate.metrics may list.
Metric = Literal[
    "exact_match",
    "token_f1",
    "json_valid",
    "json_fields",
    "tool_calls",
    "tool_calls_f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "chrf",
    "bleu",
    "bert_score",
    "length_ratio",
    "distinct_1",
    "distinct_2",
]

# Scores that come from generation, whatever evaluate.metrics lists.
MEASURED = ("perplexity", "kl", "stop_rate", "general_perplexity", "bytes")

# Keys beside the scores of an artifact, in the reports of the stage evaluate, that are none.
NOT_SCORES = {"bytes", "intervals", "deltas", "documents", "engine", "lower_is_better", "samples", "spread"}


def suggest_remedy(score: str, computed: list[str]) -> str:
    """Return what to change so that the score is computed, or the name that may have been meant."""
    if score == "judge":
        return "set judge.enabled to true, and judge.mode to score"
    if score == "win_rate":
        return "set judge.enabled to true, and judge.mode to pairwise"
    if score in ("combined", "bert_score"):
        return "add bert_score to evaluate.metrics"
    return "add it to evaluate.metrics" if score in get_args(Metric) else did_you_mean(score, computed)
