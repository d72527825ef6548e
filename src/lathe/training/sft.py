"""Supervised fine-tuning with TRL; only the answers' tokens carry loss."""

import logging
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from lathe.common.errors import InputError
from lathe.models.adapter import unwrapped
from lathe.models.loss_mask import encode
from lathe.training import distributed
from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import Best
from lathe.training.dataset_padding import BlanksLast, filled
from lathe.training.packing import EndToEnd, Padded, packed_dataset, row_dataset
from lathe.training.resume import ResumableTrainer
from lathe.training.row_attention import separate_rows
from lathe.training.trainer_setup import Setting
from lathe.training.training_step import compute_step_loss

logger = logging.getLogger(__name__)


def trainer(setting: Setting) -> ResumableTrainer:
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
    processes = distributed.count()
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
        rate="training.learning_rate",
        examples=len(train),
        checkpoints=setting.checkpoints,
        save_steps=training.save_steps,
        best=Best(training),
    )


class AnswerTrainer(BaseTrainer, ResumableTrainer, SFTTrainer):
    """TRL's trainer with logits only where an answer token is predicted.

    TRL computes entropy and accuracy over the vocabulary at every step; on a real vocabulary that costs more than the
    step itself.
    """

    def __init__(self, *, examples: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.examples = examples  # of the training split; blank ones follow them

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood per supervised token of the whole step, all passes together."""
        self.trained_tokens += sum(inputs["row_lengths"]) if inputs["supervised_tokens"] else 0
        self.trained_supervised_tokens += inputs["supervised_tokens"]
        loss = compute_step_loss(model, inputs)
        if num_items_in_batch is None:
            return loss / inputs["supervised_tokens"]
        # Of all processes' passes; gradients are then averaged over the processes, and the loss that is logged too.
        return loss / num_items_in_batch * self.accelerator.num_processes

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
                loss += compute_step_loss(self.model, self._prepare_inputs(inputs))
            tokens += inputs["supervised_tokens"]
        loss, tokens = self.accelerator.reduce(loss), self.accelerator.reduce(tokens)
        self.model.train()
        measured = {f"{metric_key_prefix}_loss": (loss / tokens).item()}
        self.log(dict(measured))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return measured


def _why_padded(setting: Setting) -> str:
    asked = setting.params.training.attn_implementation
    if asked != "auto":
        return f"training.attn_implementation is {asked!r}, which pads rows"
    name = type(unwrapped(setting.model)).__name__
    return f"{name} does not keep rows apart without padding"
