"""Training from the base to the saved adapter, by any method, in one phase or with a supervised phase first."""

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
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PrinterCallback, set_seed
from transformers.utils import is_liger_kernel_available

from lathe.common import launch, paths
from lathe.common.code_closure import code_closure
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.common.scratch import compute_fingerprint
from lathe.config.base import Auto
from lathe.config.params import Params
from lathe.models.adapter import add_adapter, check_adapter
from lathe.models.loading import load_base
from lathe.models.measured_answers import AnswerLikelihood, choose_answers
from lathe.models.model_folder import open_model
from lathe.models.precision import resolve_precision
from lathe.models.template_options import load_tokenizer_with_options
from lathe.models.tokenizer_template import read_chat_template
from lathe.training import distributed, memory
from lathe.training.best_weights import BestWeights
from lathe.training.checkpoints import Checkpoints, acquire_checkpoints, raise_disk_errors
from lathe.training.dvclive_curves import Curves
from lathe.training.freeze_proof import hash_tensors
from lathe.training.full_tuning import map_to_base_names, save_full_model
from lathe.training.fused_lora import add_updates_in_products
from lathe.training.measure_answers import measure_answers
from lathe.training.page_release import PageRelease
from lathe.training.preference_pairs import check_pairs
from lathe.training.resume import ResumableTrainer
from lathe.training.reward_functions import RewardFunction, get_source_file
from lathe.training.row_attention import check_attention
from lathe.training.sharding import get_state_to_save
from lathe.training.throughput import ThroughputMeter
from lathe.training.trainer_setup import TrainerSetup, uses_liger
from lathe.training.vllm import check_vllm
from lathe.training.weighted_rewards import check_rewards
from lathe.training.zero import check_zero, set_up_zero

logger = logging.getLogger(__name__)

# Their versions are part of a training's fingerprint: a checkpoint is not resumed with another one.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True)
class TrainingResult:
    """What a training reports beside the adapter."""

    frozen: dict[str, str]  # name of every frozen tensor -> SHA-256 of its bytes, the same before and after
    trained_tensors: int
    answers: AnswerLikelihood | None  # of held-out rows; None where the tensors are on several GPUs
    throughput: dict[str, float]  # of the last phase, such as {"tokens_per_second": 812.5}


@dataclass(frozen=True)
class _Phase:
    method: str
    params: Params
    curve_prefix: str


