"""What an answer is worth, against a reference. Pure: texts in, a number from 0 to 1 out."""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

# A number as people write it: sign, thousands in threes or none, decimals, exponent, and perhaps one over another.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)])[-+])?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?(?:/\d+)?")
_CURRENCY = re.compile(r"[$€£¥₽]")
_SPACED_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f_'](?=\d{3})")
LONGEST_NUMBER = 400  # characters; what goes on beyond is a loop of the model's, and no number


def exact_match(completion: str, reference: str) -> float:
    """Return 1 where the two are equal, white space at both ends aside."""
    return float(completion.strip() == reference.strip())


def numeric(completion: str, reference: str, *, pattern: str | None = None) -> float:
    r"""Return 1 where both end in the same number, however it is written: 1,200.50 is 1200.5, and 1/2 is 0.5.

    The number is the last one in the text, or in the first group of the last match of `pattern`, such as `#### (\S+)`
    for GSM8K. Currency and percent signs do not count; a comma parts thousands and never decimals. A text without a
    number earns 0.
    """
    given, wanted = _number(completion, pattern), _number(reference, pattern)
    return float(given is not None and given == wanted)


def json_valid(completion: str, reference: str) -> float:
    """Return 1 where the completion is one JSON object or array: a bare number or word parses too, but says nothing."""
    return float(isinstance(_parsed(completion), dict | list))


def json_fields(completion: str, reference: str) -> float:
    """Return the F1 of the completion's fields against the reference's: a field is right under its name with its value.

    Fields of nested objects and items of arrays count one by one. 1 and 1.0 are equal, 1 and true are not. Fields too
    many cost as much as fields missing. 0 unless both are JSON objects or arrays.
    """
    given, wanted = _parsed(completion), _parsed(reference)
    if not isinstance(given, dict | list) or type(given) is not type(wanted):
        return 0.0
    given_fields, wanted_fields = _fields(given), _fields(wanted)
    return 2 * len(given_fields & wanted_fields) / (len(given_fields) + len(wanted_fields))


def regex(completion: str, reference: str, *, pattern: str) -> float:
    r"""Return 1 where `pattern` is found in the completion; with `\A` and `\Z` it must be all of it."""
    return float(re.search(pattern, completion) is not None)


def length(completion: str, reference: str, *, max_characters: int, min_characters: int = 0) -> float:
    """Return 1 within the window (characters, both ends included), and less the further outside.

    Below, the share of `min_characters` that is there; above, it falls to 0 at twice `max_characters`.
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


def _number(text: str, pattern: str | None) -> Fraction | None:
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        text = (matches[-1][1] or "") if matches else ""
    text = _SPACED_THOUSANDS.sub("", _CURRENCY.sub("", text.replace("\N{MINUS SIGN}", "-")))
    numbers = _NUMBER.findall(text)
    if not numbers or len(numbers[-1]) > LONGEST_NUMBER:
        return None
    above, _, below = numbers[-1].replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a model that says `[` without end
        return None


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> set[Any]:
    """Return (path, value) of every leaf; an empty object or array is one too."""
    members = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if members:
        return {field for name, member in members for field in _fields(member, (*path, name))}
    leaf = type(value).__name__ if isinstance(value, dict | list) else value
    return {(path, isinstance(value, bool), isinstance(value, str), leaf)}
