"""Text of a search file, edited with its comments kept."""

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from lathe.common.errors import InputError


def load_text(text: str) -> Any:
    """Return the tree of a search file's text. Raises InputError for a text that is no YAML, or has no space."""
    try:
        tree = _make_editor().load(text)
    except YAMLError as error:
        raise InputError(f"the text is no YAML: {str(error).splitlines()[0]}; mend it", code="no-yaml") from None
    if not isinstance(tree, Mapping) or not isinstance(tree.get("space"), Mapping):
        raise InputError("the text has no `space:` with parameters; add it", code="no-space")
    return tree


def dump_text(tree: Any) -> str:
    """Return the text of a tree that `load_text` has made."""
    out = io.StringIO()
    _make_editor().dump(tree, out)
    return out.getvalue()


def unwrap(value: Any) -> Any:
    """Return a value of such a tree as plain Python."""
    if isinstance(value, list):
        return [unwrap(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return next((kind(value) for kind in (int, float, str) if isinstance(value, kind)), value)


class _NullInWords(RoundTripRepresenter):
    """Writes null as the word, as search files have it."""


_NullInWords.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


def _make_editor() -> YAML:
    editor = YAML()
    editor.Representer = _NullInWords
    editor.preserve_quotes, editor.width = True, 1_000_000
    editor.indent(mapping=2, sequence=4, offset=2)
    return editor
