"""Stage runner: arguments, parameters, errors and timings around the steps of every stage."""

import argparse
import inspect
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lathe.common import json_files, launch, metric_files, operating_system, paths, workspace_lock
from lathe.common.entry_point import guard
from lathe.common.errors import InputError
from lathe.config.classifier_config import ClassifierConfig, load_classifier
from lathe.config.held_out_checks import find_misfits
from lathe.config.load import Config, load
from lathe.config.params import Convert, Params
from lathe.evaluation.benchmark import check_benchmark
from lathe.experiments.tracking import start_mirror
from lathe.needs.disk_space import check_disk_space, find_shortages
from lathe.needs.later_stages import check_later_stages

_log = logging.getLogger(__name__)

LAST_STAGE = "card"  # of the pipeline

# Measured by a stage besides seconds and memory, such as {"tokens_per_second": 812.5}.
Throughput = dict[str, float]


def run(main: Callable[[Config], Throughput | None]) -> None:
    """Run a stage without items; its script's docstring is the help text."""
    name, parser = _make_parser(main)
    parser.parse_args()
    guard(lambda: _run_timed(name, None, lambda: main(_load_config(name))))


def run_on_machines(main: Callable[[Config, int | None], Throughput | None]) -> None:
    """Run a stage that several machines may share; `--machine_rank` is the number of this one."""
    name, parser = _make_parser(main)
    parser.add_argument(
        "--machine_rank",
        type=int,
        metavar="N",
        help="this machine's number where several take part, from 0 (default: as training.launcher says)",
    )
    machine_rank = parser.parse_args().machine_rank
    if machine_rank:  # the first machine writes the timings
        guard(lambda: main(load(), machine_rank))
    else:

        def train() -> Throughput | None:
            config = _load_config(name)
            if not launch.is_worker():
                warn_without_converter(config.params.convert)
                check_held_out(config.params)
                check_benchmark(config.params)
                _check_merge(config.params)
                for warning in check_later_stages(config.params, paths.MODEL_BASE, os.environ):
                    _log.warning("%s", warning)
                for shortage in find_shortages(config.params, paths.ROOT):
                    _log.warning("%s", shortage)
            return main(config, machine_rank)

        guard(lambda: _run_timed(name, None, train))


def run_items(
    main: Callable[[Config, str], Throughput | None],
    items: Callable[[Config], list[str]],
    options: Sequence[str] = ("type",),
) -> None:
    """Run a stage once per item named on the command line; without one, for all of `items`.

    An item is an artifact or a quantization type, as `dvc.yaml` names it in the stage's command. `options` are the
    names of the matrix there, such as artifact and task, whose values make the item `ARTIFACT/TASK`.
    """
    name, parser = _make_parser(main)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="what to run it for (default: all)")
    for option in options:
        parser.add_argument(f"--{option}", help="part of the item, as DVC gives that of a matrix")
    arguments = parser.parse_args()
    parts = [part for option in options if (part := getattr(arguments, option)) is not None]
    chosen = arguments.items + (["/".join(parts)] if parts else [])

    def run_chosen() -> None:
        config = _load_config(name)
        known = items(config)
        check_items(name, chosen, known)
        if name == "fetch":
            warn_of_untracked(config, chosen or known)
        for item in chosen or known:
            _run_timed(name, item, lambda item=item: main(config, item), known)  # type: ignore[misc]
            if (name, item) == ("fetch", "model"):
                check_disk_space(config.params, paths.ROOT)

    guard(run_chosen)


def check_items(name: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for an item that the stage does not have."""
    for item in chosen:
        if item not in known:
            raise InputError(f"{name} {item}: no such item; known: {', '.join(known)}", code="unknown-item")


def run_classifier(main: Callable[[ClassifierConfig], Throughput | None]) -> None:
    """Run a stage of the classifier's pipeline, classify/dvc.yaml, which has parameters and metrics of its own."""
    name, parser = _make_parser(main)
    parser.parse_args()

    def run_stage() -> None:
        workspace_lock.refuse_beside_holder(name)
        config = load_classifier()
        _run_timed(name, None, lambda: main(config), folder=paths.CLASSIFIER_METRICS)

    guard(run_stage)


def run_classifier_items(main: Callable[[ClassifierConfig, str], Throughput | None], items: Sequence[str]) -> None:
    """Run a stage of the classifier's pipeline once per item named on the command line; without one, for all."""
    name, parser = _make_parser(main)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="what to run it for (default: all)")
    chosen = parser.parse_args().items

    def run_chosen() -> None:
        workspace_lock.refuse_beside_holder(name)
        config = load_classifier()
        check_items(name, chosen, items)
        for item in chosen or items:
            folder = paths.CLASSIFIER_METRICS
            _run_timed(name, item, lambda item=item: main(config, item), items, folder=folder)  # type: ignore[misc]

    guard(run_chosen)


