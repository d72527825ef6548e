"""Resident memory over the steps of a training: `make bench-memory` shows if it grows.

Trains with the settings of params.yaml on the data and the base model that the pipeline has made, for more steps, in a
process of its own, and reads how much of that is resident ten times a second. What is compared is the most within the
ten steps before each of the steps that are shown.

    python benchmarks/memory.py [--checkout FOLDER] [--steps 400] [--set training.per_device_train_batch_size=16]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe

from lathe.common import operating_system, paths
from lathe.common.metric_files import unwrap_list
from lathe.config.overrides import apply_overrides
from lathe.config.params import Params
from lathe.needs.estimate import estimate_training_memory

WINDOW = 10  # steps
SHOWN = (10, 40, 100, 200, 300, 400)
CURVE = "plots/metrics/train/loss.tsv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkout", type=Path, default=paths.ROOT, help="whose data/processed and models/base to read"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of params.yaml")
    parser.add_argument("--keep-pages", action="store_true", help="release no pages between steps, to compare")
    parser.add_argument("--json", type=Path, help="file to write the sizes (bytes) to as well")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps
    fixed = [f"training.max_steps={steps}", "training.logging_steps=1", f"training.save_steps={steps * 2}"]
    config = apply_overrides([*arguments.set, *fixed, f"training.eval_steps={steps}"])
    if arguments.train:
        if arguments.keep_pages:
            operating_system.release_freed_pages = lambda: None
        train(arguments.checkout, arguments.train, config.params)
        return
    splits = unwrap_list(json.loads((arguments.checkout / "metrics/preprocess/report.json").read_text()))["splits"]
    length = max(split["tokens"]["total"]["max"] for split in splits if split["split"] != "test")
    estimate = estimate_training_memory(arguments.checkout / "models/base", config.params, length=length).total
    with tempfile.TemporaryDirectory() as folder:
        samples, before, seconds = measure([sys.executable, __file__, *sys.argv[1:], "--train", folder], Path(folder))
    most = {step: max(size for at, size in samples if step - WINDOW < at <= step) for step in SHOWN if step <= steps}
    print(f"{describe()}; {seconds:.0f} s\n")
    print("| | resident, GB | of that at the first step shown |\n| --- | ---: | ---: |")
    print(f"| before the first step | {before / 1e9:.2f} | |")
    for step, size in most.items():
        print(f"| step {step} | {size / 1e9:.3f} | {size / most[min(most)]:.3f} |")
    print(f"| tensors of a step, by the estimate | {estimate / 1e9:.2f} | |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"before": before, "estimate": estimate, "resident": most}))


def measure(command: list[str], folder: Path) -> tuple[list[tuple[int, int]], int, float]:
    """Run a training; return its resident sizes (bytes) with the step, that before the first, and seconds of steps."""
    samples: list[tuple[int, int]] = []
    before, started = 0, 0.0
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        curve = folder / "metrics" / CURVE
        while process.poll() is None:
            time.sleep(0.1)
            try:
                size = watched.memory_info().rss
            except psutil.NoSuchProcess:
                break
            step = max(0, len(curve.read_text().splitlines()) - 1) if curve.exists() else 0
            if step == 0:
                before = size
            else:
                started = started or time.monotonic()
                samples.append((step + 1, size))  # of the one that is being made
        seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(process.returncode)
    return samples, before, seconds


def train(checkout: Path, folder: Path, params: Params) -> None:
    """Train in this process."""
    from lathe.training.train import train as train_model

    splits: dict[str, Any] = {split: checkout / f"data/processed/{split}.jsonl" for split in ("train", "validation")}
    (folder / "adapter").mkdir()
    train_model(checkout / "models/base", splits, folder / "adapter", folder / "metrics", params=params)


if __name__ == "__main__":
    main()
