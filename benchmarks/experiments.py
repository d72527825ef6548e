"""What DVC takes to show many experiments, and to find that nothing is to be run.

python benchmarks/experiments.py [--experiments 100] [--folder DIR]

Clones this checkout's last commit, makes experiments on it as `dvc exp run` leaves them (a commit below refs/exps with
another learning rate and another score), and prints a Markdown table of `dvc exp show`: when it reads them for the
first time, when none is new, and when one is; and of `dvc repro` where nothing is to be done, with a copy of this
checkout's cache. Seconds of the clock, and of the processor, which other work on the machine lengthens less.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
DVC = str(Path(sys.executable).parent / "dvc")


def main() -> None:
    """Make the clone, time the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=100, help="how many of them (default: 100)")
    parser.add_argument("--folder", type=Path, help="where the clone is made (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-experiments-") as name:
        clone = Path(name) / "lathe"
        _run(["git", "clone", "--quiet", str(ROOT), str(clone)], Path(name))
        for number in range(arguments.experiments):
            make_experiment(clone, number)
        show = [DVC, "exp", "show", "--csv"]
        rows = [(f"`dvc exp show`, {arguments.experiments} experiments for the first time", *_seconds(show, clone))]
        rows.append(("the same again", *_seconds(show, clone)))
        make_experiment(clone, arguments.experiments)
        rows.append(("the same with one that is new", *_seconds(show, clone)))
        (clone / ".dvc/cache").mkdir(exist_ok=True)
        _run(["cp", "-r", str(ROOT / ".dvc/cache/files"), str(clone / ".dvc/cache")], clone)
        _run([DVC, "checkout", "--quiet"], clone)
        _run([DVC, "repro", "--quiet"], clone)
        for command in (["repro"], ["status"]):
            rows.append(
                (f"`dvc {command[0]}`, nothing to do", *min(_seconds([DVC, *command], clone) for _ in range(3)))
            )
    sys.stdout.write(f"{machine.describe()}\n\n| | seconds | of the processor |\n| --- | ---: | ---: |\n")
    sys.stdout.writelines(f"| {what} | {wall:.2f} | {processor:.2f} |\n" for what, wall, processor in rows)


def make_experiment(clone: Path, number: int) -> None:
    """Commit the clone's parameters, lock and scores with another rate and score, as an experiment of its own."""
    rate = f"{1e-3 + number * 1e-5:.5f}"
    changes = {
        "params.yaml": (r"(learning_rate: )[\d.e-]+", rate),
        "dvc.lock": (r"(learning_rate: )[\d.e-]+", rate),
        "metrics/evaluate/summary.json": (r'("merged": )[\d.]+', f"0.{number:04d}"),
    }
    head = _run(["git", "rev-parse", "HEAD"], clone)
    index = {"GIT_INDEX_FILE": str(clone / ".git/experiment")}
    _run(["git", "read-tree", head], clone, **index)
    for file, (pattern, value) in changes.items():
        text = re.sub(pattern, rf"\g<1>{value}", (clone / file).read_text(encoding="utf-8"))
        blob = _run(["git", "hash-object", "-w", "--stdin"], clone, text)
        _run(["git", "update-index", "--cacheinfo", f"100644,{blob},{file}"], clone, **index)
    tree = _run(["git", "write-tree"], clone, **index)
    who = {f"GIT_{role}_{key}": "bench" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    commit = _run(["git", "commit-tree", tree, "-p", head, "-m", f"experiment {number}"], clone, **who)
    _run(["git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/bench-{number}", commit], clone)


def _seconds(command: list[str], clone: Path) -> tuple[float, float]:
    """Return the seconds that a command takes by the clock, and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    _run(command, clone)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(command: list[str], folder: Path, text: str | None = None, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, input=text, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
