"""Words of the library: class names are unique, refusals carry a code, and every module says what it is about."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from lathe.common import paths

SOURCE = paths.ROOT / "src/lathe"
MODULES = sorted(SOURCE.rglob("*.py"))
NAMES = [file.relative_to(SOURCE).as_posix() for file in MODULES]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def find_calls(file: Path, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == name:
            yield node


def find_class_places() -> dict[str, list[str]]:
    """Where each class is defined, by name; a leading underscore does not make another name."""
    places: dict[str, list[str]] = defaultdict(list)
    for file, name in zip(MODULES, NAMES, strict=True):
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{name}:{node.lineno}")
    return places


def test_no_two_classes_have_one_name():
    assert {name: where for name, where in find_class_places().items() if len(where) > 1} == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_refusal_carries_a_code(name):
    without = [
        f"{name}:{call.lineno}"
        for call in find_calls(SOURCE / name, "InputError")
        if "code" not in {keyword.arg for keyword in call.keywords}
    ]
    assert without == []


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_lower_case_words_joined_by_hyphens(name):
    for call in find_calls(SOURCE / name, "InputError"):
        for keyword in call.keywords:
            if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                words = keyword.value.value.split("-")
                assert all(word.isalnum() and word == word.lower() for word in words), f"{name}:{call.lineno}"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("__init__.py")])
def test_every_module_begins_with_what_it_is_about(name):
    assert ast.get_docstring(parse(SOURCE / name))
