"""Names of the scores that need no metric in `evaluate.metrics`, and the remedy for one that is not computed."""

from typing import Literal, get_args

from lathe.common.text import did_you_mean

# What evaluate.metrics may list.
Metric = Literal[
    "exact_match",
    "token_f1",
    "json_valid",
    "json_fields",
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

# What `evaluate` takes from generation, whatever evaluate.metrics lists.
MEASURED = ("perplexity", "kl", "stop_rate", "general_perplexity", "bytes")


def to_compute(score: str, computed: list[str]) -> str:
    """Return what to do for a score that is asked for and not computed."""
    if score == "judge":
        return "set judge.enabled to true"
    if score in ("combined", "bert_score"):
        return "add bert_score to evaluate.metrics"
    return "add it to evaluate.metrics" if score in get_args(Metric) else did_you_mean(score, computed)
