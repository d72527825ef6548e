"""YAML files: read as DVC reads them, and the line of a key in one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lathe.common.errors import InputError


def read_yaml(file: Path) -> Any:
    """Read a YAML file with DVC's own library and settings (YAML 1.2: `5e-05` is a number)."""
    try:
        return YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{file}: no such file; restore it with `git checkout {file.name}`"
        raise InputError(message, code="missing-file") from None
    except UnicodeDecodeError as error:
        message = f"{file.name}: byte {error.start} is not UTF-8; save the file as UTF-8"
        raise InputError(message, code="not-utf-8") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join((error.problem or "unreadable").split())
        raise InputError(f"{file.name}:{line}: not valid YAML: {problem}; mend this line", code="not-yaml") from None
    except YAMLError as error:
        raise InputError(f"{file.name}: not valid YAML: {' '.join(str(error).split())}", code="not-yaml") from None


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
