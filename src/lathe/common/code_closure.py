"""Code closure: which files of the library a script or module imports, directly or through others.

`dvc.yaml` lists them for each stage (`make deps`), and the fingerprint of unfinished work is made from them.
"""

import ast
import re
from functools import cache
from pathlib import Path

from lathe.common import paths

SOURCE = paths.ROOT / "src"

# These packages and modules carry things about and cannot change an output: an edit of theirs re-runs nothing.
CARRIERS = ("common", "config", "stage", "out_of_memory")

# Modules of those packages that can.
DECIDING = ("common.jsonl", "config.artifacts", "config.engine_marks", "config.engines", "config.gates")


def code_closure(file: Path) -> list[Path]:
    """Return the files below src/lathe that `file` runs and that can change what it makes, sorted, without itself."""
    seen: set[str] = set()
    waiting = set(imported_modules(file))
    while waiting:
        module = waiting.pop()
        if module not in seen and not carries(module):
            seen.add(module)
            waiting |= imported_modules(module_file(module))
    modules = {module_file(module) for module in seen} - {file}
    return sorted({found for module in modules for found in (module, *templates_of(module)) if is_code(found)})


def is_code(file: Path) -> bool:
    """Tell whether a file is one that can change what is made: an empty `__init__.py` is not."""
    return file.is_file() and file.suffix in {".py", ".jinja"} and file.stat().st_size > 0


def templates_of(module: Path) -> list[Path]:
    """Return the templates that belong to a module: all of its folder for `templates/`, else those it names."""
    beside = module.parent.glob("*.jinja")
    text = module.read_text(encoding="utf-8")
    return [file for file in beside if module.parent.name == "templates" or f'"{file.name}"' in text]


def carries(module: str) -> bool:
    """Tell whether a module only carries things about, and so is no dependency of any stage."""
    name = module.removeprefix("lathe.")
    return module == "lathe" or (name.partition(".")[0] in CARRIERS and name not in DECIDING)


@cache
def imported_modules(file: Path) -> frozenset[str]:
    """Return the modules of the library that a file imports, in functions too, or names for `python -m`.

    What is imported for type checking alone does not count.
    """
    modules: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"lathe(\.\w+)+", str(node.value)):
            modules.add(str(node.value))
        nodes += ast.iter_child_nodes(node)
    return frozenset(module for module in modules if module.partition(".")[0] == "lathe" and is_module(module))


def is_module(name: str) -> bool:
    """Tell whether the library has a module or package of this dotted name."""
    return module_file(name).exists()


def module_file(name: str) -> Path:
    """Return the file of a module, or the __init__.py of a package; it need not be there."""
    folder = SOURCE.joinpath(*name.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
