"""`python -m lathe …`: what is not a stage of the pipeline."""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lathe import doctor
from lathe.common import entry_point, paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import artifacts
from lathe.config.base import SPLITS
from lathe.config.load import Config, load
from lathe.config.overrides import applied
from lathe.config.yaml_files import read_yaml
from lathe.experiments import preflight, recipes, run_recipe
from lathe.inference import general_text
from lathe.provenance import remotes, run_cache, trace, verify

logger = logging.getLogger(__name__)


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m lathe", description="Tools around the Lathe pipeline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("config", help="print the resolved configuration, or a part of it")
    command.add_argument(
        "section", nargs="?", metavar="SECTION", help="a key such as training or training.learning_rate"
    )
    command.add_argument("--stage", metavar="NAME", help="only what this stage of dvc.yaml depends on")
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.set_defaults(run=lambda args: print_config(args.section, args.stage, args.overrides))

    command = commands.add_parser(
        "check", help="check params.yaml and presets.yaml, and put right a dvc.lock cut short"
    )
    command.set_defaults(run=lambda args: check())

    command = commands.add_parser("doctor", help="check machine, packages, memory, disk and remotes before a run")
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.add_argument("--recipe", metavar="NAME", help="with the overrides of experiments/NAME.yaml")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.set_defaults(run=examine)

    command = commands.add_parser("experiments", help="list the recipes, with the scores of those that have been run")
    command.set_defaults(run=lambda args: list_experiments())

    command = commands.add_parser("run", help="run a recipe: `dvc exp run` with the overrides of experiments/NAME.yaml")
    command.add_argument("name", metavar="RECIPE", help="its name")
    command.add_argument(
        "-n", "--name", dest="experiment", metavar="NAME", help="of the experiment (default: the recipe's)"
    )
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.add_argument("--queue", action="store_true", help="only queue it, or a sweep; then: dvc queue start")
    command.add_argument("--temp", action="store_true", help="run it in a checkout of its own, with its own code")
    command.add_argument("--force", action="store_true", help="in place of an experiment of that name")
    command.set_defaults(run=run_recipe)

    command = commands.add_parser(
        "preflight", help="say what queued and temporary experiments would take along, and what they would miss"
    )
    command.set_defaults(run=lambda args: sys.exit(preflight.run()))

    command = commands.add_parser(
        "compare", help="put experiments beside one another: changes, scores, cost, a verdict"
    )
    command.add_argument("names", nargs="+", metavar="EXP", help="experiment, commit, branch or `workspace`")
    command.add_argument("--artifact", metavar="NAME", help="such as merged or Q4_K_M (default: the best file of each)")
    command.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="which rows (default: validation)"
    )
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=compare_experiments)

    command = commands.add_parser("remote-check", help="write to a DVC remote, read it back and delete it")
    command.add_argument("--remote", metavar="NAME", help="which (default: the one that `dvc push` takes)")
    command.set_defaults(run=lambda args: sys.stdout.write(f"{remotes.check(paths.ROOT, args.remote)}\n"))

    command = commands.add_parser("push-runs", help="share what DVC remembers of runs, with all their files")
    command.add_argument("--remote", metavar="NAME", help="which (default: the one that `dvc push` takes)")
    command.set_defaults(run=lambda args: sys.stdout.write(f"{run_cache.push(paths.ROOT, args.remote)}\n"))

    command = commands.add_parser("schema", help="document every key of params.yaml: type, unit, range, meaning")
    command.set_defaults(run=lambda args: print_schema())

    command = commands.add_parser("inspect", help="print processed rows as the model sees them, learnt tokens marked")
    command.add_argument("--split", choices=SPLITS, default="train", help="which rows (default: train)")
    command.add_argument("--rows", type=int, default=3, metavar="N", help="how many, from the first (default: 3)")
    command.add_argument("--row", type=int, metavar="N", help="this one alone, by its line")
    command.add_argument("--ids", action="store_true", help="one token a line, behind its id")
    command.set_defaults(run=lambda args: inspect(args.split, args.rows, args.row, ids=args.ids))

    command = commands.add_parser("gate", help="say which gates the validation scores pass; exit 1 where one fails")
    command.set_defaults(run=lambda args: sys.exit(0 if gate() else 1))

    command = commands.add_parser("report", help="write one page with all that the pipeline measured")
    command.add_argument("--out", type=Path, metavar="FILE", help="where to (default: metrics/report/index.html)")
    command.set_defaults(run=lambda args: report(args.out))

    command = commands.add_parser("chat", help="talk to the GGUF with the best validation score")
    command.add_argument("--gguf", type=Path, metavar="FILE", help="another file to talk to")
    command.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    command.set_defaults(run=lambda args: talk(args.gguf, args.prompt))

    command = commands.add_parser("serve", help="serve the GGUF with the best validation score, as OpenAI's API does")
    command.add_argument("--gguf", type=Path, metavar="FILE", help="another file to serve")
    command.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port on 127.0.0.1 (default: 8000; 0: any)"
    )
    command.set_defaults(run=lambda args: offer(args.gguf, args.port))

    command = commands.add_parser("trace", help="say what a GGUF was made from, by which commit, and what has changed")
    command.add_argument("gguf", type=Path, metavar="FILE", help="the file, whatever its name and folder")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=lambda args: trace.run(args.gguf, as_json=args.json))

    command = commands.add_parser("verify", help="read every output again and hold it against dvc.lock")
    command.set_defaults(run=lambda args: sys.exit(verify.run()))

    command = commands.add_parser("infer", help="answer a file of requests, many at a time, with the best GGUF")
    command.add_argument(
        "--file", type=Path, required=True, metavar="FILE", help="JSON Lines, each with a prompt or messages"
    )
    command.add_argument("--gguf", type=Path, metavar="FILE", help="another file to answer with")
    command.add_argument("--out", type=Path, metavar="FILE", help="where the answers go (default: standard output)")
    command.set_defaults(run=lambda args: answer_file(args.file, args.gguf, args.out))

    command = commands.add_parser("mirror", help="send runs to MLflow and W&B: those that were missed, or those named")
    command.add_argument("revs", nargs="*", metavar="REV", help="a commit, an experiment, or `workspace`")
    command.add_argument("--mlflow", action="store_true", help="to MLflow alone, enabled or not")
    command.add_argument("--wandb", action="store_true", help="to Weights & Biases alone, enabled or not")
    command.add_argument("--follow", type=Path, help=argparse.SUPPRESS)  # the process beside a pipeline
    command.set_defaults(run=lambda args: mirror(args.revs, args.follow, mlflow=args.mlflow, wandb=args.wandb))

    command = commands.add_parser("search", help="search for parameters: Optuna drives experiments of DVC")
    command.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=paths.ROOT / "experiments/search/default.yaml",
        metavar="FILE",
        help="what to search (default: experiments/search/default.yaml)",
    )
    command.add_argument("--n-trials", type=int, metavar="N", help="trials of the whole study (default: the file's)")
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="begin no trial after so long")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once, one GPU each (default: 1)")
    command.add_argument(
        "--storage",
        metavar="URL",
        help="database that several machines share; or set LATHE_SEARCH_STORAGE",
    )
    command.add_argument(
        "--apply",
        nargs="?",
        const="",
        metavar="EXPERIMENT",
        help="put the best experiment into the workspace",
    )
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")
    command.set_defaults(run=search)

    args = parser.parse_args()
    try:
        try:
            entry_point.guard(lambda: args.run(args))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def examine(args: argparse.Namespace) -> None:
    """Check what a run with these overrides, and those of a recipe, needs; exit 1 where something fails."""

    def configured() -> Config:
        return applied(recipes.find(args.recipe).arguments(args.overrides) if args.recipe else args.overrides)

    sys.exit(doctor.run(configured, as_json=args.json))


