"""Supervised fine-tuning with TRL: only the answers' tokens carry loss."""

import logging
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.config.base import get_number
from lathe.models.adapter import unwrap
from lathe.models.loss_mask import encode
from lathe.training import distributed
from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import BestWeights
from lathe.training.dataset_padding import PaddingLastSampler, pad_dataset
from lathe.training.loss import uses_tiles
from lathe.training.packing import (
    PaddedCollator,
    PaddingFreeCollator,
    build_dataset,
    build_packed_dataset,
    cut_documents,
)
from lathe.training.resume import ResumableTrainer
from lathe.training.row_attention import separate_rows
from lathe.training.trainer_setup import TrainerSetup
from lathe.training.training_step import compute_step_loss, has_plain_head

logger = logging.getLogger(__name__)


def build_trainer(setup: TrainerSetup) -> ResumableTrainer:
    """Return the trainer that teaches the answers of the conversations.

    Raises InputError where sequences are to be packed and the model would mix them.
    """
    training, tokenizer = setup.params.training, setup.tokenizer
    packing, max_length = setup.params.sft.packing, training.max_length
    supervise = setup.params.preprocess.supervise
    sequences = {
        split: cut_documents(
            encode(
                tokenizer,
                [example["messages"] for example in setup.splits[split]],
                supervise=supervise,
                tools=[example.get("tools") for example in setup.splits[split]],
            ),
            max_length,
        )
        for split in ("train", "validation")
    }
    is_padding_free = separate_rows(setup.model, training.attn_implementation, precision=setup.precision)
    if not is_padding_free:
        reason = _explain_padding(setup)
        if packing:
            raise InputError(f"sft.packing is true; {reason}; set it to false", code="packing-impossible")
        logger.warning("%s: batches are padded, which is slower", reason)
    if packing:
        train = build_packed_dataset(sequences["train"], max_length=max_length)
    else:
        train = build_dataset(sequences["train"])
    processes = distributed.count_processes()
    return AnswerTrainer(
        precision=setup.precision,
        model=setup.model,
        args=SFTConfig(
            **setup.build_arguments(
                max_length=max_length,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,  # the collator needs them all
                router_aux_loss_coef=0.0,  # a router that is frozen needs no balance, and the loss here has none
            )
        ),
        train_dataset=pad_dataset(train, processes * get_number(training.per_device_train_batch_size)),
        eval_dataset=pad_dataset(
            build_dataset(sequences["validation"]), processes * get_number(training.per_device_eval_batch_size)
        ),
        data_collator=PaddingFreeCollator() if is_padding_free else PaddedCollator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=list(setup.callbacks),
        sequences=sequences["train"],
        learning_rate_key="training.learning_rate",
        examples=len(train),
        checkpoints=setup.checkpoints,
        save_steps=training.save_steps,
        best=BestWeights(training),
    )


class AnswerTrainer(BaseTrainer, ResumableTrainer, SFTTrainer):
    """TRL's trainer with logits only where an answer token is predicted.

    TRL computes entropy and accuracy over the vocabulary at every step; on a real vocabulary that costs more than the
    step itself.
    """

    def __init__(self, *, examples: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.examples = examples  # in the training dataset, before its padding
        inner = unwrap(self.model)
        self.vocabulary = inner.config.get_text_config().vocab_size
        self.has_plain_head = has_plain_head(inner)
        add_fused_lm_head(inner)  # in place of TRL's, which computes entropy and accuracy too
        if launch.get_zero_stage():
            self.compute_under_autocast(inner)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood per supervised token of the whole step, all passes together."""
        self.trained_tokens += inputs["tokens"] if inputs["supervised_tokens"] else 0
        self.trained_supervised_tokens += inputs["supervised_tokens"]
        loss = self._sum_losses(model, inputs)
        if num_items_in_batch is None:
            return loss / inputs["supervised_tokens"]
        # Of all processes' passes; gradients are then averaged over the processes, and the loss that is logged too.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _sum_losses(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        in_tiles = self.has_plain_head and uses_tiles(
            self.args.device.type,
            inputs["targets"].numel(),
            self.vocabulary,
            itemsize=4 if self.precision == "fp32" else 2,
            sharded=launch.is_sharded(),
        )
        return compute_step_loss(model, inputs, in_tiles=in_tiles)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if len(self.train_dataset) == self.examples:
            return super()._get_train_sampler(train_dataset)
        return PaddingLastSampler(self.train_dataset, self.examples, self.args.data_seed)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Log the loss per supervised token; the stock loop averages over batches, whatever they hold."""
        self.model.eval()
        loss = torch.zeros((), device=self.args.device)
        tokens = torch.zeros((), device=self.args.device)
        for inputs in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad(), self.compute_loss_context_manager():
                loss += self._sum_losses(self.model, self._prepare_inputs(inputs))
            tokens += inputs["supervised_tokens"]
        loss, tokens = self.accelerator.reduce(loss), self.accelerator.reduce(tokens)
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": (loss / tokens).item()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _explain_padding(setup: TrainerSetup) -> str:
    attention = setup.params.training.attn_implementation
    if attention != "auto":
        return f"training.attn_implementation is {attention!r}, which pads rows"
    name = type(unwrap(setup.model)).__name__
    return f"{name} does not keep rows apart without padding"
