"""Supervised fine-tuning of an adapter with TRL; only the answers' tokens carry loss."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, set_seed
from trl import SFTConfig

from lathe import memory
from lathe.errors import InputError
from lathe.model import add_adapter, check_adapter, load_base, load_tokenizer, resolve_precision
from lathe.params import Lora, Quantization, Training
from lathe.template import Encoded, encode
from lathe.training.attention import separate_rows
from lathe.training.checkpoints import Checkpoints, claimed, fingerprint
from lathe.training.curves import Curves
from lathe.training.finite import not_finite
from lathe.training.frozen import digests
from lathe.training.loss import summed_loss
from lathe.training.packing import EndToEnd, Padded, model_inputs, packed_dataset, row_dataset
from lathe.training.resume import ResumableTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a training left to record beside the adapter."""

    frozen: dict[str, str]  # name of every frozen tensor -> SHA-256 of its bytes, the same before and after
    tokens_per_second: float
    supervised_tokens_per_second: float


@memory.given_back()
def train(
    base: Path,
    splits: dict[str, list[dict[str, Any]]],
    adapter: Path,
    metrics: Path,
    *,
    seed: int,
    training: Training,
    lora: Lora,
    quantization: Quantization,
    supervise: Literal["all", "last"],
    scratch: Path | None = None,
) -> Trained:
    """Train an adapter for `base` on the rows of `splits["train"]` and save it into the empty folder `adapter`.

    The loss curves go to the dvclive folder `metrics`; `splits["validation"]` is evaluated every `eval_steps`.
    Every `save_steps` a checkpoint goes to the folder `scratch`, from where the same training goes on if it was
    interrupted; at the end they are removed. Without `scratch` there are none.
    Raises InputError where a parameter does not fit the model and where the loss is not finite, Interrupted after
    SIGINT or SIGTERM.
    """
    set_seed(seed)  # before the model and the adapter are made
    precision = resolve_precision(training.precision)
    check_adapter(base, lora)
    tokenizer = load_tokenizer(base)
    model = load_base(base, quantization, precision=precision)
    if warning := unusual_rate(training.learning_rate, weights=model.num_parameters()):
        logger.warning(warning)
    end_to_end = separate_rows(model, precision=precision)
    if not end_to_end:
        name = type(model).__name__
        if training.packing:
            raise InputError(f"training.packing is true; {name} does not keep packed rows apart; set it to false")
        logger.warning("%s does not keep rows apart without padding: batches are padded, which is slower", name)
    model = add_adapter(model, lora)
    frozen_before = digests(model)

    rows = {split: _encode(tokenizer, splits[split], supervise) for split in ("train", "validation")}
    decides = {
        "training": training.model_dump(exclude={"save_steps"}),
        "lora": lora.model_dump(),
        "quantization": quantization.model_dump(),
        "seed": seed,
        "precision": precision,
        "device": model.device.type,
        "base": {**frozen_before, "config": (base / "config.json").read_text(encoding="utf-8")},
        "rows": {split: _digest(encoded) for split, encoded in rows.items()},
    }
    with _checkpoints(scratch, decides) as checkpoints, Curves(metrics) as curves:
        trainer = AnswerTrainer(
            precision=precision,
            model=model,
            args=_arguments(training, seed=seed, precision=precision),
            train_dataset=(
                packed_dataset(rows["train"], max_length=training.max_length)
                if training.packing
                else row_dataset(rows["train"])
            ),
            eval_dataset=row_dataset(rows["validation"]),
            data_collator=EndToEnd() if end_to_end else Padded(tokenizer.pad_token_id or 0),
            processing_class=tokenizer,
            callbacks=[curves.callback()],
            rows=rows["train"],
            checkpoints=checkpoints,
            save_steps=training.save_steps,
        )
        trainer.remove_callback(PrinterCallback)  # the curves log the same
        started = time.perf_counter()
        trainer.train_to_the_end()
        seconds = time.perf_counter() - started
        if not _evaluated_last(trainer.state):
            trainer.evaluate()
        frozen_after = digests(model)
        if moved := [name for name, digest in frozen_before.items() if frozen_after[name] != digest]:
            raise RuntimeError(f"training moved {len(moved)} tensors that are frozen, {moved[0]} first")
        _save(model, adapter)
        if checkpoints:
            checkpoints.remove()
    return Trained(
        frozen=frozen_after,
        tokens_per_second=round(trainer.trained_tokens / seconds, 1),
        supervised_tokens_per_second=round(trainer.trained_supervised_tokens / seconds, 1),
    )


