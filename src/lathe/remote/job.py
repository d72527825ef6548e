"""Job: a run of a recipe on another machine, and what that machine does for it (`lathe remote job FILE`).

The run works in a checkout of its own at the job's commit, so that several share one folder, on one machine or on the
nodes of a cluster. Whatever ends it, the same command goes on: finished stages come from DVC's cache, and training
from its last checkpoint, which are in the main checkout.
"""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lathe.common import metric_files, operating_system, paths
from lathe.common.errors import InputError
from lathe.common.git import run_git, try_git
from lathe.common.json_files import read_json
from lathe.experiments import separate_checkout
from lathe.experiments.dvc_command import run_dvc
from lathe.provenance.remotes import open_remote
from lathe.provenance.revisions import Experiment, list_experiments
from lathe.remote.outputs import push_outputs

logger = logging.getLogger(__name__)

# Below the name of the machine: on a shared folder each cleans up after its own processes alone.
CHECKOUTS = paths.MAIN / ".dvc/tmp/remote" / socket.gethostname()
BUNDLES = "lathe-results"  # the folder in a remote of DVC with experiments, as bundles of Git
SECONDS_BETWEEN_PUSHES = 60.0


@dataclass(frozen=True)
class Job:
    """A run of a recipe from a commit, with all its overrides.

    `remote` is the remote of DVC which has the data, and which gets what the run makes; None: DVC's cache is where both
    are wanted. `git_remote` is the remote of Git that gets the experiment; None: it goes to `remote` as a bundle, or
    stays in the checkout where there is no `remote` either.
    """

    name: str
    commit: str
    overrides: list[str]
    remote: str | None = None
    git_remote: str | None = None
    price_per_hour: float | None = None

    @property
    def digest(self) -> str:
        """What tells this job from another one of its name."""
        told = json.dumps([self.commit, self.overrides])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def message(self) -> str:
        """The message of the experiment's commit."""
        return f"remote run {self.name}, {self.digest}"

    @property
    def ref(self) -> str:
        """Git's reference of the experiment."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}/{self.name}"

    @property
    def bundle(self) -> str:
        """The name of the file with the experiment in the folder BUNDLES of a remote of DVC."""
        return f"{self.name}-{self.digest}.bundle"


def write_jobs(jobs: Sequence[Job], file: Path) -> None:
    """Write jobs into a file that `read_job` reads."""
    with paths.replace_file(file) as partial:
        partial.write_text(json.dumps([asdict(job) for job in jobs], indent=2) + "\n", encoding="utf-8")


def read_job(file: Path, number: int) -> Job:
    """Read one of the jobs in a file; the first has the number 1. Raises InputError if the file has no such job."""
    jobs: Any = read_json(file, shown=str(file), remedy="`lathe remote run` writes one")
    try:
        known = [Job(**entry) for entry in jobs]
    except TypeError:
        raise InputError(f"{file}: no jobs of this Lathe; `lathe remote run` writes them", code="no-jobs") from None
    if not 1 <= number <= len(known):
        raise InputError(f"--number {number}: {file} has {len(known)} jobs, counted from 1; name one", code="no-job")
    return known[number - 1]


def run(job: Job) -> int:
    """Run a job to its end, or go on with it, and deliver its result; return the exit code of `dvc exp run`.

    Raises Interrupted after a signal, and InputError where this machine has not got what the job needs.
    """
    if try_git("cat-file", "-e", f"{job.commit}^{{commit}}") is None:
        raise InputError(f"commit {job.commit[:10]}: not in this repository; push it here", code="no-commit")
    separate_checkout.remove_stale(CHECKOUTS)
    made = find_experiment(job)
    if made is None:
        os.environ |= {metric_files.MACHINE: describe_machine()}
        if job.price_per_hour is not None:
            os.environ |= {metric_files.PRICE: str(job.price_per_hour)}
        logger.info("%s: begins on %s, from commit %s", job.name, describe_machine(), job.commit[:10])
        with _push_while_running(job):
            code = _run_experiment(job)
        if code:
            return code
        made = find_experiment(job)
        assert made is not None
    else:
        logger.info("%s: had been run already, as %s", job.name, made.commit[:10])
    deliver(job, made)
    return 0


def find_experiment(job: Job) -> Experiment | None:
    """Return the experiment of a job in this repository; None if it has not been made."""
    for experiment in list_experiments():
        if (experiment.name, experiment.baseline, experiment.message) == (job.name, job.commit, job.message):
            return experiment
    return None


def describe_machine() -> str:
    """Return the name of this machine with its GPUs, or its cores where it has none; of SkyPilot's, where it stands."""
    if name := os.environ.get(metric_files.MACHINE):
        return name
    name = socket.gethostname()
    with suppress(ValueError, AttributeError):
        cluster = json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", ""))
        name = " ".join(str(cluster[key]) for key in ("cloud", "region", "zone") if cluster.get(key)) or name
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        kinds = {gpu.strip(): listed.count(gpu) for gpu in listed if gpu.strip()}
        if kinds:
            return f"{name}, {', '.join(f'{count} x {gpu}' for gpu, count in kinds.items())}"
    return f"{name}, {os.cpu_count()} cores"


