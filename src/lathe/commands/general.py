"""Commands of `lathe`: what each does with its arguments; `cli.py` has the parser."""

import argparse
import json
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lathe.commands import classifier
from lathe.common import metric_files, paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.common.text import did_you_mean, write_lines
from lathe.config import artifacts
from lathe.config.load import Config, load
from lathe.config.overrides import apply_overrides
from lathe.config.pipelines import CLASSIFIER
from lathe.config.yaml_files import read_yaml

if TYPE_CHECKING:
    from lathe.inference.generation_sizes import GenerationSizes

logger = logging.getLogger(__name__)

SCHEMAS = ("params", "presets", "recipe")
RESULT_ORDERS = ("name", "score", "size", "seconds")


def init_repository(args: argparse.Namespace) -> None:
    """Make a repository of the user's own, or bring one to the state of this Lathe."""
    from lathe.adopt.new_repository import create
    from lathe.adopt.update import update

    if not args.update:
        create(args.folder, args.name, args.model, args.dataset, prompt=args.prompt, completion=args.completion)
    elif args.name or args.model or args.dataset or args.prompt or args.completion:
        raise InputError("--update: takes DIR and no other option; give it alone", code="exclusive-options")
    else:
        update(args.folder)


def run_doctor(args: argparse.Namespace) -> None:
    """Check what a run with these overrides, and those of a recipe, needs; exit 1 if something fails."""
    from lathe.doctor import doctor
    from lathe.experiments.recipes import load_main_recipe

    def list_overrides() -> list[str]:
        return load_main_recipe(args.recipe).build_overrides(args.overrides) if args.recipe else args.overrides

    def load_with_overrides() -> Config:
        return apply_overrides(list_overrides())

    if args.shape is not None:
        print_needs(args, list_overrides())
        return
    if args.gpus is not None or args.rows is not None:
        raise InputError("--gpus and --rows go with --for MODEL; add it", code="option-without-model")
    sys.exit(doctor.run(load_with_overrides, as_json=args.json))


def print_needs(args: argparse.Namespace, overrides: list[str]) -> None:
    """Print what the training of a model of a known shape takes on named GPUs."""
    from lathe.doctor import scaling

    rows = 10_000 if args.rows is None else args.rows
    if not 1 <= rows <= 10**10:
        raise InputError(f"--rows {rows}: must be from 1 to 10,000,000,000", code="option-out-of-range")
    needs = scaling.measure_needs(args.shape, scaling.parse_gpus(args.gpus or "H100"), rows, overrides)
    if args.json:
        sys.stdout.write(json.dumps(asdict(needs), indent=2) + "\n")
    else:
        write_lines(scaling.format_needs(needs))


def create_recipe(args: argparse.Namespace) -> None:
    """Write a recipe for a model and a dataset."""
    from lathe.new_recipe.write_recipe import create_recipe

    name = args.name or f"{args.model}-{args.dataset}"
    create_recipe(name, args.model, args.dataset, gpu=args.gpu, method=args.method, force=args.force)


def list_experiments() -> None:
    """Print every recipe, and below it its experiments with their scores."""
    from lathe.experiments.run_recipe import list_results

    write_lines(list_results())


def run_experiment(args: argparse.Namespace) -> None:
    """Run a recipe by `dvc exp run`, and exit with its code."""
    from lathe.experiments import run_recipe
    from lathe.provenance.revisions import WORKSPACE
    from lathe.reports import run_summary

    options = run_recipe.Options(
        name=args.experiment,
        queue=args.queue,
        temp=args.temp,
        force=args.force,
        keep=args.keep,
        print_command=args.print_command,
    )
    with run_summary.printed_at_the_end():
        code = run_recipe.run(args.name, args.overrides, options)
    if code == 0 and not (args.queue or args.print_command):
        name = (args.experiment or args.name) if args.temp else WORKSPACE
        classifier.print_summary(name, of_classifier=run_recipe.is_of_classifier(args.name))
    sys.exit(code)


def run_smoke(args: argparse.Namespace) -> None:
    """Run every stage on a few rows, in a copy of the checkout, and exit with the code of the first that fails."""
    from lathe.experiments.smoke import command

    sys.exit(command.run(args.recipe, args.overrides))


