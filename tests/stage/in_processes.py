"""Trains the small model in two processes, for test_launch.py: `python in_processes.py WORK.json`, as a user would.

WORK.json: `base`, the trainings (`params`, `rows`, `out`), and what is to go wrong on the second rank, if anything.
With a `launcher` of two machines a second argument says which of them this process is.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lathe.common import entry_point, launch
from lathe.common.errors import InputError
from lathe.common.jsonl import write_jsonl
from lathe.config.params import Params
from lathe.sources.builtin import household_commands

WORK = "LATHE_TEST_WORK"
LAUNCHER = "accelerate launch --config_file experiments/accelerate/cpu-2.yaml"


def main() -> None:
    """Start two workers, or be one."""
    if not launch.is_worker():
        os.environ[WORK] = sys.argv[1]
        launcher = json.loads(Path(sys.argv[1]).read_text()).get("launcher")
        if launcher:
            count_one_gpu()
        launch.run(launcher or LAUNCHER, __file__, machine_rank=int(sys.argv[2]) if launcher else None)
        return
    work = json.loads(Path(os.environ[WORK]).read_text())
    if work.get("sharded"):
        pass_the_cpu_off_as_gpus()
    if work.get("zero"):
        pass_the_cpu_off_as_gpus_of_deepspeed(work["zero"])
    if work.get("in_tiles"):
        compute_the_loss_in_tiles()
    if os.environ["RANK"] == "1":
        go_wrong(work.get("wrong"))
    for training in work["trainings"]:
        train_once(Path(work["base"]), training)
        if work.get("zero"):
            from transformers.integrations import deepspeed

            deepspeed.unset_hf_deepspeed_config()  # else the next base is loaded for ZeRO-3

    from lathe.training import distributed

    distributed.leave()


def train_once(base: Path, training: dict[str, Any]) -> None:
    """Train on the first rows of the commands, and write what comes back beside the adapter."""
    from lathe.training import distributed
    from lathe.training.train import train

    rows, out = household_commands.make_rows(1), Path(training["out"])
    if launch.is_main():
        (out / "adapter").mkdir(parents=True, exist_ok=True)
    splits = {"train": rows["train"][: training["rows"]], "validation": rows["validation"][:5]}
    chosen = Params.model_validate(training["params"])
    files = {split: out.with_name(f"{out.name}-{split}.jsonl") for split in splits}
    if launch.is_main():
        for split, file in files.items():
            write_jsonl(splits[split], file)
    distributed.join()
    distributed.wait()
    with recording_whole_weights() as whole:
        trained = train(base, files, out / "adapter", out / "metrics", params=chosen, scratch=out / "scratch")
    if launch.is_main():
        told = {"frozen": trained.frozen, "kind": kind(), "whole": whole}
        (out / "trained.json").write_text(json.dumps(told))


@contextmanager
def recording_whole_weights() -> Iterator[list[str]]:
    """Yield the names of the weights that each process had whole when they were hashed last."""
    from torch.distributed.tensor import DTensor

    from lathe.training import train as module

    usual = module.hash_tensors
    whole: list[str] = []

    def record(model: Any, **how: Any) -> dict[str, str]:
        weights = model.named_parameters()
        whole[:] = [
            name for name, weight in weights if not isinstance(weight, DTensor) and not hasattr(weight, "ds_id")
        ]
        return usual(model, **how)

    with mock.patch.object(module, "hash_tensors", record):
        yield whole


def kind() -> str:
    """Return how accelerate spread the last training over processes."""
    from accelerate import PartialState

    return str(PartialState().distributed_type.value)


def go_wrong(how: str | None) -> None:
    """Fail before the training, poison its second loss, or get a signal in its fourth step."""
    if how == "refuses":
        raise InputError("the second rank refuses")
    if how == "crashes":
        raise ZeroDivisionError("the second rank crashes")
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how not in {"computes nan", "is told to stop"}:
        return
    from lathe.training import sft

    calls = iter(range(1000))
    if how == "computes nan":
        right = sft.compute_step_loss

        def poisoned(*given: Any, **how: Any) -> Any:
            return right(*given, **how) * (float("nan") if next(calls) == 1 else 1)

        sft.compute_step_loss = poisoned
    else:
        usual = sft.AnswerTrainer._clip_grad_norm

        def interrupted(*given: Any) -> Any:
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return usual(*given)

        sft.AnswerTrainer._clip_grad_norm = interrupted  # type: ignore


def count_one_gpu() -> None:
    """Let the launcher find a GPU here; its workers say themselves what they compute on."""
    import torch

    torch.cuda.device_count = lambda: 1


def pass_the_cpu_off_as_gpus() -> None:
    """Let accelerate shard a model over processes on a CPU, which torch can and accelerate does not offer."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = "2"
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"

    def backend(*_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def use_cpu(state: Any) -> None:
        state.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = backend
    PartialState.set_device = use_cpu
    PartialState.wait_for_everyone = lambda _: torch.distributed.barrier()


def pass_the_cpu_off_as_gpus_of_deepspeed(stage: int) -> None:
    """Let accelerate train with DeepSpeed on a CPU, for which DeepSpeed has an accelerator and accelerate no offer."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}

    def backend(*_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.DEEPSPEED

    def use_cpu(state: Any) -> None:
        state.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    from deepspeed import comm

    comm.init_distributed("gloo", auto_mpi_discovery=False)
    PartialState._prepare_backend = backend
    PartialState.set_device = use_cpu
    PartialState.wait_for_everyone = lambda _: torch.distributed.barrier()


def compute_the_loss_in_tiles() -> None:
    """Compute the loss as a GPU does, but for the kernel."""
    from trl.trainer import utils

    from lathe.training import sft

    sft.uses_tiles = lambda *_, **__: True
    utils._use_triton = lambda device: True


if __name__ == "__main__":
    entry_point.guard(main)