def _run_experiment(job: Job) -> int:
    checkout = CHECKOUTS / f"{job.name}-{os.getpid()}"
    try:
        separate_checkout.create(checkout, job.commit, job.commit)
        if job.remote:
            with open_remote(checkout, job.remote) as (repo, name, _):
                repo.fetch_sources(name)
                repo.checkout()
        sets = [word for override in job.overrides for word in ("--set-param", override)]
        # Not --allow-missing: a stage whose output is in no remote would count as done.
        pull = ["--pull"] if job.remote else []
        before = Path.cwd()
        os.chdir(checkout)
        try:
            code = run_dvc(["exp", "run", "--name", job.name, "--message", job.message, *pull, *sets], checkout)
        finally:
            os.chdir(before)
        if code == 0:
            run_git("push", "--quiet", "--force", "origin", f"{job.ref}:{job.ref}", root=checkout)
        return code
    finally:
        separate_checkout.remove(checkout)


def deliver(job: Job, made: Experiment) -> None:
    """Push what the run made to the remotes of a job; again: only what is missing there."""
    if job.git_remote:
        push_experiment(made, job.remote, job.git_remote)
    elif job.remote:
        with open_remote(paths.ROOT, job.remote) as (repo, name, _):
            push_outputs(repo, made.commit, name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / job.bundle
            run_git("bundle", "create", "--quiet", str(file), job.ref, f"^{job.commit}")
            with open_remote(paths.ROOT, job.remote) as (repo, name, _):
                storage = repo.remote(name)
                storage.write(storage.join(BUNDLES, job.bundle), file.read_bytes())
        logger.info("%s: delivered to the remote %s", job.name, job.remote)


def push_experiment(made: Experiment, remote: str | None, git_remote: str = "origin") -> None:
    """Push an experiment to a remote of Git, and before that its files to one of DVC, if there is one."""
    if remote:
        with open_remote(paths.ROOT, remote) as (repo, name, _):
            pushed = push_outputs(repo, made.commit, name)
        logger.info("%d files pushed to the remote %s", pushed, remote)
    run_git("push", "--quiet", "--force", git_remote, f"{made.commit}:{made.ref}")
    logger.info("%s: delivered to %s", made.name, git_remote)


@contextmanager
def _push_while_running(job: Job) -> Iterator[None]:
    """Push finished stages during the block: where this machine is taken away, the next one has them."""
    if not job.remote:
        yield
        return
    ended = threading.Event()
    command = [sys.executable, "-m", "lathe", "push-runs", "--remote", job.remote]

    def push() -> None:
        while not ended.wait(SECONDS_BETWEEN_PUSHES):
            done = operating_system.run_command(command, cwd=paths.ROOT, capture_output=True, text=True)
            if done.returncode:
                logger.warning("finished stages are not pushed: %s", (done.stderr.strip().splitlines() or ["?"])[-1])

    pusher = threading.Thread(target=push, daemon=True)
    pusher.start()
    try:
        yield
    finally:
        ended.set()
        pusher.join()
