"""Command line of `lathe`: the parser, with a line of help per command; `commands/` has what each does."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lathe import __version__, completion
from lathe.commands import classifier, data, general, publish, remote
from lathe.common import entry_point, paths
from lathe.config.base import SPLITS

EXAMPLES = {
    "init": "lathe init support --model Qwen/Qwen3-0.6B --dataset answers.jsonl",
    "doctor": "lathe doctor --recipe qwen3-600m -S training.max_length=1024",
    "completion": 'eval "$(lathe completion bash)"',
    "config": "lathe config training.learning_rate",
    "check": "lathe check",
    "schema": "lathe schema --json recipe",
    "data": "lathe data answers.csv --prompt question --completion answer",
    "inspect": "lathe inspect --split test --row 7 --ids",
    "experiments": "lathe experiments",
    "run": "lathe run tiny -S lora.r=8",
    "smoke": "lathe smoke qwen3-600m",
    "recipe": "lathe recipe new support --model qwen3-600m --dataset support --gpu 24GB",
    "repro": "lathe repro",
    "reset": "lathe reset",
    "preflight": "lathe preflight",
    "compare": "lathe compare baseline dropout --split test",
    "search": "lathe search experiments/search/default.yaml --n-trials 20",
    "results": "lathe results --sort score",
    "metrics": "lathe metrics dropout --split validation",
    "gate": "lathe gate",
    "report": "lathe report --out report.html",
    "trace": "lathe trace models/gguf/Q4_K_M.gguf",
    "verify": "lathe verify",
    "publish": "lathe publish me/support-GGUF --files Q4_K_M adapter --sign ~/lathe.key",
    "sign-key": "lathe sign-key ~/lathe.key",
    "judge-agreement": "lathe judge-agreement marks.csv",
    "chat": 'lathe chat --prompt "Turn on the attic lamp."',
    "serve": "lathe serve --port 8001",
    "studio": "lathe studio --port 8080",
    "infer": "lathe infer --file prompts.jsonl --out answers.jsonl",
    "classify": 'lathe classify "open the kitchen blinds"',
    "remote-check": "lathe remote-check --remote ycloud",
    "push-runs": "lathe push-runs --remote ycloud",
    "remote": "lathe remote run qwen3-600m --host me@box",
    "mirror": "lathe mirror my-experiment --mlflow",
}


class _CommandTable:
    """The subparsers of argparse, each with its line of help as a sentence and an example."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser:  # noqa: A002 - argparse's name
        sentence = f"{help[0].upper()}{help[1:]}."
        return self._table.add_parser(name, help=help, description=sentence, epilog=f"Example: {EXAMPLES[name]}")


def main() -> None:
    """Parse the command line and run one command."""
    args = build_parser().parse_args()
    try:
        try:
            entry_point.guard(lambda: args.run(args))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="lathe", description="Tools around the Lathe pipeline, for the checkout that they are called in."
    )
    parser.add_argument("--version", action="version", version=f"lathe {__version__} ({paths.ROOT})")
    table = _CommandTable(parser.add_subparsers(required=True, metavar="COMMAND"))
    _add_setup_commands(table)
    _add_configuration_commands(table)
    _add_experiment_commands(table)
    _add_result_commands(table)
    _add_model_commands(table)
    _add_remote_commands(table)
    return parser


