"""The documentation names commands, files and links that exist, and its site loads nothing from another host."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
FOLDERS = (".github", "benchmarks", "docs", "experiments", "rewards", "src", "stages", "tests")

FENCED = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def code(page: Path) -> list[str]:
    """Everything on a page that is marked as code: blocks and spans."""
    text = page.read_text(encoding="utf-8")
    return [block for _, block in FENCED.findall(text)] + INLINE.findall(FENCED.sub("", text))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def build_site(folder: Path, *, addition: str = "") -> subprocess.CompletedProcess[str]:
    """Build the site into `folder` as `make docs-check` does, with some more text at the end of its first page."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    with (folder / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write(addition)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_of_results_is_what_its_command_writes():
    program = "import sys; sys.path[:0] = ['docs']; import results; sys.stdout.write(results.render_page())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/results.md").read_text(encoding="utf-8")
    names = {file.stem for file in (ROOT / "docs/results").glob("*.json")}
    assert names == set(re.findall(r"^## (.*)$", done.stdout, flags=re.MULTILINE))
    assert names <= {file.stem for file in (ROOT / "experiments").glob("*.yaml")} | {"smollm2"}


def test_the_guide_for_learners_has_the_tables_of_the_records():
    program = (
        "import sys; sys.path[:0] = ['docs']; import classifier_results as tables; "
        "sys.stdout.write(tables.fill_page(tables.PAGE.read_text()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    page = (ROOT / "docs/experiments-guide.md").read_text()
    assert done.stdout == page
    recorded = [file.stem for file in (ROOT / "docs/classifier_results").glob("*.json")]
    assert len(recorded) > 8
    assert [name for name in recorded if f"`{name}` |" not in page] == []


def test_the_readme_is_read_in_one_go():
    assert (ROOT / "README.md").stat().st_size <= 12_000


def test_every_make_target_that_the_pages_name_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in [*FRONT, *PAGES]:
        named = {name for text in code(page) for name in re.findall(r"(?<![\w-])make ([a-z][a-z-]*)", text)}
        assert named <= targets, f"{page.name}: {named - targets}"


def test_every_command_that_the_pages_name_is_there_and_every_command_is_on_its_page():
    listed = subprocess.run(
        [sys.executable, "-m", "lathe", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = set(re.findall(r"^ {4}([a-z][a-z-]*)(?: |$)", listed, flags=re.MULTILINE))
    assert {"config", "trace"} <= commands
    named: dict[str, set[str]] = {}
    for page in [*FRONT, *PAGES]:
        words = {name for text in code(page) for name in re.findall(r"(?<![\w./-])lathe ([a-z][a-z-]*)", text)}
        assert words <= commands, f"{page.name}: {words - commands}"
        named[page.name] = words
    assert commands <= named["commands.md"]


def test_every_file_and_module_that_the_pages_name_is_there():
    for page in [*FRONT, *PAGES]:
        for span in INLINE.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
            if re.fullmatch(r"lathe(\.[a-z_]\w*)+", span):
                module = ROOT / "src" / Path(*span.split("."))
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{page.name}: {span}"
            elif re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[a-z0-9_./-]*", span):
                assert (ROOT / span).exists() or (ROOT / "src/lathe" / span).exists(), f"{page.name}: {span}"


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_every_link_of_the_front_pages_points_to_something_that_is_there(page):
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def test_the_site_is_built_and_its_pages_load_nothing_from_another_host(tmp_path):
    done = build_site(tmp_path)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        html = (tmp_path / "site" / f"{page.stem}.html").read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?([^"\s>]+)', html)
        loaded += re.findall(r'<link[^>]* href="?([^"\s>]+)', html)
        assert loaded
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page.name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("link", ["gone.md", "data.md#gone", "../README.md", "/data.md"])
def test_a_dead_link_fails(tmp_path, link):
    done = build_site(tmp_path, addition=f"\n[a dead link]({link})\n")
    assert done.returncode != 0
    assert "Aborted with 1 warnings in strict mode" in done.stderr + done.stdout
