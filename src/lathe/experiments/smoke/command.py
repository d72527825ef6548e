"""`lathe smoke`: every stage of the pipeline on a few rows of a configuration, in a copy of the checkout.

Model, dataset and encoder are fetched as for the run itself, and through the checkout's cache of DVC, from which the
run then takes them. The other stages run by their own commands, in DVC's order, with small values; what they write is
in no cache, and is removed with the copy.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import yaml

from lathe.common import paths
from lathe.common.dvc_api import StageCommand, open_repository
from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.workspace_lock import refuse_beside_holder
from lathe.config.held_out_checks import find_misfits
from lathe.config.load import Config, load
from lathe.config.overrides import apply_overrides, check_keys, expand_sweep
from lathe.config.presets import MixtureDataset
from lathe.config.yaml_files import read_yaml
from lathe.experiments.recipes import load_main_recipe
from lathe.experiments.smoke import checkout_copy, small_values
from lathe.experiments.smoke.stage_processes import StageProcesses

GENERAL_TEXT = "data/smoke-general.txt"
FETCHING = ("local_files", "local_files_encoder", "fetch", "fetch_encoder")
ANSWERING = "generate"  # the first stage that depends on the values of choose_short_answers
NO_TRACKING = {"MLFLOW_ENABLED": "false", "WANDB_MODE": "disabled"}  # they take precedence over params.yaml

Seconds = dict[str, float]  # of each stage that has run


def run(recipe: str | None, further: Sequence[str]) -> int:
    """Run every stage on a few rows with a recipe's overrides and `further` ones; return the first exit code but 0.

    Without a recipe the values are those of params.yaml. Raises InputError if an override is invalid, and if another
    command works in the checkout: its parameters may be that command's, and so are memory and devices.
    """
    check_keys(further)
    overrides = load_main_recipe(recipe).build_overrides(further) if recipe else list(further)
    if len(runs := expand_sweep(overrides)) > 1:
        raise InputError(
            f"-S {' '.join(further)}: that is a sweep of {len(runs)} runs; give each key one value",
            code="sweep-in-smoke",
        )
    config = apply_overrides(overrides)
    text = _shorten_general_text(config)
    refuse_beside_holder(f"lathe smoke {recipe}" if recipe else "lathe smoke")
    os.environ.update(NO_TRACKING)
    with checkout_copy.reserve_folder(recipe or "params") as folder:
        try:
            checkout_copy.copy_checkout(folder, _list_named_files(config))
            (folder / GENERAL_TEXT).write_text(text, encoding="utf-8")
            seconds: Seconds = {}
            failed = _run_stages(folder, config, seconds)
        except KeyboardInterrupt:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if failed:
            stage, code = failed
            sys.stderr.write(f"smoke: {stage} failed with exit code {code}; its files are kept in {folder}\n")
            return code
        shutil.rmtree(folder)
    _print_seconds(seconds)
    following = f"lathe run {recipe}" if recipe else "dvc exp run" if further else "lathe repro"
    command = shlex.join([*following.split(), *(word for override in further for word in ("-S", override))])
    sys.stdout.write(f"smoke: every stage ran; now: {command}\n")
    return 0


def _run_stages(folder: Path, config: Config, seconds: Seconds) -> tuple[str, int] | None:
    """Run every stage in the copy, and note its seconds; return the first that fails, with its exit code."""
    with chdir(folder):
        _write_params(folder, config, small_values.choose_no_tracking())
        with open_repository(folder) as repository:
            fetching = [stage.name for stage in repository.list_commands() if _is_fetching(stage)]
            for name in fetching:
                _announce(name)
                started = time.perf_counter()
                if code := repository.reproduce_alone(name):
                    return name, code
                seconds[name] = time.perf_counter() - started
        _limit_rows(folder, config)
        small = small_values.choose_small_values(config.params, GENERAL_TEXT)
        _write_params(folder, config, small)
        processes = StageProcesses()
        with open_repository(folder) as repository:
            stages = [stage for stage in repository.list_commands() if not _is_fetching(stage)]
        for stage in stages:
            if stage.name.startswith(ANSWERING) and "generate.max_rows" not in small:
                small |= small_values.choose_short_answers(config.params)
                _write_params(folder, config, small)
            _announce(stage.name)
            started = time.perf_counter()
            for command in stage.commands:
                if code := processes.run(stage, command):
                    return stage.name, code
            seconds[stage.name] = time.perf_counter() - started
            if stage.name == "preprocess":
                _compare_references(folder, config)
    return None


def _compare_references(folder: Path, config: Config) -> None:
    """Warn if no reference of the few rows fits into an answer: for all of them, training would refuse that."""
    report = read_json_object(folder / "metrics/preprocess/report.json")
    for misfit in find_misfits(report, config.params):
        if misfit.code == "references-too-long":
            sys.stderr.write(f"warning: of the few rows here, {misfit.text}; {misfit.remedy}\n")


def _is_fetching(stage: StageCommand) -> bool:
    return stage.name.partition("@")[0] in FETCHING


def _write_params(folder: Path, config: Config, values: Mapping[str, Any]) -> None:
    """Write the params.yaml of the copy, and read it as the stages will. Raises InputError if they would refuse it."""
    tree = small_values.set_values(config.params.model_dump(), values)
    file = folder / paths.PARAMS.name
    file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    load(file, folder / paths.PRESETS.name)


def _limit_rows(folder: Path, config: Config) -> None:
    """Write the presets.yaml of the copy with a few rows of the selected dataset; it is fetched before as it is."""
    file = folder / paths.PRESETS.name
    tree, params = read_yaml(file), config.params
    entry, chosen = tree["datasets"][params.dataset], config.dataset
    parts = chosen.datasets if isinstance(chosen, MixtureDataset) else {"": chosen}
    for name, dataset in parts.items():
        limited = entry["datasets"][name] if name else entry
        limited["limits"] = small_values.choose_limits(dataset.limits, params.preprocess.max_dropped_fraction)
    file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _shorten_general_text(config: Config) -> str:
    from lathe.inference.general_text import read_paragraphs

    return small_values.shorten_text(read_paragraphs(paths.ROOT / config.params.evaluate.general_text)[0]) + "\n"


def _list_named_files(config: Config) -> list[str | None]:
    """Return the paths that parameters name, which Git may not know."""
    params = config.params
    judge = params.judge.model if params.judge.provider == "gguf" else None
    tasks = params.benchmark.include_path if params.benchmark.tasks else None
    named = [judge, tasks, params.judge.ca_bundle, params.bert_score.baseline, params.convert.llama_cpp_dir]
    return [name for name in [*named, params.quantize.binary] if name and not Path(name).is_absolute()]


def _announce(stage: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"smoke: {stage}\n")
    sys.stderr.flush()


def _print_seconds(seconds: Seconds) -> None:
    width = max(map(len, seconds), default=0)
    for name, taken in seconds.items():
        sys.stdout.write(f"{name:<{width}} {taken:6.1f} s\n")
    sys.stdout.flush()
