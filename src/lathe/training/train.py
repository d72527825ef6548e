"""A training from the base to the saved adapter, whatever the method: one phase, or a supervised one before it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import PrinterCallback, set_seed
from transformers.utils import is_liger_kernel_available

from lathe.common import launch, paths
from lathe.common.code_closure import code_closure
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.common.scratch import fingerprint
from lathe.config.params import Params
from lathe.models.adapter import add_adapter, check_adapter
from lathe.models.loading import load_base
from lathe.models.model_folder import open_model
from lathe.models.precision import resolve_precision
from lathe.models.tokenizer import load_tokenizer
from lathe.training import distributed, memory
from lathe.training.best_weights import Best
from lathe.training.checkpoints import Checkpoints, claimed, disk_errors
from lathe.training.dvclive_curves import Curves
from lathe.training.freeze_proof import digests
from lathe.training.full_tuning import by_base_names, save_whole
from lathe.training.preference_pairs import check_pairs
from lathe.training.resume import ResumableTrainer
from lathe.training.reward_functions import RewardFunction, source
from lathe.training.row_attention import check_attention
from lathe.training.sharding import state_to_save
from lathe.training.throughput import Speed
from lathe.training.trainer_setup import Setting

logger = logging.getLogger(__name__)

# What besides data and parameters decides what a training ends with.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class Trained:
    """What a training left to record beside the adapter."""

    frozen: dict[str, str]  # name of every frozen tensor -> SHA-256 of its bytes, the same before and after
    trained_tensors: int
    speeds: dict[str, float]  # of the last phase, such as {"tokens_per_second": 812.5}


@dataclass(frozen=True)
class _Phase:
    method: str
    params: Params
    curves: str  # what the names of its curves begin with


@memory.given_back()
def train(
    base: Path,
    splits: Mapping[str, Path],
    adapter: Path,
    metrics: Path,
    *,
    params: Params,
    functions: Mapping[str, RewardFunction] | None = None,
    speed: Path | None = None,
    scratch: Path | None = None,
) -> Trained:
    """Train on the examples in the file `splits["train"]`; save what was trained into the empty folder `adapter`.

    That is an adapter for `base` as PEFT saves it, or under full tuning all of its weights (`full_tuning`).
    The curves go to the dvclive folder `metrics`, those that vary from run to run to the folder `speed`;
    `splits["validation"]` is evaluated every `eval_steps`. Both are JSON Lines as `preprocess` writes them.
    `functions` are the rewards of the user's own that `grpo.rewards` names.
    Every `save_steps` a checkpoint goes to the folder `scratch`, from where the same training goes on if it was
    interrupted; at the end they are removed. Without `scratch` there are none.
    Raises InputError where a parameter does not fit the model and where the loss is not finite, Interrupted after
    SIGINT or SIGTERM.
    """
    distributed.join()
    training = params.training
    precision = resolve_precision(training.precision)
    check_attention(training.attn_implementation, precision=precision)
    _check_liger(training.use_liger_kernel)
    Best(training)  # whether the method has the metric that is asked for
    full = training.tuning == "full"
    examples = {split: read_jsonl(file) for split, file in splits.items()}
    if training.method == "dpo":
        check_pairs(examples)
    if not full:
        check_adapter(base, params.lora)
    if launch.is_sharded() and params.quantization.load_in_4bit:
        raise InputError(
            "quantization.load_in_4bit is true; FSDP would leave the 4-bit base whole on every GPU; set it to false, "
            "or set training.launcher to a DDP configuration"
        )
    set_seed(params.seed)  # before the model and the adapter are made
    tokenizer = load_tokenizer(base)
    model = load_base(base, params.quantization, precision="fp32" if full else precision)
    if warning := unusual_rate(training.learning_rate, weights=model.num_parameters(), tuning=training.tuning):
        logger.warning(warning)
    if full:
        by_base_names(model, open_model(base))  # whether it can be saved, asked before the hours of training
    else:
        model = add_adapter(model, params.lora)
    frozen = digests(model)
    phases = _phases(params)
    claims: list[Checkpoints | None] = []
    with Curves(metrics, speed) as curves, ExitStack() as locks:
        for phase in phases:
            tensors = {**frozen, **digests(model, trained=True)}
            values = _values_of_fingerprint(phase, tensors, precision, model.device.type)
            files = _files_of_fingerprint(phase, base, splits, functions or {})
            claims.append(locks.enter_context(_claimed(scratch, values, files)))
            measured = Speed(model, precision=precision)
            set_seed(params.seed)  # as if no phase had been before
            trainer = _trainer(phase.method)(
                Setting(
                    model=model,
                    tokenizer=tokenizer,
                    splits=examples,
                    params=phase.params,
                    precision=precision,
                    checkpoints=claims[-1],
                    callbacks=[measured, curves.callback(phase.curves, measured)],
                    functions=functions or {},
                )
            )
            measured.follow(trainer)
            trainer.remove_callback(PrinterCallback)  # the curves log the same
            with _without_casts(model, precision):
                trainer.train_to_the_end()
            if phase is phases[-1]:
                curves.note(trainer.best.kept(trainer.state))
            else:
                trainer.keep_result()
        after = digests(model)
        if moved := [name for name, digest in frozen.items() if after[name] != digest]:
            raise RuntimeError(f"training moved {len(moved)} tensors that are frozen, {moved[0]} first")
        state = state_to_save(model)
        if launch.is_main():
            with disk_errors():
                if full:
                    save_whole(model, base, adapter, state)
                else:
                    _save_adapter(model, adapter, state)
        for checkpoints in claims:
            if checkpoints:
                checkpoints.remove()
    trained_tensors = sum(parameter.requires_grad for parameter in model.parameters())
    return Trained(frozen=frozen, trained_tensors=trained_tensors, speeds=measured.overall())


def unusual_rate(rate: float, *, weights: int, tuning: Literal["lora", "full"]) -> str | None:
    """Return a warning where `rate` is far from what models of so many weights are trained with, or None.

    The committed params.yaml is a toy's; its rate ruins a real model, and a real model's rate teaches the toy nothing.
    """
    # LoRA's usual 1e-5 to 1e-3 is for models from 0.1 B weights; ones of a few million take ten times as much. All
    # weights at once take a tenth of what an adapter takes.
    lowest, highest = (1e-6, 2e-3) if weights >= 100_000_000 else (1e-5, 5e-2)
    if tuning == "full":
        lowest, highest = lowest / 10, highest / 10
    if lowest <= rate <= highest:
        return None
    what = "training all of" if tuning == "full" else "an adapter on"
    return (
        f"training.learning_rate is {rate:g}; {what} {weights / 1e6:,.0f} M weights usually takes {lowest:g} to "
        f"{highest:g}; the values in params.yaml are a toy's"
    )


def _check_liger(asked: bool) -> None:
    if asked and not is_liger_kernel_available():
        raise InputError(
            "training.use_liger_kernel is true; liger-kernel is not installed; install it, or set it to false"
        )


def _without_casts(model: Any, precision: str) -> AbstractContextManager[Any]:
    """Let an adapter take its input as it is, under autocast: PEFT would make it float32, and autocast bf16 again."""
    if precision != "bf16" or not isinstance(model, PeftModel):
        return nullcontext()
    context: AbstractContextManager[Any] = disable_input_dtype_casting(model)
    return context


def _trainer(method: str) -> Callable[[Setting], ResumableTrainer]:
    # TRL's trainers are imported where they are used: each takes a second or more.
    match method:
        case "sft":
            from lathe.training.sft import trainer
        case "dpo":
            from lathe.training.dpo import trainer
        case "grpo":
            from lathe.training.grpo import trainer
    return trainer


def _phases(params: Params) -> list[_Phase]:
    method = params.training.method
    whole = _Phase(method, params, "")
    if method == "sft":
        return [whole]
    epochs = getattr(params, method).sft_epochs
    if not epochs:
        return [whole]
    before = params.training.model_copy(
        update={
            "method": "sft",
            "num_train_epochs": epochs,
            "max_steps": None,
            "metric_for_best_model": "auto",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
        }
    )
    return [_Phase("sft", params.model_copy(update={"training": before}), "sft/"), whole]


def _values_of_fingerprint(phase: _Phase, tensors: dict[str, str], precision: str, device: str) -> dict[str, Any]:
    """Return the parameters and circumstances that decide what a phase ends with."""
    params = phase.params
    return {
        "training": params.training.model_dump(exclude={"save_steps"}),
        "method": getattr(params, phase.method).model_dump(),
        "lora": params.lora.model_dump(),
        "quantization": params.quantization.model_dump(),
        "supervise": params.preprocess.supervise,
        "seed": params.seed,
        "precision": precision,
        "device": device,
        "processes": distributed.count(),
        "sharded": launch.is_sharded(),
        "tensors": tensors,
    }


def _files_of_fingerprint(
    phase: _Phase, base: Path, splits: Mapping[str, Path], functions: Mapping[str, RewardFunction]
) -> dict[str, Path]:
    """Return the files that decide what a phase ends with: data, texts of the base, the user's rewards."""
    files = {f"data/{split}": file for split, file in splits.items()}
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":  # of weights, the loaded tensors are hashed
            files[f"base/{file.name}"] = file
    if phase.method == "grpo":
        files |= {f"reward/{name}": source(function) for name, function in functions.items()}
    return files


@contextmanager
def _claimed(scratch: Path | None, values: dict[str, Any], files: dict[str, Path]) -> Iterator[Checkpoints | None]:
    if scratch is None:
        yield None
        return
    name = fingerprint(values, files=files, packages=PACKAGES, code=code_closure(paths.ROOT / "stages/train.py"))
    with ExitStack() as lock:
        mine = lock.enter_context(claimed(scratch, name)) if launch.is_main() else None
        folder = distributed.from_main(mine.folder if mine else None)
        yield mine or (Checkpoints(folder, None) if folder else None)


def _save_adapter(model: Any, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Save the adapter alone, without paths and with names in order: equal runs give equal bytes."""
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form with nothing filled in
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "models/base"
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
