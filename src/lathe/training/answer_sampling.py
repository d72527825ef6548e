"""Answers of the model that is trained: sampled for the training, greedy for the evaluation.

They are made by transformers, or by vLLM, which TRL sends the weights to (`grpo.vllm_mode`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation

from lathe.common.errors import InputError

TokenIds = list[int]


class AnswerSampler(Protocol):
    """What makes answers to prompts, both as token ids."""

    def sample(self, prompts: Sequence[TokenIds]) -> tuple[list[TokenIds], list[list[float]] | None]:
        """Return an answer to each prompt, and the log-probability of each of its tokens if that is known."""

    def answer_greedily(self, prompts: Sequence[TokenIds]) -> list[TokenIds]:
        """Return the likeliest answer to each prompt. All processes must call it with as many prompts."""


class TransformersSampler:
    """Answers made by `generate` of the model itself, without dropout and in the precision of training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=trainer.max_completion_length,
            pad_token_id=trainer.processing_class.pad_token_id,
            eos_token_id=trainer.eos_token_ids,
            disable_compile=True,
        )

    def sample(self, prompts: Sequence[TokenIds]) -> tuple[list[TokenIds], None]:
        """Return an answer to each prompt, by the sampling that TRL configured."""
        return self._generate(prompts, self.trainer.generation_config), None

    def answer_greedily(self, prompts: Sequence[TokenIds]) -> list[TokenIds]:
        """Return the likeliest answer to each prompt."""
        return self._generate(prompts, self.greedy)

    def _generate(self, prompts: Sequence[TokenIds], config: GenerationConfig) -> list[TokenIds]:
        trainer = self.trainer
        longest, padding = max(map(len, prompts)), trainer.processing_class.pad_token_id
        ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = trainer.accelerator.device
        with (
            _answer_as_in_use(trainer.model),
            trainer.autocast_smart_context_manager(),
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
        ):
            try:
                rows = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise InputError(
                    f"the model gives no probabilities at step {trainer.state.global_step + 1}, from which to sample "
                    "answers; lower grpo.learning_rate",
                    code="probabilities-not-finite",
                ) from None
        ends = set(trainer.eos_token_ids)
        return [_cut_behind_end(row, ends) for row in rows[:, longest:].tolist()]


class VllmSampler:
    """Answers made by vLLM through TRL's `VLLMGeneration`, which has sampling parameters of its own."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def sample(self, prompts: Sequence[TokenIds]) -> tuple[list[TokenIds], list[list[float]]]:
        """Return an answer to each prompt, of which `num_generations` in a row are the same, with log-probabilities.

        TRL has sent the weights of the step.
        """
        _, answers, found, _ = self.trainer.vllm_generation.generate(
            prompts=list(prompts), images=None, num_generations=self.trainer.num_generations
        )
        return answers, [[token[0] for token in answer] for answer in found]

    def answer_greedily(self, prompts: Sequence[TokenIds]) -> list[TokenIds]:
        """Return the likeliest answer to each prompt, by the weights of now."""
        generation = self.trainer.vllm_generation
        generation.sync_weights()
        temperature, top_p = generation.temperature, generation.top_p
        generation.temperature, generation.top_p = 0.0, 1.0
        try:
            _, answers, _, _ = generation.generate(prompts=list(prompts), images=None, num_generations=1)
        finally:
            generation.temperature, generation.top_p = temperature, top_p
        return list(answers)


@contextmanager
def _answer_as_in_use(model: Any) -> Iterator[None]:
    """Leave out dropout, as whoever uses the model will."""
    is_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)


def _cut_behind_end(answer: TokenIds, ends: set[int]) -> TokenIds:
    """Return an answer up to its first end; the shorter ones of a batch are padded behind theirs."""
    length = next((index + 1 for index, token in enumerate(answer) if token in ends), len(answer))
    return answer[:length]