def _add_setup_commands(table: Any) -> None:
    command = table.add_parser("init", help="make a repository of your own, with your model and dataset")
    command.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder").complete = completion.FOLDER
    command.add_argument("--name", metavar="NAME", help="of preset and recipe (default: the folder's)")
    command.add_argument("--model", metavar="PATH_OR_ID", help="a model folder, or OWNER/NAME on the Hugging Face Hub")
    command.add_argument("--dataset", metavar="PATH_OR_ID", help="a file or folder, or OWNER/NAME on the Hub")
    command.add_argument("--prompt", metavar="COLUMN", help="column with the prompt (default: by its name)")
    command.add_argument("--completion", metavar="COLUMN", help="column with the answer (default: by its name)")
    command.add_argument("--update", action="store_true", help="bring DIR, made by `lathe init`, to this Lathe's state")
    command.set_defaults(run=general.init_repository)

    command = table.add_parser("doctor", help="check machine, packages, memory, disk and remotes before a run")
    _add_overrides(command)
    command.add_argument(
        "--recipe", metavar="NAME", help="with the overrides of experiments/NAME.yaml"
    ).complete = completion.RECIPES
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    on_paper = "on paper, what the training of MODEL takes: a shape such as llama-70b, a preset, a folder"
    command.add_argument("--for", metavar="MODEL", dest="shape", help=on_paper)
    command.add_argument("--gpus", metavar="NxNAME", help="with --for: on these GPUs, such as 8xH100 (default: H100)")
    command.add_argument("--rows", type=int, metavar="N", help="with --for: time for so many rows (default: 10,000)")
    command.set_defaults(run=general.run_doctor)

    command = table.add_parser("completion", help="print a script that completes commands and options in a shell")
    command.add_argument("shell", choices=completion.SHELLS, help="for which shell")
    command.set_defaults(run=lambda args: sys.stdout.write(completion.write_script(build_parser(), args.shell)))


def _add_configuration_commands(table: Any) -> None:
    command = table.add_parser("config", help="print the resolved configuration, or a part of it")
    command.add_argument(
        "section", nargs="?", metavar="SECTION", help="a key such as training or training.learning_rate"
    )
    command.add_argument("--stage", metavar="NAME", help="only what this stage of dvc.yaml depends on")
    _add_overrides(command)
    command.set_defaults(run=lambda args: general.print_config(args.section, args.stage, args.overrides))

    command = table.add_parser("check", help="check params.yaml and presets.yaml, and repair a truncated dvc.lock")
    command.set_defaults(run=lambda args: general.check_configuration())

    command = table.add_parser("schema", help="document every key of params.yaml: type, unit, range, meaning")
    command.add_argument(
        "--json", choices=general.SCHEMAS, metavar="FILE", help="a JSON Schema instead: params, presets or recipe"
    )
    command.set_defaults(run=lambda args: general.print_schema(args.json))

    command = table.add_parser(
        "data", help="say what a dataset's file holds and which rows would be dropped; exit 1 if any"
    )
    command.add_argument(
        "source",
        type=Path,
        metavar="FILE",
        help="a file, a folder with train.*, validation.* and test.*, or a name under datasets in presets.yaml",
    ).complete = completion.FILE
    command.add_argument("--prompt", metavar="COLUMN", help="column with the prompt (default: by its name)")
    command.add_argument("--completion", metavar="COLUMN", help="column with the answer (default: by its name)")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_check_data)

    command = table.add_parser("inspect", help="print examples as the model sees them, supervised tokens marked")
    command.add_argument("--split", choices=SPLITS, default="train", help="of which split (default: train)")
    command.add_argument("--rows", type=int, default=3, metavar="N", help="how many, from the first (default: 3)")
    command.add_argument("--row", type=int, metavar="N", help="this one alone, by its line")
    command.add_argument("--ids", action="store_true", help="one token per line, after its id")
    command.set_defaults(run=lambda args: general.inspect_rows(args.split, args.rows, args.row, ids=args.ids))


def _check_data(args: argparse.Namespace) -> None:
    usable = data.check_data(args.source, prompt=args.prompt, completion=args.completion, as_json=args.json)
    sys.exit(0 if usable else 1)


