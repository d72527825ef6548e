"""Searches over several hosts: a driver on each, all on one study in a database; each delivers its trials."""

import argparse
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.experiments.search import command, storage, trial
from lathe.experiments.search.pruning import MARK
from lathe.provenance.revisions import list_experiments
from lathe.remote.job import push_experiment
from lathe.remote.preparation import require_committed
from lathe.remote.records import Record, write_record
from lathe.remote.ssh_runs import make_record, prepare, send_data, start_command

logger = logging.getLogger(__name__)

WORK = "exec python -m lathe remote worker {words}"


def start(
    file: Path,
    overrides: list[str],
    hosts: Sequence[str],
    *,
    workers: int,
    n_trials: int | None,
    url: str | None,
    folder: str | None,
    setup: str | None,
    remote: str | None,
) -> list[Record]:
    """Start drivers of a study on hosts, with so many trials at once over all of them; return a record for each.

    Raises InputError before anything is sent if the search file is invalid or not committed, or if the study's storage
    is none that machines can share.
    """
    if workers < len(hosts):
        raise InputError(
            f"--workers {workers}: there are {len(hosts)} hosts, and each takes one at least; name fewer hosts",
            code="too-few-workers",
        )
    if len(set(hosts)) < len(hosts):
        raise InputError(f"--hosts {','.join(hosts)}: one is named twice; give it more --workers", code="host-twice")
    if url is None or url.startswith("sqlite"):
        raise InputError(
            f"{storage.hide_password(url) if url else 'no --storage'}: hosts share a study in a database alone; set "
            f"{storage.VARIABLE} to postgresql://USER:PASSWORD@HOST/DATABASE",
            code="storage-not-shared",
        )
    study = command.prepare(file, overrides).plan.study
    commit = require_committed()
    name = str(file.resolve().relative_to(paths.ROOT)) if file.resolve().is_relative_to(paths.ROOT) else str(file)
    kept = try_git("show", f"{commit}:./{name}")
    if kept is None or kept != file.read_bytes():
        raise InputError(f"{name}: not as in the last commit, which the hosts get; commit it", code="not-committed")
    with storage.translate_connection_errors(url):
        storage.open_storage(url, study)  # or each host would find out
    prepared = [prepare(target, folder) for target in hosts]
    records = []
    for number, host in enumerate(prepared):
        share = workers // len(hosts) + (number < workers % len(hosts))
        words = [name, "--jobs", str(share), *(f"-S{text}" for text in overrides)]
        words += ["--n-trials", str(n_trials)] if n_trials else []
        words += ["--dvc-remote", remote] if remote else []
        run_name = f"{study}-on-{re.sub('[^A-Za-z0-9]+', '-', host.target).strip('-')}"
        send_data(host, remote)
        host.push(commit, f"runs/{run_name}")
        run = WORK.format(words=shlex.join(words))
        start_command(host, run_name, commit, "[]", setup, run, variables={storage.VARIABLE: url})
        record = make_record(run_name, host, [], study, remote)
        write_record(record)
        records.append(record)
        logger.info("%d workers on %s", share, host.target)
    return records


def work(file: Path, overrides: list[str], *, jobs: int, n_trials: int | None, remote: str | None) -> None:
    """On a host: drive the study until all its trials have ended, and deliver each experiment of a trial."""
    require_origin()
    study = command.prepare(file, overrides).plan.study
    for experiment in list_experiments():  # those that a kill kept from it
        if experiment.message.startswith(f"search {study}, trial "):
            push_experiment(experiment, remote)

    def deliver(order: trial.Order) -> None:
        for experiment in list_experiments():
            if (experiment.name, experiment.message.partition(MARK)[0]) == (order.name, order.message):
                push_experiment(experiment, remote)

    options = argparse.Namespace(
        file=file, overrides=overrides, jobs=jobs, n_trials=n_trials, timeout=None, storage=None, apply=None
    )
    command.run(options, deliver)


def require_origin() -> None:
    """Raise InputError where this checkout has nowhere to deliver to."""
    if try_git("remote", "get-url", "origin") is None:
        raise InputError(
            "this checkout has no remote `origin` of Git; `lathe remote search` starts workers where there is one",
            code="no-origin",
        )
