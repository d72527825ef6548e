"""Say beforehand what training will take: optimizer steps, and memory at its worst moment.

reads   models/base/config.json, metrics/preprocess/report.json, params.yaml: training, sft, dpo, grpo, lora,
        quantization
writes  metrics/estimate/training.json
"""

import logging
from dataclasses import asdict

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.common.errors import InputError
from lathe.config.load import Config

logger = logging.getLogger("lathe.estimate")


def main(config: Config) -> None:
    from lathe.common.text import readable_bytes
    from lathe.estimate import estimate_training_memory, explain
    from lathe.training.optimizer_steps import training_steps

    params = config.params
    report = json_files.read_json(paths.METRICS / "preprocess/report.json")
    splits = {split["split"]: split for split in report["splits"]}
    train = splits["train"]
    steps = training_steps(params, rows=train["kept"], sequences=train["sequences"])
    longest = max(splits[name]["tokens"]["total"]["max"] for name in ("train", "validation"))
    total, parts = None, []
    try:
        memory = estimate_training_memory(paths.MODEL_BASE, params, length=longest)
        total, parts = memory.total, [{"part": part, "bytes": size} for part, size in asdict(memory).items()]
        logger.info(
            "training takes %d steps and about %s of memory; %s",
            steps["steps"],
            readable_bytes(memory.total),
            explain(memory, params.training, params.quantization),
        )
    except InputError as error:  # of a method not measured, or an architecture that cannot be traced; it may train well
        logger.warning("training takes %d steps; memory cannot be estimated: %s", steps["steps"], error)
    json_files.write_json(paths.METRICS / "estimate/training.json", {**steps, "memory_bytes": total, "memory": parts})


if __name__ == "__main__":
    stage.run(main)
