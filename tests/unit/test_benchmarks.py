"""The page of benchmarks: every command of `make bench-…` has a block there, which the command writes."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lathe.common import paths

ROOT = paths.ROOT


def load_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_page", ROOT / "benchmarks/page.py")
    assert spec
    assert spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def test_every_benchmark_of_the_makefile_has_a_block() -> None:
    called = re.findall(r"^\tpython benchmarks/page\.py (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [quoted or plain for line in called for quoted, plain in re.findall(r'"([^"]+)"|(\S+)', line)]
    written = load_page().list_commands((ROOT / "docs/benchmarks.md").read_text())
    assert sorted(commands) == sorted(written)
    assert all((ROOT / "benchmarks" / command.split()[0]).is_file() for command in commands)


def test_a_block_is_replaced_and_nothing_else() -> None:
    page = load_page()
    text = (
        "# Page\n\n<!-- python benchmarks/a.py -->\nold\n<!-- end -->\n\nBetween.\n\n"
        "<!-- python benchmarks/a.py --more -->\n\nkept\n\n<!-- end -->\n"
    )
    assert page.list_commands(text) == ["a.py", "a.py --more"]
    replaced = page.replace_block(text, "a.py", r"new \1")
    assert replaced == text.replace("\nold\n", "\n\nnew \\1\n\n")
    assert page.replace_block(replaced, "a.py", r"new \1") == replaced


def test_a_benchmark_that_fails_leaves_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = load_page()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/good.py").write_text("print('| 1 |')")
    (tmp_path / "benchmarks/bad.py").write_text("print('half'); raise SystemExit(1)")
    file = tmp_path / "page.md"
    block = "<!-- python benchmarks/{}.py -->\nold\n<!-- end -->\n"
    file.write_text(block.format("good") + block.format("bad"))
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", file)
    monkeypatch.setattr(page, "describe_versions", lambda: "versions:")
    monkeypatch.setattr(sys, "argv", ["page.py", "good.py", "bad.py"])
    with pytest.raises(SystemExit, match=r"bad\.py failed with exit code 1"):
        page.main()
    good, bad = file.read_text().split("<!-- python benchmarks/bad.py -->")
    assert "versions:\n\n| 1 |\n" in good
    assert bad == "\nold\n<!-- end -->\n"
    monkeypatch.setattr(sys, "argv", ["page.py", "other.py"])
    with pytest.raises(SystemExit, match="2"):
        page.main()
