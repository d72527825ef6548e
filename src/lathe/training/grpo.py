"""Group relative policy optimization with TRL: answers sampled for one prompt are compared by their rewards.

Source: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300).
"""

import json
import random
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lathe.models.adapter import unwrap
from lathe.models.answer_reading import render_prompt
from lathe.models.answer_syntax import find_thought_syntax
from lathe.models.chat_template import EXAMPLE_TOOL, ChatTemplate, TemplateError, Tools
from lathe.models.loss_mask import Encoded, encode
from lathe.models.message_form import ANSWER, EXAMPLE_CALL, QUESTION
from lathe.models.tokenizer_template import read_chat_template
from lathe.training import distributed
from lathe.training.answer_sampling import AnswerSampler, TransformersSampler, VllmSampler
from lathe.training.answer_text import AnswerDecoder
from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import BestWeights
from lathe.training.resume import ResumableTrainer
from lathe.training.row_attention import pad_rows
from lathe.training.trainer_setup import TrainerSetup
from lathe.training.vllm import build_vllm_arguments, unmerge_exactly
from lathe.training.weighted_rewards import RewardPrompt, WeightedReward, weight_rewards

# Sampled answers that later steps are still to be trained on; not in transformers' checkpoints.
ANSWERS_FILE = "answers_{rank}.safetensors"
REFERENCE_ADAPTER = "ref"  # TRL's name for the copy of the adapter that the KL divergence is measured from


