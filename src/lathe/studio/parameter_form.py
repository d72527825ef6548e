"""Form of the parameters, made from the classes that validate params.yaml: types, ranges, units and meanings."""

import io
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from lathe.adopt.own_files import edit_params
from lathe.common import paths
from lathe.common.dotted_keys import get_value
from lathe.common.errors import InputError
from lathe.common.workspace_lock import refuse_beside_holder
from lathe.config.base import Section, section_of
from lathe.config.load import load
from lathe.config.overrides import apply_overrides, format_override, list_keys
from lathe.config.params import Params
from lathe.config.reference import describe_range, describe_type, read_unit
from lathe.config.yaml_files import parse_yaml, read_yaml
from lathe.experiments.recipes import load_main_recipe

# Shown at once; all others are folded.
MAIN_KEYS = (
    "model",
    "dataset",
    "training.method",
    "training.tuning",
    "training.max_length",
    "training.num_train_epochs",
    "training.max_steps",
    "training.learning_rate",
    "training.per_device_train_batch_size",
    "lora.r",
    "quantize.types",
    "judge.enabled",
)
PRESET_TABLES = {"model": "models", "dataset": "datasets", "bert_score.model": "encoders"}


@dataclass(frozen=True)
class FormEntry:
    """One parameter: `choices` are its values where there are few, else it is written as YAML; `value` is that text."""

    key: str
    value: str
    meaning: str
    unit: str
    kind: str
    bounds: str
    choices: list[str] = field(default_factory=list)

    @property
    def identifier(self) -> str:
        """The id of its input on the page."""
        return f"p-{self.key.replace('.', '-')}"


@dataclass(frozen=True)
class FormSection:
    """The folded parameters of a section of params.yaml."""

    name: str
    meaning: str
    entries: list[FormEntry]


@dataclass(frozen=True)
class CheckedForm:
    """What a filled-in form asks for: the overrides of the recipe, or the problems, one line each.

    `values` are those of the overrides, by their keys.
    """

    overrides: list[str]
    problems: list[str]
    values: dict[str, Any] = field(default_factory=dict)


def read_values(recipe: str) -> dict[str, Any]:
    """Return the values of every parameter as a recipe sets them. Raises InputError."""
    tree = apply_overrides(load_main_recipe(recipe).build_overrides([])).params.model_dump(exclude_none=False)
    return {key: get_value(tree, key) for key in list_keys()}


def build_entries(values: Mapping[str, Any]) -> tuple[list[FormEntry], list[FormSection]]:
    """Return the main entries, and the sections with all others."""
    presets = read_yaml(paths.PRESETS)
    main: dict[str, FormEntry] = {}
    sections: dict[str, FormSection] = {}
    for key, info, section in walk(Params):
        names = list(presets.get(PRESET_TABLES[key]) or ()) if key in PRESET_TABLES else []
        entry = _build_entry(key, info, values[key], names)
        if key in MAIN_KEYS:
            main[key] = entry
        else:
            name = key.partition(".")[0] if "." in key else ""
            sections.setdefault(name, FormSection(name, section.__doc__ or "", [])).entries.append(entry)
    return [main[key] for key in MAIN_KEYS], list(sections.values())


def read_params() -> dict[str, Any]:
    """Return the values of every parameter as params.yaml has them. Raises InputError."""
    tree = load().params.model_dump(exclude_none=False)
    return {key: get_value(tree, key) for key in list_keys()}


def check_form(recipe: str, given: Mapping[str, str]) -> CheckedForm:
    """Compare the texts of a form with a recipe's values, and validate those that differ, as `lathe run` would.

    Keys that the form lacks stay as they are. Raises InputError if there is no such recipe.
    """
    values, problems = _compare(given, read_values(recipe))
    overrides = [format_override(key, value) for key, value in values.items()]
    return CheckedForm(overrides, problems or check_overrides(recipe, overrides), values)