def _add_experiment_commands(table: Any) -> None:
    command = table.add_parser("experiments", help="list the recipes, with the scores of those that have been run")
    command.set_defaults(run=lambda args: general.list_experiments())

    command = table.add_parser("recipe", help="write a recipe whose values fit a model, a dataset and memory")
    inner = command.add_subparsers(required=True, metavar="COMMAND")
    command = inner.add_parser("new", help="write experiments/NAME.yaml, with the reason beside each value")
    command.add_argument("name", nargs="?", metavar="NAME", help="of the recipe (default: MODEL-DATASET)")
    command.add_argument("--model", required=True, metavar="PRESET", help="a name under models in presets.yaml")
    command.add_argument("--dataset", required=True, metavar="PRESET", help="a name under datasets in presets.yaml")
    command.add_argument("--gpu", metavar="SIZE", help="memory to fit into, such as 24GB (default: what is here)")
    command.add_argument("--method", choices=("sft", "dpo", "grpo"), default="sft", help="default: sft")
    command.add_argument("--force", action="store_true", help="write over a recipe of that name")
    command.set_defaults(run=general.create_recipe)

    command = table.add_parser("run", help="run a recipe: `dvc exp run` with the overrides of experiments/NAME.yaml")
    command.add_argument("name", metavar="RECIPE", help="its name").complete = completion.RECIPES
    command.add_argument(
        "-n", "--name", dest="experiment", metavar="NAME", help="of the experiment (default: the recipe's)"
    )
    _add_overrides(command)
    command.add_argument("--queue", action="store_true", help="only queue it, or a sweep; then: dvc queue start")
    command.add_argument("--temp", action="store_true", help="run it in a checkout of its own, with its own code")
    command.add_argument("--force", action="store_true", help="in place of an experiment of that name")
    command.add_argument("--keep", action="store_true", help="with uncommitted values of params.yaml that it leaves")
    command.add_argument("--print-command", action="store_true", help="print the command of DVC, and run nothing")
    command.set_defaults(run=general.run_experiment)

    command = table.add_parser("smoke", help="run every stage on a few rows, in a copy: does this configuration work?")
    command.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="its name (default: params.yaml as it is)"
    ).complete = completion.RECIPES
    _add_overrides(command)
    command.set_defaults(run=general.run_smoke)

    command = table.add_parser("repro", help="run the pipeline: `dvc repro`, and no other command beside it")
    command.add_argument("targets", nargs="*", metavar="STAGE", help="up to this stage (default: all)")
    command.set_defaults(run=lambda args: general.run_pipeline(args.targets))

    command = table.add_parser("reset", help="bring params.yaml, metrics, dvc.lock and outputs back to the last commit")
    command.add_argument("--yes", action="store_true", help="without a question")
    command.set_defaults(run=lambda args: general.reset_workspace(yes=args.yes))

    command = table.add_parser(
        "preflight", help="say what queued and temporary experiments would include, and what they would miss"
    )
    command.set_defaults(run=lambda args: general.run_preflight())

    command = table.add_parser("compare", help="compare experiments: changes, scores, cost, a conclusion")
    command.add_argument(
        "names", nargs="+", metavar="EXP", help="experiment, commit, branch or `workspace`"
    ).complete = completion.EXPERIMENTS
    command.add_argument("--artifact", metavar="NAME", help="such as merged or Q4_K_M (default: the best file of each)")
    command.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="of which split (default: validation)"
    )
    command.add_argument(
        "--mixed-engines", action="store_true", help="compare answers of different engines (generate.engine) too"
    )
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=general.compare_experiments)

    command = table.add_parser("search", help="search for parameters: Optuna drives experiments of DVC")
    completion.add_search_file(command)
    command.add_argument("--n-trials", type=int, metavar="N", help="trials of the whole study (default: the file's)")
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="start no trial after so long")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at once, one GPU each (default: 1)")
    command.add_argument(
        "--storage", metavar="URL", help="database that several machines share; or set LATHE_SEARCH_STORAGE"
    )
    command.add_argument(
        "--apply", nargs="?", const="", metavar="EXPERIMENT", help="put the best experiment into the workspace"
    )
    _add_overrides(command)
    command.set_defaults(run=general.run_search)