@memory.keep_memory_until_the_end()
def train(
    base: Path,
    splits: Mapping[str, Path],
    adapter: Path,
    metrics: Path,
    *,
    params: Params,
    functions: Mapping[str, RewardFunction] | None = None,
    throughput: Path | None = None,
    scratch: Path | None = None,
) -> TrainingResult:
    """Train on the examples in the file `splits["train"]`, and save the trained weights to the empty folder `adapter`.

    These are an adapter for `base` as PEFT saves it, or with full tuning all weights (`full_tuning`).
    `splits["validation"]` is evaluated every `eval_steps`. Both files are JSON Lines as `preprocess` writes them.
    The curves go to the dvclive folder `metrics`, and what varies from run to run to the folder `throughput`.
    `functions` are the user's own rewards, by their names in `grpo.rewards`.
    Every `save_steps` a checkpoint is written to the folder `scratch`, from which the same training resumes; they are
    removed at the end. Without `scratch` there are none.
    Raises InputError where a parameter does not fit the model and where the loss is not finite, Interrupted after
    SIGINT or SIGTERM.
    """
    distributed.join()
    training = params.training
    precision = resolve_precision(training.precision)
    check_attention(training.attn_implementation, precision=precision)
    _check_liger(training.use_liger_kernel)
    BestWeights(training)  # raises if the method does not evaluate the metric
    is_full = training.tuning == "full"
    examples = {split: read_jsonl(file) for split, file in splits.items()}
    if training.method == "dpo":
        check_pairs(examples)
    if training.method == "grpo":
        check_vllm(params)
    if not is_full:
        check_adapter(base, params.lora)
    check_zero(params)
    set_up_zero()
    set_seed(params.seed)  # before the model and the adapter are made
    tokenizer = load_tokenizer_with_options(base, params.preprocess.chat_template_kwargs)
    if training.method == "grpo":
        check_rewards(params.grpo.rewards, read_chat_template(tokenizer), examples["train"])
    weights_type = "fp32" if is_full else precision
    model = load_base(base, params.quantization, precision=weights_type, sharded=launch.is_sharded())
    if warning := describe_unusual_rate(training.learning_rate, weights=model.num_parameters(), tuning=training.tuning):
        logger.warning(warning)
    if is_full:
        map_to_base_names(model, open_model(base))  # raises if it could not be saved, before hours of training
    else:
        added = tokenizer.convert_tokens_to_ids(params.preprocess.added_tokens)
        model = add_adapter(model, params.lora, token_ids=added)
        if model.device.type == "cuda" and not launch.is_sharded():
            add_updates_in_products(model)
    frozen = hash_tensors(model)
    phases = _plan_phases(params)
    acquired: list[Checkpoints | None] = []
    with Curves(metrics, throughput) as curves, ExitStack() as locks:
        for phase in phases:
            tensors = {**frozen, **hash_tensors(model, trained=True)}
            values = _get_fingerprint_values(phase, tensors, precision, model.device.type)
            files = _get_fingerprint_files(phase, base, splits, functions or {})
            acquired.append(locks.enter_context(_acquire_checkpoints(scratch, values, files)))
            meter = ThroughputMeter(model, precision=precision)
            set_seed(params.seed)  # as if there had been no phase before
            trainer = _import_builder(phase.method)(
                TrainerSetup(
                    model=model,
                    tokenizer=tokenizer,
                    splits=examples,
                    params=phase.params,
                    precision=precision,
                    checkpoints=acquired[-1],
                    callbacks=[meter, curves.make_callback(phase.curve_prefix, meter), PageRelease()],
                    functions=functions or {},
                )
            )
            meter.follow(trainer)
            trainer.remove_callback(PrinterCallback)  # the curves log the same
            with _disable_input_casts(model, precision):
                trainer.train_to_end()
            if phase is phases[-1]:
                curves.add_to_summary(trainer.best.summarize(trainer.state))
            else:
                trainer.save_result()
        after = hash_tensors(model)
        if moved := [name for name, digest in frozen.items() if after[name] != digest]:
            raise RuntimeError(f"training moved {len(moved)} tensors that are frozen, {moved[0]} first")
        answers = None
        if not launch.is_sharded():
            chosen = choose_answers(tokenizer, examples["validation"])
            answers = measure_answers(model, chosen, precision=precision)
        state = get_state_to_save(model)
        if launch.is_main():
            with raise_disk_errors():
                if is_full:
                    save_full_model(model, base, adapter, state)
                else:
                    _save_adapter(model, adapter, state)
                if params.preprocess.chat_template_kwargs:  # the merge takes it in place of the base's
                    (adapter / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        for checkpoints in acquired:
            if checkpoints:
                checkpoints.remove()
    trained_tensors = sum(parameter.requires_grad for parameter in model.parameters())
    return TrainingResult(
        frozen=frozen, trained_tensors=trained_tensors, answers=answers, throughput=meter.measure_overall()
    )


def describe_unusual_rate(rate: float, *, weights: int, tuning: Literal["lora", "full"]) -> str | None:
    """Return a warning if `rate` is far from the usual rates for a model of that many weights, else None.

    The rate of a tiny model ruins a real one, and a real one's teaches a tiny model nothing.
    """
    # LoRA's usual 1e-5 to 1e-3 is for models from 0.5 B weights; models of a few million take ten times as much, and
    # SmolLM2-135M is in between. Full tuning takes a tenth of an adapter's rate.
    highest = 2e-3 if weights >= 500_000_000 else 5e-3 if weights >= 50_000_000 else 5e-2
    lowest = 1e-6 if weights >= 50_000_000 else 1e-5
    if tuning == "full":
        lowest, highest = lowest / 10, highest / 10
    if lowest <= rate <= highest:
        return None
    what = "training all of" if tuning == "full" else "an adapter on"
    return (
        f"training.learning_rate is {rate:g}; {what} {weights / 1e6:,.0f} M weights usually takes {lowest:g} to "
        f"{highest:g}; set it, or start from a recipe for such a model"
    )


def _check_liger(choice: bool | Auto) -> None:
    if choice is True and not is_liger_kernel_available():
        raise InputError(
            "training.use_liger_kernel is true; liger-kernel is not installed; set it to auto, or install it: "
            "`make setup EXTRAS=gpu`",
            code="liger-kernel-missing",
        )


def _disable_input_casts(model: Any, precision: str) -> AbstractContextManager[Any]:
    """Leave the input of an adapter in bf16: PEFT would cast it to float32, and autocast back."""
    if precision != "bf16" or not isinstance(model, PeftModel):
        return nullcontext()
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):  # which lacks what PEFT's function sets
            module.cast_input_dtype_enabled = True
    context: AbstractContextManager[Any] = disable_input_dtype_casting(model)
    return context


