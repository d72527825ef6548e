"""Overrides: `-S KEY=VALUE` in Hydra's grammar, as `dvc exp run` reads it; applied, expanded to a sweep, written."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import dvc_api, paths
from lathe.common.errors import InputError
from lathe.config.load import Config, load

# Words that Hydra's grammar does not read as text unless they are quoted.
RESERVED_WORDS = {"null", "true", "false", "inf", "nan"}


def apply_overrides(overrides: Sequence[str]) -> Config:
    """Return the configuration with these overrides of params.yaml; no file changes.

    Raises InputError if one cannot be read or makes the parameters invalid.
    """
    if not overrides:
        return load()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        copy.write_text(paths.PARAMS.read_text(encoding="utf-8"), encoding="utf-8")
        try:
            dvc_api.apply_overrides(copy, overrides)
        except dvc_api.OverrideError as error:
            raise _refuse(overrides, error) from None
        return load(copy)


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep, in DVC's order: four for `a=1,2 b=3,4`, one without commas."""
    try:
        return dvc_api.expand_sweep(overrides, paths.PARAMS.name)
    except dvc_api.OverrideError as error:
        raise _refuse(overrides, error) from None


def read_key(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].lstrip("+~").strip()


def format_override(key: str, value: Any) -> str:
    """Return the override that sets `key` to a YAML value, whatever characters it holds."""
    return f"{key}={_format_value(value)}"


def _format_value(value: Any) -> str:
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z][\w-]*", value, re.ASCII) and value.lower() not in RESERVED_WORDS:
            return value
        # A backslash is literal except before a quote.
        quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
        return f"'{quoted}'"
    if isinstance(value, list):
        return f"[{','.join(map(_format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_format_value(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)


def _refuse(overrides: Sequence[str], error: Exception) -> InputError:
    return InputError(f"-S {' '.join(overrides)}: {error}; see `lathe schema` for the keys", code="unreadable-override")