def list_experiments() -> None:
    """Print every recipe, and below it what came of it."""
    for line in run_recipe.listing():
        sys.stdout.write(f"{line}\n")


def run_experiment(args: argparse.Namespace) -> None:
    """Become the `dvc exp run` of a recipe."""
    run_recipe.run(args.name, args.overrides, name=args.experiment, queue=args.queue, temp=args.temp, force=args.force)


def compare_experiments(args: argparse.Namespace) -> None:
    """Print experiments beside one another."""
    from lathe.experiments import compare

    compare.run(args.names, split=args.split, artifact=args.artifact, as_json=args.json)


def print_config(section: str | None, stage_name: str | None, overrides: list[str]) -> None:
    """Print as YAML the parameters and selected presets, after `overrides`, or the named part of them."""
    tree = _resolved(applied(overrides))
    if stage_name:
        tree = _of_stage(tree, stage_name)
    for key in section.split(".") if section else []:
        if not isinstance(tree, dict) or key not in tree:
            known = list(tree) if isinstance(tree, dict) else []
            raise InputError(f"{section}: no such key; {did_you_mean(key, known)}")
        tree = tree[key]
    sys.stdout.write(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).removesuffix("...\n"))


def check() -> None:
    """Refuse wrong parameters, presets and general text; put back a dvc.lock that a kill cut short."""
    general_text.paragraphs(paths.ROOT / load().params.evaluate.general_text)
    lock = paths.ROOT / "dvc.lock"
    # DVC does not write it whole or not at all, and takes nothing but a whole one.
    if not lock.exists() or _is_whole(lock.read_text(encoding="utf-8", errors="replace")):
        return
    committed = subprocess.run(
        ["git", "show", "HEAD:./dvc.lock"], cwd=paths.ROOT, capture_output=True, text=True, check=False
    )
    if committed.returncode != 0:
        raise InputError("dvc.lock: cut short while DVC wrote it, and Git has none; remove it and run again")
    with paths.whole_file(lock) as partial:
        partial.write_text(committed.stdout, encoding="utf-8")
    logger.warning(
        "dvc.lock was cut short while DVC wrote it: the committed one is back; what ran since comes from cache"
    )


