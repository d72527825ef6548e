"""Commands `lathe remote …`: runs on other machines, by ssh, Slurm or SkyPilot."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe import completion
from lathe.common.errors import InputError
from lathe.common.text import write_lines

if TYPE_CHECKING:
    from lathe.remote.records import Record


def add_commands(table: Any) -> None:
    """Add the commands to the parser of `lathe remote`."""
    command = table.add_parser("run", help="run a recipe on another machine")
    command.add_argument("recipe", metavar="RECIPE", help="its name").complete = completion.RECIPES
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.add_argument("-n", "--name", metavar="NAME", help="of the experiment (default: the recipe's)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--host", metavar="USER@MACHINE", help="by ssh, on this machine")
    where.add_argument("--slurm", action="store_true", help="by sbatch, on nodes that share this folder; takes sweeps")
    command.add_argument("--gpus", metavar="KIND:N", help="of SkyPilot (without --host and --slurm), such as H100:1")
    command.add_argument(
        "--spot", action="store_true", help="of SkyPilot: cheaper, and may be taken away; goes on then"
    )
    command.add_argument(
        "--infra", metavar="WHERE", help="of SkyPilot, such as aws/us-east-1 or k8s (default: cheapest)"
    )
    command.add_argument(
        "--bucket", metavar="NAME", help="of SkyPilot, for unfinished work (default: the repository's)"
    )
    command.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch, such as --sbatch=--gres=gpu:1"
    )
    _add_host_options(command)
    command.add_argument(
        "--price-per-hour", type=float, metavar="N", help="of the machine, for the cost in the timings"
    )
    command.set_defaults(run=_run)

    command = table.add_parser("search", help="drive one search on several hosts by ssh, with a database between them")
    completion.add_search_file(command)
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.add_argument("--hosts", required=True, metavar="A,B", help="as ssh knows them, such as me@box,me@den")
    command.add_argument("--workers", type=int, metavar="N", help="trials at once, over all hosts (default: one each)")
    command.add_argument("--n-trials", type=int, metavar="N", help="trials of the whole study (default: the file's)")
    command.add_argument("--storage", metavar="URL", help="the database; or set LATHE_SEARCH_STORAGE, which ps hides")
    _add_host_options(command)
    command.set_defaults(run=_start_search)

    command = table.add_parser("status", help="say what has become of the runs that were started from here")
    command.add_argument("names", nargs="*", metavar="NAME", help="of which (default: all)")
    command.set_defaults(run=_show_status)

    command = table.add_parser("logs", help="print what a run has printed")
    command.add_argument("name", metavar="NAME", help="of the experiment")
    command.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    command.set_defaults(run=_show_logs)

    command = table.add_parser("stop", help="stop a run in good order; the same `remote run` goes on with it")
    command.add_argument("name", metavar="NAME", help="of the experiment")
    command.set_defaults(run=_stop)

    command = table.add_parser("fetch", help="bring a finished run home: its experiment and its files")
    command.add_argument("name", metavar="NAME", help="of the experiment")
    command.set_defaults(run=_fetch)

    command = table.add_parser("forget", help="remove the note of a run here; what is there stays")
    command.add_argument("name", metavar="NAME", help="of the experiment")
    command.set_defaults(run=_forget)

    command = table.add_parser("worker", help="on a host of `remote search`: drive the study, deliver its trials")
    command.add_argument("file", type=Path, metavar="FILE", help="what to search")
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once (default: 1)")
    command.add_argument("--n-trials", type=int, metavar="N", help="trials of the whole study (default: the file's)")
    command.add_argument("--dvc-remote", metavar="NAME", help="of DVC, which gets their files (default: none)")
    command.set_defaults(run=_work)

    command = table.add_parser("job", help="on the other machine: run a job, or go on with it")
    command.add_argument("file", type=Path, metavar="FILE", help="with jobs, which `remote run` writes")
    command.add_argument("--number", type=int, default=1, metavar="N", help="which of them, from 1 (default: 1)")
    command.set_defaults(run=_run_job)


def _add_host_options(command: Any) -> None:
    command.add_argument("--folder", metavar="PATH", help="on the host (default: lathe/ and this checkout's name)")
    command.add_argument("--setup", metavar="COMMAND", help="that makes the environment there (default: make setup)")
    command.add_argument(
        "--dvc-remote", metavar="NAME", help="of DVC, that both machines reach (default: the host's cache, by ssh)"
    )


def _run(args: argparse.Namespace) -> None:
    from lathe.remote import preparation, sky_runs, slurm_runs, ssh_runs

    if args.price_per_hour is not None and not 0 <= args.price_per_hour < float("inf"):
        raise InputError(f"--price-per-hour {args.price_per_hour}: must be 0 or more", code="option-out-of-range")
    _refuse_foreign_options(args)
    name = args.name or args.recipe
    jobs = preparation.build_jobs(args.recipe, args.overrides, name, args.price_per_hour)
    if args.slurm:
        record = slurm_runs.submit(name, jobs, args.sbatch)
        write_lines([f"{name} is job {record.place['job']} of Slurm; `lathe remote status {name}` says how it is"])
        return
    if len(jobs) > 1:
        raise InputError(
            f"-S {' '.join(args.overrides)}: that is a sweep of {len(jobs)} runs; give one value of each key, or "
            "send it to a cluster by --slurm",
            code="sweep-on-one-machine",
        )
    if args.host:
        record = ssh_runs.start(jobs[0], args.host, args.folder, args.setup, args.dvc_remote)
        write_lines([f"{name} runs on {args.host}; `lathe remote logs -f {name}` follows it"])
        return
    machine = sky_runs.Machine(args.gpus, args.spot, args.bucket, args.infra)
    sky_runs.launch(jobs[0], machine, args.dvc_remote)
    write_lines([f"{name} is sent to SkyPilot; `sky jobs queue` says how it is, `lathe remote fetch {name}` brings it"])


def _refuse_foreign_options(args: argparse.Namespace) -> None:
    """Raise InputError if options of several kinds of machines are mixed."""
    kind = "--slurm" if args.slurm else "--host" if args.host else "SkyPilot"
    kinds = {"folder": "--host", "setup": "--host", "sbatch": "--slurm"}
    kinds |= dict.fromkeys(("gpus", "spot", "infra", "bucket"), "SkyPilot")
    for option, belongs_to in kinds.items():
        if getattr(args, option) and belongs_to != kind:
            raise InputError(
                f"--{option}: goes with {belongs_to}, not with {kind}; leave it out", code="foreign-option"
            )
    if args.dvc_remote and args.slurm:
        raise InputError("--dvc-remote: jobs of Slurm share this folder; leave it out", code="foreign-option")


def _start_search(args: argparse.Namespace) -> None:
    from lathe.experiments.search import storage
    from lathe.remote import searches

    hosts = [host for host in args.hosts.split(",") if host]
    for option, number in (("--workers", args.workers), ("--n-trials", args.n_trials)):
        if number is not None and number < 1:
            raise InputError(f"{option} {number}: must be at least 1", code="option-out-of-range")
    records = searches.start(
        args.file,
        args.overrides,
        hosts,
        workers=args.workers or len(hosts),
        n_trials=args.n_trials,
        url=args.storage or os.environ.get(storage.VARIABLE) or None,
        folder=args.folder,
        setup=args.setup,
        remote=args.dvc_remote,
    )
    study = records[0].study
    write_lines(
        [f"{study} is searched on {', '.join(hosts)}; `lathe remote status {study}`, `lathe remote fetch {study}`"]
    )


def _work(args: argparse.Namespace) -> None:
    from lathe.remote import searches

    searches.work(args.file, args.overrides, jobs=args.jobs, n_trials=args.n_trials, remote=args.dvc_remote)


def _find_module(record: "Record") -> Any:
    """Return the module that knows the runs of a record: each has the same functions."""
    from lathe.remote import sky_runs, slurm_runs, ssh_runs

    return {"ssh": ssh_runs, "slurm": slurm_runs, "sky": sky_runs}[record.by]


def _show_status(args: argparse.Namespace) -> None:
    from lathe.remote.records import find_records, list_names

    records = [record for name in args.names or list_names() for record in find_records(name)]
    for record in records:
        where = record.place.get("host") or f"{record.by} {record.place['job']}"
        try:
            state = _find_module(record).read_state(record)
        except InputError as error:
            if args.names and len(records) == 1:
                raise
            state = f"unknown: {error}"
        write_lines([f"{record.name}  {where}  since {record.started}  {state}"])


def _show_logs(args: argparse.Namespace) -> None:
    from lathe.remote.records import read_record

    record = read_record(args.name)
    sys.stdout.flush()
    sys.exit(_find_module(record).show_logs(record, follow=args.follow))


def _stop(args: argparse.Namespace) -> None:
    def stop(record: "Record") -> None:
        _find_module(record).stop(record)
        write_lines([f"{record.name}: told to stop; `lathe remote status {record.name}` says when it has"])

    _act_on_each(args.name, stop)


def _fetch(args: argparse.Namespace) -> None:
    _act_on_each(args.name, lambda record: write_lines(_find_module(record).fetch(record)))


def _act_on_each(name: str, act: Callable[["Record"], None]) -> None:
    """Act on the run of that name, or on the drivers of that study: one that is refused keeps no other from it.

    Raises InputError with a line for each that was.
    """
    from lathe.remote.records import find_records

    refusals: list[InputError] = []
    for record in find_records(name):
        try:
            act(record)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise InputError("\n".join(map(str, refusals)), code=refusals[0].code)


def _forget(args: argparse.Namespace) -> None:
    from lathe.remote.records import forget_record

    forget_record(args.name)


def _run_job(args: argparse.Namespace) -> None:
    from lathe.remote import job

    sys.exit(job.run(job.read_job(args.file, args.number)))
