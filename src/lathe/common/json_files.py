"""JSON files: read with an error that names the place, written completely or not at all."""

import json
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError


def read_json(file: Path, *, shown: str | None = None, remedy: str = "run the stage that writes it again") -> Any:
    """Return the content of a JSON file.

    Raises InputError with file and line if it is missing or no JSON; `shown` is the name used there, by default the
    whole path, and `remedy` what is to be done about it.
    """
    name = shown or str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; {remedy}", code="no-such-file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: byte {error.start} is not UTF-8; {remedy}", code="not-utf8") from None
    return parse_json(text, name, remedy=remedy)


def parse_json(text: str, name: str, *, remedy: str) -> Any:
    """Return the content of the text of a JSON file, which messages call `name`. Raises InputError if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}: not valid JSON: {error.msg}; {remedy}", code="not-json") from None
    except RecursionError:
        raise InputError(f"{name}: not valid JSON: nested too deep; {remedy}", code="not-json") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise InputError(f"{name}: not valid JSON: {error}; {remedy}", code="not-json") from None


def read_json_object(
    file: Path, *, shown: str | None = None, remedy: str = "run the stage that writes it again"
) -> Any:
    """Return the content of a JSON file that holds one object; raises InputError as `read_json`."""
    content = read_json(file, shown=shown, remedy=remedy)
    if not isinstance(content, dict):
        raise InputError(f"{shown or file}: must hold a JSON object; {remedy}", code="no-json-object")
    return content


def encode_json(content: Any, *, sort_keys: bool = False) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(file: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Write JSON of two spaces' indent, floats as they are, keys in the order given unless sorted, a newline last."""
    with paths.replace_file(file) as partial:
        partial.write_text(encode_json(content, sort_keys=sort_keys), encoding="utf-8")
