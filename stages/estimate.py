"""Estimate what training will take: optimizer steps, and peak memory.

reads   models/base/config.json, metrics/preprocess/report.json, params.yaml: training, sft, dpo, grpo, lora,
        quantization
writes  metrics/estimate/training.json, metrics/estimate/batch_sizes.json (numbers, where they are auto)
"""

import logging
from dataclasses import asdict

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.common.errors import InputError
from lathe.config.load import Config

logger = logging.getLogger("lathe.needs.estimate")


def main(config: Config) -> None:
    from lathe.common.text import readable_bytes
    from lathe.needs.estimate import describe_largest_part, estimate_training_memory
    from lathe.needs.fit_batch import choose_batch_sizes
    from lathe.training.batch_sizes import has_auto, set_batch_sizes
    from lathe.training.optimizer_steps import count_training_steps

    params = config.params
    report = json_files.read_json(paths.METRICS / "preprocess/report.json")
    splits = {split["split"]: split for split in report["splits"]}
    train = splits["train"]
    longest = max(splits[name]["tokens"]["total"]["max"] for name in ("train", "validation"))
    sizes = choose_batch_sizes(paths.MODEL_BASE, params, length=longest)
    if has_auto(params.training):
        logger.info(
            "batch sizes: %d passes of %d rows make a step; %d rows in an evaluation",
            sizes.gradient_accumulation_steps,
            sizes.per_device_train_batch_size,
            sizes.per_device_eval_batch_size,
        )
    params = set_batch_sizes(params, sizes)
    # A list, of which DVC makes no columns. A file of its own: train depends on it, and on no estimate.
    json_files.write_json(paths.METRICS / "estimate/batch_sizes.json", {"batch_sizes": [vars(sizes)]})
    steps = count_training_steps(params, examples=train["kept"], sequences=train["sequences"])
    total, parts = None, []
    try:
        memory = estimate_training_memory(paths.MODEL_BASE, params, length=longest)
        total, parts = memory.total, [{"part": part, "bytes": size} for part, size in asdict(memory).items()]
        logger.info(
            "training takes %d steps and about %s of memory; %s",
            steps["steps"],
            readable_bytes(memory.total),
            describe_largest_part(memory, params.training, params.quantization),
        )
    except InputError as error:  # of a method not measured, or an architecture that cannot be traced; it may train well
        logger.warning("training takes %d steps; memory cannot be estimated: %s", steps["steps"], error)
    json_files.write_json(paths.METRICS / "estimate/training.json", {**steps, "memory_bytes": total, "memory": parts})


if __name__ == "__main__":
    stage.run(main)
