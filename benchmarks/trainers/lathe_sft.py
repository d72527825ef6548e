"""Trains with Lathe, on rows of text: python -m trainers.lathe_sft WORK RESULT."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from trainers.work import LEARNING_RATE, SEED, WARMUP, Work


def main() -> None:
    """Train, and leave the steps in the second file."""
    from trainers import steps

    steps.record(Path(sys.argv[2]))
    run(Work.read(sys.argv[1]))


def run(work: Work) -> None:
    """Train."""
    from lathe.config.load import load
    from lathe.training.train import train

    params = load().params
    sections = {name: getattr(params, name).model_copy(update=own) for name, own in parameters(work).items()}
    params = params.model_copy(update={"seed": SEED, **sections})
    rows = Path(work.rows("messages"))
    with tempfile.TemporaryDirectory(dir=work.folder) as out:
        adapter = Path(out) / "adapter"
        adapter.mkdir()
        first = Path(out) / "validation.jsonl"
        first.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
        train(
            Path(work.model),
            {"train": rows, "validation": first},
            adapter,
            Path(out) / "metrics",
            params=params,
        )


def parameters(work: Work) -> dict[str, dict[str, Any]]:
    """Return, section by section, what `work` wants in params.yaml."""
    return {
        "training": {
            "max_length": work.max_length,
            "max_steps": work.steps,
            "per_device_train_batch_size": work.examples,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": LEARNING_RATE,
            "warmup_ratio": WARMUP,
            "gradient_checkpointing": work.settings.checkpointing,
            "precision": work.settings.precision,
            "use_liger_kernel": work.settings.has_liger,
            "torch_compile": work.settings.compiled,
            "logging_steps": work.logging_steps,
            "eval_steps": 1000,
        },
        "sft": {"packing": work.settings.packing},
        "lora": {"r": work.rank, "lora_alpha": work.alpha, "target_modules": "all-linear", "num_layers": None},
        "quantization": {"load_in_4bit": work.load_in_4bit},
    }


if __name__ == "__main__":
    main()
