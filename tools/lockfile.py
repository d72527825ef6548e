"""Reads requirements.lock, and cuts it down to what some extras of pyproject.toml need."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# What the package index has no wheel of; `make lock` refuses any other such package. They are built with the locked
# setuptools; of everything else a wheel must be there, so that no build tool comes in without a hash.
SOURCE_ONLY = {"antlr4-python3-runtime", "deepspeed", "rouge-score", "sqlitedict", "word2number"}


class SetupError(Exception):
    """Something the user has to change: value, rule and remedy in one line."""


def parse_name(requirement: str) -> str:
    """Return the package that a requirement such as `psycopg[binary]==3.3.9` is about, as the index writes it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def list_direct_packages(project: Mapping[str, Any], extras: Collection[str]) -> set[str]:
    """Return the packages that pyproject.toml's `[project]` names: its dependencies and those of some extras."""
    waiting = list(project["dependencies"])
    seen: set[str] = set()

    def add(names: Collection[str]) -> None:
        for extra in set(names) - seen:
            seen.add(extra)
            waiting.extend(project["optional-dependencies"][extra])

    add(extras)
    packages = set()
    while waiting:
        requirement = waiting.pop()
        if parse_name(requirement) == project["name"]:  # `lathe[mlflow,wandb]`: an extra that takes in others
            add(re.findall(r"[\w-]+", requirement.partition("[")[2]))
        else:
            packages.add(parse_name(requirement))
    return packages


class Lock:
    """For each package its lines, as pip reads them, and the packages that require it: uv's comments name these.

    A package whose version depends on the platform or on the Python has several entries.
    """

    def __init__(self, text: str) -> None:
        self.lines: dict[str, str] = {}
        self.parents: dict[str, set[str]] = {}
        for entry in re.findall(r"^[A-Za-z0-9].*(?:\n +.*)*", text, re.MULTILINE):
            name = parse_name(entry)
            pin, _, comment = entry.partition("\n    # via")
            self.lines[name] = f"{self.lines.get(name, '')}{pin}\n"
            self.parents.setdefault(name, set()).update(
                map(parse_name, re.findall(r"^[ #]+(\S.*)", comment, re.MULTILINE))
            )

    def closure(self, direct: Collection[str], *, torch_requires: Collection[str] | None = None) -> set[str]:
        """Return the packages that some packages need, themselves included.

        `torch_requires` are those that the installed build of torch requires. The lock is of the build on the package
        index, which takes CUDA along on Linux; a CPU build needs none of that.
        """
        missing = sorted(set(direct) - set(self.lines))
        if missing:
            raise SetupError(f"requirements.lock lacks {missing[0]}, which pyproject.toml names; run `make lock`")

        def is_needed(child: str, parent: str) -> bool:
            return parent in needed and (parent != "torch" or torch_requires is None or child in torch_requires)

        needed, before = set(direct), 0
        while len(needed) > before:
            before = len(needed)
            needed |= {
                child for child, parents in self.parents.items() if any(is_needed(child, one) for one in parents)
            }
        return needed

    def requirements(self, packages: Collection[str]) -> str:
        """Return the text of a requirements file of exactly these packages."""
        return "".join(self.lines[name] for name in sorted(packages))

    def version(self, package: str) -> str:
        """Return the version of a package with a single entry."""
        match = re.match(r"\S+?==([^\s;]+)", self.lines[package])
        assert match, package
        return match[1]

    def hashes(self, package: str) -> list[str]:
        """Return the SHA-256 digests that are accepted for a package's files."""
        return re.findall(r"sha256:([0-9a-f]{64})", self.lines[package])
