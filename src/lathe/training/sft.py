"""Supervised fine-tuning with TRL; only the answers' tokens carry loss."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from trl import SFTConfig, SFTTrainer

from lathe.errors import InputError
from lathe.model import unwrapped
from lathe.template import Encoded, encode
from lathe.training import ranks
from lathe.training.attention import separate_rows
from lathe.training.best import Best
from lathe.training.blanks import BlanksLast, filled
from lathe.training.finite import not_finite
from lathe.training.loss import summed_loss
from lathe.training.packing import EndToEnd, Padded, model_inputs, packed_dataset, row_dataset
from lathe.training.resume import Resumable
from lathe.training.setting import Setting

logger = logging.getLogger(__name__)


def trainer(setting: Setting) -> Resumable:
    """Return the trainer that teaches the answers of the conversations.

    Raises InputError where rows are to be packed and the model would mix them.
    """
    training, tokenizer = setting.params.training, setting.tokenizer
    packing, max_length = setting.params.sft.packing, training.max_length
    supervise = setting.params.preprocess.supervise
    rows = {
        split: encode(tokenizer, [row["messages"] for row in setting.splits[split]], supervise=supervise)
        for split in ("train", "validation")
    }
    end_to_end = separate_rows(setting.model, training.attn_implementation, precision=setting.precision)
    if not end_to_end:
        if packing:
            raise InputError(f"sft.packing is true; {_why_padded(setting)}; set it to false")
        logger.warning("%s: batches are padded, which is slower", _why_padded(setting))
    train = packed_dataset(rows["train"], max_length=max_length) if packing else row_dataset(rows["train"])
    processes = ranks.count()
    return AnswerTrainer(
        precision=setting.precision,
        model=setting.model,
        args=SFTConfig(
            **setting.arguments(
                max_length=max_length,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,  # the collator needs them all
            )
        ),
        train_dataset=filled(train, processes * training.per_device_train_batch_size),
        eval_dataset=filled(row_dataset(rows["validation"]), processes * training.per_device_eval_batch_size),
        data_collator=EndToEnd() if end_to_end else Padded(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=list(setting.callbacks),
        rows=rows["train"],
        examples=len(train),
        checkpoints=setting.checkpoints,
        save_steps=training.save_steps,
        best=Best(training),
    )


class AnswerTrainer(Resumable, SFTTrainer):
    """TRL's trainer with logits only where an answer token is predicted.

    TRL computes entropy and accuracy over the vocabulary at every step; on a real vocabulary that costs more than the
    step itself.
    """

    def __init__(self, *, precision: str, rows: Sequence[Encoded], examples: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.precision = precision
        self.rows = rows
        self.examples = examples  # of the training split; blank ones follow them
        self.step_batches: list[torch.Tensor] = []  # token ids of the passes of the step at hand
        self.not_finite: list[tuple[float, torch.Tensor]] = []  # losses and token ids of those that went wrong

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
        self.trained_tokens += sum(inputs["row_lengths"]) if inputs["supervised_tokens"] else 0
        self.trained_supervised_tokens += inputs["supervised_tokens"]
        loss, supervised_tokens = self._summed_loss(model, inputs)
        if num_items_in_batch is None:
            return loss / supervised_tokens
        # Of all processes' passes; gradients are then averaged over the processes, and the loss that is logged too.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one pass, and note a loss that is no number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self.not_finite.append((loss.item(), inputs["input_ids"].cpu()))
        self.step_batches.append(inputs["input_ids"])
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        wrong = not self.args.fp16 and not torch.isfinite(norm)  # in fp16 the scaler skips such a step and goes on
        if ranks.largest(int(wrong or bool(self.not_finite))):
            self._refuse(norm)
        self.step_batches.clear()
        return norm

    def _refuse(self, norm: torch.Tensor) -> NoReturn:
        """Say which step and rows gave a loss or gradient that is no number, in all processes alike."""
        lost = [each for by_rank in ranks.gathered(self.not_finite) for each in by_rank]
        step = self.state.global_step + 1
        if lost:
            raise not_finite("loss", lost[0][0], step, [ids for _, ids in lost], self.rows)
        batches = ranks.gathered([ids.cpu() for ids in self.step_batches])
        raise not_finite("grad_norm", norm.item(), step, [ids for by_rank in batches for ids in by_rank], self.rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if len(self.train_dataset) == self.examples:
            return super()._get_train_sampler(train_dataset)
        return BlanksLast(self.train_dataset, self.examples, self.args.data_seed)

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


def _why_padded(setting: Setting) -> str:
    asked = setting.params.training.attn_implementation
    if asked != "auto":
        return f"training.attn_implementation is {asked!r}, which pads rows"
    name = type(unwrapped(setting.model)).__name__
    return f"{name} does not keep rows apart without padding"