def _add_result_commands(table: Any) -> None:
    command = table.add_parser("results", help="list the runs: scores, gates, sizes, seconds, what was changed")
    command.add_argument("--sort", choices=general.RESULT_ORDERS, help="by this column (default: the newest first)")
    command.add_argument("--json", action="store_true", help="print them as JSON")
    command.set_defaults(run=lambda args: general.list_results(args.sort, as_json=args.json))

    command = table.add_parser("metrics", help="print every score and measurement of one run")
    command.add_argument(
        "rev", nargs="?", default="workspace", metavar="EXP", help="experiment, commit or branch (default: workspace)"
    ).complete = completion.EXPERIMENTS
    command.add_argument(
        "--split", choices=("validation", "test"), default="test", help="the scores of which split (default: test)"
    )
    command.add_argument("--summary", action="store_true", help="only the lines that a pipeline ends with")
    command.add_argument("--json", action="store_true", help="print the files of its metrics as JSON")
    command.set_defaults(run=general.show_metrics)

    command = table.add_parser("gate", help="say which gates the validation scores pass; exit 1 if one fails")
    command.set_defaults(run=lambda args: sys.exit(0 if general.check_gates() else 1))

    command = table.add_parser("report", help="write one page with everything that the pipeline measured")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="where to (default: metrics/report/index.html)"
    ).complete = completion.FILE
    command.set_defaults(run=lambda args: general.write_report(args.out))

    command = table.add_parser("trace", help="say what a GGUF was made from, by which commit, and what has changed")
    command.add_argument(
        "gguf", type=Path, metavar="FILE", help="the file, whatever its name and folder"
    ).complete = completion.FILE
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=lambda args: general.trace_file(args.gguf, as_json=args.json))

    command = table.add_parser("verify", help="compare every output with dvc.lock, or a release with its signature")
    command.add_argument(
        "path",
        nargs="?",
        type=Path,
        metavar="PATH",
        help="a downloaded release, or a file of it",
    ).complete = completion.FILE
    command.add_argument(
        "--key", type=Path, metavar="FILE", help="public key of its publisher"
    ).complete = completion.FILE
    command.set_defaults(run=publish.verify_outputs)

    command = table.add_parser("judge-agreement", help="say how far the judge agrees with marks that people gave")
    command.add_argument(
        "file", type=Path, metavar="FILE", help="CSV or JSONL with artifact, split, row and mark"
    ).complete = completion.FILE
    command.set_defaults(run=publish.compare_judge_with_people)


def _add_model_commands(table: Any) -> None:
    command = table.add_parser("chat", help="talk to the GGUF with the best validation score")
    _add_gguf(command, "another file to talk to")
    command.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    command.add_argument("--system", metavar="TEXT", help="message of the system before the conversation")
    command.add_argument("--tools", type=Path, metavar="FILE", help="JSON file with definitions of functions to offer")
    command.set_defaults(run=lambda args: general.start_chat(args.gguf, args.prompt, args.system, args.tools))

    command = table.add_parser("serve", help="serve the GGUF with the best validation score, as OpenAI's API does")
    _add_gguf(command, "another file to serve")
    command.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port on 127.0.0.1 (default: 8000; 0: any)"
    )
    command.add_argument(
        "--engine",
        choices=("auto", "llama-server", "llama-cpp-python"),
        default="auto",
        help="what answers (default: auto: llama-server where `make llama-server` has built it)",
    )
    command.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="requests that llama-server answers at once (default: 32, or as many as fit into a quarter of the memory)",
    )
    command.set_defaults(run=general.start_server)

    command = table.add_parser("studio", help="start, watch and compare experiments in a browser, or over HTTP")
    command.add_argument(
        "--port", type=int, default=8080, metavar="N", help="port on 127.0.0.1 (default: 8080; 0: any)"
    )
    command.add_argument("--no-browser", action="store_true", help="print the link, and open no browser")
    command.add_argument(
        "--largest-upload", type=int, default=2000, metavar="MB", help="of a file that is sent (default: 2000)"
    )
    command.set_defaults(run=_start_studio)

    command = table.add_parser("infer", help="answer a file of prompts, many at a time, with the best GGUF")
    command.add_argument(
        "--file",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON Lines, each with a prompt or messages; - for standard input",
    ).complete = completion.FILE
    _add_gguf(command, "another file to answer with")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="where the answers go (default: standard output)"
    ).complete = completion.FILE
    command.set_defaults(run=lambda args: general.answer_file(args.file, args.gguf, args.out))

    command = table.add_parser("classify", help="name the labels of texts with the classifier of `make classify`")
    command.add_argument("texts", nargs="*", metavar="TEXT", help="a text")
    command.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="a text a line, or JSONL, CSV or Parquet with a column text; - is standard input",
    ).complete = completion.FILE
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="where the labels go (default: standard output)"
    ).complete = completion.FILE
    command.set_defaults(run=classifier.classify)


