"""Lathe's files for a repository of one's own: those of this checkout's last commit that a user needs, as a commit.

Each state of Lathe that a repository takes is a commit of these files alone, with the one before as its parent, and is
merged: so Git knows what Lathe has changed since, and what the user has.
"""

import io
import re
import tarfile
import tempfile
from pathlib import Path

from lathe import __version__
from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import run_git, try_git

# Files and folders for work on Lathe itself, and what its own runs left.
LEFT_OUT = (
    *(".ci/", ".github/", ".pre-commit-config.yaml", "benchmarks/", "tests/", "metrics/", "dvc.lock"),
    *("classify/metrics/", "classify/dvc.lock"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md"),
    *("mkdocs.yml", "docs/build.py", "docs/style.css"),
    # The series for learners: its figures are those of the committed parameters.
    *(f"experiments/{name}.yaml" for name in ("baseline", "more-context", "adapter-capacity", "dropout")),
    "experiments/full-fine-tune.yaml",
    "classify/experiments/classify-",
)

# Targets of the Makefile that need them.
LEFT_OUT_TARGETS = r"chaos|lint|format|unit|test|test-all|bench|bench-[a-z-]+|docs|docs-[a-z-]+|ci-[a-z-]+"

MARK = "Lathe-Commit"  # names the commit of Lathe in the message of such a commit


def check_source() -> None:
    """Raise InputError unless this checkout can give its files: a Git repository of Lathe's own with a commit."""
    top = try_git("rev-parse", "--show-toplevel")
    if not top or Path(top.decode().strip()).resolve() != paths.ROOT.resolve() or not _find_head():
        raise InputError(
            f"{paths.ROOT}: Lathe's files are taken from a commit, and this is no Git repository with one; "
            "run this in a clone of Lathe",
            code="not-a-clone",
        )
    if find_taken(paths.ROOT):
        raise InputError(
            f"{paths.ROOT}: was itself made by `lathe init`; run this in a clone of Lathe", code="adopted-source"
        )


def find_taken(repository: Path) -> str | None:
    """Return the newest commit of Lathe's files in a repository's history; None if there is none."""
    taken = try_git("log", "-1", "--format=%H", f"--grep=^{MARK}: ", "HEAD", root=repository)
    return taken.decode().strip() or None if taken else None


def describe_source() -> str:
    """Return the version and commit of this Lathe."""
    return f"Lathe {__version__} ({_find_head()[:10]})"


def commit_files(repository: Path, parent: str | None) -> str:
    """Add Lathe's files to a repository as a commit that no branch has yet, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder)
        export_files(export)
        run_git("init", "--quiet", root=export)
        run_git("add", "--all", "--force", root=export)
        tree = run_git("write-tree", root=export).decode().strip()
        # A tree is fetched with the commit that has it.
        commit = run_git("commit-tree", tree, "-m", "export", root=export).decode().strip()
        run_git("update-ref", "refs/heads/export", commit, root=export)
        run_git("fetch", "--quiet", "--no-tags", str(export), "refs/heads/export", root=repository)
    message = f"{describe_source()}\n\n{MARK}: {_find_head()}"
    parents = ["-p", parent] if parent else []
    return str(run_git("commit-tree", tree, *parents, "-m", message, root=repository).decode().strip())


def export_files(folder: Path) -> None:
    """Write Lathe's files, as they were committed last, into a folder."""
    archive = run_git("archive", "--format=tar", "HEAD")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        kept = [member for member in tar if not member.isdir() and not member.name.startswith(LEFT_OUT)]
        tar.extractall(folder, members=kept, filter="data")
    makefile = folder / "Makefile"
    makefile.write_text(trim_makefile(makefile.read_text(encoding="utf-8")), encoding="utf-8")


def trim_makefile(text: str) -> str:
    """Return a Makefile without the targets for work on Lathe itself."""
    text = "\n\n".join(rule for rule in text.split("\n\n") if not re.match(rf"({LEFT_OUT_TARGETS}):", rule))
    text = re.sub(rf"^({LEFT_OUT_TARGETS}): \w+ \+=.*\n", "", text, flags=re.MULTILINE)  # a variable of one of them
    # Lists of targets: .PHONY, and those that set a variable.
    text = re.sub(r"(?<=^\.PHONY:)(\\\n|.)*", lambda names: f" {_trim_targets(names[0])}", text, flags=re.MULTILINE)
    return re.sub(
        r"^([a-z-]+(?:[ \t]|\\\n)+[a-z \t\\\n-]+)(?=: \w+ \+=)",
        lambda names: _trim_targets(names[0]),
        text,
        flags=re.MULTILINE,
    )


def _trim_targets(names: str) -> str:
    return " ".join(name for name in names.replace("\\\n", " ").split() if not re.fullmatch(LEFT_OUT_TARGETS, name))


def _find_head() -> str:
    commit = try_git("rev-parse", "--verify", "--quiet", "HEAD")
    return str(commit.decode().strip()) if commit else ""