def run_pipeline(targets: list[str]) -> None:
    """Check the parameters, run the pipeline by `dvc repro`, and exit with its code."""
    from lathe.common.workspace_lock import hold_workspace
    from lathe.experiments.dvc_command import run_dvc
    from lathe.provenance.damaged_cache import remove_damaged_objects
    from lathe.provenance.revisions import WORKSPACE
    from lathe.reports import run_summary

    of_classifier = targets == [f"{CLASSIFIER.folder}/dvc.yaml"]
    with hold_workspace("lathe repro"):
        check_configuration()
        if of_classifier:
            remove_damaged_objects(paths.CLASSIFIER)
        os.chdir(paths.ROOT)
        with run_summary.printed_at_the_end():
            code = run_dvc([*CLASSIFIER.dvc_options, "repro"] if of_classifier else ["repro", *targets])
        if code == 0 and (of_classifier or not targets):
            classifier.print_summary(WORKSPACE, of_classifier=of_classifier)
        sys.exit(code)


def reset_workspace(*, yes: bool) -> None:
    """Bring parameters, metrics, dvc.lock and outputs back to the last commit."""
    from lathe.experiments import reset

    reset.run(yes=yes)


def run_preflight() -> None:
    """Print what queued experiments would include and miss; exit 1 if a stage may miss a file."""
    from lathe.experiments import preflight

    sys.exit(preflight.run())


def compare_experiments(args: argparse.Namespace) -> None:
    """Print experiments beside one another."""
    from lathe.experiments import compare

    compare.run(
        args.names, split=args.split, artifact=args.artifact, as_json=args.json, mixed_engines=args.mixed_engines
    )


def print_config(section: str | None, stage_name: str | None, overrides: list[str]) -> None:
    """Print as YAML the parameters and selected presets, after `overrides`, or the named part of them."""
    tree = _resolve(apply_overrides(overrides))
    if stage_name:
        tree = _select_stage(tree, stage_name)
    for key in section.split(".") if section else []:
        if not isinstance(tree, dict) or key not in tree:
            known = list(tree) if isinstance(tree, dict) else []
            raise InputError(f"{section}: no such key; {did_you_mean(key, known)}", code="unknown-key")
        tree = tree[key]
    sys.stdout.write(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).removesuffix("...\n"))


def check_configuration() -> None:
    """Refuse wrong parameters, presets and general text; repair files of DVC that a kill truncated."""
    from lathe.evaluation.benchmark import check_benchmark
    from lathe.experiments.interrupted import describe_detached_head
    from lathe.inference import general_text
    from lathe.provenance.damaged_cache import remove_damaged_objects
    from lathe.provenance.repair_dvc_files import remove_truncated_rwlock, restore_truncated_lock

    params = load().params
    general_text.read_paragraphs(paths.ROOT / params.evaluate.general_text)
    check_benchmark(params)
    if line := describe_detached_head():
        logger.warning("%s", line)
    restore_truncated_lock()
    remove_truncated_rwlock()
    remove_damaged_objects()


def print_schema(kind: str | None) -> None:
    """Print a Markdown page that documents every key, or the JSON Schema of a kind of file."""
    if kind:
        from lathe.experiments.schemas import write_schema

        sys.stdout.write(write_schema(kind))
        return
    from lathe.config.reference import render_page

    sys.stdout.write(render_page())


def inspect_rows(split: str, rows: int, row: int | None, *, ids: bool) -> None:
    """Print rows of data/processed as training reads them."""
    from lathe.data.inspect import show_examples

    for option, number in (("--rows", rows), ("--row", row)):
        if number is not None and number < 1:
            raise InputError(f"{option} {number}: must be at least 1; rows are counted from 1", code="number-too-small")
    show_examples(split, rows=rows, row=row, ids=ids, settings=load().params.preprocess, out=sys.stdout)