def _load_config(name: str) -> Config:
    """Return the parameters, and start the mirror of this run, if there is to be one.

    Raises InputError where another command works in this checkout.
    """
    workspace_lock.refuse_beside_holder(name)
    config = load()
    if "DVC_STAGE" in os.environ and not launch.is_worker():
        start_mirror.start_mirroring(name, config.params.tracking)
    return config


def warn_without_converter(convert: Convert) -> None:
    """Warn, before the hours of training, if llama.cpp's converter is missing, with which a later stage begins."""
    from lathe.gguf.install_converter import SCRIPT, find_converter

    try:
        folder, state = find_converter(paths.ROOT, convert.llama_cpp_dir)
    except InputError:  # llama-cpp-python of another version than the converter that is pinned
        folder, state = paths.LLAMA_CPP, "outdated"
    if state != "ready":
        remedy = "name a llama.cpp checkout in convert.llama_cpp_dir" if convert.llama_cpp_dir else "run `make setup`"
        _log.warning("%s: no %s that fits; convert will fail after the training; %s", folder, SCRIPT, remedy)


def check_held_out(params: Params) -> None:
    """Warn, before the hours of training, if references do not fit the parameters of generation and scores.

    Raises InputError if no answer could be complete, or `generate` would fail. The report of preprocess is there in a
    run of the pipeline; a training without one is not checked.
    """
    file = paths.METRICS / "preprocess/report.json"
    if not file.exists():
        return
    for misfit in find_misfits(json_files.read_json_object(file), params):
        if misfit.code:
            raise InputError(f"{misfit.text}; {misfit.remedy}", code=misfit.code)
        _log.warning("%s; %s", misfit.text, misfit.remedy)


def _check_merge(params: Params) -> None:
    """Raise InputError where the adapter could not be merged after the training."""
    if params.training.tuning == "lora" and (paths.MODEL_BASE / "config.json").is_file():
        from lathe.models.check_merge import check_merge

        check_merge(paths.MODEL_BASE, params.lora, paths.SCRATCH)


def warn_of_untracked(config: Config, items: Sequence[str]) -> None:
    """Warn of local data and models that neither DVC nor Git tracks: the run could not be made again without them."""
    from lathe.provenance.local_files import find_untracked

    for path in find_untracked(config, {item: getattr(config, item) for item in items}):
        _log.warning(
            "%s: in no cache: it cannot be restored once it is changed or gone; `dvc add %s`", path, shlex.quote(path)
        )


def _make_parser(main: Callable[..., object]) -> tuple[str, argparse.ArgumentParser]:
    module = inspect.getmodule(main)
    assert module is not None
    assert module.__file__ is not None
    name = os.path.splitext(os.path.basename(module.__file__))[0]
    parser = argparse.ArgumentParser(
        prog=f"python {os.path.relpath(module.__file__, paths.ROOT)}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return name, parser


def _run_timed(
    name: str,
    item: str | None,
    action: Callable[[], Throughput | None],
    items: Sequence[str] = (),
    folder: Path = paths.METRICS,
) -> None:
    started = time.perf_counter()
    throughput = action() or {}
    if launch.is_worker():
        if launch.is_main():
            launch.report_throughput({"peak_memory_bytes": operating_system.get_peak_memory_bytes(), **throughput})
        return
    seconds = time.perf_counter() - started
    metric_files.write_timings(name, item, seconds=seconds, throughput=throughput, items=items, folder=folder)
    if name == LAST_STAGE and "DVC_STAGE" in os.environ:
        from lathe.reports import run_summary

        run_summary.print_unless_later()
