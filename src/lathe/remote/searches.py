"""Searches over several hosts: a driver on each, all on one study in a database; each delivers its trials."""

import argparse
import logging
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.experiments.search import command, run_search, storage, trial
from lathe.experiments.search.pruning import MARK
from lathe.provenance.remotes import open_remote
from lathe.provenance.revisions import Experiment, list_experiments
from lathe.remote.job import push_experiment
from lathe.remote.preparation import require_committed
from lathe.remote.records import Record, list_names, write_record
from lathe.remote.ssh_runs import make_record, prepare, send_data, start_command

logger = logging.getLogger(__name__)

WORK = "exec python -m lathe remote worker {words}"
PAUSES = (10.0, 30.0, 60.0, 120.0)  # seconds between the last attempts to deliver


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

    A host that works on the study already is left alone, unless all of them do. Raises InputError before anything is
    sent if the search file is invalid or not committed, or if the study's storage is none that machines can share.
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
    names = [f"{study}-on-{re.sub('[^A-Za-z0-9]+', '-', target).strip('-')}" for target in hosts]
    drivers = list(zip(prepared, names, strict=True))
    at_work = [host.call("status", run_name).strip() == f"{run_name} running" for host, run_name in drivers]
    records = []
    for number, (host, run_name) in enumerate(drivers):
        record = make_record(run_name, host, [], study, remote)
        records.append(record)
        if at_work[number] and not all(at_work):
            logger.info("%s works on it already, with what it was told then", host.target)
            if run_name not in list_names():
                write_record(record)
            continue
        share = workers // len(hosts) + (number < workers % len(hosts))
        words = [name, "--jobs", str(share), *(f"-S{text}" for text in overrides)]
        words += ["--n-trials", str(n_trials)] if n_trials else []
        words += ["--dvc-remote", remote] if remote else []
        send_data(host, remote)
        host.push(commit, f"runs/{run_name}")
        run = WORK.format(words=shlex.join(words))
        start_command(host, run_name, commit, "[]", setup, run, variables={storage.VARIABLE: url})
        write_record(record)
        logger.info("%d workers on %s", share, host.target)
    return records


def work(file: Path, overrides: list[str], *, jobs: int, n_trials: int | None, remote: str | None) -> None:
    """On a host: drive the study until all its trials have ended, and deliver each experiment of a trial.

    Raises InputError at the end if experiments did not arrive, though each was tried again.
    """
    require_origin()
    prepared = command.prepare(file, overrides)
    url = os.environ.get(storage.VARIABLE) or None
    if remote:  # without one the data are in this host's cache, by ssh
        with open_remote(paths.ROOT, remote) as (repo, resolved, _):
            repo.fetch_sources(resolved)
    deliveries = _Deliveries(remote)
    with storage.translate_connection_errors(url):
        study = run_search.open_study(prepared.plan, prepared.params, url)
        recorded = study.list_experiments()
    for experiment in list_experiments():  # those that a kill kept from it
        if experiment.commit in recorded:
            deliveries.add(experiment)
    deliveries.send()

    def deliver(order: trial.Order) -> None:
        for experiment in list_experiments():
            if (experiment.name, experiment.message.partition(MARK)[0]) == (order.name, order.message):
                deliveries.add(experiment)
        deliveries.send()

    options = argparse.Namespace(
        file=file, overrides=overrides, jobs=jobs, n_trials=n_trials, timeout=None, storage=None, apply=None
    )
    command.run(options, deliver)
    deliveries.send_or_raise()


class _Deliveries:
    """Experiments on their way to `origin` and to a remote of DVC: one that does not arrive is tried again later."""

    def __init__(self, remote: str | None) -> None:
        self._remote = remote
        self._waiting: list[Experiment] = []

    def add(self, experiment: Experiment) -> None:
        """Take an experiment; nothing is sent yet."""
        self._waiting.append(experiment)

    def send(self) -> InputError | None:
        """Send all that wait; return why one did not arrive. The network may be gone for a while: no reason to end."""
        refusal: InputError | None = None
        for experiment in list(self._waiting):
            try:
                push_experiment(experiment, self._remote)
            except InputError as error:
                refusal = error
                logger.warning("%s is not delivered, and will be tried again: %s", experiment.name, error)
            else:
                self._waiting.remove(experiment)
        return refusal

    def send_or_raise(self) -> None:
        """Send all that wait, several times if need be."""
        for pause in (*PAUSES, None):
            refusal = self.send()
            if refusal is None:
                return
            if pause is not None:
                time.sleep(pause)
        names = ", ".join(experiment.name for experiment in self._waiting)
        raise InputError(
            f"{names}: not delivered: {refusal}; the study has the scores, and the same command tries again",
            code="not-delivered",
        ) from None


def require_origin() -> None:
    """Raise InputError where this checkout has nowhere to deliver to."""
    if try_git("remote", "get-url", "origin") is None:
        raise InputError(
            "this checkout has no remote `origin` of Git; `lathe remote search` starts workers where there is one",
            code="no-origin",
        )
