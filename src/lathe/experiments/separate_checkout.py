"""Checkout of a run of its own: a clone below `.dvc/tmp`, with the same objects of Git, cache of DVC and scratch.

DVC's `--temp` makes such a copy too, but puts the user's workspace into Git's stash to do so.
"""

import shutil
from pathlib import Path

from lathe.common import operating_system, paths
from lathe.common.dvc_api import open_repository, update_local_config
from lathe.common.git import read_line, run_git


def create(checkout: Path, head: str, snapshot: str, folder: str = "") -> None:
    """Make a checkout of the commit `snapshot`, with HEAD at the commit `head`, and link what DVC's cache has of it.

    `folder` is that of the pipeline, empty for the main one.
    """
    source = run_git("rev-parse", "--path-format=absolute", "--git-common-dir").decode().strip()
    identity = {key: read_line("config", key) for key in ("user.name", "user.email")}
    user = [f"--config={key}={value}" for key, value in identity.items() if value]
    checkout.parent.mkdir(parents=True, exist_ok=True)
    run_git("clone", "--quiet", "--shared", "--no-checkout", *user, source, str(checkout))
    run_git("checkout", "--quiet", "--detach", head, root=checkout)
    run_git("read-tree", "--reset", "-u", snapshot, root=checkout)
    for name in dict.fromkeys(["", folder]):
        inner = checkout / name
        with open_repository(paths.ROOT / name) as repo:
            local, cache = repo.local_config, repo.cache_folder
        update_local_config(inner, local)
        own = {"cache": {"dir": str(cache)}, "core": {"site_cache_dir": str(inner / ".dvc/tmp/site")}}
        update_local_config(inner, own)
        with open_repository(inner) as repo:
            repo.checkout()  # what is not in the cache is made by the run


def remove_stale(folder: Path) -> None:
    """Remove the checkouts in a folder whose processes have ended; each is named NAME-PROCESS."""
    for checkout in folder.glob("*-*"):
        pid = checkout.name.rpartition("-")[2]
        if not (pid.isdigit() and operating_system.is_running(int(pid))):
            shutil.rmtree(checkout, ignore_errors=True)


def remove(checkout: Path) -> None:
    """Remove a checkout whose run has ended."""
    shutil.rmtree(checkout, ignore_errors=True)  # a stage that is still ending may write there
