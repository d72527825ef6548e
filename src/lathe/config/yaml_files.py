"""YAML files: read as DVC reads them, within limits, and the line of a key in one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lathe.common.errors import InputError

MOST_DEPTH = 100  # of values within values
MOST_VALUES = 1_000_000  # with every alias written out, as a message or a copy would write it


def read_yaml(file: Path) -> Any:
    """Read a YAML file with DVC's own library and settings (YAML 1.2: `5e-05` is a number).

    Raises InputError with file and line for what is no YAML, or beyond the limits.
    """
    return parse_yaml(_read_text(file), file.name)


def read_marked_yaml(file: Path) -> Any:
    """Read a YAML file that `read_yaml` has read, with the lines of its keys, for `find_line`."""
    return parse_yaml(_read_text(file), file.name, kind="rt")


def parse_yaml(text: str, name: str, *, kind: str = "safe") -> Any:
    """Read the text of a YAML file; messages call it `name`, and `kind` is that of ruamel's loaders.

    Raises InputError as `read_yaml` does.
    """
    check_depth(text, name)
    try:
        tree = YAML(typ=kind).load(text)
        check_values(tree, name)
    except RecursionError:
        raise _refuse_depth(name) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join((error.problem or "unreadable").split())
        raise InputError(f"{name}:{line}: not valid YAML: {problem}; mend this line", code="not-yaml") from None
    except (YAMLError, ValueError, AttributeError, TypeError) as error:  # a date without such a day, a tag out of place
        raise InputError(f"{name}: not valid YAML: {' '.join(str(error).split())}", code="not-yaml") from None
    return tree


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"{file}: no such file; restore it with `git checkout {file.name}`"
        raise InputError(message, code="missing-file") from None
    except UnicodeDecodeError as error:
        message = f"{file.name}: byte {error.start} is not UTF-8; save the file as UTF-8"
        raise InputError(message, code="not-utf-8") from None


def check_depth(text: str, name: str) -> None:
    """Raise InputError where brackets or dashes nest so deep that libyaml, which is C, would end the process."""
    depth = 0
    for sign in re.findall(r"[\[\]{}]", text):
        depth += 1 if sign in "[{" else -1
        if depth > MOST_DEPTH:
            raise _refuse_depth(name)
    if re.search(rf"(?:[-?:][ \t]+){{{MOST_DEPTH},}}", text):
        raise _refuse_depth(name)


def check_values(tree: Any, name: str) -> None:
    """Raise InputError where the values of a YAML file, aliases written out, are too many, or lie too deep."""
    _count_values(tree, name, {}, 0)


def _count_values(value: Any, name: str, counted: dict[int, int], depth: int) -> int:
    """Return the number of values in a tree with its aliases written out; each is looked at once."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if depth > MOST_DEPTH:
        raise _refuse_depth(name)
    if (known := counted.get(id(value))) is not None:
        return known
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    total = 1 + sum(_count_values(item, name, counted, depth + 1) for item in inner)
    if total > MOST_VALUES:
        raise InputError(
            f"{name}: its aliases stand for more than {MOST_VALUES:,} values; write out those that are meant",
            code="too-many-values",
        )
    counted[id(value)] = total
    return total


def _refuse_depth(name: str) -> InputError:
    return InputError(
        f"{name}: values lie more than {MOST_DEPTH} deep in one another, or a value in itself; write them flat",
        code="nested-too-deep",
    )


def find_line(marked: Any, location: Sequence[Any]) -> int:
    """Return the line of a key or item in a YAML file, or of the nearest above it that is there.

    `marked` is the file from ruamel's round-trip loader, `location` that of a problem from pydantic.
    """
    line = 1
    for step in location:
        try:
            line = marked.lc.item(step)[0] + 1 if isinstance(step, int) else marked.lc.key(step)[0] + 1
            marked = marked[step]
        except (AttributeError, KeyError, TypeError):
            continue  # the name of a union's member, or a missing key
    return line
