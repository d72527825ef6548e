"""Configuration: `params.yaml` and `presets.yaml` loaded and validated, all problems at once, one line each."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lathe.common import paths
from lathe.common.dotted_keys import get_value
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean, escape_name, shorten_value, suggest_name
from lathe.config.adapter_base import resolve_adapter
from lathe.config.base import Section, section_of
from lathe.config.params import Params
from lathe.config.presets import (
    BuiltinDataset,
    BuiltinModel,
    BuiltinPart,
    DatasetPreset,
    EncoderPreset,
    HubDataset,
    HubEncoder,
    HubModel,
    HubPart,
    LocalDataset,
    LocalEncoder,
    LocalModel,
    LocalPart,
    MixtureDataset,
    ModelPreset,
    PackageEncoder,
    PackageModel,
    Presets,
)
from lathe.config.yaml_files import read_yaml

# Codes of problems by pydantic's type of error; every other type is an invalid value.
CODES = {"extra_forbidden": "unknown-key", "missing": "missing-key"}

# The kinds of entries in the tables of presets.yaml, by their source.
KINDS: dict[str, dict[str, type[Section]]] = {
    "models": {"builtin": BuiltinModel, "local": LocalModel, "hub": HubModel, "package": PackageModel},
    "encoders": {"local": LocalEncoder, "hub": HubEncoder, "package": PackageEncoder},
    "datasets": {"builtin": BuiltinDataset, "local": LocalDataset, "hub": HubDataset, "mixture": MixtureDataset},
}
PARTS: dict[str, type[Section]] = {"builtin": BuiltinPart, "local": LocalPart, "hub": HubPart}  # of a mixture


class Config(Section):
    """The configuration of a run: the parameters and the presets that they select."""

    params: Params
    model: ModelPreset
    dataset: DatasetPreset
    encoder: EncoderPreset | None


def load(params_file: Path = paths.PARAMS, presets_file: Path = paths.PRESETS) -> Config:
    """Read and validate both files.

    Raises InputError with one line per problem, all problems of both files at once.
    """
    tree, presets_tree = read_yaml(params_file), read_yaml(presets_file)
    problems = validate_tree(Params, tree, params_file.name) + validate_tree(Presets, presets_tree, presets_file.name)
    for key, table in (("model", "models"), ("bert_score.model", "encoders"), ("dataset", "datasets")):
        problems += check_preset(tree, presets_tree, key, table, params_file.name, presets_file.name)
    refuse_problems(problems)
    params, presets = Params.model_validate(tree), Presets.model_validate(presets_tree)
    encoder = params.bert_score.model
    return Config(
        params=params,
        model=resolve_adapter(presets.models[params.model]),
        dataset=presets.datasets[params.dataset],
        encoder=presets.encoders[encoder] if encoder else None,
    )


def check_value(key: str, value: Any, tree: dict[str, Any], where: str, section: type[Section] = Params) -> list[str]:
    """Return the problems of one key's `value` in a tree of parameters; rules between keys are left out.

    `where` begins each message: the file, and the line if it is known. `section` is the class of the whole tree.
    """
    *parents, last = key.split(".")
    changed = part = dict(tree)
    for parent in parents:
        inner = part.get(parent)
        if not isinstance(inner, dict):
            return [f"{where}: {key} is not a known key; {did_you_mean(parent, list(part))}"]
        part[parent] = part = dict(inner)
    part[last] = value
    try:
        section.model_validate(changed)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["loc"][: len(parents) + 1] == (*parents, last)]
        return [line for _, line in _describe(problems, section, changed, where)]
    return []


# A problem: its code, and the line that says what it is.
Problem = tuple[str, str]


def refuse_problems(problems: Sequence[Problem]) -> None:
    """Raise InputError with a line for each problem, if there is one."""
    if not problems:
        return
    codes = [code for code, _ in problems]
    # A misspelt key is also a missing one.
    code = "unknown-key" if "unknown-key" in codes else codes[0]
    raise InputError("\n".join(line for _, line in problems), code=code)


def validate_tree(model: type[Section], tree: Any, file: str) -> list[Problem]:
    """Return the problems of a file's content."""
    try:
        TypeAdapter(model).validate_python(tree)
    except ValidationError as error:
        return _describe(error.errors(), model, tree, file)
    return []


