"""Text metrics: scores of one answer against its reference, and the statistics that corpus scores are made from.

Pure functions of two texts. Words are runs of letters, marks and digits of any script; in scripts without spaces
between words, each character is a word.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import regex
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lathe.common.bounded_regex import limit_matching
from lathe.evaluation import answer_checks

Normalization = Literal["none", "text", "json"]
# The numbers that are summed over rows: (value, 1) for a mean, (0, 0) for a row that does not count.
Statistics = Sequence[float]
PairStatistics = Callable[[str, str], Statistics]

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--{_UNSPACED}]+", regex.VERSION1)
_NOT_APPLICABLE = (float("nan"), 1.0)


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, in Unicode normal form NFKC."""
    words: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return words


def exact_match(
    completion: str, reference: str, *, normalize: Normalization = "none", answer_pattern: str | None = None
) -> float:
    r"""Return 1 if the two are equal, apart from white space at both ends.

    With `answer_pattern`, such as `#### (\S+)` for GSM8K, the first group of its last match is compared instead of the
    whole text. An answer without a match is wrong; a reference without one is compared as a whole. `normalize` ignores
    more differences: `text` case, punctuation and the amount of white space; `json` the order of keys, white space, and
    1 against 1.0.
    """
    if answer_pattern is not None:
        answer, expected = _extract_answer(completion, answer_pattern), _extract_answer(reference, answer_pattern)
        if answer is None:
            return 0.0
        completion, reference = answer, reference if expected is None else expected
    if answer_checks.exact_match(completion, reference):
        return 1.0
    match normalize:
        case "text":
            return float(_normalize_text(completion) == _normalize_text(reference))
        case "json":  # an F1 of 1: all fields are equal, and none is missing or extra
            return float(answer_checks.json_fields(completion, reference) == 1)
    return 0.0


def token_f1(completion: str, reference: str) -> float:
    """Return the F1 score of the answer's words against the reference's, as multisets (as for SQuAD).

    Two texts without words are equal. Unlike SQuAD's, it counts articles, as not every language has them.
    """
    answer, expected = Counter(split_words(completion)), Counter(split_words(reference))
    if not answer or not expected:
        return float(answer == expected)
    return 2 * (answer & expected).total() / (answer.total() + expected.total())


def distinct(completion: str, n: int) -> float | None:
    """Return the fraction of distinct n-grams among an answer's n-grams of words; None if it has no n-gram."""
    words = split_words(completion)
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def select_statistics(
    metrics: Sequence[str], *, normalize: Normalization, answer_pattern: str | None
) -> dict[str, PairStatistics]:
    """Return for each of `metrics` that needs only the two texts the function (answer, reference) -> statistics.

    Statistics are NaN if the metric does not apply to the reference, which makes the score of all rows NaN.
    """
    known: dict[str, PairStatistics] = {
        "exact_match": _make_mean(partial(exact_match, normalize=normalize, answer_pattern=answer_pattern)),
        "token_f1": _make_mean(token_f1),
        "json_valid": _make_json_mean(answer_checks.json_valid),
        "json_fields": _make_json_mean(answer_checks.json_fields),
        "rouge_1": _make_rouge("rouge1"),
        "rouge_2": _make_rouge("rouge2"),
        "rouge_l": _make_rouge("rougeL"),
        "chrf": _make_sacrebleu(CHRF()),
        "bleu": _make_sacrebleu(BLEU(effective_order=True, force=True)),
        "length_ratio": lambda completion, reference: (len(completion), len(reference)),
        "distinct_1": _make_distinct(1),
        "distinct_2": _make_distinct(2),
    }
    return {metric: known[metric] for metric in metrics if metric in known}


class _WordTokenizer:
    """Replaces rouge-score's tokenizer, which keeps only a-z and 0-9: every Russian text would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _make_mean(score: Callable[[str, str], float]) -> PairStatistics:
    return lambda completion, reference: (score(completion, reference), 1.0)


def _make_json_mean(score: Callable[[str, str], float]) -> PairStatistics:
    return lambda completion, reference: (
        (score(completion, reference), 1.0) if answer_checks.json_valid(reference, reference) else _NOT_APPLICABLE
    )


def _make_rouge(kind: str) -> PairStatistics:
    """Return ROUGE's F1 score, of n-grams or of the longest common subsequence of words (Lin 2004)."""
    if kind == "rougeL":
        return lambda completion, reference: (compute_rouge_l(completion, reference), 1.0)
    return lambda completion, reference: (_make_scorer(kind).score(reference, completion)[kind].fmeasure, 1.0)


@cache
def _make_scorer(kind: str) -> Any:
    from rouge_score import rouge_scorer  # with nltk, half a second: only where it is asked for

    return rouge_scorer.RougeScorer([kind], tokenizer=_WordTokenizer())


def compute_rouge_l(completion: str, reference: str) -> float:
    """Return the F1 score of ROUGE-L, as rouge-score does, without its table of all pairs of words."""
    words, expected = split_words(completion), split_words(reference)
    common = count_common_subsequence(words, expected)
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def count_common_subsequence(words: Sequence[str], others: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, 64 words of `words` at a time (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << position
    every = (1 << len(words)) - 1
    unmatched = every
    for word in others:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & every
    return len(words) - unmatched.bit_count()


def _make_sacrebleu(metric: BLEU | CHRF) -> PairStatistics:
    # Not public, but the base of sacrebleu's own bootstrap: counts of a pair, to be summed over pairs.
    return lambda completion, reference: metric._extract_corpus_statistics([completion], [[reference]])[0]


def _make_distinct(n: int) -> PairStatistics:
    def compute(completion: str, reference: str) -> Statistics:
        share = distinct(completion, n)
        return (0.0, 0.0) if share is None else (share, 1.0)

    return compute


def _extract_answer(text: str, pattern: str) -> str | None:
    with limit_matching("evaluate.answer_pattern", pattern):
        matches = list(re.finditer(pattern, text))
    return (matches[-1][1] or "") if matches else None


def _normalize_text(text: str) -> str:
    plain = "".join(
        " " if unicodedata.category(character).startswith("P") else character
        for character in unicodedata.normalize("NFKC", text).casefold()
    )
    return " ".join(plain.split())
