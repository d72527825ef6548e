"""A checkout whose pipeline is its training alone, with a small base model and data that `dvc add` tracks."""

import shutil
from pathlib import Path

import yaml
from conftest import SMALL, Checkout, make_checkout, write_splits

from lathe.sources.builtin import household_commands

# Dropout draws random numbers in each step; no checkpoint is of the last one.
LONGER = {"training.max_steps": 300, "training.save_steps": 20, "training.eval_steps": 170, "lora.lora_dropout": 0.1}


def make_training_checkout(root: Path, small_model: Path) -> Checkout:
    """Return the checkout, committed, with a recipe `longer` that takes some seconds."""
    checkout = make_checkout(root)
    values = {key: value for key, value in SMALL.items() if key.startswith("training.")}
    checkout.set({**values, "training.per_device_train_batch_size": 2})
    rows = household_commands.make_rows(1)
    write_splits(root / "data/processed", {"train": rows["train"][:30], "validation": rows["validation"][:6]})
    shutil.copytree(small_model, root / "models/base")
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    alone = {"stages": {"train": pipeline["stages"]["train"]}, "metrics": pipeline["metrics"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump(alone, sort_keys=False))
    (root / "dvc.lock").unlink()
    for folder in (root / "metrics").iterdir():
        if folder.is_dir() and folder.name not in ("estimate", "timings"):
            shutil.rmtree(folder)
    recipe = {"description": "Some seconds of training.", "overrides": LONGER}
    (root / "experiments/longer.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ignored = root / ".gitignore"
    ignored.write_text(
        ignored.read_text().replace("/data/processed/\n", "").replace("/models/base/\n", "") + "/.venv\n"
    )
    checkout.run("dvc", "add", "--quiet", "data/processed", "models/base")
    checkout.environment["PYTHONPATH"] = str(root / "src")
    checkout.commit()
    return checkout.without_preloading()


def list_outputs(checkout: Checkout, experiment: str) -> dict[str, list[str]]:
    """Return the hashes of an experiment's outputs, by stage."""
    ref = checkout.run("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{experiment}").stdout.strip()
    stages = yaml.safe_load(checkout.run("git", "show", f"{ref}:dvc.lock").stdout)["stages"]
    return {name: [out["md5"] for out in stage["outs"]] for name, stage in stages.items()}


def list_checkpoints(checkout: Path) -> list[Path]:
    """Return the checkpoints of unfinished trainings."""
    return sorted((checkout / ".scratch/train").glob("*/checkpoint-*"))