def _start_studio(args: argparse.Namespace) -> None:
    from lathe.studio import server

    opens = not args.no_browser and sys.stdout.isatty()
    server.run(port=args.port, opens_browser=opens, largest_upload_bytes=args.largest_upload * 1_000_000)


def _add_remote_commands(table: Any) -> None:
    command = table.add_parser(
        "publish", help="lay out a repository for the Hugging Face Hub, and upload it with --yes"
    )
    command.add_argument("repository", metavar="OWNER/NAME", help="where to")
    command.add_argument(
        "--files",
        nargs="+",
        metavar="NAME",
        help="types, merged, adapter, adapter-gguf, formats of export.formats (default: all types, and the adapter)",
    )
    command.add_argument("--sign", type=Path, metavar="KEY", help="private key to sign with").complete = completion.FILE
    command.add_argument("--yes", action="store_true", help="upload; without it nothing is sent")
    command.add_argument("--public", action="store_true", help="for everyone to see (default: private)")
    command.add_argument("--despite-gates", action="store_true", help="even if a gate fails")
    command.set_defaults(run=publish.publish)

    command = table.add_parser("sign-key", help="make a key to sign releases with, and its public half")
    command.add_argument("file", type=Path, metavar="FILE", help="outside of the repository")
    command.set_defaults(run=publish.make_signing_key)

    command = table.add_parser("remote-check", help="write to a DVC remote, read it back and delete it")
    command.add_argument("--remote", metavar="NAME", help="which (default: the one that `dvc push` takes)")
    command.set_defaults(run=lambda args: general.check_remote(args.remote))

    command = table.add_parser("remote", help="run recipes and searches on other machines: ssh, Slurm, SkyPilot")
    remote.add_commands(command.add_subparsers(required=True, metavar="COMMAND"))

    command = table.add_parser("push-runs", help="share the runs that DVC remembers, with all their files")
    command.add_argument("--remote", metavar="NAME", help="which (default: the one that `dvc push` takes)")
    command.set_defaults(run=lambda args: general.push_runs(args.remote))

    command = table.add_parser("mirror", help="send runs to MLflow and W&B: those that were missed, or those named")
    command.add_argument("revs", nargs="*", metavar="REV", help="a commit, an experiment, or `workspace`")
    command.add_argument("--mlflow", action="store_true", help="to MLflow alone, enabled or not")
    command.add_argument("--wandb", action="store_true", help="to Weights & Biases alone, enabled or not")
    command.add_argument("--follow", type=Path, help=argparse.SUPPRESS)  # the process beside a pipeline
    command.set_defaults(
        run=lambda args: general.mirror_runs(args.revs, args.follow, mlflow=args.mlflow, wandb=args.wandb)
    )


def _add_overrides(command: Any) -> None:
    command.add_argument("-S", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="as in dvc")


def _add_gguf(command: Any, meaning: str) -> None:
    command.add_argument("--gguf", type=Path, metavar="FILE", help=meaning).complete = completion.FILE
