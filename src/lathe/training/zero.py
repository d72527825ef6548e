"""DeepSpeed's ZeRO: what it cannot train with, and checkpoints of it without pickled objects."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map_only

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.config.params import Params
from lathe.training import distributed
from lathe.training.sharding import copy_full_tensor, get_trained_tensors

# transformers looks for `global_step*` before it lets the engine read.
STATE_FILE = "global_step_rank_{rank}.pt"
WEIGHTS_FILE = "global_step_weights.safetensors"
# Of the state of an optimizer: objects, which only pickle could write, and which the new optimizer has as well.
NOT_KEPT = {"loss_scaler", "zero_stage", "param_slice_mappings"}


def check_zero(params: Params) -> None:
    """Raise InputError where ZeRO would train otherwise than one process does."""
    stage, training = launch.get_zero_stage(), params.training
    if not stage:
        return
    if training.method != "sft":
        raise InputError(
            f"training.method is {training.method!r}; with DeepSpeed only 'sft' is trained; set training.launcher to a "
            "DDP or FSDP2 configuration",
            code="zero-method",
        )
    if training.precision == "fp16":
        raise InputError(
            "training.precision is fp16; DeepSpeed would train the adapter itself in fp16; set it to bf16 or fp32",
            code="zero-fp16",
        )
    if training.optim == "adafactor":
        raise InputError(
            f"training.optim is adafactor, whose rows and columns ZeRO-{stage} does not keep; choose another, such as "
            "adamw_torch",
            code="zero-optimizer",
        )


def set_up_zero() -> None:
    """Let DeepSpeed's engine write and read checkpoints as tensors, numbers and lists alone.

    Its own are read with pickle. A checkpoint has a file of each process, and under ZeRO-2 the trained weights.
    """
    if launch.get_zero_stage():
        from deepspeed import DeepSpeedEngine

        # At every step: DeepSpeed 0.19 calls torch's collectives by names that torch 2.13 has given others for.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        DeepSpeedEngine.save_checkpoint = _save_state
        DeepSpeedEngine.load_checkpoint = _load_state


def _save_state(engine: Any, save_dir: str, **_: Any) -> None:
    Path(save_dir).mkdir(exist_ok=True)  # each process comes here, and rank 0 not always first
    state = {key: value for key, value in engine.optimizer.state_dict().items() if key not in NOT_KEPT}
    torch.save(
        tree_map_only(torch.Tensor, _copy_plain, state), Path(save_dir) / STATE_FILE.format(rank=distributed.get_rank())
    )
    if launch.get_zero_stage() == 2 and launch.is_main():
        weights = {name: tensor.cpu().clone() for name, tensor in get_trained_tensors(engine.module).items()}
        save_file(weights, Path(save_dir) / WEIGHTS_FILE)


def _copy_plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of its own, without the attributes that DeepSpeed gives to those of the optimizer."""
    return tensor.detach().to("cpu", copy=True)


def _load_state(engine: Any, load_dir: str, **_: Any) -> tuple[str, dict[str, Any]]:
    rank, folder = distributed.get_rank(), Path(load_dir)
    kept = torch.load(folder / STATE_FILE.format(rank=rank), map_location="cpu", weights_only=True)
    states: list[Any] = [None] * distributed.count_processes()
    states[rank] = {**engine.optimizer.state_dict(), **kept}
    engine.optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)
    if launch.get_zero_stage() == 2:
        weights = load_file(folder / WEIGHTS_FILE)
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                copy_full_tensor(weights[name], parameter)
    return load_dir, {}
