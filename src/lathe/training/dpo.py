"""Direct preference optimization with TRL: the better answer of a pair is to gain on the worse one.

The reward of an answer is beta times how much likelier it has become than it was when the pairs began; the margin is
the better answer's reward less the worse one's (https://arxiv.org/abs/2305.18290).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from trl import DPOConfig, DPOTrainer

from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import Best
from lathe.training.preference_pairs import encode_pairs, pair_dataset
from lathe.training.resume import ResumableTrainer
from lathe.training.row_attention import pad_rows
from lathe.training.trainer_setup import Setting


def trainer(setting: Setting) -> ResumableTrainer:
    """Return the trainer that learns from pairs of answers, which `lathe.training.preference_pairs` has checked."""
    training, dpo = setting.params.training, setting.params.dpo
    chosen, rejected = encode_pairs(setting.tokenizer, setting.splits["train"])
    pad_rows(setting.model, training.attn_implementation)
    return PairTrainer(
        precision=setting.precision,
        model=setting.model,
        args=DPOConfig(
            **setting.arguments(
                num_train_epochs=dpo.num_train_epochs,
                per_device_train_batch_size=dpo.per_device_train_batch_size,
                gradient_accumulation_steps=dpo.gradient_accumulation_steps,
                learning_rate=dpo.learning_rate,
                beta=dpo.beta,
                loss_type=dpo.loss_type,
                label_smoothing=dpo.label_smoothing,
                max_length=None,  # rows that are too long are preprocess's matter; no answer is cut here
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=training.per_device_eval_batch_size,
                eval_on_start=True,  # a margin says something beside the one it began with
            )
        ),
        train_dataset=pair_dataset(chosen, rejected),
        eval_dataset=pair_dataset(*encode_pairs(setting.tokenizer, setting.splits["validation"])),
        processing_class=setting.tokenizer,
        callbacks=list(setting.callbacks),
        rows=chosen,
        rate="dpo.learning_rate",
        checkpoints=setting.checkpoints,
        save_steps=training.save_steps,
        best=Best(training),
    )


class PairTrainer(BaseTrainer, ResumableTrainer, DPOTrainer):
    """TRL's trainer on token ids of ours, which is exact over the validation pairs and when it goes on.

    What the reference, the model as it is now, makes of each pair is computed once and before the first step, so that
    neither a second model nor a copy of the adapter stays in memory.
    """

    def __init__(self, **arguments: Any) -> None:
        self.evaluated: list[int] = []  # pairs of each batch of the evaluation at hand
        super().__init__(**arguments)
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's copy of the adapter, for the reference
            self.model.delete_adapter("ref")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the summed log-probabilities of the better and of the worse answers, in the precision of training."""
        with self.compute_loss_context_manager():
            return super().compute_ref_log_probs(model, inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the batch's pairs."""
        if self.model.training:
            self.trained_tokens += int(inputs["attention_mask"].sum())
            self.trained_supervised_tokens += int(inputs["completion_mask"].sum())
        else:
            self.evaluated.append(len(inputs["input_ids"]) // 2)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what TRL has collected, validation as the mean over pairs: TRL's is over batches, whatever they hold."""
        self._metrics["train"].pop("num_tokens", None)  # no checkpoint keeps TRL's count; ours is logged
        if self.evaluated:
            pairs = sum(self.evaluated)
            for name, means in self._metrics["eval"].items():
                if len(means) == len(self.evaluated):
                    whole = sum(mean * count for mean, count in zip(means, self.evaluated, strict=True))
                    self._metrics["eval"][name] = [whole / pairs]
            self.evaluated.clear()
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # token ids are there: those of lathe.models.chat_template, as in inference

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        with _bars_on_terminals_only():
            return super()._precompute_ref_logps(dataset, name, batch_size)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self.state.global_step:  # a run that goes on has evaluated before its first step
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    if sys.stderr.isatty():
        yield
        return
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
