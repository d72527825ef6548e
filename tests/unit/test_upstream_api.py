"""Private names of other packages: each one used is listed, and exists with the signature that the list gives."""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import lathe.training
from lathe.common import paths
from lathe.training.upstream_api import OVERRIDDEN, UPSTREAM_API, UpstreamName

SOURCE = paths.ROOT / "src/lathe"
FILES = sorted(
    [
        *(file for package in ("training", "models", "gguf") for file in (SOURCE / package).rglob("*.py")),
        *(SOURCE / name for name in ("needs/estimate.py", "needs/out_of_memory.py", "common/launch.py")),
    ]
)
LISTED = {entry.name for entry in UPSTREAM_API}


def load(path: str) -> Any:
    """Import a module, or get a class or namespace from one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(load(module), name)


def signature_of(function: Any) -> str:
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def assigned_on_self(owner: type) -> set[str]:
    """Names of the attributes that the class or one of its bases assigns in a method."""
    names = set()
    for kind in owner.__mro__[:-1]:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("entry", UPSTREAM_API, ids=lambda entry: f"{entry.owner}.{entry.name}")
def test_every_name_exists_with_the_signature_that_is_listed(entry: UpstreamName):
    owner = load(entry.owner)
    if not hasattr(owner, entry.name):
        assert inspect.isclass(owner)
        assert entry.name in assigned_on_self(owner)
        assert not entry.signature
    elif entry.signature:
        assert signature_of(getattr(owner, entry.name)) == entry.signature


def test_no_name_is_listed_twice_or_without_a_reason():
    keys = [(entry.owner, entry.name) for entry in UPSTREAM_API]
    assert len(keys) == len(set(keys))
    assert all(entry.reason for entry in UPSTREAM_API)


def trainers() -> Iterator[type]:
    for module in pkgutil.iter_modules(lathe.training.__path__, "lathe.training."):
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name and issubclass(kind, Trainer):
                yield kind


def test_every_method_of_a_trainer_that_ours_override_is_listed():
    listed = {(entry.owner, entry.name) for entry in OVERRIDDEN}
    needed = set()
    for trainer in trainers():
        ours = [kind for kind in trainer.__mro__ if kind.__module__.startswith("lathe.")]
        names = {name for kind in ours for name, value in vars(kind).items() if inspect.isfunction(value)}
        for name in names - {"__init__"}:
            upstream = next((kind for kind in trainer.__mro__ if kind not in ours and name in vars(kind)), None)
            if upstream:
                needed.add((f"{upstream.__module__.partition('.')[0]}.{upstream.__name__}", name))
    # Beside these, what a TRL class's method calls by `super()`.
    assert needed <= listed
    assert {name for _, name in listed} == {name for _, name in needed}


def own_names(tree: ast.AST) -> Iterator[str]:
    """Functions, classes and variables that a module defines, and attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        # What a trainer assigns on itself may be upstream's: ours are public.
        if isinstance(node, ast.ClassDef) and not any(ast.unparse(base).endswith("Trainer") for base in node.bases):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    yield inner.attr


NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public, for all their underscore


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in {*name.split(".")} - NAMED_TUPLE)


def foreign_private_names(file: Path, own: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lathe"):
            for alias in node.names:
                if is_private(f"{node.module}.{alias.name}"):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr


def test_no_private_name_of_another_package_is_used_that_is_not_listed():
    own: dict[Path, set[str]] = {}  # by folder: a name of ours in another package says nothing
    for file in FILES:
        own.setdefault(file.parent, set()).update(own_names(ast.parse(file.read_text(encoding="utf-8"))))
    used = {
        f"{file.relative_to(SOURCE)}:{line}: {name}"
        for file in FILES
        for line, name in foreign_private_names(file, own[file.parent])
        if name not in LISTED
    }
    assert not used


def test_a_private_name_that_is_not_listed_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from torch._other import thing\n"
        "import peft._hidden\n"
        "class Ours(SFTTrainer):\n"
        "    def step(self):\n"
        "        self._invented = self.model._private()\n"
        "        return self.__class__, self.public\n"
    )
    found = set(foreign_private_names(file, set(own_names(ast.parse(file.read_text())))))
    assert found == {(1, "thing"), (2, "peft._hidden"), (5, "_invented"), (5, "_private")}


def test_every_listed_name_is_used():
    text = "\n".join(file.read_text(encoding="utf-8") for file in FILES if file.name != "upstream_api.py")
    assert [entry.name for entry in UPSTREAM_API if entry.name not in text] == []
