"""Space of a search as a form: a row for each parameter, made from the classes that validate search files.

The search file's text stays what counts: rows are read from it and written into it, its comments kept.
"""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo
from ruamel.yaml.comments import CommentedMap

from lathe.common.errors import InputError
from lathe.config.base import Section
from lathe.config.params import Params
from lathe.config.reference import describe_range, read_unit
from lathe.experiments.search.search_file import Dimension
from lathe.studio.parameter_form import list_choices, parse_back, read_params, walk, write_value
from lathe.studio.search_text import unwrap

MOST_ROWS = 60


@dataclass(frozen=True)
class SpaceField:
    """An input of a row: a key of its distribution, the text in it, and whether it is true or false."""

    name: str
    text: str
    is_switch: bool
    is_required: bool


@dataclass(frozen=True)
class SpaceRow:
    """A searched parameter: the distributions that fit its type, the one that it has, and that one's inputs.

    `kind` is empty where the text names none.
    """

    key: str
    kind: str
    kinds: list[str]
    fields: list[SpaceField]
    help: str


def _list_distributions() -> dict[str, type[Section]]:
    """Return the classes of distributions by their names in a search file."""
    union = typing.get_args(Dimension)[0]
    return {typing.get_args(kind.model_fields["type"].annotation)[0]: kind for kind in typing.get_args(union)}


DISTRIBUTIONS = _list_distributions()


def list_free_keys(rows: Sequence[SpaceRow]) -> list[str]:
    """Return the parameters that could be searched besides those of the rows."""
    taken = {row.key for row in rows}
    return [key for key, _, _ in walk(Params) if key not in taken]


def read_rows(tree: Mapping[str, Any]) -> list[SpaceRow]:
    """Return the rows of a search file's tree."""
    known = {key: info for key, info, _ in walk(Params)}
    rows = []
    for key, given in tree["space"].items():
        values = given if isinstance(given, Mapping) else {}
        rows.append(_build_row(str(key), str(values.get("type", "")), values, known.get(str(key))))
    return rows[:MOST_ROWS]


def write_rows(tree: Any, form: Mapping[str, str]) -> None:
    """Put the rows of a form into a search file's tree: those removed are gone, the added one is the last.

    Inputs are named `space:NUMBER:NAME`, NAME being `key`, `kind` or a key of the distribution; `remove` is the number
    of a row, `add` a parameter. Raises InputError for an input that is none of these.
    """
    space: Any = tree["space"]
    for number, row in sorted(_group_inputs(form).items()):
        key = row.get("key", "")
        if form.get("remove") == str(number):
            space.pop(key, None)
            continue
        if key not in space:
            raise InputError(
                f"space: {key[:80]!r} is not in the text any more; load the page again", code="other-space"
            )
        _write_row(space, key, row)
    if added := form.get("add", ""):
        _add_row(space, added)


def _write_row(space: Any, key: str, row: Mapping[str, str]) -> None:
    """Put what a row says into its entry; what it has as it was stays as it is written."""
    kind = row.get("kind", "")
    if kind not in DISTRIBUTIONS:
        raise InputError(f"space.{key}: type must be one of {', '.join(DISTRIBUTIONS)}", code="no-such-type")
    entry: Any = space[key]
    if not isinstance(entry, dict) or entry.get("type") != kind:
        entry = space[key] = _make_entry(kind, _suggest(kind, key))
        return
    for name, info in _list_fields(kind):
        if (given := row.get(name)) is None or given.strip() == write_value(unwrap(entry.get(name))):
            continue
        value = parse_back(given)
        if value is None and given.strip():
            value = given.strip()  # what is no YAML is told by the check of the text
        if value is None or (value is False and not info.is_required()):
            entry.pop(name, None)
        else:
            entry[name] = value


def _add_row(space: Any, key: str) -> None:
    info = {name: info for name, info, _ in walk(Params)}.get(key)
    if info is None or key in space:
        raise InputError(
            f"space: {key[:80]!r} is no parameter, or is searched already; choose another", code="no-such-key"
        )
    kind = _fit_distributions(info)[0]
    space[key] = _make_entry(kind, _suggest(kind, key))


def _suggest(kind: str, key: str) -> dict[str, Any]:
    """Return values to begin with, around the one of params.yaml."""
    value = read_params().get(key)
    if kind == "categorical":
        info = {name: info for name, info, _ in walk(Params)}[key]
        return {"choices": list_choices(info.annotation) or [value]}
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return {"low": 0, "high": 1} if kind == "int" else {"low": 0.0, "high": 1.0}
    ends = sorted((value / 2, value * 2))
    return {"low": int(ends[0]), "high": int(ends[1])} if kind == "int" else {"low": ends[0], "high": ends[1]}


def _make_entry(kind: str, values: Mapping[str, Any]) -> CommentedMap:
    entry = CommentedMap({"type": kind, **values})
    entry.fa.set_flow_style()
    return entry


def _build_row(key: str, kind: str, values: Mapping[str, Any], info: FieldInfo | None) -> SpaceRow:
    kinds = _fit_distributions(info) if info else list(DISTRIBUTIONS)
    if kind not in kinds:
        kinds = [kind, *kinds]
    fields = []
    for name, of_field in _list_fields(kind) if kind in DISTRIBUTIONS else ():
        is_switch = of_field.annotation is bool
        value = values.get(name, of_field.default if is_switch else None)
        fields.append(SpaceField(name, write_value(unwrap(value)), is_switch, of_field.is_required()))
    unit, bounds = (read_unit(info) or "", describe_range(info)) if info else ("", "")
    parts = [info.description or "" if info else "", unit, bounds]
    return SpaceRow(key, kind, kinds, fields, " · ".join(filter(None, parts)))


def _list_fields(kind: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in DISTRIBUTIONS[kind].model_fields.items():
        if name != "type":
            yield name, info


def _fit_distributions(info: FieldInfo) -> list[str]:
    """Return the distributions whose values a parameter can have, the most telling first."""
    kinds = set(_list_kinds(info.annotation))
    numeric = ["float"] if float in kinds else ["int"] if int in kinds else []
    return [*numeric, "categorical"]


def _list_kinds(kind: Any) -> Iterator[Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        yield from _list_kinds(arguments[0])
    elif origin in {typing.Union, types.UnionType}:
        for argument in arguments:
            yield from _list_kinds(argument)
    elif origin is not Literal and origin is not list:
        yield kind


def _group_inputs(form: Mapping[str, str]) -> dict[int, dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for name, text in form.items():
        head, _, rest = name.partition(":")
        number, _, key = rest.partition(":")
        if head == "space" and number.isascii() and number.isdigit() and len(number) < 4:
            rows.setdefault(int(number), {})[key] = text
    return rows
