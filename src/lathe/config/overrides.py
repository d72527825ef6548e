"""`-S KEY=VALUE` as `dvc exp run` reads it: overrides in Hydra's grammar, written, applied, and multiplied out."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import dvc_api, paths
from lathe.common.errors import InputError
from lathe.config.load import Config, load

# Words that Hydra's grammar takes for something else than a text, unless they are quoted.
MEANS_SOMETHING_ELSE = {"null", "true", "false", "inf", "nan"}


def applied(overrides: Sequence[str]) -> Config:
    """Return what is configured after the overrides of params.yaml; no file changes.

    Raises InputError where one cannot be read, or makes the parameters wrong.
    """
    if not overrides:
        return load()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.PARAMS.name
        copy.write_text(paths.PARAMS.read_text(encoding="utf-8"), encoding="utf-8")
        try:
            dvc_api.apply_overrides(copy, overrides)
        except dvc_api.OverrideError as error:
            raise _unreadable(overrides, error) from None
        return load(copy)


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep, in DVC's order: of `a=1,2` and `b=3,4` four; without commas one."""
    try:
        return dvc_api.expand_sweep(overrides, paths.PARAMS.name)
    except dvc_api.OverrideError as error:
        raise _unreadable(overrides, error) from None


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].lstrip("+~").strip()


def written(key: str, value: Any) -> str:
    """Return the override that sets `key` to a value of YAML, whatever characters it holds."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z][\w-]*", value, re.ASCII) and value.lower() not in MEANS_SOMETHING_ELSE:
            return value
        # Backslashes mean themselves but in front of a quote.
        quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
        return f"'{quoted}'"
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_literal(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value)


def _unreadable(overrides: Sequence[str], error: Exception) -> InputError:
    return InputError(f"-S {' '.join(overrides)}: {error}; see `python -m lathe schema` for the keys")
