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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common import operating_system, paths
from lathe.common.dvc_api import open_repository, run_command, update_local_config
from lathe.common.errors import InputError
from lathe.common.git import find_head, read_line, run_git
from lathe.provenance.revisions import Revision, list_experiments

if TYPE_CHECKING:
    import optuna

CHECKOUTS = paths.MAIN / ".dvc/tmp/search"


@dataclass(frozen=True)
class Order:
    """What a trial's process is asked to run.

    `message` tells its experiment from others of its name. `head` and `snapshot` are commits: what the experiment is
    based on, and the workspace; `driver` is a process.
    """

    study: str
    number: int
    sampler: str
    message: str
    overrides: list[str]
    head: str
    snapshot: str
    driver: int

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return name_of(self.study, self.number)

    def command(self) -> list[str]:
        """Return the command line of the process."""
        return [sys.executable, "-m", "lathe.experiments.search.trial", json.dumps(asdict(self))]

    def environment(self, hidden: Sequence[str], gpu: str | None) -> dict[str, str]:
        """Return the environment of the process: without what is the search's own, with one GPU where there are any.

        Study, trial and sampler are told for the mirrors of its run (`lathe.experiments.tracking.run_files`).
        """
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        kept |= {"LATHE_STUDY": self.study, "LATHE_TRIAL": str(self.number), "LATHE_SAMPLER": self.sampler}
        return kept if gpu is None else {**kept, "CUDA_VISIBLE_DEVICES": gpu}


def name_of(study: str, number: int) -> str:
    """Return the name of a trial's experiment."""
    return f"{study}-{number}"


def message(study: str, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> str:
    """Return what the commit of a trial's experiment says; no trial of another study of that name says the same."""
    return f"search {study}, trial {trial.number} of {trial.datetime_start}"


def main() -> int:
    """Run the trial that the command line describes; the exit code is DVC's, or 1 where there is no driver."""
    operating_system.end_with_parent()
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
        pid = checkout.name.rpartition("-")[2]
        if not (pid.isdigit() and operating_system.is_running(int(pid))):
            shutil.rmtree(checkout, ignore_errors=True)


def snapshot() -> tuple[str, str]:
    """Return HEAD and a commit of the workspace as it is, uncommitted changes of known files included.

    Raises InputError where contents have changed that DVC tracks: a trial gets what DVC keeps of them.
    """
    if (head := find_head()) is None:
        raise InputError("the repository has no commit, and experiments hang on one; `git commit` first")
    if changed := _changed_data():
        raise InputError(f"{', '.join(changed)}: not as DVC keeps it; `dvc add` it, so that the trials have it")
    # Asked first, as a stash fails where files have other time stamps and the same contents.
    is_changed = run_git("status", "--porcelain", "--untracked-files=no")
    return head, run_git("stash", "create").decode().strip() if is_changed else head


def experiment(order: Order) -> Revision | None:
    """Find the experiment that a trial has made, whatever commit it is based on."""
    for found in list_experiments():
        if found.name == order.name and found.message == order.message:
            return Revision(found.name, found.commit)
    return None


def reason(log: str, code: int) -> str:
    """Return why a trial failed, in one line: the failed stage and the last line that it or DVC called an error."""
    at: list[str] = re.findall(r"failed to reproduce '([^']+)'", log)
    said: list[str] = (
        re.findall(
            r"^(?:error: .*|(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*|fatal: .*)$", log, re.MULTILINE
        )
        or re.findall(r"^(?:ERROR: )?(\S.*)$", log, re.MULTILINE)
        or [f"ended with {code} and said nothing"]
    )
    if not at:
        return said[-1]
    repeated = f"failed to reproduce '{at[-1]}': "
    return f"{at[-1]}: {said[-1].removeprefix(repeated)}"


def was_killed(log: str, code: int) -> bool:
    """Return whether the trial, or one of its stages, was ended by SIGKILL: that says nothing of its parameters."""
    return code == -9 or bool(re.search(r"exited with -9\b", log))


def _changed_data() -> list[str]:
    with open_repository(paths.ROOT) as repo:
        return repo.changed_sources()


def _copy(order: Order, checkout: Path) -> None:
    source = run_git("rev-parse", "--path-format=absolute", "--git-common-dir").decode().strip()
    identity = {key: read_line("config", key) for key in ("user.name", "user.email")}
    user = [f"--config={key}={value}" for key, value in identity.items() if value]
    checkout.parent.mkdir(parents=True, exist_ok=True)
    run_git("clone", "--quiet", "--shared", "--no-checkout", *user, source, str(checkout))
    run_git("checkout", "--quiet", "--detach", order.head, root=checkout)
    run_git("read-tree", "--reset", "-u", order.snapshot, root=checkout)
    with open_repository(paths.ROOT) as repo:
        local, cache = repo.local_config, repo.cache_folder
    update_local_config(checkout, local)
    own = {"cache": {"dir": str(cache)}, "core": {"site_cache_dir": str(checkout / ".dvc/tmp/site")}}
    update_local_config(checkout, own)
    with open_repository(checkout) as repo:
        repo.checkout()  # what is not in the cache is made by the run


def _run(order: Order, checkout: Path) -> int:
    os.chdir(checkout)
    sets = [part for override in order.overrides for part in ("--set-param", override)]
    code = run_command(["exp", "run", "--name", order.name, "--message", order.message, *sets])
    if code == 0:
        [made] = [found for found in list_experiments(checkout) if found.name == order.name]
        run_git("push", "--quiet", "origin", f"{made.ref}:{made.ref}", root=checkout)
        _let_dvc_read(made.commit)
    return code


def _let_dvc_read(commit: str) -> None:
    """Let DVC read the experiment, and keep that; else the first `dvc exp show` would do so for all trials at once."""
    with open_repository(paths.ROOT) as repo:
        repo.cache_experiment(commit)


def log_of(folder: Path, name: str) -> str:
    """Return what a trial printed, its last part."""
    file = folder / f"{name}.log"
    return file.read_text(encoding="utf-8", errors="replace")[-200_000:] if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
