"""Train a LoRA adapter on the frozen base, 4-bit or 16-bit, or all its weights, by SFT, DPO or GRPO.

reads   models/base/, data/processed/, rewards/, metrics/estimate/batch_sizes.json (where one is auto),
        params.yaml: seed, training, sft, dpo, grpo, lora, quantization,
        preprocess.{supervise,chat_template_kwargs,added_tokens}
writes  models/adapter/, metrics/train/ (curves, last values, freeze_proof.json, answers.json), metrics/speed/

training.launcher sets the number of processes; of several machines only the first, where DVC runs, writes.
After an interruption it resumes from its last checkpoint in .scratch/train/ when it is run again.
"""

from contextlib import nullcontext

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, launch, paths
from lathe.config.load import Config
from lathe.models import model_folder
from lathe.needs import out_of_memory
from lathe.stage import Throughput
from lathe.training import batch_sizes, reward_functions


def main(config: Config, machine_rank: int | None) -> Throughput:
    params = batch_sizes.read_batch_sizes(config.params, paths.METRICS / "estimate/batch_sizes.json")
    functions = (
        reward_functions.load_reward_functions(params.grpo.rewards, paths.REWARDS)
        if params.training.method == "grpo"
        else {}
    )
    model_folder.check_length(paths.MODEL_BASE, params.training.max_length)
    if launch.is_needed(params.training.launcher, machine_rank):
        return launch.run(params.training.launcher, __file__, machine_rank=machine_rank)

    from lathe.training import distributed
    from lathe.training.train import train

    adapter = paths.replace_folder(paths.MODEL_ADAPTER) if launch.is_main() else nullcontext(paths.MODEL_ADAPTER)
    with out_of_memory.explain_out_of_memory(paths.MODEL_BASE, params), adapter as folder:
        trained = train(
            paths.MODEL_BASE,
            {split: paths.DATA_PROCESSED / f"{split}.jsonl" for split in ("train", "validation")},
            folder,
            paths.METRICS / "train",
            params=params,
            functions=functions,
            throughput=paths.METRICS / "speed",
            scratch=paths.SCRATCH / "train",
        )
    if launch.is_main():
        proof = {"trained_tensors": trained.trained_tensors, "frozen_tensors": len(trained.frozen), "moved": []}
        # A list, of which DVC makes no columns.
        digests = [{"tensor": name, "sha256": digest} for name, digest in trained.frozen.items()]
        json_files.write_json(paths.METRICS / "train/freeze_proof.json", {**proof, "sha256": digests})
        # What `convert` holds the GGUF against.
        measured = [trained.answers.describe()] if trained.answers else []
        json_files.write_json(paths.METRICS / "train/answers.json", {"answers": measured})
    distributed.leave()
    return trained.throughput


if __name__ == "__main__":
    stage.run_on_machines(main)
