"""What one answer is worth beside its reference, and the numbers about it that a score of many answers is made from.

Pure: two texts in, numbers out. Words are of any script: letters, marks and digits that stand together, and each
character by itself where a script puts no spaces between words.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import regex
from rouge_score import rouge_scorer, tokenizers
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lathe.evaluation import answer_checks

Normalization = Literal["none", "text", "json"]
# The numbers that are added up over rows; for a mean (value, 1), or (0, 0) where the row says nothing.
Statistics = Sequence[float]
OfPair = Callable[[str, str], Statistics]

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--{_UNSPACED}]+", regex.VERSION1)
_NOT_A_NUMBER = (float("nan"), 1.0)


def words(text: str) -> list[str]:
    """Return the words of a text, case and punctuation aside, equal however their accents are encoded."""
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def exact_match(
    completion: str, reference: str, *, normalize: Normalization = "none", answer_pattern: str | None = None
) -> float:
    r"""Return 1 where the two are equal, white space at both ends aside.

    With `answer_pattern`, such as `#### (\S+)` of GSM8K, the first group of its last match is compared instead of the
    whole; a completion without a match is wrong, a reference without one is compared whole. `normalize` also overlooks:
    text, case, punctuation and the amount of white space; json, the order of keys, white space and 1 against 1.0.
    """
    if answer_pattern is not None:
        given, wanted = _extracted(completion, answer_pattern), _extracted(reference, answer_pattern)
        if given is None:
            return 0.0
        completion, reference = given, reference if wanted is None else wanted
    if answer_checks.exact_match(completion, reference):
        return 1.0
    match normalize:
        case "text":
            return float(_plain(completion) == _plain(reference))
        case "json":  # all fields are equal, and there is none beside them
            return float(answer_checks.json_fields(completion, reference) == 1)
    return 0.0


def token_f1(completion: str, reference: str) -> float:
    """Return the F1 of the completion's words against the reference's, each counted as often as it stands (SQuAD).

    Two texts without words are equal; articles are words like others, as not every language has them.
    """
    given, wanted = Counter(words(completion)), Counter(words(reference))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def distinct(completion: str, n: int) -> float | None:
    """Return the share of different ones among an answer's n-grams of words; None where it has no n-gram."""
    found = words(completion)
    grams = list(zip(*(found[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def statistics(metrics: Sequence[str], *, normalize: Normalization, answer_pattern: str | None) -> dict[str, OfPair]:
    """Return what takes (completion, reference) to its statistics, for each of `metrics` that is about texts alone.

    NaN stands for a metric that does not apply to the reference, and makes the score of all rows NaN.
    """
    known: dict[str, OfPair] = {
        "exact_match": _mean(partial(exact_match, normalize=normalize, answer_pattern=answer_pattern)),
        "token_f1": _mean(token_f1),
        "json_valid": _of_json(answer_checks.json_valid),
        "json_fields": _of_json(answer_checks.json_fields),
        "rouge_1": _rouge("rouge1"),
        "rouge_2": _rouge("rouge2"),
        "rouge_l": _rouge("rougeL"),
        "chrf": _sacrebleu(CHRF()),
        "bleu": _sacrebleu(BLEU(effective_order=True, force=True)),
        "length_ratio": lambda completion, reference: (len(completion), len(reference)),
        "distinct_1": _distinct(1),
        "distinct_2": _distinct(2),
    }
    return {metric: known[metric] for metric in metrics if metric in known}


class _Words(tokenizers.Tokenizer):
    """The package's own tokenizer keeps a-z and 0-9 alone: every Russian text would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _mean(score: Callable[[str, str], float]) -> OfPair:
    return lambda completion, reference: (score(completion, reference), 1.0)


def _of_json(score: Callable[[str, str], float]) -> OfPair:
    return lambda completion, reference: (
        (score(completion, reference), 1.0) if answer_checks.json_valid(reference, reference) else _NOT_A_NUMBER
    )


def _rouge(kind: str) -> OfPair:
    """F1 of common n-grams, or of the longest common subsequence of words (Lin 2004)."""
    scorer = rouge_scorer.RougeScorer([kind], tokenizer=_Words())
    return lambda completion, reference: (scorer.score(reference, completion)[kind].fmeasure, 1.0)


def _sacrebleu(metric: BLEU | CHRF) -> OfPair:
    # Not public, but what the package's own bootstrap is made from: counts of a pair, to be added up over pairs.
    return lambda completion, reference: metric._extract_corpus_statistics([completion], [[reference]])[0]


def _distinct(n: int) -> OfPair:
    def of_pair(completion: str, reference: str) -> Statistics:
        share = distinct(completion, n)
        return (0.0, 0.0) if share is None else (share, 1.0)

    return of_pair


def _extracted(text: str, pattern: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    return (matches[-1][1] or "") if matches else None


def _plain(text: str) -> str:
    kept = "".join(
        " " if unicodedata.category(character).startswith("P") else character
        for character in unicodedata.normalize("NFKC", text).casefold()
    )
    return " ".join(kept.split())
