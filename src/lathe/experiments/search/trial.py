"""Trial: `dvc exp run` in a checkout and a process of its own, and its experiment or the reason of its failure.

`dvc exp run --temp` is not used: before it starts it stashes, rewrites and resets the user's own workspace. Killed
there, it would leave the user without their changes, and an edit made during the search would be in all later trials.
So the copy that DVC would make below `.dvc/tmp` is made here, of the workspace at the start of the search, and DVC runs
in it. The finished experiment is pushed into the user's repository, completely or not at all.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common import operating_system, paths
from lathe.common.dvc_api import open_repository, run_command
from lathe.common.errors import InputError
from lathe.common.git import find_head, run_git
from lathe.config.pipelines import build_dvc_options
from lathe.experiments import interrupted, separate_checkout
from lathe.provenance.revisions import Revision, list_experiments

if TYPE_CHECKING:
    import optuna

CHECKOUTS = paths.MAIN / ".dvc/tmp/search"


@dataclass(frozen=True)
class Order:
    """What a trial's process runs.

    `message` distinguishes its experiment from others of its name. `head` and `snapshot` are commits: the base of the
    experiment, and the workspace; `driver` is the id of the process that started it, `folder` that of
    the pipeline: empty for the main one.
    """

    study: str
    number: int
    sampler: str
    message: str
    overrides: list[str]
    head: str
    snapshot: str
    driver: int
    folder: str = ""

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return name_experiment(self.study, self.number)

    def build_command(self) -> list[str]:
        """Return the command line of the process."""
        return [sys.executable, "-m", "lathe.experiments.search.trial", json.dumps(asdict(self))]

    def build_environment(self, hidden: Sequence[str], gpu: str | None) -> dict[str, str]:
        """Return the environment of the process: without the variables of the search, with one GPU if there are any.

        Study, trial and sampler are for the mirrors of its run (`lathe.experiments.tracking.run_files`).
        """
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        kept |= {"LATHE_STUDY": self.study, "LATHE_TRIAL": str(self.number), "LATHE_SAMPLER": self.sampler}
        return kept if gpu is None else {**kept, "CUDA_VISIBLE_DEVICES": gpu}


def name_experiment(study: str, number: int) -> str:
    """Return the name of a trial's experiment."""
    return f"{study}-{number}"


def find_checkout(order: Order, pid: int) -> Path:
    """Return the folder of the checkout in which a process runs a trial."""
    return CHECKOUTS / f"{order.name}-{pid}"


def build_ref(order: Order) -> str:
    """Return Git's reference of a trial's experiment."""
    return f"refs/exps/{order.head[:2]}/{order.head[2:]}/{order.name}"


def build_message(study: str, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> str:
    """Return the message of the commit of a trial's experiment, unique among studies of the same name."""
    return f"search {study}, trial {trial.number} of {trial.datetime_start}"


def main() -> int:
    """Run the trial that the command line describes; the exit code is DVC's, or 1 if the driver has gone."""
    operating_system.end_with_parent()
    order = Order(**json.loads(sys.argv[1]))
    if os.getppid() != order.driver:
        return 1  # it was killed before this process could register to end with it
    checkout = find_checkout(order, os.getpid())
    try:
        separate_checkout.create(checkout, order.head, order.snapshot, order.folder)
        return _run_experiment(order, checkout)
    finally:
        separate_checkout.remove(checkout)


def remove_stale_checkouts() -> None:
    """Remove the checkouts of processes that have ended."""
    separate_checkout.remove_stale(CHECKOUTS)


def create_snapshot() -> tuple[str, str]:
    """Return HEAD and a commit of the workspace, with the uncommitted changes of files that Git tracks.

    It waits where another command, such as `dvc exp run --temp`, has those changes in Git's stash for a moment. Raises
    InputError if contents have changed that DVC tracks: a trial gets those in DVC's cache.
    """
    interrupted.wait_for_stash()
    if (head := find_head()) is None:
        raise InputError(
            "the repository has no commit, and experiments hang on one; `git commit` first", code="no-commit"
        )
    if changed := _list_changed_data():
        raise InputError(
            f"{', '.join(changed)}: not as DVC keeps it; `dvc add` it, so that the trials have it", code="changed-data"
        )
    while True:
        try:
            # A stash fails if files have other time stamps and the same contents.
            is_changed = run_git("status", "--porcelain", "--untracked-files=no")
            snapshot = run_git("stash", "create").decode().strip() if is_changed else head
        except InputError:
            if not interrupted.is_stashed():
                raise
        else:
            if not interrupted.is_stashed():
                return head, snapshot
        interrupted.wait_for_stash()


def find_experiment(order: Order) -> Revision | None:
    """Return the experiment of a trial, whatever commit it is based on; None if there is none."""
    for experiment in list_experiments():
        if experiment.name == order.name and experiment.message == order.message:
            return Revision(experiment.name, experiment.commit)
    return None


def explain_failure(log: str, code: int) -> str:
    """Return why a trial failed, in one line: the failed stage and its last error, or DVC's."""
    stages: list[str] = re.findall(r"failed to reproduce '([^']+)'", log)
    errors: list[str] = (
        re.findall(
            r"^(?:error: .*|(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b.*|fatal: .*)$", log, re.MULTILINE
        )
        or re.findall(r"^(?:ERROR: )?(\S.*)$", log, re.MULTILINE)
        or [f"ended with {code} and printed nothing"]
    )
    if not stages:
        return errors[-1]
    repeated = f"failed to reproduce '{stages[-1]}': "
    return f"{stages[-1]}: {errors[-1].removeprefix(repeated)}"


def was_killed(log: str, code: int) -> bool:
    """Tell whether the trial, or one of its stages, was ended by SIGKILL, which is no fault of its parameters."""
    return code == -9 or bool(re.search(r"exited with -9\b", log))


def _list_changed_data() -> list[str]:
    with open_repository(paths.ROOT) as repo:
        return repo.changed_sources()


def _run_experiment(order: Order, checkout: Path) -> int:
    os.chdir(checkout)
    sets = [part for override in order.overrides for part in ("--set-param", override)]
    code = run_command(
        [*build_dvc_options(order.folder), "exp", "run", "--name", order.name, "--message", order.message, *sets]
    )
    if code == 0:
        [made] = [experiment for experiment in list_experiments(checkout) if experiment.name == order.name]
        # Over one that was pruned, if the driver was killed before the study had that.
        run_git("push", "--quiet", "--force", "origin", f"{made.ref}:{made.ref}", root=checkout)
        _cache_for_exp_show(made.commit)
    return code


def _cache_for_exp_show(commit: str) -> None:
    """Let DVC parse and cache the experiment; else the first `dvc exp show` would parse those of all trials."""
    with open_repository(paths.ROOT) as repo:
        repo.cache_experiment(commit)


def read_log(folder: Path, name: str) -> str:
    """Return the end of what a trial printed."""
    file = folder / f"{name}.log"
    return file.read_text(encoding="utf-8", errors="replace")[-200_000:] if file.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
