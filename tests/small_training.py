"""A training of a small model, in this process or by itself: python small_training.py CHANGES BASE FOLDER.

CHANGES are a JSON object of parameters, as `changed` of conftest takes them. FOLDER gets the folders `adapter`,
`metrics`, `data` and `scratch`; run again with the same arguments, a training that was killed goes on.
"""

import json
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "seed": 1,
    "max_length": 256,
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.005,
    "logging_steps": 1,
    "eval_steps": 12,
    "save_steps": 4,
    "quantization.load_in_4bit": False,
}
CURVE = "plots/metrics/train/loss.tsv"


def train_small(base: Path, folder: Path, changes: dict[str, Any]) -> Any:
    """Train, and return what `train` returns."""
    from conftest import changed, write_splits
    from toy import load_toy

    from lathe.sources.builtin import household_commands
    from lathe.training.train import train

    made = household_commands.make_rows(1)
    splits = {"train": made["train"][:64], "validation": made["validation"][:8]}
    if changes.get("method") == "dpo":
        splits = {name: [row for row in rows if row.get("rejected")] for name, rows in splits.items()}
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    return train(
        base,
        write_splits(folder / "data", splits),
        folder / "adapter",
        folder / "metrics",
        params=changed(load_toy().params, {**SETTINGS, **changes}),
        scratch=folder / "scratch",
    )


def read_curve(folder: Path, name: str = CURVE) -> list[float]:
    """Return the values of a curve that a training left in `folder`."""
    lines = (folder / "metrics" / name).read_text(encoding="utf-8").splitlines()[1:]
    return [float(line.split("\t")[1]) for line in lines]


if __name__ == "__main__":
    train_small(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[1]))