def build_trainer(setup: TrainerSetup) -> ResumableTrainer:
    """Return the trainer that rewards answers to the last prompt of each conversation.

    Raises InputError where a parameter does not fit the model.
    """
    grpo, training, tokenizer = setup.params.grpo, setup.params.training, setup.tokenizer
    pad_rows(setup.model, training.attn_implementation)
    ends = _set_end_of_answer(setup.model, tokenizer)
    template = read_chat_template(tokenizer)
    prompts = {split: encode_prompts(tokenizer, setup.splits[split]) for split in ("train", "validation")}
    rewards = weight_rewards(grpo.rewards, setup.functions)
    arguments = GRPOConfig(
        **setup.build_arguments(
            max_steps=grpo.max_steps,
            per_device_train_batch_size=grpo.per_device_train_batch_size,
            gradient_accumulation_steps=grpo.gradient_accumulation_steps,
            learning_rate=grpo.learning_rate,
            num_generations=grpo.num_generations,
            num_generations_eval=1,
            max_completion_length=grpo.max_completion_length,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            top_k=0,  # transformers' default is 50
            beta=grpo.beta,
            epsilon=grpo.epsilon,
            num_iterations=grpo.num_iterations,
            loss_type=grpo.loss_type,
            scale_rewards=grpo.scale_rewards,
            reward_weights=[reward.weight for reward in rewards],
            shuffle_dataset=False,  # `_shuffle_prompts` does it, in a way that a resumed run repeats
            remove_unused_columns=False,
            chat_template_kwargs=setup.params.preprocess.chat_template_kwargs,
            **build_vllm_arguments(
                grpo, ends, max(len(prompt.prompt_ids) for row in prompts.values() for prompt in row)
            ),
        )
    )
    prompts_needed = -(-grpo.max_steps // grpo.num_iterations) * arguments.generation_batch_size // grpo.num_generations
    return RewardTrainer(
        prompts=prompts,
        rewards=rewards,
        template=template,
        precision=setup.precision,
        sequences=[Encoded(row, prompt.prompt_ids, []) for row, prompt in enumerate(prompts["train"])],
        learning_rate_key="grpo.learning_rate",
        model=setup.model,
        args=arguments,
        train_dataset=_shuffle_prompts(prompts["train"], prompts_needed, seed=setup.params.seed),
        eval_dataset=Dataset.from_dict({"prompt_index": list(range(len(prompts["validation"])))}),
        processing_class=tokenizer,
        callbacks=list(setup.callbacks),
        checkpoints=setup.checkpoints,
        save_steps=training.save_steps,
        best=BestWeights(training),
    )


class RewardTrainer(BaseTrainer, ResumableTrainer, GRPOTrainer):
    """TRL's trainer with the prompts of inference, answers without dropout, and an evaluation without sampling.

    Validation prompts are answered greedily, before the first step too, and the mean reward is logged.
    """

    def __init__(
        self,
        *,
        prompts: dict[str, list[RewardPrompt]],
        rewards: list[WeightedReward],
        template: ChatTemplate,
        **arguments: Any,
    ) -> None:
        self.prompts, self.rewards, self.template = prompts, rewards, template
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using .rollout_func.")  # it may change in a release
            super().__init__(
                reward_funcs=[self._make_reward_function(reward) for reward in rewards],
                rollout_func=_roll_out,
                **arguments,
            )
        self.decoder = AnswerDecoder(self.processing_class, template, self.eos_token_ids)
        self.sampler: AnswerSampler = VllmSampler(self) if self.use_vllm else TransformersSampler(self)
        if self.use_vllm and isinstance(self.model, PeftModel):
            unmerge_exactly(self.model)
        for model in (self.model, self.ref_model):
            if model is not None:
                self.compute_under_autocast(unwrap(model))
        self.add_callback(_EvaluateFirstCallback(self))

    def train_to_end(self) -> None:
        """Train as `ResumableTrainer` does, and delete TRL's copy of the adapter."""
        super().train_to_end()
        if REFERENCE_ADAPTER in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(REFERENCE_ADAPTER)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Log the mean reward of greedy answers to the validation split, and the mean of each reward."""
        accelerator, size = self.accelerator, self.args.per_device_eval_batch_size
        # Prompts of similar length together; each process takes its share of them.
        prompts = sorted(self.prompts["validation"], key=lambda prompt: len(prompt.prompt_ids))
        share = prompts[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(len(self.rewards) + 3, device=self.args.device, dtype=torch.float64)
        # As many of them in each, though some count for nothing: processes sample together.
        rounds = range(0, -(-len(prompts) // accelerator.num_processes), size)
        for start in rounds:
            batch = share[start : start + size]
            asked = [*batch, *prompts[: min(size, rounds.stop - start) - len(batch)]]
            answers = self.sampler.answer_greedily([prompt.prompt_ids for prompt in asked])
            for prompt, answer_ids in zip(batch, answers, strict=False):
                text = self.decoder.decode(answer_ids)
                values = [reward.compute(text, prompt, self.template) for reward in self.rewards]
                unfinished = answer_ids[-1] not in self.eos_token_ids
                sums += sums.new_tensor([*values, len(answer_ids), unfinished, 1])
        *means, length, unfinished, count = accelerator.reduce(sums).tolist()
        metrics = {
            f"{metric_key_prefix}_reward": sum(
                reward.weight * mean / count for reward, mean in zip(self.rewards, means, strict=True)
            ),
            **{
                f"{metric_key_prefix}_rewards/{reward.name}": mean / count
                for reward, mean in zip(self.rewards, means, strict=True)
            },
            f"{metric_key_prefix}_completion_length": length / count,
            f"{metric_key_prefix}_unfinished": unfinished / count,
        }
        super(GRPOTrainer, self).log(dict(metrics))  # TRL's would add the averages of the training, and clear them
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss, and count tokens; those of the answers are the supervised ones."""
        answer_tokens = int(inputs["completion_mask"].sum())
        self.trained_tokens += int(inputs["prompt_mask"].sum()) + answer_tokens
        self.trained_supervised_tokens += answer_tokens
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_token_ids(self, inputs: Any) -> torch.Tensor:
        """Return the prompts of the last forward pass; `inputs` are those of a whole step."""
        ids: torch.Tensor = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]["prompt_ids"]
        return ids

    def _make_reward_function(self, reward: WeightedReward) -> Any:
        # TRL calls it with columns of the dataset, and logs it by its name. The texts that it gives lack the control
        # tokens that mark thoughts and calls.
        def compute_rewards(*, completion_ids: list[list[int]], prompt_index: list[int], **_: Any) -> list[float]:
            return [
                reward.compute(self.decoder.decode(ids), self.prompts["train"][index], self.template)
                for ids, index in zip(completion_ids, prompt_index, strict=True)
            ]

        compute_rewards.__name__ = reward.name
        return compute_rewards

    def _save_extra_state(self, checkpoint: Path) -> None:
        super()._save_extra_state(checkpoint)
        if self._buffered_inputs and self._step % (self.args.steps_per_generation * self.num_iterations):
            tensors = {
                f"{index}.{name}": tensor.clone()  # the batches of a step are views of one tensor
                for index, batch in enumerate(self._buffered_inputs)
                for name, tensor in batch.items()
                if isinstance(tensor, torch.Tensor)
            }
            save_file(tensors, checkpoint / ANSWERS_FILE.format(rank=distributed.get_rank()))

    def _load_extra_state(self, checkpoint: Path) -> None:
        super()._load_extra_state(checkpoint)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self._step = state["global_step"] * self.args.gradient_accumulation_steps
        if (answers := checkpoint / ANSWERS_FILE.format(rank=distributed.get_rank())).exists():
            batches: list[dict[str, torch.Tensor]] = [{} for _ in range(self.args.steps_per_generation)]
            for key, tensor in load_file(answers, device=str(self.args.device)).items():
                index, _, name = key.partition(".")
                batches[int(index)][name] = tensor
            self._buffered_inputs = batches


