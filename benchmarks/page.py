"""Runs benchmarks and writes what they print into docs/benchmarks.md.

    python benchmarks/page.py "merge.py --rounds 5" …

The page has a block for each command that `make bench-…` runs, between two comments:

    <!-- python benchmarks/merge.py --rounds 5 -->
    <!-- end -->

Each argument is such a command without `python benchmarks/`. It runs, and what it printed takes the place of what
stands in its block, with the date, the commit and the versions that it ran with. A command that fails leaves its block
as it was. To try a benchmark with other arguments, run the benchmark itself: then nothing is written.
"""

import argparse
import datetime
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks.md"
BLOCK = re.compile(r"<!-- python benchmarks/(?P<command>[^>]+?) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)
MEASURED = ("benchmarks", "src", "stages", "params.yaml", "presets.yaml")  # what the figures are of
PACKAGES = ("torch", "transformers", "trl", "peft", "llama-cpp-python", "dvc")


def main() -> None:
    """Run each command and write its block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", help="as the page has them, without `python benchmarks/`")
    commands = parser.parse_args().commands
    unknown = [command for command in commands if command not in list_commands(PAGE.read_text(encoding="utf-8"))]
    if unknown:
        parser.error(f"{PAGE}: no block <!-- python benchmarks/{unknown[0]} -->; add one, or run the benchmark itself")
    for command in commands:
        printed = _run(command)
        page = PAGE.read_text(encoding="utf-8")  # as it is now: somebody may have edited it meanwhile
        PAGE.write_text(replace_block(page, command, f"{describe_versions()}\n\n{printed.strip()}"), encoding="utf-8")


def list_commands(page: str) -> list[str]:
    """Return the commands that a page has blocks for, without `python benchmarks/`."""
    return [block["command"] for block in BLOCK.finditer(page)]


def replace_block(page: str, command: str, text: str) -> str:
    """Return the page with `text` (Markdown) in the block of `command`."""

    def fill(block: re.Match[str]) -> str:
        if block["command"] != command:
            return block[0]
        return f"<!-- python benchmarks/{command} -->\n\n{text}\n\n<!-- end -->"

    return BLOCK.sub(fill, page)


def describe_versions() -> str:
    """Return date, commit and versions in one line."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"], check=True).stdout.strip()
    if git(["git", "diff", "--quiet", "HEAD", "--", *MEASURED]).returncode:
        commit += " with changes"
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"{today}, commit {commit}, Python {sys.version.split()[0]}, {', '.join(map(_name_version, PACKAGES))}:"


def _name_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _run(command: str) -> str:
    """Run a benchmark, show what it prints as it comes, and return it; raise SystemExit where it fails."""
    script, *arguments = command.split()
    whole = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    lines = []
    with subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit code {process.returncode}: its block is as it was")
    return "".join(lines)


if __name__ == "__main__":
    main()
