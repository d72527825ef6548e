"""One trial: `dvc exp run` in a checkout of its own, by a process of its own; and what is read of it afterwards.

`dvc exp run --temp` would do, but before it begins it stashes, rewrites and resets the user's own workspace: killed
there, it would leave the user without their changes, and an edit made during the search would be in the trials after
it. So the copy that DVC would make below `.dvc/tmp` is made here, of the workspace as it was when the search began, and
DVC runs in it. The finished experiment is pushed into the user's repository, whole or not at all.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lathe import paths, stage
from lathe.errors import InputError

CHECKOUTS = paths.MAIN / ".dvc/tmp/search"


@dataclass(frozen=True)
class Order:
    """What a trial's process is asked to run; `message` tells the experiment from others of its name.

    `head` and `snapshot` are commits: what the experiment is based on, and the workspace; `driver` is a process.
    """

    name: str
    message: str
    overrides: list[str]
    head: str
    snapshot: str
    driver: int

    def command(self) -> list[str]:
        """Return the command line of the process."""
        return [sys.executable, "-m", "lathe.search.trial", json.dumps(asdict(self))]


@dataclass(frozen=True)
class Experiment:
    """A finished experiment of this repository."""

    commit: str
    message: str

    def json(self, file: str) -> Any:
        """Read a JSON file of it; raises ValueError where it has none."""
        shown = git("show", f"{self.commit}:./{file}", check=False)
        if not shown:
            raise ValueError(f"the experiment has no {file}")
        return json.loads(shown)


def main() -> int:
    """Run the trial that the command line describes; the exit code is DVC's, or 1 where there is no driver."""
    stage.end_with_parent()
    order = Order(**json.loads(sys.argv[1]))
    if os.getppid() != order.driver:
        return 1  # it was killed before this process could ask to end with it
    checkout = CHECKOUTS / f"{order.name}-{os.getpid()}"
    try:
        _copy(order, checkout)
        return _run(order, checkout)
    finally:
        shutil.rmtree(checkout, ignore_errors=True)  # a stage that is still ending may write there; see `sweep`


def sweep() -> None:
    """Remove the checkouts of processes that are gone."""
    for checkout in CHECKOUTS.glob("*-*"):
        if not Path("/proc", checkout.name.rpartition("-")[2]).exists():
            shutil.rmtree(checkout, ignore_errors=True)


def snapshot() -> tuple[str, str]:
    """Return HEAD and a commit of the workspace as it is, uncommitted changes of known files included."""
    head = git("rev-parse", "HEAD")
    is_changed = git("status", "--porcelain", "--untracked-files=no")
    return head, git("stash", "create") if is_changed else head


def experiment(name: str) -> Experiment | None:
    """Find an experiment by its name, whatever commit it is based on; the newest of several."""
    form = "--format=%(objectname)%00%(contents:subject)"
    found = git("for-each-ref", "--sort=-committerdate", form, f"refs/exps/*/*/{name}").splitlines()
    if not found:
        return None
    commit, _, message = found[0].partition("\0")
    return Experiment(commit, message)


def reason(log: str, code: int) -> str:
    """Return why a trial failed, in one line: the failed stage and the last line that it or DVC called an error."""
    at = re.findall(r"failed to reproduce '([^']+)'", log)
    errors = re.findall(
        r"^(?:error: .*|(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*|fatal: .*)$", log, re.MULTILINE
    )
    said = errors or re.findall(r"^(?:ERROR: )?(\S.*)$", log, re.MULTILINE) or [f"ended with {code} and said nothing"]
    return f"{at[-1]}: {said[-1]}" if at else str(said[-1])


def was_killed(log: str, code: int) -> bool:
    """Return whether the trial, or one of its stages, was ended by SIGKILL: that says nothing of its parameters."""
    return code == -9 or bool(re.search(r"exited with -9\b", log))


def git(*arguments: str, check: bool = True, cwd: Path = paths.ROOT) -> str:
    """Return what a Git command printed; raises InputError where it fails, or returns nothing without `check`."""
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"git {' '.join(arguments)}: {said}; the search needs this of Git")
    return done.stdout.strip() if done.returncode == 0 else ""


def _copy(order: Order, checkout: Path) -> None:
    from dvc.config import Config
    from dvc.repo import Repo

    source = git("rev-parse", "--path-format=absolute", "--git-common-dir")
    user = [
        f"--config={key}={value}" for key in ("user.name", "user.email") if (value := git("config", key, check=False))
    ]
    checkout.parent.mkdir(parents=True, exist_ok=True)
    git("clone", "--quiet", "--shared", "--no-checkout", *user, source, str(checkout))
    git("checkout", "--quiet", "--detach", order.head, cwd=checkout)
    git("read-tree", "--reset", "-u", order.snapshot, cwd=checkout)
    with Repo(str(paths.ROOT)) as repo:
        local, cache = repo.config.read("local"), repo.cache.local_cache_dir
    with Config(str(checkout / ".dvc")).edit("local") as config:
        for section, values in local.items():
            config.setdefault(section, {}).update(values)
        config.setdefault("cache", {})["dir"] = cache
        config.setdefault("core", {})["site_cache_dir"] = str(checkout / ".dvc/tmp/site")
    with Repo(str(checkout)) as repo:
        repo.checkout(force=True, allow_missing=True)  # what is not in the cache is made by the run


def _run(order: Order, checkout: Path) -> int:
    from dvc.cli import main as dvc

    os.chdir(checkout)
    sets = [part for override in order.overrides for part in ("--set-param", override)]
    code: int = dvc(["exp", "run", "--name", order.name, "--message", order.message, *sets])
    if code == 0:
        [ref] = git("for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{order.name}", cwd=checkout).split()
        git("push", "--quiet", "origin", f"{ref}:{ref}", cwd=checkout)
    return code


def log_of(folder: Path, name: str) -> str:
    """Return what a trial printed, its last part."""
    file = folder / f"{name}.log"
    return file.read_text(encoding="utf-8", errors="replace")[-200_000:] if file.exists() else ""


def environment(hidden: Sequence[str], gpu: str | None) -> dict[str, str]:
    """Return the environment of a trial: without what is the search's own, and with one GPU where there are any."""
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept if gpu is None else {**kept, "CUDA_VISIBLE_DEVICES": gpu}


if __name__ == "__main__":
    sys.exit(main())
