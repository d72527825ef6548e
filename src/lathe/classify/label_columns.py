"""Label columns: the labels that the text of a row's label column means."""

import json
from typing import TYPE_CHECKING, Any

from lathe.common.text import shorten_value
from lathe.data.row_checks import RowFault

if TYPE_CHECKING:
    from lathe.config.classifier_params import Data


def parse_labels(value: str, settings: "Data", field: str) -> list[str]:
    """Return the labels that the text of a label column means, none for none of the classes; raises RowFault."""
    if settings.label_fields:
        return _join_fields(value, settings, field)
    if settings.multi_label:
        return _split_labels(value, settings, field)
    name = value.strip()
    if not name:
        raise RowFault("empty_label", field, "is empty; expected a label")
    return [] if name == settings.none_label else [name]


def _join_fields(value: str, settings: "Data", field: str) -> list[str]:
    """Return one label, made of the fields of a JSON object; a field that is null means none of the classes."""
    try:
        content = json.loads(value)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise RowFault(
            "not_an_object",
            field,
            f"is {shorten_value(value)}; data.label_fields wants a JSON object; set that to null if it is the label",
        )
    parts = []
    for name in settings.label_fields or []:
        if name not in content:
            raise RowFault("missing_label_field", field, f"has no {name!r}, which data.label_fields names")
        parts.append(content[name])
    if None in parts and settings.none_label:
        return []
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise RowFault("not_a_label", field, f"is {shorten_value(value)}; expected texts in data.label_fields")
    name = " ".join(part.strip() for part in parts)
    return [] if name == settings.none_label else [name]


def _split_labels(value: str, settings: "Data", field: str) -> list[str]:
    if settings.label_separator:
        parts: Any = [part for part in value.split(settings.label_separator) if part.strip()]
    else:
        try:
            parts = json.loads(value)
        except ValueError:
            parts = None
    if not isinstance(parts, list) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise RowFault(
            "not_a_list",
            field,
            f"is {shorten_value(value)}; data.multi_label wants a list of texts; name what separates them in "
            "data.label_separator",
        )
    return sorted({part.strip() for part in parts})
