"""Stage dependencies: the library modules that each dvc.yaml lists for each stage, written from the code closure.

`python -m lathe.common.stage_dependencies` (`make deps`) rewrites the lists; a test holds them equal to the closure.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from lathe.common import paths
from lathe.common.code_closure import SOURCE, code_closure, is_code

DVC_YAMLS = (paths.ROOT / "dvc.yaml", paths.CLASSIFIER / "dvc.yaml")

_STAGE = re.compile(r"^  (?P<name>\w+):$")
_SCRIPT = re.compile(r"^(?P<indent>\s+)- (?P<path>stages/\w+\.py)$")
_MODULE = re.compile(r"^\s+- (\.\./)*src/lathe/\S*$")


def main() -> None:
    """Rewrite the lists in every dvc.yaml, and name the stages whose list has changed."""
    for file in DVC_YAMLS:
        shown = file.relative_to(paths.ROOT).as_posix()
        before = file.read_text(encoding="utf-8")
        after = with_dependencies(before, file.parent)
        if after == before:
            sys.stdout.write(f"{shown} lists what each stage imports\n")
            continue
        with paths.replace_file(file) as partial:
            partial.write_text(after, encoding="utf-8")
        changed = [name for name, text in stages_of(after).items() if stages_of(before).get(name) != text]
        sys.stdout.write(f"{shown}: rewrote the modules of {', '.join(changed)}\n")


def with_dependencies(text: str, folder: Path = paths.ROOT) -> str:
    """Return the text of a dvc.yaml with the library modules of every stage as the closure of its script has them.

    They follow the entry of the script itself, in place of all entries below src/lathe; the other lines stay. `folder`
    is that of the file, from which its paths start.
    """
    to_root = "../" * len(folder.relative_to(paths.ROOT).parts)
    lines: list[str] = []
    for line in text.splitlines():
        if _MODULE.match(line):
            continue
        lines.append(line)
        if script := _SCRIPT.match(line):
            lines += [f"{script['indent']}- {to_root}{path}" for path in dependencies(folder / script["path"])]
    return "\n".join(lines) + "\n"


def dependencies(script: Path) -> list[str]:
    """Return what a stage's script depends on below src/lathe: files, and folders where it imports all of one."""
    needed = set(code_closure(script))
    listed: list[str] = []
    for folder in sorted(path for path in (SOURCE / "lathe").rglob("*") if path.is_dir()):
        inside = {file for file in folder.rglob("*") if is_code(file)}
        if len(inside) > 1 and inside <= needed:
            listed.append(f"{folder.relative_to(paths.ROOT).as_posix()}/")
            needed -= inside
    return sorted([*listed, *(file.relative_to(paths.ROOT).as_posix() for file in needed)])


def stages_of(text: str) -> dict[str, str]:
    """Return the text of each stage of a dvc.yaml, by name."""
    return dict(_blocks(text.splitlines()))


def _blocks(lines: list[str]) -> Iterator[tuple[str, str]]:
    starts = [(number, found["name"]) for number, line in enumerate(lines) if (found := _STAGE.match(line))]
    for (number, name), (end, _) in zip(starts, [*starts[1:], (len(lines), "")], strict=True):
        yield name, "\n".join(lines[number:end])


if __name__ == "__main__":
    main()