def _is_whole(lock: str) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    if "<<<<<<<" in lock:
        return True  # a conflict of Git is the user's to resolve
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(lock))
    except (YAMLError, Invalid):
        return False
    return True


def print_schema() -> None:
    """Print a Markdown page that documents every key."""
    from lathe.config.reference import markdown

    sys.stdout.write(markdown())


def inspect(split: str, rows: int, row: int | None, *, ids: bool) -> None:
    """Print rows of data/processed as training reads them."""
    from lathe.data.inspect import show_examples

    for option, number in (("--rows", rows), ("--row", row)):
        if number is not None and number < 1:
            raise InputError(f"{option} {number}: must be at least 1; rows are counted from 1")
    show_examples(split, rows=rows, row=row, ids=ids, supervise=load().params.preprocess.supervise, out=sys.stdout)


def gate() -> bool:
    """Print how each of evaluate.gates goes by the metrics as they are, and return whether all pass."""
    from lathe.config.gates import parse_gate
    from lathe.evaluation.gate_results import evaluate_gate, format_outcome, make_metrics

    params = load().params
    report, recorded = (_evaluated(name) for name in ("validation", "gates"))
    expressions = params.evaluate.gates or []
    if set(report) != set(artifacts.list_artifacts(params.quantize.types)) or list(recorded["gates"]) != expressions:
        raise InputError(
            "metrics/evaluate is not of the evaluate.gates and quantize.types in params.yaml; run `dvc repro`"
        )
    outcomes = [evaluate_gate(parse_gate(expression), report, params.quantize.types) for expression in expressions]
    if make_metrics(outcomes) != recorded:
        raise InputError("metrics/evaluate/gates.json is not of the validation.json beside it; run `dvc repro`")
    for outcome in outcomes:
        print(format_outcome(outcome))  # noqa: T201
    if not outcomes:
        print("evaluate.gates is null: nothing is asked of the files")  # noqa: T201
    return bool(recorded["passed"])


def report(out: Path | None) -> None:
    """Write the page about what the last run left."""
    from lathe.reports import experiment_table, facts, page

    params = load().params
    found = facts.gather(paths.ROOT, seed=params.seed, primary_metric=params.evaluate.primary_metric)
    target = out or paths.METRICS / "report/index.html"
    page.write(target, found, experiment_table.read(paths.ROOT, found.columns))
    sys.stdout.write(f"{target}\n")


