"""Direct preference optimization with TRL: the chosen answer of a pair is made likelier than the rejected one.

The reward of an answer is beta times the gain of its log-probability over the reference model, which is the model as
this phase began; the margin is the chosen answer's reward less the rejected one's (https://arxiv.org/abs/2305.18290).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from trl import DPOConfig, DPOTrainer

from lathe.common.progress import Progress
from lathe.training import distributed
from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import BestWeights
from lathe.training.preference_pairs import build_pair_dataset, encode_pairs
from lathe.training.resume import ResumableTrainer
from lathe.training.row_attention import pad_rows
from lathe.training.trainer_setup import TrainerSetup


def build_trainer(setup: TrainerSetup) -> ResumableTrainer:
    """Return the trainer for preference pairs, which `lathe.training.preference_pairs` has checked."""
    training, dpo = setup.params.training, setup.params.dpo
    chosen, rejected = encode_pairs(setup.tokenizer, setup.splits["train"])
    pad_rows(setup.model, training.attn_implementation)
    return PairTrainer(
        precision=setup.precision,
        model=setup.model,
        args=DPOConfig(
            **setup.build_arguments(
                num_train_epochs=dpo.num_train_epochs,
                per_device_train_batch_size=dpo.per_device_train_batch_size,
                gradient_accumulation_steps=dpo.gradient_accumulation_steps,
                learning_rate=dpo.learning_rate,
                beta=dpo.beta,
                loss_type=dpo.loss_type,
                label_smoothing=dpo.label_smoothing,
                max_length=None,  # preprocess has handled long examples; no answer is cut here
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=training.per_device_eval_batch_size,
                eval_on_start=True,  # so that the curve of the margin starts before training
            )
        ),
        train_dataset=build_pair_dataset(chosen, rejected),
        eval_dataset=build_pair_dataset(*encode_pairs(setup.tokenizer, setup.splits["validation"])),
        processing_class=setup.tokenizer,
        callbacks=list(setup.callbacks),
        sequences=chosen,
        learning_rate_key="dpo.learning_rate",
        checkpoints=setup.checkpoints,
        save_steps=training.save_steps,
        best=BestWeights(training),
    )


class PairTrainer(BaseTrainer, ResumableTrainer, DPOTrainer):
    """TRL's trainer on Lathe's token ids, exact over the validation pairs and when it resumes.

    The reference's log-probabilities are computed once, before the first step, by the model itself: neither a second
    model nor a copy of the adapter stays in memory.
    """

    def __init__(self, **arguments: Any) -> None:
        self.eval_batch_pairs: list[int] = []  # pairs in each batch of the current evaluation
        self.reference_progress: Progress | None = None
        super().__init__(**arguments)
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's copy of the adapter, for the reference
            self.model.delete_adapter("ref")

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the summed log-probabilities of chosen and rejected answers, in the precision of training."""
        if self.reference_progress:
            self.reference_progress.add(len(inputs["input_ids"]) // 2 * distributed.count_processes())
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
            self.eval_batch_pairs.append(len(inputs["input_ids"]) // 2)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's measures, those of validation as the mean over pairs: TRL averages over batches of any size."""
        self._metrics["train"].pop("num_tokens", None)  # TRL's count is in no checkpoint; ours is logged instead
        if self.eval_batch_pairs:
            pairs = sum(self.eval_batch_pairs)
            for name, means in self._metrics["eval"].items():
                if len(means) == len(self.eval_batch_pairs):
                    total = sum(mean * count for mean, count in zip(means, self.eval_batch_pairs, strict=True))
                    self._metrics["eval"][name] = [total / pairs]
            self.eval_batch_pairs.clear()
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # it holds token ids already, from lathe.models.chat_template as in inference

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        task = f"log-probabilities of the {name} pairs under the reference"
        with _hide_bars_of_others(), Progress(task, len(dataset), unit="pair") as progress:
            self.reference_progress = progress
            computed = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_progress = None
        return computed

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self.state.global_step:  # a resumed run has evaluated before its first step
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)


@contextmanager
def _hide_bars_of_others() -> Iterator[None]:
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
