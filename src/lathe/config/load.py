"""Loading and validation of `params.yaml` and `presets.yaml`: all problems at once, one line each."""

import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean, escape_name, shorten_value, suggest_name
from lathe.config.base import Section, section_of
from lathe.config.params import Params
from lathe.config.presets import (
    BuiltinDataset,
    BuiltinModel,
    DatasetPreset,
    HubDataset,
    HubModel,
    LocalDataset,
    LocalModel,
    ModelPreset,
    Presets,
)
from lathe.config.yaml_files import read_yaml


class Config(Section):
    """What a run is made from: the parameters and the two presets they select."""

    params: Params
    model: ModelPreset
    dataset: DatasetPreset


def load(params_file: Path = paths.PARAMS, presets_file: Path = paths.PRESETS) -> Config:
    """Read and validate both files.

    Raises InputError with one line per problem, all problems of both files at once.
    """
    tree, presets_tree = read_yaml(params_file), read_yaml(presets_file)
    problems = _problems(Params, tree, params_file.name) + _problems(Presets, presets_tree, presets_file.name)
    for key, table in (("model", "models"), ("dataset", "datasets")):
        problems += _unknown_preset(tree, presets_tree, key, table, params_file.name, presets_file.name)
    if problems:
        raise InputError("\n".join(problems))
    params, presets = Params.model_validate(tree), Presets.model_validate(presets_tree)
    return Config(params=params, model=presets.models[params.model], dataset=presets.datasets[params.dataset])


def problems_of(key: str, value: Any, tree: dict[str, Any], where: str) -> list[str]:
    """Return what is wrong with one key's `value` in a tree of parameters; rules between keys are left out.

    `where` stands before each sentence: the file, and the line if it is known.
    """
    *parents, last = key.split(".")
    changed = section = dict(tree)
    for parent in parents:
        inner = section.get(parent)
        if not isinstance(inner, dict):
            return [f"{where}: {key} is not a known key; {did_you_mean(parent, list(section))}"]
        section[parent] = section = dict(inner)
    section[last] = value
    try:
        Params.model_validate(changed)
    except ValidationError as error:
        found = [problem for problem in error.errors() if problem["loc"][: len(parents) + 1] == (*parents, last)]
        by_path: dict[tuple[Any, ...], list[Any]] = {}
        for problem in found:
            by_path.setdefault(_path_in_file(problem["loc"], changed, missing=False), []).append(problem)
        return [_sentence(path, problems, Params, changed, where) for path, problems in by_path.items()]
    return []


def _problems(model: type[Section], tree: Any, file: str) -> list[str]:
    try:
        TypeAdapter(model).validate_python(tree)
    except ValidationError as error:
        by_path: dict[tuple[Any, ...], list[Any]] = {}
        for problem in error.errors():
            path = _path_in_file(problem["loc"], tree, missing=problem["type"] == "missing")
            by_path.setdefault(path, []).append(problem)
        return [_sentence(path, problems, model, tree, file) for path, problems in by_path.items()]
    return []


def _sentence(path: tuple[Any, ...], problems: list[Any], model: type[Section], tree: Any, file: str) -> str:
    # A value of several allowed types fails once per type; where it fits one, only that one's rule matters.
    deeper = [problem for problem in problems if not problem["type"].endswith("_type")]
    problem, given = (deeper or problems)[0], problems[0]["input"]
    key = ".".join(map(escape_name, path)) or "the whole file"
    match problem["type"]:
        case "extra_forbidden":
            remedy = did_you_mean(str(path[-1]), _keys(model, path[:-1], tree))
            return f"{file}: {key} is not a known key; {remedy}"
        case "missing":
            return f"{file}: {key} is missing; add it (`python -m lathe schema` says what it means)"
        case "literal_error":
            known = [text.strip("'") for text in re.split(r", | or ", problem["ctx"]["expected"])]
            near = suggest_name(str(given), known)
            return f"{file}: {key} is {shorten_value(given)}; must be one of {', '.join(known)}{near and f'; {near}'}"
        case "union_tag_not_found" | "union_tag_invalid":
            source = given.get("source") if isinstance(given, dict) else given
            return f"{file}: {key}.source is {shorten_value(source)}; must be one of builtin, local, hub"
        case "value_error" if not path:  # of several keys, which it names
            return f"{file}: {problem['msg'].removeprefix('Value error, ')}"
        case "value_error":
            return f"{file}: {key}: {problem['msg'].removeprefix('Value error, ')}"
        case "too_short":
            return f"{file}: {key} is {shorten_value(given)}; must have at least {problem['ctx']['min_length']} item"
    rules = [rule["msg"].removeprefix("Input should be ").removeprefix("a valid ") for rule in deeper or problems]
    return f"{file}: {key} is {shorten_value(given)}; must be {' or '.join(dict.fromkeys(rules))}"


def _path_in_file(location: tuple[Any, ...], tree: Any, *, missing: bool) -> tuple[Any, ...]:
    # Pydantic puts a union's member into the location; the path in the file is what the user knows.
    path: list[Any] = []
    for index, step in enumerate(location):
        if (isinstance(tree, dict) and step in tree) or (isinstance(tree, list) and isinstance(step, int)):
            tree = tree[step]
        elif not (missing and index == len(location) - 1):
            continue
        path.append(step)
    return tuple(path)


def _keys(model: type[Section], parent: tuple[Any, ...], tree: Any) -> list[str]:
    if not parent:
        return list(model.model_fields)
    if model is Presets:
        for step in parent:
            tree = tree[step]
        members: dict[str, dict[str, type[Section]]] = {
            "models": {"builtin": BuiltinModel, "local": LocalModel, "hub": HubModel},
            "datasets": {"builtin": BuiltinDataset, "local": LocalDataset, "hub": HubDataset},
        }
        return list(members[parent[0]][tree["source"]].model_fields)
    section = model
    for step in parent:
        # A list's entries are sections where they have keys at all; which of them it is does not matter.
        if inner := None if isinstance(step, int) else section_of(section.model_fields[step].annotation):
            section = inner
    return list(section.model_fields)


def _unknown_preset(tree: Any, presets: Any, key: str, table: str, params_name: str, presets_name: str) -> list[str]:
    name = tree.get(key) if isinstance(tree, dict) else None
    known = presets.get(table) if isinstance(presets, dict) else None
    if not isinstance(name, str) or not isinstance(known, dict) or name in known:
        return []
    remedy = did_you_mean(name, [str(preset) for preset in known])
    return [f"{params_name}: {key} is {name!r}; must be a name under {table} in {presets_name}; {remedy}"]
