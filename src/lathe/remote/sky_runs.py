"""Runs on machines of SkyPilot: a task in its own YAML, handed to `sky jobs launch`, and results by a remote of DVC.

SkyPilot is installed apart from Lathe (`uv tool install skypilot`): only its command is called.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import run_git
from lathe.evaluation.judge.api_keys import VARIABLES as JUDGE_KEYS
from lathe.provenance import remotes
from lathe.remote.job import BUNDLES, Job, write_jobs
from lathe.remote.outputs import fetch_outputs
from lathe.remote.records import FOLDER, Record, write_record

TEMPLATE = paths.ROOT / "experiments/remote/sky.yaml"
SENT = "~/lathe-sent"
MOUNT = "/lathe"
MOST_BUNDLE_BYTES = 1 << 30  # of a file with the commits of a run, without its data
# Handed on to the job as SkyPilot's secrets, where they are set here.
SECRETS = ("HF_TOKEN", *remotes.SECRET_VARIABLES, *JUDGE_KEYS.values())


@dataclass(frozen=True)
class Machine:
    """What is asked of SkyPilot: GPUs as it writes them, such as H100:1, and whether they may be taken away."""

    gpus: str | None = None
    spot: bool = False
    bucket: str | None = None
    infra: str | None = None


def launch(job: Job, machine: Machine, remote: str | None) -> Record:
    """Send data to a remote of DVC, compose the task of a job, and launch it; return its record.

    `remote` is None for the default one. Raises InputError if SkyPilot is missing or refuses, or if that remote is a
    folder of this machine.
    """
    if shutil.which("sky") is None:
        raise InputError(
            "sky: not installed; `uv tool install skypilot`, and `sky check` says which clouds it may use",
            code="no-sky",
        )
    with remotes.open_remote(paths.ROOT, remote) as (repo, name, settings):
        if "://" not in str(settings["url"]):
            raise InputError(
                f"{remotes.describe_remote(name, settings)}: a folder of this machine, which no other reaches; name a "
                "bucket by --dvc-remote",
                code="local-remote",
            )
        repo.push_sources(name)
    job = replace(job, remote=name)
    file = write_task(job, machine)
    secrets = [word for variable in SECRETS if os.environ.get(variable) for word in ("--secret", variable)]
    infra = ["--infra", machine.infra] if machine.infra else []
    command = ["sky", "jobs", "launch", "--yes", "--detach-run", *infra, *secrets, str(file)]
    done = subprocess.run(command, cwd=paths.ROOT, check=False)
    if done.returncode:
        raise InputError(f"sky jobs launch: ended with {done.returncode}; its words are above", code="sky-refused")
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    record = Record(job.name, "sky", {"job": job.name}, started, [job])
    write_record(record)
    return record


def write_task(job: Job, machine: Machine) -> Path:
    """Write the files that a job's machine gets, and the task for SkyPilot; return the file of the task."""
    folder = FOLDER / "jobs" / job.name
    folder.mkdir(parents=True, exist_ok=True)
    run_git("bundle", "create", "--quiet", str(folder / "code.bundle"), "HEAD")
    write_jobs([job], folder / "jobs.json")
    editor = YAML()
    task = editor.load(TEMPLATE.read_text(encoding="utf-8"))
    fill_in(task, job, machine, folder)
    with paths.replace_file(folder / "sky.yaml") as partial, partial.open("w", encoding="utf-8") as target:
        editor.dump(task, target)
    return folder / "sky.yaml"


def fill_in(task: Any, job: Job, machine: Machine, folder: Path) -> None:
    """Set in the template's tree what differs from job to job."""
    task["name"] = job.name
    task["resources"]["use_spot"] = machine.spot
    if machine.gpus:
        task["resources"]["accelerators"] = machine.gpus
    for name in ("code.bundle", "jobs.json"):
        task["file_mounts"][f"{SENT}/{name}"] = str(folder / name)
    task["file_mounts"][MOUNT]["name"] = machine.bucket or name_bucket()
    task["envs"] |= {"LATHE_COMMIT": job.commit, "LATHE_WORK": f"{MOUNT}/{job.name}-{job.digest}"}


def name_bucket() -> str:
    """Return a name for the bucket with unfinished work: the same for every clone of this repository, and no other."""
    first = run_git("rev-list", "--max-parents=0", "HEAD").decode().split()[-1]
    return f"lathe-work-{first[:16]}"


def read_state(record: Record) -> str:
    """Return whether the result is there."""
    [job] = record.jobs
    with remotes.open_remote(paths.ROOT, job.remote) as (repo, name, _):
        storage = repo.remote(name)
        if storage.exists(storage.join(BUNDLES, job.bundle)):
            return "done"
    return "no result yet; `sky jobs queue` says how it is"


def fetch(record: Record) -> list[str]:
    """Bring the experiment home, with its data; return a line. Raises InputError if there is no result yet."""
    [job] = record.jobs
    with remotes.open_remote(paths.ROOT, job.remote) as (repo, name, settings):
        storage = repo.remote(name)
        path = storage.join(BUNDLES, job.bundle)
        if not storage.exists(path):
            raise InputError(
                f"{job.name}: no result in {remotes.describe_remote(name, settings)}; `sky jobs queue` says how it is",
                code="not-done",
            )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / job.bundle
            content = storage.read(path, MOST_BUNDLE_BYTES + 1)
            if len(content) > MOST_BUNDLE_BYTES:
                raise InputError(
                    f"{job.name}: {path} is larger than {MOST_BUNDLE_BYTES >> 20} MiB, which no run is; look "
                    "who writes to that remote",
                    code="endless-answer",
                )
            file.write_bytes(content)
            run_git("fetch", "--quiet", "--no-tags", str(file), f"{job.ref}:{job.ref}")
        commit = run_git("rev-parse", "--verify", job.ref).decode().strip()
        count = fetch_outputs(repo, commit, name)
    return [f"{job.name}: {commit[:10]}, with {count} files that were not here"]


def stop(record: Record) -> None:
    """Cancel a job."""
    call_sky("jobs", "cancel", "--yes", "--name", record.place["job"])


def show_logs(record: Record, *, follow: bool) -> int:
    """Let SkyPilot print what a job has printed; return its exit code."""
    return call_sky("jobs", "logs", "--follow" if follow else "--no-follow", "--name", record.place["job"])


def call_sky(*words: str) -> int:
    """Run a command of SkyPilot and let it print; return its exit code. Raises InputError if it is not installed."""
    try:
        return subprocess.run(["sky", *words], check=False).returncode
    except FileNotFoundError:
        raise InputError("sky: not installed; `uv tool install skypilot`", code="no-sky") from None
