"""Seconds from the start of a command that trains to the loss of its first step, as its user sees them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML
from trainers import lathe_sft, llamafactory_sft
from trainers.environments import BENCHMARKS, python_of
from trainers.work import LEARNING_RATE, SEED, Work

# How each command says that the first step is done.
FIRST_STEP = (b"'loss'", b"train/loss")


def commands(work: Work, *, on_gpu: bool) -> dict[str, tuple[list[str], Path]]:
    """Return, by name, a command that trains as `work` says, and the folder to run it in; lathe's stage is the first.

    The stage gets a checkout of its own, with the model and the rows in their places.
    """
    folder = Path(work.folder)
    listed = {
        "lathe: stages/train.py": ([sys.executable, "stages/train.py"], _checkout(work, folder / "checkout")),
        "TRL: trl/scripts/sft.py": (
            [sys.executable, "-m", "trl.scripts.sft", *_trl_arguments(work), "--use_cpu", str(not on_gpu)],
            folder,
        ),
    }
    if not on_gpu:
        config = folder / "llamafactory.yaml"
        config.write_text(json.dumps(llamafactory_sft.arguments(work)), encoding="utf-8")  # JSON is YAML
        python = python_of("LLaMA-Factory")
        command = [python, str(Path(python).parent / "llamafactory-cli"), "train", str(config)]
        listed["LLaMA-Factory: llamafactory-cli train"] = command, folder
    return listed


def seconds_to_first_step(command: list[str], folder: Path, environment: Mapping[str, str]) -> float:
    """Run a command until it tells the loss of its first step; raise SystemExit where it ends without."""
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        said = b""
        while some := os.read(process.stdout.fileno(), 1 << 16):
            said += some
            if any(sign in said for sign in FIRST_STEP):
                seconds = time.monotonic() - started
                process.kill()
                return seconds
    raise SystemExit(f"{' '.join(command)} told no loss:\n{said.decode(errors='replace')}")


def _checkout(work: Work, root: Path) -> Path:
    source = BENCHMARKS.parent
    for name in ("stages", "src", "experiments"):  # the last for the files that params.yaml names
        shutil.copytree(source / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(source / "presets.yaml", root)
    editor = YAML()
    params = editor.load(source / "params.yaml")
    params["seed"] = SEED
    for section, own in lathe_sft.parameters(work).items():
        params[section].update(own)
    editor.dump(params, root / "params.yaml")
    (root / "models").mkdir()
    (root / "models/base").symlink_to(work.model)
    processed = root / "data/processed"
    processed.mkdir(parents=True)
    shutil.copy2(source / params["evaluate"]["general_text"], root / "data")
    rows = Path(work.rows("messages")).read_text(encoding="utf-8")
    (processed / "train.jsonl").write_text(rows, encoding="utf-8")
    (processed / "validation.jsonl").write_text(rows.partition("\n")[0] + "\n", encoding="utf-8")
    return root


def _trl_arguments(work: Work) -> list[str]:
    rows = Path(work.folder) / "trl"
    rows.mkdir()
    shutil.copy2(work.rows("prompt_completion"), rows / "train.jsonl")
    chosen = {
        "model_name_or_path": work.model,
        "dtype": "bfloat16" if work.settings.precision == "bf16" else "float32",
        "dataset_name": str(rows),
        "output_dir": f"{work.folder}/unused",
        "max_steps": work.steps,
        "per_device_train_batch_size": work.examples,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "max_length": work.max_length,
        "gradient_checkpointing": work.settings.checkpointing,
        "use_peft": True,
        "lora_r": work.rank,
        "lora_alpha": work.alpha,
        "lora_target_modules": "all-linear",
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]