def unusual_rate(rate: float, *, weights: int) -> str | None:
    """Return a warning where `rate` is far from what adapters of models of so many weights are trained with, or None.

    The committed params.yaml is a toy's; its rate ruins a real model, and a real model's rate teaches the toy nothing.
    """
    # LoRA's usual 1e-5 to 1e-3 is for models from 0.1 B weights; ones of a few million take ten times as much.
    lowest, highest = (1e-6, 2e-3) if weights >= 100_000_000 else (1e-5, 5e-2)
    if lowest <= rate <= highest:
        return None
    return (
        f"training.learning_rate is {rate:g}; an adapter on {weights / 1e6:,.0f} M weights usually takes {lowest:g} to "
        f"{highest:g}; the values in params.yaml are a toy's"
    )


class AnswerTrainer(ResumableTrainer):
    """TRL's trainer with logits only where an answer token is predicted, and float32 adapter weights.

    TRL casts a 4-bit model's adapter to bf16, where a small update is rounded away, and computes entropy and
    accuracy over the vocabulary at every step; on a real vocabulary that costs more than the step itself.
    """

    def __init__(self, *, precision: str, rows: Sequence[Encoded], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.precision = precision
        self.rows = rows
        self.step_batches: list[torch.Tensor] = []  # token ids of the passes of the step at hand
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.trained_tokens = 0  # without padding
        self.trained_supervised_tokens = 0

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Return bf16 autocast, where the forward pass is in bf16.

        Asked to do so itself, accelerate would also give a float32 copy of all logits.
        """
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=bool(cache_enabled))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood per supervised token of the whole step, all passes together."""
        self.trained_tokens += sum(inputs["row_lengths"])
        self.trained_supervised_tokens += inputs["supervised_tokens"]
        loss, supervised_tokens = self._summed_loss(model, inputs)
        return loss / (supervised_tokens if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one pass, and refuse a loss that is no number, naming step and rows."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise not_finite("loss", loss.item(), self.state.global_step + 1, [inputs["input_ids"]], self.rows)
        self.step_batches.append(inputs["input_ids"])
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16 and not torch.isfinite(norm):  # in fp16 the scaler skips such a step and goes on
            raise not_finite("grad_norm", norm.item(), self.state.global_step + 1, self.step_batches, self.rows)
        self.step_batches.clear()
        return norm

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Log the loss per supervised token; the stock loop averages over batches, whatever they hold."""
        self.model.eval()
        loss = torch.zeros((), device=self.args.device)
        tokens = torch.zeros((), device=self.args.device)
        for inputs in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad(), self.compute_loss_context_manager():
                batch_loss, batch_tokens = self._summed_loss(self.model, self._prepare_inputs(inputs))
            loss += batch_loss
            tokens += batch_tokens
        loss, tokens = self.accelerator.reduce(loss), self.accelerator.reduce(tokens)
        self.model.train()
        measured = {f"{metric_key_prefix}_loss": (loss / tokens).item()}
        self.log(dict(measured))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return measured

    def _summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        logits = model(**model_inputs(inputs), logits_to_keep=inputs["columns"], use_cache=False).logits
        return summed_loss(logits.flatten(0, 1), inputs["targets"].flatten()), inputs["supervised_tokens"]


@contextmanager
def _checkpoints(scratch: Path | None, decides: dict[str, Any]) -> Iterator[Checkpoints | None]:
    if scratch is None:
        yield None
        return
    with claimed(scratch, fingerprint(decides)) as checkpoints:
        yield checkpoints


def _digest(rows: Sequence[Encoded]) -> str:
    # Of what is learnt, so that rows, tokenizer, template and `supervise` are all in it.
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.supervised)).encode())
    return digest.hexdigest()


def _evaluated_last(state: Any) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


def _encode(tokenizer: Any, rows: list[dict[str, Any]], supervise: Literal["all", "last"]) -> Sequence[Encoded]:
    return encode(tokenizer, [row["messages"] for row in rows], supervise=supervise)


def _arguments(training: Training, *, seed: int, precision: str) -> SFTConfig:
    on_cpu = not torch.cuda.is_available()
    return SFTConfig(
        output_dir="unused",  # nothing is saved there: save_strategy is "no"
        save_strategy="no",
        report_to=[],
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpu,
        bf16=False,  # AnswerTrainer's own matter
        fp16=precision == "fp16",
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        per_device_eval_batch_size=training.per_device_eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        gradient_checkpointing=training.gradient_checkpointing,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the device at every pass, and hides what must stop the run
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        max_length=training.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # the collator needs them all
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,  # lathe.training.curves draws the bar
    )


def _save(model: Any, folder: Path) -> None:
    """Save the adapter alone, without paths and with names in order: equal runs give equal bytes."""
    try:
        model.save_pretrained(folder, save_embedding_layers=False)
    except SafetensorError as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from None
        raise
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form with nothing filled in
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "models/base"
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