def check_params(given: Mapping[str, str]) -> CheckedForm:
    """Do the same with the values of params.yaml."""
    values, problems = _compare(given, read_params())
    overrides = [format_override(key, value) for key, value in values.items()]
    if not problems:
        try:
            apply_overrides(overrides)
        except InputError as error:
            problems = str(error).splitlines()
    return CheckedForm(overrides, problems, values)


def save_params(values: Mapping[str, Any]) -> None:
    """Write values into params.yaml by their keys; its other lines and all comments stay.

    Raises InputError if the file would not be valid, or while another command works with it.
    """
    refuse_beside_holder("saving params.yaml")
    text = edit_params(paths.PARAMS.read_text(encoding="utf-8"), values)
    with paths.replace_file(paths.PARAMS) as partial:
        partial.write_text(text, encoding="utf-8")
        written = load(partial).params.model_dump(exclude_none=False)
        wrong = [key for key, value in values.items() if get_value(written, key) != value]
        if wrong:
            raise InputError(f"params.yaml: {wrong[0]} cannot be written here; edit the file", code="params-place")


def _compare(given: Mapping[str, str], values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what differs, by its keys, and the problems of what cannot be read."""
    different, problems = dict[str, Any](), []
    for key, text in given.items():
        if key not in values:
            problems.append(f"{key[:80]!r} is no parameter; load the page again")
            continue
        if text.strip() == write_value(values[key]):
            continue
        try:
            value = parse_value(text)
        except InputError:
            problems.append(f"{key} is {text[:60]!r}, which is no YAML value; quote it, or close its brackets")
            continue
        if "${" in text:
            problems.append(f"{key}: DVC would fill in ${{…}}; write the value itself")
        elif value != values[key] or type(value) is not type(values[key]):
            different[key] = value
    return different, problems


def check_overrides(recipe: str, overrides: Sequence[str]) -> list[str]:
    """Return why a recipe with these overrides would be refused, one line each."""
    try:
        apply_overrides(load_main_recipe(recipe).build_overrides(overrides))
    except InputError as error:
        return str(error).splitlines()
    return []


def parse_value(text: str) -> Any:
    """Return the value of a text in YAML, as params.yaml would have it; empty is null."""
    value = parse_yaml(text, "the value")
    if isinstance(value, str | int | float | bool | list | dict | None):
        return value
    return str(text)  # a date, which no parameter is


def write_value(value: Any) -> str:
    """Return a value as YAML on one line; null is empty."""
    if value is None:
        return ""
    if isinstance(value, str) and parse_back(value) == value and "\n" not in value:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    writer = YAML(typ="safe")
    writer.default_flow_style, writer.width, writer.allow_unicode = True, 1_000_000, True
    out = io.StringIO()
    writer.dump(value, out)
    return out.getvalue().strip().removesuffix("...").strip()


def parse_back(text: str) -> Any:
    """Return what a plain text would be read as; None if it cannot be read."""
    try:
        return parse_value(text)
    except InputError:
        return None


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo, type[Section]]]:
    """Yield every key of a section that holds a value, with its field and the section that it is in."""
    for name, info in section.model_fields.items():
        inner = None if typing.get_origin(info.annotation) is list else section_of(info.annotation)
        if inner:
            yield from walk(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, info, section


def _build_entry(key: str, info: FieldInfo, value: Any, names: list[str]) -> FormEntry:
    choices = names or [write_value(choice) for choice in list_choices(info.annotation)]
    text = write_value(value)
    if choices and text not in choices:
        choices = [text, *choices]
    kind = describe_type(info.annotation).replace("`", "").replace("null", "empty")
    return FormEntry(key, text, info.description or "", read_unit(info) or "", kind, describe_range(info), choices)


def list_choices(kind: Any) -> list[Any]:
    """Return all values of a type that has few; none for numbers and texts."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return list_choices(arguments[0])
    if kind is bool:
        return [True, False]
    if kind is type(None):
        return [None]
    if origin is Literal:
        return list(arguments)
    if origin in {typing.Union, types.UnionType}:
        parts = [list_choices(argument) for argument in arguments]
        if all(parts):
            return [choice for part in parts for choice in part]
    return []
