"""Recipes: `experiments/NAME.yaml`, an experiment that is ready to run, with what is expected of it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import overrides
from lathe.config.base import Name, Section
from lathe.config.params import Params
from lathe.config.yaml_files import line_of, read_yaml

FOLDER = paths.ROOT / "experiments"


class Recipe(Section):
    """What stands in the file."""

    description: Name = Field(description="what is run, in a sentence")
    hypothesis: Name = Field(description="what it should show, and by which number")
    expect: Name = Field(description="time and memory where they are known, or that it has not been run")
    overrides: Annotated[dict[Name, Any], Field(min_length=1)] = Field(
        description="values by their keys in params.yaml, such as `training.learning_rate: 2e-5`"
    )


@dataclass(frozen=True)
class Ready:
    """A recipe whose overrides params.yaml takes, by its name."""

    name: str
    recipe: Recipe

    def arguments(self, further: list[str]) -> list[str]:
        """Return the recipe's overrides and `further` ones as for `-S`; of one key the further one counts alone."""
        taken = {overrides.key_of(override) for override in further}
        own = [overrides.written(key, value) for key, value in self.recipe.overrides.items() if key not in taken]
        return [*own, *further]


def names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(name: str) -> Ready:
    """Read the recipe of that name and hold it against params.yaml as it is.

    Raises InputError, one line a problem with file and line, or where there is no such recipe.
    """
    if name not in names():
        raise InputError(f"{name}: no such recipe in {FOLDER.name}/; {did_you_mean(name, names())}")
    return Ready(name, read(FOLDER / f"{name}.yaml"))


def read(file: Path) -> Recipe:
    """Read a recipe and hold it against params.yaml; see `find`."""
    shown = file.relative_to(paths.ROOT).as_posix() if file.is_relative_to(paths.ROOT) else str(file)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", file.stem):
        raise InputError(f"{shown}: the name of an experiment has small letters, digits and hyphens; rename the file")
    try:
        tree = read_yaml(file)
    except InputError as error:
        raise InputError(str(error).replace(file.name, shown, 1)) from None
    marked = YAML().load(file.read_text(encoding="utf-8"))  # knows the line of every key
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_sentence(problem, shown, marked) for problem in error.errors())) from None
    problems = _unknown_keys(recipe, shown, marked) or _refusals(recipe, shown, marked)
    if problems:
        raise InputError("\n".join(problems))
    return recipe


def leaves(section: type[Section] = Params, prefix: str = "") -> list[str]:
    """Return every key of params.yaml that holds a value, with the sections that it lies in."""
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += leaves(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _sentence(problem: Any, shown: str, marked: Any) -> str:
    path = tuple(str(step) for step in problem["loc"] if step != "[key]")
    line, key = line_of(marked, problem["loc"]), ".".join(path) or "the whole file"
    match problem["type"]:
        case "extra_forbidden":
            return f"{shown}:{line}: {key} is not a known key; {did_you_mean(key, list(Recipe.model_fields))}"
        case "missing":
            return f"{shown}:1: {key} is missing; add it: {Recipe.model_fields[key].description}"
        case "dict_type" | "model_type" if path in ((), ("overrides",)):
            meant = "description, hypothesis, expect and overrides" if not path else "KEY: VALUE, one a line"
            return f"{shown}:{line}: {key} is not a mapping; write {meant}"
        case "too_short" | "string_too_short":
            return f"{shown}:{line}: {key} is empty; write {Recipe.model_fields[path[0]].description}"
    rule = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{shown}:{line}: {key} is {problem['input']!r}; must be {rule}"


def _unknown_keys(recipe: Recipe, shown: str, marked: Any) -> list[str]:
    known, problems = leaves(), []
    for key in recipe.overrides:
        if key in known:
            continue
        inner = next((leaf for leaf in known if leaf.startswith(f"{key}.")), None)
        remedy = f"it is a section; name its keys, such as {inner}" if inner else did_you_mean(key, known)
        problems.append(
            f"{shown}:{line_of(marked, ('overrides', key))}: overrides: {key} is not a key of params.yaml; {remedy}"
        )
    return problems


def _refusals(recipe: Recipe, shown: str, marked: Any) -> list[str]:
    try:
        overrides.applied([overrides.written(key, value) for key, value in recipe.overrides.items()])
    except InputError as error:
        return [_located(line, recipe, shown, marked) for line in str(error).splitlines()]
    return []


def _located(message: str, recipe: Recipe, shown: str, marked: Any) -> str:
    """Put the line of the override that is meant before what params.yaml's own rules say."""
    said = message.removeprefix(f"{paths.PARAMS.name}: ")
    mentioned = [key for key in recipe.overrides if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", said)]
    if not mentioned:
        return message  # params.yaml itself is wrong
    nearest = min(mentioned, key=lambda key: (said.index(key), -len(key)))
    return f"{shown}:{line_of(marked, ('overrides', nearest))}: overrides: {said}"