def _roll_out(prompts: list[list[int]], trainer: RewardTrainer) -> dict[str, Any]:
    """Return an answer to each prompt, as TRL's `rollout_func` does; the prompts are token ids already."""
    answers, found = trainer.sampler.sample(prompts)
    return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": found}


class _EvaluateFirstCallback(TrainerCallback):
    """Evaluates before the first step, so that the curves start with the untrained model."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()


def _set_end_of_answer(model: Any, tokenizer: Any) -> list[int]:
    """Let generation stop at the tokens that end a text and a call in the chat template, and the configured ones.

    Returns these tokens.
    """
    ends = {_find_end(tokenizer, [QUESTION, {"role": "assistant", "content": ANSWER}])}
    if read_chat_template(tokenizer).writes_tools:
        with suppress(TemplateError):  # one that writes definitions and no calls
            ends.add(_find_end(tokenizer, list(EXAMPLE_CALL), [EXAMPLE_TOOL]))
    config = unwrap(model).generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    every = sorted({*ends, *(token for token in known if token is not None)})
    config.eos_token_id = every
    return every


def _find_end(tokenizer: Any, conversation: list[Any], tools: Tools | None = None) -> int:
    """Return the token that ends the answer of a conversation."""
    [row] = encode(tokenizer, [conversation], supervise="last", tools=[tools])
    return row.input_ids[max(index for index, is_supervised in enumerate(row.supervised) if is_supervised)]


def encode_prompts(tokenizer: Any, examples: Sequence[dict[str, Any]]) -> list[RewardPrompt]:
    """Return the prompt before each conversation's last answer, and that answer as the reference."""
    template = read_chat_template(tokenizer)
    tools = [example.get("tools") for example in examples]
    encoded = encode(tokenizer, [example["messages"] for example in examples], supervise="last", tools=tools)
    prompts = []
    for sequence, example in zip(encoded, examples, strict=True):
        row = render_prompt(template, example["messages"], example.get("tools"))
        reference = find_thought_syntax(template).strip(row.reference)
        ids = sequence.input_ids[: sequence.supervised.index(True)]
        prompts.append(RewardPrompt(ids, reference, example, row))
    return prompts


def _shuffle_prompts(prompts: Sequence[RewardPrompt], count: int, *, seed: int) -> Dataset:
    """Return `count` prompts with their indices: all in random order before any is repeated.

    TRL's sampler would shuffle a second pass like the first when a run is resumed in it.
    """
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < count:
        order += generator.sample(range(len(prompts)), len(prompts))
    order = order[:count]
    return Dataset.from_dict({"prompt": [prompts[index].prompt_ids for index in order], "prompt_index": order})
