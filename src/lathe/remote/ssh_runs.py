"""Runs on a host by ssh alone: started there, detached; looked at, stopped, and brought home."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from lathe.common import paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.git import read_line, run_git
from lathe.provenance.remotes import open_remote
from lathe.remote.host import REMOTE, Host
from lathe.remote.job import Job
from lathe.remote.outputs import fetch_outputs
from lathe.remote.records import Record, list_names, read_record, write_record

logger = logging.getLogger(__name__)

SETUP = 'make setup EXTRAS="judge search"'  # what a run or a search may need beside training
RUN = 'exec python -m lathe remote job "{file}"'


def start(job: Job, target: str, folder: str | None, setup: str | None, remote: str | None) -> Record:
    """Start a job on a host, or go on with it there; return its record.

    `remote` is a remote of DVC that both machines reach; None: the data go into the host's own cache by ssh. Raises
    InputError if the host cannot be reached, runs it already, or has had another run of that name from the commit.
    """
    host = prepare(target, folder)
    if job.name in list_names() and (known := read_record(job.name)).jobs and known.jobs[0].digest != job.digest:
        raise InputError(
            f"{job.name}: started from here before, with another commit or other parameters; --name NAME for another "
            f"beside it, or `lathe remote forget {job.name}`",
            code="remote-name-taken",
        )
    if host.list_refs(job.ref):
        raise InputError(
            f"{job.name}: {target} has run it from this commit; `lathe remote fetch {job.name}` brings it home, --name "
            "NAME is another beside it",
            code="remote-run-exists",
        )
    job = replace(job, remote=remote, git_remote="origin")
    send_data(host, remote)
    host.push(job.commit, f"runs/{job.name}")
    run = RUN.format(file=f"{host.folder}/runs/{job.name}/job.json")
    start_command(host, job.name, job.commit, json.dumps([asdict(job)]), setup, run)
    record = make_record(job.name, host, [job])
    write_record(record)
    return record


def prepare(target: str, folder: str | None) -> Host:
    """Make the folder on a host, by default lathe/ and the name of this checkout, and return it as it is there."""
    host = Host(target, folder or f"lathe/{paths.MAIN.name}")
    return Host(target, host.call("prepare").strip().splitlines()[-1])


def send_data(host: Host, remote: str | None) -> None:
    """Push what `dvc add` tracks, to the remote or into the host's cache."""
    with open_repository(paths.ROOT) as repo:
        sources = repo.list_sources()
    if sources and remote:
        with open_remote(paths.ROOT, remote) as (repo, name, _):
            logger.info("%d files of data sent to %s", repo.push_sources(name), name)
    if sources and not remote:
        with host.open_cache() as repo:
            logger.info("%d files of data sent to %s", repo.push_sources(REMOTE), host.target)


def start_command(
    host: Host,
    name: str,
    commit: str,
    job: str,
    setup: str | None,
    command: str,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Start a command of the shell on a host, in its checkout at a commit, after the set-up, whatever happens here."""
    host.call("start", name, commit, job, setup or SETUP, command, variables=variables)


def make_record(name: str, host: Host, jobs: list[Job], study: str | None = None, remote: str | None = None) -> Record:
    """Return the record of what was started on a host: jobs, or a driver of a study with its remote of DVC."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    place = {"host": host.target, "folder": host.folder} | ({"remote": remote} if remote else {})
    return Record(name, "ssh", place, started, jobs, study)


def open_host(record: Record) -> Host:
    """Return the host of a record."""
    return Host(record.place["host"], record.place["folder"])


def read_state(record: Record) -> str:
    """Return the state of a run in words."""
    line = open_host(record).call("status", record.name).strip()
    word, _, code = line.removeprefix(f"{record.name} ").partition(" ")
    match word, code:
        case "ended", "0":
            return "done"
        case "ended", "143":
            return "stopped; the same `lathe remote run` goes on"
        case "ended", _:
            return f"failed with {code}; `lathe remote logs {record.name}` says why"
        case "gone", _:
            return "killed, or its host restarted; the same `lathe remote run` goes on"
    return {"none": "not there"}.get(word, word)


def fetch(record: Record) -> list[str]:
    """Bring the experiments of a record home, with their data; return a line for each."""
    host = open_host(record)
    if record.study is not None:
        pattern = rf"refs/exps/\w+/\w+/{re.escape(record.study)}-\d+"
        refs = [ref for ref in host.list_refs(f"refs/exps/*/{record.study}-*") if re.fullmatch(pattern, ref)]
        jobs = dict.fromkeys(refs, record.place.get("remote"))
    else:
        jobs = {job.ref: job.remote for job in record.jobs}
        missing = [job.name for job in record.jobs if not host.list_refs(job.ref)]
        if missing:
            raise InputError(
                f"{', '.join(missing)}: not done: {read_state(record)}; `lathe remote status` shows all",
                code="not-done",
            )
    lines = []
    for ref, remote in jobs.items():
        if record.study is not None and read_line("rev-parse", "--verify", "--quiet", ref):
            continue  # here already, or from another host, which has taken the trial over
        host.fetch(ref)
        commit = run_git("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()
        if remote:
            with open_remote(paths.ROOT, remote) as (repo, name, _):
                count = fetch_outputs(repo, commit, name)
        else:
            with host.open_cache() as repo:
                count = fetch_outputs(repo, commit, REMOTE)
        lines.append(f"{Path(ref).name}: {commit[:10]}, with {count} files that were not here")
    return lines


def stop(record: Record) -> None:
    """Tell a run to stop: it saves, and ends."""
    open_host(record).call("stop", record.name)


def show_logs(record: Record, *, follow: bool) -> int:
    """Print what a run has printed, and go on until it ends if `follow`; return an exit code."""
    return open_host(record).show("logs", record.name, "follow" if follow else "once")
