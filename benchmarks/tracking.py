"""Seconds of the training stage, run by DVC, while it is mirrored to MLflow against while it is not.

python benchmarks/tracking.py [--rounds 5] [--steps 100] [--mlflow .services/mlflow]

In a clone of this checkout, whose default pipeline has run: `dvc repro --single-item --force train` without a mirror,
with one to a server that accepts connections and never answers, and with one to a real server, in turns whose order
changes from round to round; the clone's mirrors have ended before a turn begins. The server is that of the environment
`--mlflow`, which the tests make; without it those turns are left out. Prints a Markdown table: wall seconds, and the
processor seconds of DVC and the stage; ratios are those within a round.
"""

import argparse
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import machine
import psutil
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
OFF = "not mirrored"

Seconds = tuple[float, float]  # wall, processor


def main() -> None:
    """Make the clone and the servers, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a training")
    parser.add_argument("--mlflow", type=Path, default=ROOT / ".services/mlflow", metavar="FOLDER")
    arguments = parser.parse_args()
    (ROOT / ".bench").mkdir(exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT / ".bench", prefix="tracking-")))
        clone = _clone(folder / "lathe", arguments.steps)
        servers = {"a server that hangs": stack.enter_context(_hanging())}
        if (arguments.mlflow / "bin/mlflow").exists():
            servers["a server"] = stack.enter_context(_answering(arguments.mlflow, folder))
        else:
            sys.stderr.write(f"{arguments.mlflow} holds no MLflow: the turns with a server are left out\n")
        _train(clone, None)  # once before it counts: files are read, code is compiled
        turns: dict[str, list[Seconds]] = {OFF: [], **{name: [] for name in servers}}
        for number in range(arguments.rounds):
            names = list(turns)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                turns[name].append(_train(clone, servers.get(name)))
                sys.stderr.write(f"round {number + 1}, {name}: {turns[name][-1][0]:.1f} s\n")
        _wait(clone)
    sys.stdout.write(_report(turns))


def _clone(target: Path, steps: int) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(target)], check=True)
    for command in (
        ["dvc", "cache", "dir", "--local", str(ROOT / ".dvc/cache")],
        ["dvc", "checkout", "--quiet", "fetch@model", "preprocess"],
    ):
        subprocess.run(command, cwd=target, check=True, stdout=subprocess.DEVNULL)
    editor, file = YAML(), target / "params.yaml"
    tree = editor.load(file)
    tree["training"]["max_steps"] = steps
    editor.dump(tree, file)
    return target


@contextmanager
def _hanging() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def _answering(environment: Path, folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [str(environment / "bin/mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "mlflow.log").open("wb") as log:
        process = psutil.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        while not _answers(uri):
            if process.poll() is not None:
                raise RuntimeError((folder / "mlflow.log").read_text())
            time.sleep(1)
        yield uri
    finally:
        for each in [*process.children(recursive=True), process]:
            each.kill()
        process.wait()


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _train(clone: Path, uri: str | None) -> Seconds:
    environment = {
        **os.environ,
        "MLFLOW_ENABLED": "1" if uri else "0",
        "MLFLOW_TRACKING_URI": uri or "http://127.0.0.1:9",
    }
    _wait(clone)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = ["dvc", "repro", "--single-item", "--force", "train"]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0 or ("mirrored to" in done.stderr + done.stdout) != bool(uri):
        raise RuntimeError(done.stdout + done.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _wait(clone: Path) -> None:
    """Wait until no mirror of the clone runs."""
    marks = str(clone / ".scratch/mirror/following")
    while any(
        argument.startswith(marks)
        for process in psutil.process_iter(["cmdline"])
        for argument in process.info["cmdline"] or ()
    ):
        time.sleep(1)


def _report(turns: dict[str, list[Seconds]]) -> str:
    lines = [
        f"{machine.describe()}; {len(turns[OFF])} rounds",
        "",
        "| | wall, seconds | ratio (range) | processor, seconds | ratio (range) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, taken in turns.items():
        cells = []
        for kind in (0, 1):
            cells.append(f"{statistics.median(each[kind] for each in taken):.1f}")
            ratios = [each[kind] / off[kind] for each, off in zip(taken, turns[OFF], strict=True)]
            middle = statistics.median(ratios)
            cells.append("" if name == OFF else f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