def _describe(problems: Sequence[Any], model: type[Section], tree: Any, file: str) -> list[Problem]:
    by_path: dict[tuple[Any, ...], list[Any]] = {}
    for problem in problems:
        path = _path_in_file(problem["loc"], tree, missing=problem["type"] == "missing")
        by_path.setdefault(path, []).append(problem)
    return [
        (CODES.get(of_path[0]["type"], "invalid-value"), _write_line(path, of_path, model, tree, file))
        for path, of_path in by_path.items()
    ]


def _write_line(path: tuple[Any, ...], problems: list[Any], model: type[Section], tree: Any, file: str) -> str:
    # A value of several allowed types fails once per type; if it fits one, only the rule of that one matters.
    deeper = [problem for problem in problems if not problem["type"].endswith("_type")]
    problem, given = (deeper or problems)[0], problems[0]["input"]
    key = ".".join(map(escape_name, path)) or "the whole file"
    match problem["type"]:
        case "extra_forbidden":
            remedy = did_you_mean(str(path[-1]), _list_keys(model, path[:-1], tree))
            return f"{file}: {key} is not a known key; {remedy}"
        case "missing":
            return f"{file}: {key} is missing; add it (`lathe schema` says what it means)"
        case "literal_error":
            known = [text.strip("'") for text in re.split(r", | or ", problem["ctx"]["expected"])]
            near = suggest_name(str(given), known)
            return f"{file}: {key} is {shorten_value(given)}; must be one of {', '.join(known)}{near and f'; {near}'}"
        case "union_tag_not_found" | "union_tag_invalid":
            source = given.get("source") if isinstance(given, dict) else given
            known = list(KINDS[str(path[0])] if len(path) == 2 else PARTS)
            return f"{file}: {key}.source is {shorten_value(source)}; must be one of {', '.join(known)}"
        case "value_error" if not path:  # of several keys, which it names
            return f"{file}: {problem['msg'].removeprefix('Value error, ')}"
        case "value_error":
            return f"{file}: {key}: {problem['msg'].removeprefix('Value error, ')}"
        case "too_short":
            return f"{file}: {key} is {shorten_value(given)}; must have at least {problem['ctx']['min_length']} item"
    rules = [rule["msg"].removeprefix("Input should be ").removeprefix("a valid ") for rule in deeper or problems]
    return f"{file}: {key} is {shorten_value(given)}; must be {' or '.join(dict.fromkeys(rules))}"


def _path_in_file(location: tuple[Any, ...], tree: Any, *, missing: bool) -> tuple[Any, ...]:
    # Pydantic's location also names the member of a union; the path in the file has only keys and indexes.
    path: list[Any] = []
    member = None
    for index, step in enumerate(location):
        if member is None and isinstance(tree, dict) and step == tree.get("source"):
            member = step  # and not the key of this name, which an entry of the source `package` has
            continue
        if (isinstance(tree, dict) and step in tree) or (isinstance(tree, list) and isinstance(step, int)):
            tree = tree[step]
        elif not (missing and index == len(location) - 1):
            continue
        path.append(step)
    return tuple(path)


def _list_keys(model: type[Section], parent: tuple[Any, ...], tree: Any) -> list[str]:
    if not parent:
        return list(model.model_fields)
    if model is Presets:
        for step in parent:
            tree = tree[step]
        kinds = KINDS[parent[0]] if len(parent) == 2 else PARTS
        return list(kinds[tree["source"]].model_fields) if "source" in tree else []
    section = model
    for step in parent:
        # An index selects an entry of a list; all entries have the same keys.
        if inner := None if isinstance(step, int) else section_of(section.model_fields[step].annotation):
            section = inner
    return list(section.model_fields)


def check_preset(tree: Any, presets: Any, key: str, table: str, params_name: str, presets_name: str) -> list[Problem]:
    """Return the problem of a key that must name an entry of a table in presets.yaml, if it has one."""
    name = get_value(tree, key)
    known = presets.get(table) if isinstance(presets, dict) else None
    if not isinstance(name, str) or not isinstance(known, dict) or name in known:
        return []
    remedy = did_you_mean(name, [str(preset) for preset in known])
    line = f"{params_name}: {key} is {name!r}; must be a name under {table} in {presets_name}; {remedy}"
    return [("unknown-preset", line)]
