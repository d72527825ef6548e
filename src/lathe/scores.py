"""How good answers are, against references. Pure: texts in, numbers between 0 and 1 out."""

import json
import re
from collections.abc import Callable, Sequence

from rouge_score import rouge_scorer, tokenizers

Score = Callable[[Sequence[str], Sequence[str]], float | None]


def score(metrics: Sequence[str], completions: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Return each named metric's mean over the rows; None where it does not apply to these references.

    Raises ValueError where there are no rows or not as many completions as references.
    """
    if not references or len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions for {len(references)} references; both must be equal, not 0")
    return {metric: METRICS[metric](completions, references) for metric in metrics}


def exact_match(completions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of completions equal to their reference, white space at both ends aside."""
    return _mean([a.strip() == b.strip() for a, b in zip(completions, references, strict=True)])


def json_valid(completions: Sequence[str], references: Sequence[str]) -> float | None:
    """Return the share of completions that are one JSON value; None unless every reference is an object or array."""
    if not all(_is_json(text) and text.lstrip()[0] in "{[" for text in references):
        return None
    return _mean([_is_json(text) for text in completions])


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the longest common subsequence of words (Lin 2004), words of any script."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())
    return _mean([scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(completions, references, strict=True)])


METRICS: dict[str, Score] = {"exact_match": exact_match, "json_valid": json_valid, "rouge_l": rouge_l}


class _Words(tokenizers.Tokenizer):
    """The package's own tokenizer keeps a-z and 0-9 alone: every Russian text would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
