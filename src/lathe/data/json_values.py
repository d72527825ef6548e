"""JSON values: decoded so that no key is lost, and described for messages."""

import datetime
import decimal
import json
import sys
from dataclasses import dataclass
from typing import Any

from lathe.common.text import summarize_error
from lathe.data.json_text import Decode


@dataclass(frozen=True, slots=True)
class RepeatedKey:
    """Replaces a JSON object in which a key occurs twice, because it is unknown which value is meant."""

    key: str


def load_json(text: str) -> Any:
    """Return the value of a JSON text; an object that has a key twice is a RepeatedKey."""
    return _DECODER.decode(text)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKey:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    keys = [key for key, _ in pairs]
    return RepeatedKey(next(key for key in keys if keys.count(key) > 1))


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)  # json.loads would make one for every text
decode_item: Decode = _DECODER.raw_decode


def describe_json_error(error: Exception) -> str:
    """Return what is wrong with a JSON text, by the error of reading it."""
    if isinstance(error, json.JSONDecodeError):
        problem = error.msg.removesuffix(" at")
        return f"{problem[0].lower()}{problem[1:]} at column {error.colno}"
    if "integer string conversion" in str(error):
        return f"an integer has more than {sys.get_int_max_str_digits()} digits"
    return "nested too deeply" if isinstance(error, RecursionError) else summarize_error(error)


def describe_value(value: Any) -> str:
    """Return a description of a JSON value for a message: `the text 'x'`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value!r}" if len(repr(value)) <= 40 else "a long number"
        case str():
            return f"the text {value[:37] + '...' if len(value) > 40 else value!r}"
        case list():
            return "a list"
        case dict() | RepeatedKey():
            return "an object"
        case bytes():
            return "binary data"
        case decimal.Decimal():
            return f"the decimal number {value}"
        case datetime.date() | datetime.time() | datetime.timedelta():
            return f"the time {value}"
    return f"a {type(value).__name__}"
