"""Command `lathe` (also `python -m lathe`): finds the checkout that it is called in and runs that checkout's own code.

An environment that several checkouts share has one of them installed. Only the standard library is imported here, and
no other module of Lathe before the checkout's `src` is first on the import path; `stages/_path.py` does the same for
the scripts of the stages.
"""

import importlib
import os
import sys
from pathlib import Path

MARKS = ("dvc.yaml", "params.yaml", "src/lathe/__main__.py")  # what every checkout has at its top
CHECKOUT = "LATHE_CHECKOUT"  # names the checkout for a process that runs in another folder

# Commands that act on no checkout, and so run anywhere, with the installed code.
ANYWHERE = ("init", "completion", "--version")


def main() -> None:
    """Run a command on the checkout that the current folder is in; exit with 2 outside of one."""
    words = sys.argv[1:]
    root = find_checkout(Path(os.environ.get(CHECKOUT) or Path.cwd()))
    if root:
        put_first(root / "src")
    elif words[:1] and words[0] not in ANYWHERE and not {"-h", "--help"} & set(words):
        print(  # noqa: T201
            f"error: {Path.cwd()}: in no checkout of Lathe, a folder with {', '.join(MARKS)}; "
            "change to one, or make one with `lathe init DIR`",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        cli = importlib.import_module("lathe.cli")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lathe":
            raise
        if words[:1] != ["doctor"]:
            sys.exit(f"error: {error}; run `make setup`; `python -m lathe doctor` tells what else is missing")
        doctor = importlib.import_module("lathe.doctor.doctor")
        load = lambda: importlib.import_module("lathe.config.load").load()  # noqa: E731 - fails where a package is missing
        sys.exit(doctor.run(load, as_json="--json" in words))
    cli.main()


def find_checkout(folder: Path) -> Path | None:
    """Return the checkout that a folder is in, or None."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if all((path / mark).exists() for mark in MARKS)), None)


def put_first(source: Path) -> None:
    """Make `source` the place that Lathe is imported from, here and in the processes that this one starts."""
    if Path(sys.modules["lathe"].__file__ or "").resolve() == (source / "lathe/__init__.py").resolve():
        return
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lathe"]:
        del sys.modules[name]
    importlib.invalidate_caches()


if __name__ == "__main__":
    main()
