"""Recipes: `experiments/NAME.yaml`, an experiment that is ready to run, with what is expected of it.

A recipe may extend other files, bases in `experiments/base/` or recipes: it then has their overrides and its own.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.base import Name, Section
from lathe.config.overrides import apply_overrides, format_override, list_keys, read_key
from lathe.config.params import Params
from lathe.config.pipelines import CLASSIFIER, MAIN, Pipeline
from lathe.config.yaml_files import find_line, read_marked_yaml, read_yaml

FOLDER = paths.ROOT / "experiments"

Extends = Name | Annotated[list[Name], Field(min_length=1)]
Overrides = Annotated[dict[Name, Any], Field(min_length=1)]

EXTENDS = "files whose overrides it starts from, relative to this one's folder; of one key the last one counts"
OVERRIDES = "values by their keys in params.yaml, such as `training.learning_rate: 2e-5`"


class Base(Section):
    """A file that recipes extend; every recipe is one too."""

    extends: Extends | None = Field(None, description=EXTENDS)
    description: Name | None = Field(None, description="what the values are for, in a sentence")
    hypothesis: Name | None = Field(None, description="in a recipe")
    expect: Name | None = Field(None, description="in a recipe")
    overrides: Overrides = Field(description=OVERRIDES)


class Recipe(Section):
    """The content of a recipe; once read, with the overrides of the files that it extends."""

    description: Name = Field(description="what is run, in a sentence")
    hypothesis: Name | None = Field(None, description="what it should show, and by which number")
    expect: Name | None = Field(None, description="time and memory where they are known, or that it has not been run")
    extends: Extends | None = Field(None, description=EXTENDS)
    overrides: Overrides = Field(description=OVERRIDES)


Kind = TypeVar("Kind", Recipe, Base)


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe whose overrides params.yaml takes, with its name."""

    name: str
    recipe: Recipe
    pipeline: Pipeline = MAIN

    def build_overrides(self, further: Sequence[str]) -> list[str]:
        """Return the recipe's overrides and `further` ones as for `-S`; a further one replaces the recipe's own."""
        replaced = {read_key(override) for override in further}
        own = [format_override(key, value) for key, value in self.recipe.overrides.items() if key not in replaced]
        return [*own, *further]


@dataclass(frozen=True)
class Override:
    """A value that a file sets, and where."""

    value: Any
    file: str
    line: int

    @property
    def place(self) -> str:
        """The file and line, as they stand before a message."""
        return f"{self.file}:{self.line}"


def list_recipes(pipeline: Pipeline = MAIN) -> list[str]:
    """Return the names of all recipes of a pipeline, sorted."""
    return sorted(file.stem for file in _get_folder(pipeline).glob("*.yaml"))


def _get_folder(pipeline: Pipeline) -> Path:
    return FOLDER if pipeline is MAIN else pipeline.recipes


def load_recipe(name: str) -> NamedRecipe:
    """Read the recipe of that name, of either pipeline, and validate it against params.yaml as it is.

    Raises InputError, one line per problem with file and line, or if there is no such recipe.
    """
    if name in list_recipes():
        return NamedRecipe(name, read_recipe(FOLDER / f"{name}.yaml"))
    if name in list_recipes(CLASSIFIER):
        return NamedRecipe(name, read_recipe(_get_folder(CLASSIFIER) / f"{name}.yaml", CLASSIFIER), CLASSIFIER)
    known = [*list_recipes(), *list_recipes(CLASSIFIER)]
    raise InputError(f"{name}: no such recipe in {FOLDER.name}/; {did_you_mean(name, known)}", code="unknown-recipe")


def load_main_recipe(name: str) -> NamedRecipe:
    """Read the recipe of that name as `load_recipe`; raises InputError if it is one of the classifier's pipeline."""
    recipe = load_recipe(name)
    if recipe.pipeline is not MAIN:
        raise InputError(
            f"{name}: is a recipe of the classifier's pipeline, for which this command is not; run it: "
            f"`lathe run {name}`",
            code="classifier-recipe",
        )
    return recipe


