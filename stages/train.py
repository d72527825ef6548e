"""Train a LoRA adapter on the frozen base, 4-bit or 16-bit, or all its weights, by the method of training.method.

reads   models/base/, data/processed/, params.yaml: seed, training, sft, dpo, grpo, lora, quantization,
        preprocess.supervise
writes  models/adapter/, metrics/train/ (curves, last values, freeze_proof.json), metrics/speed/

Interrupted, it goes on from its last checkpoint in .scratch/train/ when it is run again.
"""

import _path  # noqa: F401

from lathe import memory, model_folder, paths, stage, track
from lathe.params import Config
from lathe.stage import Speeds


def main(config: Config) -> Speeds:
    model_folder.check_length(paths.MODEL_BASE, config.params.training.max_length)

    from lathe.jsonl import read_jsonl
    from lathe.training.run import train

    with memory.explained(paths.MODEL_BASE, config.params), paths.whole_folder(paths.MODEL_ADAPTER) as folder:
        trained = train(
            paths.MODEL_BASE,
            {split: read_jsonl(paths.DATA_PROCESSED / f"{split}.jsonl") for split in ("train", "validation")},
            folder,
            paths.METRICS / "train",
            params=config.params,
            speed=paths.METRICS / "speed",
            scratch=paths.SCRATCH / "train",
        )
    proof = {"trained_tensors": trained.trained_tensors, "frozen_tensors": len(trained.frozen), "moved": []}
    track.write_json(paths.METRICS / "train/freeze_proof.json", {**proof, "sha256": trained.frozen})
    return trained.speeds


if __name__ == "__main__":
    stage.run(main)
