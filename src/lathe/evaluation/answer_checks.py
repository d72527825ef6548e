"""Answer checks: pure functions from an answer and a reference to a number from 0 to 1, for metrics and rewards."""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from lathe.common.bounded_regex import limit_matching

# A number as people write it: sign, optional thousands separators, decimals, exponent, or a fraction.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)])[-+])?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?(?:/\d+)?")
_CURRENCY = re.compile(r"[$€£¥₽]")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f_'](?=\d{3})")
MAX_NUMBER_CHARACTERS = 400  # a longer one comes from a model that repeats itself


def exact_match(completion: str, reference: str) -> float:
    """Return 1 if the two are equal, apart from white space at both ends."""
    return float(completion.strip() == reference.strip())


def numeric(completion: str, reference: str, *, pattern: str | None = None) -> float:
    r"""Return 1 if both end in the same number, however it is written: 1,200.50 is 1200.5, and 1/2 is 0.5.

    The number is the last one in the text, or in the first group of the last match of `pattern`, such as `#### (\S+)`
    for GSM8K. Currency and percent signs are ignored; a comma separates thousands, never decimals. A text without a
    number gives 0.
    """
    answer_value, reference_value = _extract_number(completion, pattern), _extract_number(reference, pattern)
    return float(answer_value is not None and answer_value == reference_value)


def json_valid(completion: str, reference: str) -> float:
    """Return 1 if the answer is one JSON object or array; a bare number or string, which is valid JSON too, gives 0."""
    return float(isinstance(_parse_json(completion), dict | list))


def json_fields(completion: str, reference: str) -> float:
    """Return the F1 score of the answer's fields against the reference's; name and value of a field must be equal.

    Fields of nested objects and items of arrays count one by one. 1 and 1.0 are equal, 1 and true are not. An extra
    field costs as much as a missing one. 0 unless both are JSON objects or both are arrays.
    """
    answer_value, reference_value = _parse_json(completion), _parse_json(reference)
    if not isinstance(answer_value, dict | list) or type(answer_value) is not type(reference_value):
        return 0.0
    answer_fields, reference_fields = _flatten_fields(answer_value), _flatten_fields(reference_value)
    return 2 * len(answer_fields & reference_fields) / (len(answer_fields) + len(reference_fields))


def regex(completion: str, reference: str, *, pattern: str) -> float:
    r"""Return 1 if `pattern` matches anywhere in the answer; between `\A` and `\Z` it must match all of it."""
    with limit_matching("grpo.rewards: pattern", pattern):
        return float(re.search(pattern, completion) is not None)


def length(completion: str, reference: str, *, max_characters: int, min_characters: int = 0) -> float:
    """Return 1 for an answer of `min_characters` to `max_characters`, and less the further it is outside.

    Below, the fraction of `min_characters` that it has; above, it falls linearly to 0 at twice `max_characters`.
    """
    count = len(completion)
    if count < min_characters:
        return count / min_characters
    return max(0.0, 1.0 - max(0, count - max_characters) / max_characters)


REWARDS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "numeric": numeric,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "regex": regex,
    "length": length,
}


def _extract_number(text: str, pattern: str | None) -> Fraction | None:
    if pattern is not None:
        with limit_matching("grpo.rewards: pattern", pattern):
            matches = list(re.finditer(pattern, text))
        text = (matches[-1][1] or "") if matches else ""
    text = _SPACED_THOUSANDS.sub("", _CURRENCY.sub("", text.replace("\N{MINUS SIGN}", "-")))
    numbers = _NUMBER.findall(text)
    if not numbers or len(numbers[-1]) > MAX_NUMBER_CHARACTERS:
        return None
    above, _, below = numbers[-1].replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a model that repeats `[`
        return None


def _flatten_fields(value: Any, path: tuple[str | int, ...] = ()) -> set[Any]:
    """Return (path, value) of every leaf; an empty object or array is a leaf too."""
    members = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if members:
        return {field for name, member in members for field in _flatten_fields(member, (*path, name))}
    leaf = type(value).__name__ if isinstance(value, dict | list) else value
    return {(path, isinstance(value, bool), isinstance(value, str), leaf)}