def read_recipe(file: Path, pipeline: Pipeline = MAIN) -> Recipe:
    """Read a recipe with what it extends and validate it against its pipeline's params.yaml; see `load_recipe`."""
    shown = _show(file)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", file.stem):
        raise InputError(
            f"{shown}: the name of an experiment has small letters, digits and hyphens; rename the file",
            code="recipe-name",
        )
    recipe, overrides = _read_overrides(file, Recipe, ())
    problems = list(_find_unknown_keys(overrides, pipeline)) or _find_refusals(
        overrides, shown if recipe.extends else None, pipeline
    )
    if problems:
        raise InputError("\n".join(problems), code="recipe-overrides")
    return recipe.model_copy(update={"overrides": {key: override.value for key, override in overrides.items()}})


def read_overrides(file: Path) -> dict[str, Any]:
    """Return the overrides of a recipe with those that it extends, not validated against params.yaml."""
    return {key: override.value for key, override in _read_overrides(file, Recipe, ())[1].items()}


def _read_overrides(file: Path, kind: type[Kind], above: tuple[Path, ...]) -> tuple[Kind, dict[str, Override]]:
    """Return a file and its overrides with those that it extends; `above` are the files that extend it."""
    shown = _show(file)
    try:
        tree = read_yaml(file)
    except InputError as error:
        raise InputError(str(error).replace(file.name, shown, 1), code=error.code) from None
    marked = read_marked_yaml(file)  # knows the line of every key
    try:
        content = kind.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_describe(problem, kind, tree, shown, marked) for problem in error.errors())
        raise InputError("\n".join(lines), code="recipe-content") from None
    inherited: dict[str, Override] = {}
    for base in _find_bases(content, file, marked, (*above, file)):
        inherited |= _read_overrides(base, Base, (*above, file))[1]
    own = {
        key: Override(value, shown, find_line(marked, ("overrides", key))) for key, value in content.overrides.items()
    }
    redundant = [
        f"{override.place}: overrides: {key} is {override.value!r}, as in {inherited[key].place}; remove this line"
        for key, override in own.items()
        if key in inherited and _is_same(override.value, inherited[key].value)
    ]
    if redundant:
        raise InputError("\n".join(redundant), code="redundant-override")
    return content, inherited | own


def _find_bases(content: Recipe | Base, file: Path, marked: Any, chain: tuple[Path, ...]) -> Iterator[Path]:
    named = [content.extends] if isinstance(content.extends, str) else content.extends or []
    for number, name in enumerate(named):
        location = ("extends",) if isinstance(content.extends, str) else ("extends", number)
        place = f"{_show(file)}:{find_line(marked, location)}: extends"
        base = (file.parent / name).resolve()
        if base in (path.resolve() for path in chain):
            circle = " -> ".join(path.name for path in (*chain, base))
            raise InputError(f"{place}: {circle} is a circle; extend another file", code="circular-base")
        if not base.is_file():
            beside = sorted(path.relative_to(file.parent).as_posix() for path in file.parent.rglob("base/*.yaml"))
            beside += sorted(path.name for path in file.parent.glob("*.yaml") if path != file)
            raise InputError(f"{place}: {name}: no such file; {did_you_mean(name, beside)}", code="missing-base")
        yield Path(os.path.normpath(file.parent / name))


def _is_same(value: Any, other: Any) -> bool:
    """Compare two values as YAML writes them: `true` is not 1."""
    return type(value) is type(other) and bool(value == other)


def _show(file: Path) -> str:
    return file.relative_to(paths.ROOT).as_posix() if file.is_relative_to(paths.ROOT) else str(file)