def _import_builder(method: str) -> Callable[[TrainerSetup], ResumableTrainer]:
    # Imported here: each of TRL's trainers takes a second or more.
    match method:
        case "sft":
            from lathe.training.sft import build_trainer
        case "dpo":
            from lathe.training.dpo import build_trainer
        case "grpo":
            from lathe.training.grpo import build_trainer
    return build_trainer


def _plan_phases(params: Params) -> list[_Phase]:
    method = params.training.method
    main = _Phase(method, params, "")
    if method == "sft":
        return [main]
    epochs = getattr(params, method).sft_epochs
    if not epochs:
        return [main]
    supervised = params.training.model_copy(
        update={
            "method": "sft",
            "num_train_epochs": epochs,
            "max_steps": None,
            "metric_for_best_model": "auto",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
        }
    )
    return [_Phase("sft", params.model_copy(update={"training": supervised}), "sft/"), main]


def _get_fingerprint_values(phase: _Phase, tensors: dict[str, str], precision: str, device: str) -> dict[str, Any]:
    """Return the parameters and circumstances that determine the result of a phase."""
    params = phase.params
    return {
        "training": params.training.model_dump(exclude={"save_steps"}),
        "method": getattr(params, phase.method).model_dump(),
        "lora": params.lora.model_dump(),
        "quantization": params.quantization.model_dump(),
        "supervise": params.preprocess.supervise,
        "chat_template_kwargs": params.preprocess.chat_template_kwargs,
        "added_tokens": params.preprocess.added_tokens,
        "seed": params.seed,
        "precision": precision,
        "liger": uses_liger(params.training.use_liger_kernel),
        "device": device,
        "processes": distributed.count_processes(),
        "sharded": launch.is_sharded(),
        "zero_stage": launch.get_zero_stage(),
        "tensors": tensors,
    }


def _get_fingerprint_files(
    phase: _Phase, base: Path, splits: Mapping[str, Path], functions: Mapping[str, RewardFunction]
) -> dict[str, Path]:
    """Return the files that determine the result of a phase: data, base without its weights, the user's rewards."""
    files = {f"data/{split}": file for split, file in splits.items()}
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":  # loaded tensors are hashed instead
            files[f"base/{file.name}"] = file
    if phase.method == "grpo":
        files |= {f"reward/{name}": get_source_file(function) for name, function in functions.items()}
    return files


@contextmanager
def _acquire_checkpoints(
    scratch: Path | None, values: dict[str, Any], files: dict[str, Path]
) -> Iterator[Checkpoints | None]:
    if scratch is None:
        yield None
        return
    packages = (*PACKAGES, "deepspeed") if launch.get_zero_stage() else PACKAGES
    name = compute_fingerprint(
        values, files=files, packages=packages, code=code_closure(paths.ROOT / "stages/train.py")
    )
    with ExitStack() as lock:
        locked = lock.enter_context(acquire_checkpoints(scratch, name)) if launch.is_main() else None
        folder = distributed.broadcast_from_main(locked.folder if locked else None)
        yield locked or (Checkpoints(folder, None) if folder else None)


def _save_adapter(model: Any, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Save the adapter without paths and with sorted names: equal runs give equal bytes."""
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "models/base"
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