def check_gates() -> bool:
    """Print the result of each of evaluate.gates by the metrics as they are, and return whether all pass."""
    from lathe.config.gates import parse_gate
    from lathe.evaluation.benchmark_scores import add_task_scores
    from lathe.evaluation.gate_results import evaluate_gate, format_outcome, make_metrics

    params = load().params
    report, recorded = (_read_evaluation(name) for name in ("validation", "gates"))
    benchmark = _read_evaluation("benchmark") if (paths.METRICS / "evaluate/benchmark.json").exists() else {}
    expressions = params.evaluate.gates or []
    listed = {*artifacts.list_artifacts(params.quantize.types), *params.export.formats}
    if set(report) != listed or list(recorded["gates"]) != expressions:
        raise InputError(
            "metrics/evaluate is not of the evaluate.gates, quantize.types and export.formats in params.yaml; "
            "run `dvc repro`",
            code="outdated-metrics",
        )
    gates = [parse_gate(expression) for expression in expressions]
    scores = add_task_scores(report, benchmark, gates)
    outcomes = [evaluate_gate(gate, scores, params.quantize.types) for gate in gates]
    if make_metrics(outcomes) != recorded:
        raise InputError(
            "metrics/evaluate/gates.json is not of the validation.json beside it; run `dvc repro`",
            code="outdated-metrics",
        )
    for result in outcomes:
        sys.stdout.write(f"{format_outcome(result)}\n")
    if not outcomes:
        sys.stdout.write("evaluate.gates is null: nothing is asked of the files\n")
    return bool(recorded["passed"])


def write_report(out: Path | None) -> None:
    """Write the page about what the last run left."""
    from lathe.reports import experiment_table, facts, page

    params = load().params
    run = facts.gather_facts(paths.ROOT, seed=params.seed, primary_metric=params.evaluate.primary_metric)
    target = out or paths.METRICS / "report/index.html"
    page.write_page(target, run, experiment_table.read_experiments(paths.ROOT, run.columns))
    sys.stdout.write(f"{target}\n")


def list_results(sort: str | None, *, as_json: bool) -> None:
    """Print the runs as a table, or as JSON."""
    from lathe.experiments import results_table
    from lathe.experiments.interrupted import describe_detached_head

    if line := describe_detached_head():
        logger.warning("%s", line)
    results_table.run(sort=sort, as_json=as_json)


def show_metrics(args: argparse.Namespace) -> None:
    """Print what one run measured."""
    from lathe.provenance.revisions import find_revision
    from lathe.reports import run_summary

    revision = find_revision(args.rev)
    if args.json:
        sys.stdout.write(json.dumps(run_summary.read_metrics(revision), indent=2, ensure_ascii=False) + "\n")
        return
    lines = run_summary.summarize_run(revision) if args.summary else run_summary.describe_metrics(revision, args.split)
    sys.stdout.writelines(f"{line}\n" for line in lines)


def trace_file(gguf: Path, *, as_json: bool) -> None:
    """Print what a GGUF was made from."""
    from lathe.provenance import trace

    trace.run(gguf, as_json=as_json)


def check_remote(remote: str | None) -> None:
    """Try a DVC remote and print what was done."""
    from lathe.provenance import remotes

    sys.stdout.write(f"{remotes.check_remote(paths.ROOT, remote)}\n")


def push_runs(remote: str | None) -> None:
    """Push the run cache and print what was sent."""
    from lathe.provenance import run_cache

    sys.stdout.write(f"{run_cache.push_runs(paths.ROOT, remote)}\n")


def mirror_runs(revs: list[str], followed: Path | None, *, mlflow: bool, wandb: bool) -> None:
    """Send runs to trackers: what was missed, those named, or the one that a stage has just begun."""
    from lathe.experiments.tracking import follow_run, send_runs

    if followed:
        follow_run.follow_run(followed)
    chosen = {"mlflow": mlflow, "wandb": wandb}
    sys.exit(send_runs.run(revs, [name for name, wanted in chosen.items() if wanted]))


def start_chat(gguf: Path | None, prompt: str | None, system: str | None, tools: Path | None) -> None:
    """Chat with `gguf`, by default the artifact that scored best on validation; `tools` is a file of definitions."""
    from lathe.inference.chat import chat, read_tools

    offered, sizes = read_tools(tools) if tools else None, choose_generation_sizes()
    chat(
        gguf or _find_best_gguf(),
        prompt=prompt,
        system=system,
        tools=offered,
        max_new_tokens=sizes.max_new_tokens,
        n_ctx=sizes.n_ctx,
        threads=os.cpu_count() or 1,
    )