def mirror(revs: list[str], followed: Path | None, *, mlflow: bool, wandb: bool) -> None:
    """Send runs to trackers: what was missed, those named, or the one that a stage has just begun."""
    from lathe.experiments.tracking import follow_run, send_runs

    if followed:
        follow_run.follow(followed)
    asked = {"mlflow": mlflow, "wandb": wandb}
    sys.exit(send_runs.run(revs, [name for name, wanted in asked.items() if wanted]))


def talk(gguf: Path | None, prompt: str | None) -> None:
    """Chat with `gguf`, by default the artifact that scored best on validation."""
    from lathe.inference.chat import chat

    settings = load().params.generate
    chat(
        gguf or _best_gguf(),
        prompt=prompt,
        max_new_tokens=settings.max_new_tokens,
        n_ctx=settings.n_ctx,
        threads=os.cpu_count() or 1,
    )


def offer(gguf: Path | None, port: int) -> None:
    """Serve `gguf`, by default the artifact that scored best on validation."""
    from lathe.inference.serve import serve

    settings = load().params.generate
    api_key = os.environ.get("LATHE_API_KEY") or None
    serve(gguf or _best_gguf(), port=port, api_key=api_key, n_ctx=settings.n_ctx, threads=os.cpu_count() or 1)


def answer_file(file: Path, gguf: Path | None, out: Path | None) -> None:
    """Answer the requests in a JSON Lines file with `gguf`, by default the artifact that scored best on validation."""
    from lathe.inference.generate import Generator
    from lathe.inference.infer import infer

    if not file.is_file():
        raise InputError(f"--file {file}: no such file; give JSON Lines, each with a prompt or messages")
    settings = load().params.generate
    with ExitStack() as stack:
        generator = stack.enter_context(
            Generator(
                gguf or _best_gguf(),
                n_parallel=settings.n_parallel,
                n_ctx=settings.n_ctx,
                threads=os.cpu_count() or 1,
            )
        )
        target = (
            stack.enter_context(stack.enter_context(paths.whole_file(out)).open("wb")) if out else sys.stdout.buffer
        )
        infer(generator, file, target, max_new_tokens=settings.max_new_tokens)


def search(args: argparse.Namespace) -> None:
    """Run a search to its end and say what is best, or put the best experiment into the workspace."""
    from lathe.experiments.search import command

    command.run(args)


def _best_gguf() -> Path:
    from lathe.evaluation.best_artifact import choose_best_artifact

    params = load().params
    artifact = choose_best_artifact(_evaluated("validation"), params.quantize.types, params.evaluate.primary_metric)
    file = paths.GGUF / artifacts.get_file_name(artifact)
    if not file.exists():
        raise InputError(f"{file.relative_to(paths.ROOT)}: no such file; run `make repro` first")
    return file


def _evaluated(name: str) -> Any:
    file = paths.METRICS / f"evaluate/{name}.json"
    if not file.exists():
        raise InputError(f"{file.relative_to(paths.ROOT)}: no such file; run `make repro` first")
    return json.loads(file.read_text(encoding="utf-8"))


def _resolved(config: Config) -> dict[str, Any]:
    tree = config.params.model_dump()
    presets = {
        "models": {config.params.model: config.model.model_dump(exclude_none=True)},
        "datasets": {config.params.dataset: config.dataset.model_dump(exclude_none=True)},
    }
    return {**tree, **presets}


def _of_stage(tree: dict[str, Any], name: str) -> dict[str, Any]:
    stages = read_yaml(paths.ROOT / "dvc.yaml")["stages"]
    if name not in stages:
        raise InputError(f"--stage {name}: no such stage in dvc.yaml; {did_you_mean(name, list(stages))}")
    definition = stages[name].get("do", stages[name])
    keys: list[str] = []
    for entry in definition.get("params", []):
        if isinstance(entry, str):
            keys.append(entry.replace("${training.method}", tree["training"]["method"]))
        else:
            presets = " ".join(entry[paths.PRESETS.name])  # `${item.preset}` is one of models, then one of datasets
            keys += [table for table in ("models", "datasets") if table in presets or "item." in presets]
    chosen: dict[str, Any] = {}
    for key in keys:
        source, target = tree, chosen
        *parents, last = key.split(".")
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[last] = source[last]
    return chosen
