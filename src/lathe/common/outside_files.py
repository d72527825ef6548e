"""Files of a model from outside: what transformers raises of them becomes one line, and sizes are bounded before."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lathe.common.errors import InputError

# More than any model has: transformers makes the modules of each layer, one by one, before it reads a weight.
MOST_LAYERS = 1_000
MOST_EXPERTS = 1_024
_LIMITS = {re.compile(r"layers?$"): MOST_LAYERS, re.compile(r"experts$"): MOST_EXPERTS}


@contextmanager
def translate_errors(shown: str, what: str) -> Iterator[None]:
    """Turn whatever reading a file from outside raises into an InputError of one line; `what` cannot be read."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{shown}: transformers cannot read {what}: {describe_error(error)}; download the model again, or choose "
            "another",
            code="model-not-read",
        ) from None


def describe_error(error: BaseException) -> str:
    """Return the text of an error of a library on one line, cut where it is long."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def check_sizes(config: Mapping[str, Any], shown: str) -> None:
    """Raise InputError where config.json has a number of layers or experts that no model has."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, value in part.items():
            most = next((limit for pattern, limit in _LIMITS.items() if pattern.search(str(key))), None)
            if most and isinstance(value, int | float) and value > most:
                raise InputError(
                    f"{shown}: config.json: {key} is {value!r:.40}, more than {most:,}, which no model has; "
                    "download the model again",
                    code="config-refused",
                )
