"""Trains with LLaMA-Factory, by its own Python: python -m trainers.llamafactory_sft WORK RESULT.

Its whole `llamafactory-cli train` runs, on rows of text; nothing of it is changed but that the steps are recorded.
"""

import sys
from pathlib import Path
from typing import Any

from trainers.work import LEARNING_RATE, SEED, WARMUP, Work


def main() -> None:
    """Train, and leave the steps in the second file."""
    work = Work.read(sys.argv[1])
    from llamafactory.train.tuner import run_exp
    from trainers import steps

    steps.record(Path(sys.argv[2]))
    run_exp(arguments(work))


def arguments(work: Work) -> dict[str, Any]:
    """Return what `llamafactory-cli train` is to be given in its YAML file."""
    return {
        "model_name_or_path": work.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": work.rank,
        "lora_alpha": work.alpha,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": f"{work.folder}/rows",
        "template": "empty",
        "cutoff_len": work.max_length,
        # Packs whose rows do not see one another; `packing` alone lets them.
        "packing": work.settings.packing,
        "neat_packing": work.settings.packing,
        "output_dir": f"{work.folder}/unused",
        "overwrite_output_dir": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "max_steps": work.steps,
        "per_device_train_batch_size": work.examples,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": WARMUP,
        "seed": SEED,
        "data_seed": SEED,
        "disable_gradient_checkpointing": not work.settings.checkpointing,
        **({"bf16": True} if work.settings.precision == "bf16" else {}),
    }


if __name__ == "__main__":
    main()
