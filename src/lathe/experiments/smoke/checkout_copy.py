"""Copy of the checkout to run in: the files as they are now, with large ones linked, and the checkout's cache of DVC.

It lies in `.scratch/smoke/NAME`, which neither Git nor DVC knows. What its stages keep while they are unfinished, such
as checkpoints, stays in it. The next copy of that name takes its place.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lathe.common import operating_system, paths
from lathe.common.dvc_api import open_repository, update_local_config
from lathe.common.errors import InputError
from lathe.common.git import list_paths, run_git, try_git

FOLDER = paths.SCRATCH / "smoke"
LOCAL = (paths.DATA_LOCAL, paths.MODELS_LOCAL)
MEASURED = ("metrics/",)  # of the last run; a stage reads them only where it has just been run
FETCHED = "metrics/fetch/"  # outputs of stages whose other outputs come from the cache


@contextmanager
def reserve_folder(name: str) -> Iterator[Path]:
    """Yield the folder for the copy of that name, empty. Raises InputError where another process has it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    handle = operating_system.open_locked(FOLDER / f"{name}.lock", wait=False)
    if handle is None:
        raise InputError(
            f"lathe smoke: another one of {name} is running in this checkout; wait for its end", code="smoke-busy"
        )
    with handle:
        folder = FOLDER / name
        if folder.exists():
            shutil.rmtree(folder)
        yield folder


def copy_checkout(folder: Path, named: Iterable[str | None]) -> None:
    """Copy the checkout into a new folder: what Git knows or would add, data/local, models/local, and `named` files.

    Local data and models are linked. The copy has the commit of the checkout, and its cache of DVC.
    """
    # Only what Git has is cloned; the files, with changes that are not committed, are copied.
    run_git("clone", "--quiet", "--shared", "--no-checkout", str(paths.ROOT), str(folder))
    try_git("reset", "--quiet", root=folder)
    for name in list_paths("ls-files", "--cached", "--others", "--exclude-standard"):
        if not name.startswith(MEASURED) or name.startswith(FETCHED):
            _copy(paths.ROOT / name, folder / name)
    for local in LOCAL:
        _link_folder(local, folder / local.relative_to(paths.ROOT))
    for name in [*filter(None, named), paths.LLAMA_CPP.name]:
        source = paths.MAIN / name if name == paths.LLAMA_CPP.name else paths.ROOT / name
        if source.exists() and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source.resolve())
    _configure_dvc(folder)


def _copy(source: Path, target: Path) -> None:
    if not source.is_symlink() and not source.is_file():  # deleted, and not yet committed
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def _link_folder(source: Path, target: Path) -> None:
    """Link every file of a folder that is not in the target yet; folders are made, for DVC to look into them."""
    for place, folders, files in os.walk(source):
        inside = target / Path(place).relative_to(source)
        inside.mkdir(parents=True, exist_ok=True)
        for name in files:
            _link(Path(place, name), inside / name)
        for name in folders:
            if Path(place, name).is_symlink():
                (inside / name).symlink_to(Path(place, name).resolve())


def _link(source: Path, target: Path) -> None:
    if target.exists() or not source.exists():
        return
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system: gigabytes are not copied
        target.symlink_to(source.resolve())


def _configure_dvc(folder: Path) -> None:
    """Give a copy the cache of this checkout, and the local files that only the cache has."""
    own = paths.ROOT / ".dvc/config.local"
    if own.exists():
        shutil.copy2(own, folder / ".dvc/config.local")
    with open_repository(paths.ROOT) as repository:
        cache = repository.cache_folder
    # What DVC remembers of files goes with the copy.
    update_local_config(
        folder, {"cache": {"dir": str(cache)}, "core": {"site_cache_dir": str(folder / ".dvc/tmp/site")}}
    )
    tracked = (file for local in LOCAL for file in (folder / local.relative_to(paths.ROOT)).rglob("*.dvc"))
    missing = [file.with_suffix("") for file in tracked if not file.with_suffix("").exists()]
    if missing:
        with open_repository(folder) as repository:
            repository.checkout([str(file) for file in missing])
