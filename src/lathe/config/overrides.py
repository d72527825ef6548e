"""Overrides: `-S KEY=VALUE` in Hydra's grammar, as `dvc exp run` reads it; applied, expanded to a sweep, written."""

import json
import re
from collections.abc import Sequence
from typing import Any

from lathe.common import dotted_keys, dvc_api, paths
from lathe.common.errors import InputError
from lathe.common.scratch import temporary_folder
from lathe.common.text import suggest_name
from lathe.config.base import Section
from lathe.config.load import load
from lathe.config.params import Params
from lathe.config.pipelines import MAIN, Pipeline
from lathe.config.yaml_files import read_yaml

# Words that Hydra's grammar does not read as text unless they are quoted.
RESERVED_WORDS = {"null", "true", "false", "inf", "nan"}


def apply_overrides(overrides: Sequence[str], pipeline: Pipeline = MAIN) -> Any:
    """Return the configuration of a pipeline with these overrides of its params.yaml; no file changes.

    Raises InputError if one cannot be read or makes the parameters invalid.
    """
    if not overrides:
        return pipeline.read(pipeline.params) if pipeline.folder else load()
    check_keys(overrides, pipeline)
    with temporary_folder(paths.SCRATCH, "overrides") as folder:
        copy = folder / pipeline.params_name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(pipeline.params.read_text(encoding="utf-8"), encoding="utf-8")
        try:
            dvc_api.apply_overrides(copy, overrides)
        except dvc_api.OverrideError as error:
            raise _refuse(overrides, error) from None
        return pipeline.read(copy)


def expand_sweep(overrides: Sequence[str], pipeline: Pipeline = MAIN) -> list[list[str]]:
    """Return the overrides of each run of a sweep, in DVC's order: four for `a=1,2 b=3,4`, one without commas."""
    check_keys(overrides, pipeline)
    try:
        return dvc_api.expand_sweep(overrides, paths.PARAMS.name)
    except dvc_api.OverrideError as error:
        raise _refuse(overrides, error) from None


def check_keys(overrides: Sequence[str], pipeline: Pipeline = MAIN) -> None:
    """Refuse overrides of what is no key of params.yaml, all of them at once. Raises InputError."""
    known = list_keys(pipeline.section)
    problems = [problem for override in overrides for problem in _find_problem(override, known, pipeline)]
    if problems:
        codes = [code for code, _ in problems]
        code = "unknown-key" if "unknown-key" in codes else codes[0]
        raise InputError("\n".join(line for _, line in problems), code=code)


def _find_problem(override: str, known: list[str], pipeline: Pipeline) -> list[tuple[str, str]]:
    """Return what is wrong with the key of one override, as code and line."""
    key, equals, value = override.partition("=")
    if override.startswith("~"):
        line = (
            f"-S {override}: removes a key; {pipeline.params_name} has every key; write -S {read_key(override)}=VALUE"
        )
        return [("unreadable-override", line)]
    key = read_key(override)
    if "${" in value:
        line = (
            f"-S {override}: DVC would fill in ${{…}}, from the environment too, and the value would be committed; "
            "write the value itself"
        )
        return [("interpolation", line)]
    if not equals:
        return [("unreadable-override", f"-S {override}: has no value; write -S {key}=VALUE")]
    leaves = [leaf for leaf in known if leaf.startswith(f"{key}.")]
    # `grpo.rewards.0.weight` names a part of a list, and `lora={r: 8}` several keys of a section.
    is_part = any(re.match(rf"{re.escape(leaf)}\.\d", key) for leaf in known)
    if key in known or is_part or (leaves and value.lstrip().startswith("{")):
        return []
    remedy = f"it is a section; name its keys, such as {leaves[0]}" if leaves else _suggest_key(key, known)
    return [("unknown-key", f"-S {override}: {key} is not a key of {pipeline.params_name}; {remedy}")]


def _suggest_key(key: str, known: list[str]) -> str:
    # `learning_rate` alone: several sections have one.
    if same := [leaf for leaf in known if leaf.rpartition(".")[2] == key.rpartition(".")[2]]:
        return f"did you mean {' or '.join(map(repr, same))}?"
    return suggest_name(key, known) or "see `lathe schema` for the keys"


def list_keys(section: type[Section] = Params, prefix: str = "") -> list[str]:
    """Return every key of params.yaml that holds a value, with the sections that it is in."""
    keys = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += list_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def compare_with_params(config: Any, pipeline: Pipeline = MAIN) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values are not those of params.yaml, with its value and that of the configuration."""
    now = dotted_keys.flatten(read_yaml(pipeline.params))
    # Without what is null: the rewards of params.yaml name no options that they do not use.
    then = dotted_keys.flatten(config.params.model_dump(exclude_none=True))
    # An empty map is a section of nulls, or says nothing.
    now, then = ({key: value for key, value in values.items() if value != {}} for values in (now, then))
    return dotted_keys.compare(now, then)


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
    """Return the refusal of what Hydra cannot read, which names the override that is meant."""
    for override in overrides:
        try:
            dvc_api.expand_sweep([override], paths.PARAMS.name)
        except dvc_api.OverrideError as alone:
            overrides, error = [override], alone
            break
    return InputError(f"-S {' '.join(overrides)}: {error}; see `lathe schema` for the keys", code="unreadable-override")