def start_server(args: argparse.Namespace) -> None:
    """Serve a GGUF, by default the artifact that scored best on validation."""
    from lathe.inference.serve import serve

    serve(
        args.gguf or _find_best_gguf(),
        port=args.port,
        api_key=os.environ.get("LATHE_API_KEY") or None,
        n_ctx=choose_generation_sizes().n_ctx,
        threads=os.cpu_count() or 1,
        engine=args.engine,
        parallel="auto" if args.parallel is None else args.parallel,
    )


def answer_file(file: Path, gguf: Path | None, out: Path | None) -> None:
    """Answer the prompts in a JSON Lines file with `gguf`, by default the artifact that scored best on validation."""
    from lathe.inference.generate import Generator
    from lathe.inference.infer import STANDARD_INPUT, infer

    if file != STANDARD_INPUT and not file.is_file():
        raise InputError(
            f"--file {file}: no such file; give JSON Lines, each with a prompt or messages", code="missing-file"
        )
    settings, sizes = load().params.generate, choose_generation_sizes()
    with ExitStack() as stack:
        generator = stack.enter_context(
            Generator(
                gguf or _find_best_gguf(),
                n_parallel=settings.n_parallel,
                n_ctx=sizes.n_ctx,
                threads=os.cpu_count() or 1,
                n_gpu_layers=settings.n_gpu_layers,
            )
        )
        target = (
            stack.enter_context(stack.enter_context(paths.replace_file(out)).open("wb")) if out else sys.stdout.buffer
        )
        infer(generator, file, target, max_new_tokens=sizes.max_new_tokens)


def run_search(args: argparse.Namespace) -> None:
    """Run a search to its end and print the best trial, or put the best experiment into the workspace."""
    from lathe.experiments.search import command

    command.run(args)


def choose_generation_sizes() -> "GenerationSizes":
    """Return the sizes of params.yaml; those that are auto by the lengths that the stage preprocess has measured."""
    from lathe.inference.generation_sizes import choose_sizes

    settings, report = load().params.generate, paths.METRICS / "preprocess/report.json"
    if "auto" not in (settings.max_new_tokens, settings.n_ctx):
        return choose_sizes(settings, {"splits": []})
    shown, remedy = str(report.relative_to(paths.ROOT)), "run `make repro` first, or give generate.n_ctx a number"
    return choose_sizes(settings, metric_files.unwrap_list(read_json(report, shown=shown, remedy=remedy)))


def _find_best_gguf() -> Path:
    from lathe.evaluation.best_artifact import choose_best_artifact

    params = load().params
    artifact = choose_best_artifact(
        _read_evaluation("validation"), params.quantize.types, params.evaluate.primary_metric
    )
    file = paths.GGUF / artifacts.get_file_name(artifact)
    if not file.exists():
        raise InputError(f"{file.relative_to(paths.ROOT)}: no such file; run `make repro` first", code="missing-file")
    return file


def _read_evaluation(name: str) -> Any:
    file = paths.METRICS / f"evaluate/{name}.json"
    content = read_json(file, shown=str(file.relative_to(paths.ROOT)), remedy="run `make repro` first")
    return metric_files.unwrap_list(content)


def _resolve(config: Config) -> dict[str, Any]:
    tree = config.params.model_dump()
    presets = {
        "models": {config.params.model: config.model.model_dump(exclude_none=True)},
        "datasets": {config.params.dataset: config.dataset.model_dump(exclude_none=True)},
    }
    return {**tree, **presets}


def _select_stage(tree: dict[str, Any], name: str) -> dict[str, Any]:
    stages = read_yaml(paths.ROOT / "dvc.yaml")["stages"]
    if name not in stages:
        raise InputError(
            f"--stage {name}: no such stage in dvc.yaml; {did_you_mean(name, list(stages))}", code="unknown-stage"
        )
    definition = stages[name].get("do", stages[name])
    keys: list[str] = []
    for entry in definition.get("params", []):
        if isinstance(entry, str):
            keys.append(entry.replace("${training.method}", tree["training"]["method"]))
        else:
            presets = " ".join(entry[paths.PRESETS.name])  # `${item.preset}` is one of models, then one of datasets
            keys += [table for table in ("models", "datasets") if table in presets or "item." in presets]
    selected: dict[str, Any] = {}
    for key in keys:
        source, target = tree, selected
        *parents, last = key.split(".")
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return selected