def _describe(problem: Any, kind: type[Section], tree: Any, shown: str, marked: Any) -> str:
    path = tuple(str(step) for step in problem["loc"] if step != "[key]")
    line, key = find_line(marked, problem["loc"]), ".".join(path) or "the whole file"
    match problem["type"]:
        case _ if path[:1] == ("extends",):  # one problem for each type that it may have
            return f"{shown}:{line}: extends is {tree['extends']!r}; must be a file, or a list of files"
        case "extra_forbidden":
            return f"{shown}:{line}: {key} is not a known key; {did_you_mean(key, list(kind.model_fields))}"
        case "missing":
            return f"{shown}:1: {key} is missing; add it: {kind.model_fields[key].description}"
        case "dict_type" | "model_type" if path in ((), ("overrides",)):
            meant = "description and overrides" if not path else "KEY: VALUE, one a line"
            return f"{shown}:{line}: {key} is not a mapping; write {meant}"
        case "too_short" | "string_too_short":
            return f"{shown}:{line}: {path[0]} is empty; write {kind.model_fields[path[0]].description}"
    rule = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{shown}:{line}: {key} is {problem['input']!r}; must be {rule}"


def _find_unknown_keys(overrides: Mapping[str, Override], pipeline: Pipeline) -> Iterator[str]:
    known = list_keys(pipeline.section)
    for key, override in overrides.items():
        if key in known:
            continue
        inner = next((leaf for leaf in known if leaf.startswith(f"{key}.")), None)
        remedy = f"it is a section; name its keys, such as {inner}" if inner else did_you_mean(key, known)
        yield f"{override.place}: overrides: {key} is not a key of {pipeline.params_name}; {remedy}"


def _find_refusals(overrides: Mapping[str, Override], recipe: str | None, pipeline: Pipeline) -> list[str]:
    """Return why params.yaml would not take the overrides, or which of those in the file `recipe` change nothing."""
    try:
        written = [format_override(key, override.value) for key, override in overrides.items()]
        config = apply_overrides(written, pipeline)
    except InputError as error:
        return [_locate(line, overrides, pipeline) for line in str(error).splitlines()]
    own = {key: override for key, override in overrides.items() if override.file == recipe}
    return list(_find_unused(own, _list_unused_sections(config.params)))


def _list_unused_sections(params: Params | Any) -> dict[str, str | bool]:
    """Return the sections that another value turns off, with that value."""
    training = params.training
    if not isinstance(params, Params):
        return {"lora": training.tuning != "lora" and f"training.tuning is {training.tuning!r}"}
    return {
        "dpo": training.method != "dpo" and f"training.method is {training.method!r}",
        "grpo": training.method != "grpo" and f"training.method is {training.method!r}",
        "lora": training.tuning == "full" and "training.tuning is 'full'",
        "judge": not params.judge.enabled and "judge.enabled is false",
        "sampling": not params.sampling.files and "sampling.files is empty",
        "benchmark": not params.benchmark.tasks and "benchmark.tasks is empty",
        "bert_score": "bert_score" not in params.evaluate.metrics and "evaluate.metrics does not list bert_score",
    }


# The keys that turn a section off, which a recipe may well set so.
SWITCHES = ("judge.enabled", "sampling.files", "benchmark.tasks")


def _find_unused(overrides: Mapping[str, Override], off: Mapping[str, str | bool]) -> Iterator[str]:
    """Yield a line for each value that changes nothing, because another one turns its whole section off."""
    for key, override in overrides.items():
        if (why := off.get(key.partition(".")[0])) and key not in SWITCHES:
            yield f"{override.place}: overrides: {key} changes nothing, as {why}; set that, or remove this line"


def _locate(message: str, overrides: Mapping[str, Override], pipeline: Pipeline) -> str:
    """Put the place of the override that is meant before a message of params.yaml's own rules."""
    rule = message.removeprefix(f"{pipeline.params_name}: ")
    mentioned = [key for key in overrides if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", rule)]
    if not mentioned:
        return message  # params.yaml itself is wrong
    nearest = min(mentioned, key=lambda key: (rule.index(key), -len(key)))
    return f"{overrides[nearest].place}: overrides: {rule}"
