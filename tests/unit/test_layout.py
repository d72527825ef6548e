"""The house: which package may import which, what loading the configuration imports, and how long a module may be."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lathe.common import paths
from lathe.common.code_closure import imported_modules, module_file
from lathe.config.quantization_types import FILE_TYPES, TENSOR_TYPES
from lathe.gguf.ggml_types import read_ggml_types
from lathe.gguf.tensor_types import list_file_types

SOURCE = paths.ROOT / "src/lathe"

# Each package or top-level module, and what else of the library it may import.
FLOORS = [
    {"common"},
    {"config"},
    {"models"},
    {"data", "gguf"},
    {"sources", "provenance", "inference"},
    {"evaluation", "export"},
    {"training", "classify", "experiments", "reports"},
    {"needs", "present_datasets", "stage"},
    {
        "doctor",
        "adopt",
        "new_recipe",
        "publishing",
        "remote",
        "studio",
        "completion",
        "commands",
        "cli",
        "__main__",
    },
]
# Beside one another on the same floor: allowed in this direction alone.
NEIGHBOURS = {
    ("classify", "training"),
    ("experiments", "classify"),
    ("stage", "needs"),
    ("doctor", "needs"),
    ("commands", "publishing"),
    ("commands", "doctor"),
    ("commands", "adopt"),
    ("commands", "new_recipe"),
    ("studio", "adopt"),
    ("new_recipe", "doctor"),
    ("cli", "commands"),
    ("cli", "completion"),
    ("commands", "remote"),
    ("commands", "completion"),
    ("cli", "studio"),
    ("studio", "commands"),
    ("__main__", "doctor"),
    ("__main__", "cli"),
}
MODULES = sorted(SOURCE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_every_package_and_top_level_module_has_a_floor():
    rooms = {room(file) for file in MODULES} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_no_module_imports_from_a_floor_above_or_beside_its_own(file):
    if room(file) == "__init__":
        return
    for module in imported_modules(file):
        target = room(module_file(module))
        if target in ("__init__", room(file)) or (room(file), target) in NEIGHBOURS:
            continue
        assert floor(target) < floor(room(file)), f"{room(file)} may not import {module}"


def test_the_modules_of_the_library_import_one_another_in_no_circle():
    def visit(file: Path, above: tuple[Path, ...]) -> None:
        assert file not in above, " -> ".join(path.name for path in (*above, file))
        if file not in done:
            for module in imported_at_once(file):
                visit(module, (*above, file))
            done.add(file)

    done: set[Path] = set()
    for file in MODULES:
        visit(file, ())


def imported_at_once(file: Path) -> set[Path]:
    """The modules that a file imports when it is imported itself: not in functions, not for type checking."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lathe":
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {module_file(name) for name in names if module_file(name).exists()} - {SOURCE / "__init__.py", file}


def test_every_package_file_is_empty_but_for_the_version():
    for file in SOURCE.rglob("__init__.py"):
        assert file.parent == SOURCE or not file.stat().st_size, file


def test_no_module_is_longer_than_450_lines():
    longest = {file.relative_to(SOURCE).as_posix(): len(file.read_text().splitlines()) for file in MODULES}
    assert {name: lines for name, lines in longest.items() if lines > 450} == {}


COUNTED_SECONDS = 0.06  # of the counting below, on a core of one's own


def test_validating_the_configuration_imports_no_heavy_library_and_is_quick():
    heavy = {"torch", "numpy", "transformers", "llama_cpp", "datasets", "dvc", "peft", "trl", "pandas"}
    program = (
        "import json, sys, time\n"
        "begun = time.process_time()\n"
        "sum(number * number for number in range(1_000_000))\n"
        "counted = time.process_time() - begun\n"
        "from lathe.config.load import load\n"
        "load()\n"
        "print(json.dumps([time.process_time() - counted, counted, sorted(sys.modules)]))"
    )
    seconds: list[float] = []
    while len(seconds) < 12 and (not seconds or min(seconds) >= 0.35):  # other work on the cores makes it more
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=paths.ROOT
        )
        taken, counted, modules = json.loads(done.stdout)
        assert not heavy & set(modules)
        seconds.append(taken / max(1.0, counted / COUNTED_SECONDS))  # a core that others slow down takes more for both
    assert min(seconds) < 0.35, seconds


def test_the_quantization_types_are_those_of_the_installed_llama_cpp():
    assert list(FILE_TYPES) == list(list_file_types())
    assert list(TENSOR_TYPES) == list(read_ggml_types())
