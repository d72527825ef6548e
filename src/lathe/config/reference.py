"""Reference of every key, made from the classes that validate them: `lathe schema`."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lathe.config.base import Section, section_of
from lathe.config.classifier_params import ClassifierParams
from lathe.config.load import KINDS
from lathe.config.params import Params


def render_page() -> str:
    """Return a page with one table per section of params.yaml, then the entries of presets.yaml, then classify/."""
    blocks = [
        "# Parameters",
        "Made by `lathe schema`. Every key must be in `params.yaml`; there are no defaults in the code.",
        "## Top level",
        *_render_section("", Params),
    ]
    blocks += ["# Presets", "Entries of `presets.yaml`; a key that is not needed is left out."]
    for title, preset in _list_presets():
        fields = {name: field for name, field in preset.model_fields.items() if name != "source"}
        blocks += [f"## {title}", preset.__doc__ or "", *([_render_table(fields)] if fields else [])]
    blocks += ["# Parameters of the classifier", "Keys of `classify/params.yaml`, of which every one must be there."]
    blocks += ["## Top level", *_render_section("classify: ", ClassifierParams)]
    return "\n\n".join(blocks) + "\n"


def _list_presets() -> Iterator[tuple[str, type[Section]]]:
    """Yield the kinds of entries of presets.yaml with their titles."""
    for table, kinds in KINDS.items():
        for source, preset in kinds.items():
            yield f"{table}: {source}", preset


def _render_section(name: str, section: type[Section]) -> Iterator[str]:
    """Yield the table of a section's own keys, then its sections and the entries of its lists."""
    own = {key: field for key, field in section.model_fields.items() if not _find_section(field)}
    if own:
        yield _render_table(own)
    for key, field in section.model_fields.items():
        if (inner := section_of(field.annotation)) is None:
            continue
        yield f"{'##' if _find_section(field) else '###'} {name}{key}"
        yield inner.__doc__ or ""
        yield from _render_section(f"{name}{key}.", inner)


def format_comment(field: FieldInfo) -> str:
    """Return the comment of a key in params.yaml: its meaning and, if it has one, its unit."""
    unit = read_unit(field)
    return f"{field.description} ({unit})" if unit else field.description or ""


def _render_table(fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | type | unit | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in fields.items():
        kind = describe_type(field.annotation)
        bounds, unit = describe_range(field), read_unit(field) or ""
        lines.append(f"| `{name}` | {kind} | {unit} | {bounds} | {field.description} |".replace("  |", " |"))
    return "\n".join(lines)


def _find_section(field: FieldInfo) -> type[Section] | None:
    return None if typing.get_origin(field.annotation) is list else section_of(field.annotation)


def read_unit(field: FieldInfo) -> str | None:
    """Return the unit of a key; None if it has none."""
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else None


def describe_type(kind: Any) -> str:
    """Return a type in words, as Markdown."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if section_of(kind):
        return "list, see below"
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"{describe_type(arguments[1])} by {describe_type(arguments[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    return names[kind]


def describe_range(field: FieldInfo) -> str:
    """Return the bounds of a key, such as `≥ 1, < 10`; empty if it has none."""
    # A union's members carry their bounds inside the annotation, a plain type beside it.
    bounds = [*field.metadata, *_collect_metadata(field.annotation)]
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    parts = []
    for bound in bounds:
        for item in [bound, *getattr(bound, "metadata", [])]:
            if type(item) in signs:
                sign, attribute = signs[type(item)]
                parts.append(f"{sign} {getattr(item, attribute):,}")
    return ", ".join(dict.fromkeys(parts))


def _collect_metadata(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Annotated:
        return list(kind.__metadata__)
    return [item for argument in typing.get_args(kind) for item in _collect_metadata(argument)]
