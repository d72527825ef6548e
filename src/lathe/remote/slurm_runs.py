"""Runs under Slurm, from a checkout that its nodes share: submitted as an array, looked at, cancelled."""

import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.remote.job import Job, find_experiment, write_jobs
from lathe.remote.records import FOLDER, Record, write_record

TEMPLATE = paths.ROOT / "experiments/remote/slurm.sbatch"


def submit(name: str, jobs: Sequence[Job], options: Sequence[str]) -> Record:
    """Submit jobs as one array, with further options of sbatch; return its record. Raises InputError if Slurm refuses.

    The experiments come into this checkout's repository: its folder is shared.
    """
    file = FOLDER / "jobs" / f"{name}.json"
    write_jobs(jobs, file)
    log = file.with_name(f"{name}-%a.log")
    words = [f"--array=1-{len(jobs)}", f"--job-name={name}", f"--output={log}", *options, str(TEMPLATE), str(file)]
    number = call("sbatch", "--parsable", *words).strip().partition(";")[0]
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    record = Record(name, "slurm", {"job": number, "log": str(log)}, started, list(jobs))
    write_record(record)
    return record


def read_state(record: Record) -> str:
    """Return the state of a record's jobs in words: how many are done, and what Slurm says of the others."""
    done = [job for job in record.jobs if find_experiment(job)]
    counted = f"{len(done)} of {len(record.jobs)} done"
    if len(done) == len(record.jobs):
        return "done"
    listed = try_call("squeue", "--noheader", "--array", f"--jobs={record.place['job']}", "--format=%T") or ""
    states = [line.strip().lower() for line in listed.splitlines() if line.strip()]
    if not states:
        return f"{counted}, and Slurm has no more; the same `lathe remote run` goes on with the others"
    return ", ".join([counted, *(f"{states.count(state)} {state}" for state in sorted(set(states)))])


def stop(record: Record) -> None:
    """Cancel what has not ended."""
    call("scancel", record.place["job"])


def show_logs(record: Record, *, follow: bool) -> int:
    """Print what the jobs have printed, and go on until interrupted if `follow`; return an exit code."""
    numbers = range(1, len(record.jobs) + 1)
    files = [file for number in numbers if Path(file := record.place["log"].replace("%a", str(number))).exists()]
    if not files:
        raise InputError(
            f"{record.name}: has printed nothing yet; `lathe remote status` shows its state", code="no-log"
        )
    return subprocess.run(["tail", "-n", "+1", *(["-F"] if follow else []), "--", *files], check=False).returncode


def fetch(record: Record) -> list[str]:
    """Return a line for each experiment: they are here already, as the folder is shared."""
    lines = []
    for job in record.jobs:
        made = find_experiment(job)
        lines.append(f"{job.name}: {made.commit[:10]}, here already" if made else f"{job.name}: not done")
    return lines


def call(program: str, *words: str) -> str:
    """Run a program of Slurm and return what it prints. Raises InputError with its reason if it fails."""
    try:
        done = subprocess.run([program, *words], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(
            f"{program}: not installed here; run this on a machine of the cluster from which jobs are submitted",
            code="no-slurm",
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise InputError(f"{lines[-1]}; --sbatch=OPTION hands an option to sbatch, as its manual has it", code="slurm")
    return done.stdout


def try_call(program: str, *words: str) -> str | None:
    """Return what a program of Slurm prints; None if it fails, as squeue does of a job that it has forgotten."""
    try:
        return call(program, *words)
    except InputError as error:
        if error.code == "no-slurm":
            raise
        return None
