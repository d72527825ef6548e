"""The page of security names tests that exist, and all that reaches a path, a shell or another program."""

import ast
import re

from lathe.common import paths

PAGE = (paths.ROOT / "docs/security.md").read_text(encoding="utf-8")
SOURCES = sorted((paths.ROOT / "src/lathe").rglob("*.py"))


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)
    assert len(named) > 25
    for file, name in named:
        tree = ast.parse((paths.ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_interpolation_of_the_pipelines_is_there() -> None:
    for file in ("dvc.yaml", "classify/dvc.yaml"):
        found = set(re.findall(r"\$\{[^}]+\}", (paths.ROOT / file).read_text(encoding="utf-8")))
        assert found
        items = ("quantize.types", "export.formats", "benchmark.tasks", "sampling.files")  # which the page has
        lists = {f"${{{name}}}" for name in items}
        lacking = [text for text in found if f"`{text}`" not in PAGE and text not in lists]
        assert lacking == []
    assert "`quantize.types`, `export.formats`, `benchmark.tasks`, `sampling.files`" in PAGE


def test_every_module_that_starts_programs_is_there() -> None:
    """By what it calls: a function of `subprocess`, `os` or of the module that wraps them."""
    starting = re.compile(
        r"subprocess\.(run|Popen|check_\w+|call)\(|os\.(system|popen|exec\w*|spawn\w*)\(|run_command\("
    )
    modules = {
        ".".join(("lathe", *file.relative_to(paths.ROOT / "src/lathe").with_suffix("").parts))
        for file in SOURCES
        if starting.search(file.read_text(encoding="utf-8"))
    }
    assert "lathe.gguf.quantize" in modules
    assert sorted(module for module in modules if f"`{module}`" not in PAGE) == []


def test_no_program_is_started_by_a_shell() -> None:
    for file in [*SOURCES, *(paths.ROOT / "stages").glob("*.py"), *(paths.ROOT / "tools").glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"shell=True|os\.system\(|os\.popen\(", text), file


def test_yaml_is_read_within_limits() -> None:
    """By one module; what has limits of its own, or reads a file of this repository alone, is named here."""
    others = {
        "experiments/results.py": "check_depth(",
        "studio/studies.py": 'FOLDER / "default.yaml"',
        "config/yaml_files.py": "check_values(",
    }
    loading = re.compile(r"YAML\([^)]*\)\.load\(|yaml\.(safe_)?load\(|yaml\.load_all\(")
    for file in SOURCES:
        text, name = file.read_text(encoding="utf-8"), file.relative_to(paths.ROOT / "src/lathe").as_posix()
        if loading.search(text):
            assert name in others, f"{name}: read it by lathe.config.yaml_files"
            assert others[name] in text
