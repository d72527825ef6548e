"""Group relative policy optimization with TRL: answers sampled to one prompt are told better or worse by rewards.

Source: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300).
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lathe.common.errors import InputError
from lathe.config.training_params import Reward
from lathe.evaluation.answer_checks import REWARDS
from lathe.models.adapter import unwrapped
from lathe.models.chat_template import ChatTemplate
from lathe.models.loss_mask import Encoded, encode
from lathe.training import distributed
from lathe.training.base_trainer import BaseTrainer
from lathe.training.best_weights import Best
from lathe.training.resume import ResumableTrainer
from lathe.training.reward_functions import RewardFunction
from lathe.training.row_attention import pad_rows
from lathe.training.trainer_setup import Setting

# What transformers does not keep of a step that is made from answers sampled before the checkpoint.
ANSWERS = "answers_{rank}.safetensors"
REFERENCE = "ref"  # TRL's name for the copy of the adapter that the KL divergence is measured from


@dataclass(frozen=True)
class Question:
    """What is asked of the model, as ids (tokens), what it should say, and the processed row that both come from."""

    prompt_ids: list[int]
    reference: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Weighed:
    """One entry of `grpo.rewards` under a name of its own."""

    name: str
    weight: float
    function: RewardFunction


def trainer(setting: Setting) -> ResumableTrainer:
    """Return the trainer that rewards answers to the last request of each conversation.

    Raises InputError where a parameter does not fit the model.
    """
    grpo, training, tokenizer = setting.params.grpo, setting.params.training, setting.tokenizer
    pad_rows(setting.model, training.attn_implementation)
    _end_answers_as_taught(setting.model, tokenizer)
    questions = {split: _questions(tokenizer, setting.splits[split]) for split in ("train", "validation")}
    rewards = weighed(grpo.rewards, setting.functions)
    arguments = GRPOConfig(
        **setting.arguments(
            max_steps=grpo.max_steps,
            per_device_train_batch_size=grpo.per_device_train_batch_size,
            gradient_accumulation_steps=grpo.gradient_accumulation_steps,
            learning_rate=grpo.learning_rate,
            num_generations=grpo.num_generations,
            num_generations_eval=1,
            max_completion_length=grpo.max_completion_length,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            top_k=0,  # transformers' own default keeps fifty
            beta=grpo.beta,
            epsilon=grpo.epsilon,
            num_iterations=grpo.num_iterations,
            loss_type=grpo.loss_type,
            scale_rewards=grpo.scale_rewards,
            reward_weights=[reward.weight for reward in rewards],
            shuffle_dataset=False,  # `_in_order` has done so, in a way that a resumed run can repeat
            remove_unused_columns=False,
        )
    )
    asked = -(-grpo.max_steps // grpo.num_iterations) * arguments.generation_batch_size // grpo.num_generations
    return RewardTrainer(
        questions=questions,
        rewards=rewards,
        answer_prefix=ChatTemplate.of_tokenizer(tokenizer).answer_prefix,
        precision=setting.precision,
        rows=[Encoded(row, question.prompt_ids, []) for row, question in enumerate(questions["train"])],
        rate="grpo.learning_rate",
        model=setting.model,
        args=arguments,
        train_dataset=_in_order(questions["train"], asked, seed=setting.params.seed),
        eval_dataset=Dataset.from_dict({"question": list(range(len(questions["validation"])))}),
        processing_class=tokenizer,
        callbacks=list(setting.callbacks),
        checkpoints=setting.checkpoints,
        save_steps=training.save_steps,
        best=Best(training),
    )


def weighed(rewards: Sequence[Reward], functions: Mapping[str, RewardFunction]) -> list[Weighed]:
    """Return the rewards as functions of completion, reference and row; the second of a name is called NAME_2."""
    names = [reward.function.partition(":")[2] if reward.function else reward.name for reward in rewards]
    return [
        Weighed(
            name if (count := names[: place + 1].count(name)) == 1 else f"{name}_{count}",
            reward.weight,
            functions[reward.function] if reward.function else _built_in(reward),
        )
        for place, (reward, name) in enumerate(zip(rewards, names, strict=True))
    ]


class RewardTrainer(BaseTrainer, ResumableTrainer, GRPOTrainer):
    """TRL's trainer with prompts as inference has them, answers without dropout, and an evaluation that draws nothing.

    The validation split is answered greedily, before the first step too, and what is logged is the mean reward.
    """

    generation_config: GenerationConfig

    def __init__(
        self,
        *,
        questions: dict[str, list[Question]],
        rewards: list[Weighed],
        answer_prefix: str,
        **arguments: Any,
    ) -> None:
        self.questions, self.rewards, self.answer_prefix = questions, rewards, answer_prefix
        super().__init__(reward_funcs=[self._scorer(reward) for reward in rewards], **arguments)
        self.add_callback(_EvaluateFirst(self))

    def train_to_the_end(self) -> None:
        """Train as `ResumableTrainer` does, and leave no adapter behind but the trained one."""
        super().train_to_the_end()
        if REFERENCE in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter(REFERENCE)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Log the mean reward of greedy answers to the validation split, and the mean of each reward."""
        accelerator, size = self.accelerator, self.args.per_device_eval_batch_size
        # Prompts of a similar length together; each process takes its share of them.
        asked = sorted(self.questions["validation"], key=lambda question: len(question.prompt_ids))
        share = asked[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(len(self.rewards) + 3, device=self.args.device, dtype=torch.float64)
        self.model.eval()
        with self._greedily():
            for start in range(0, len(share), size):
                batch = share[start : start + size]
                ids, _ = self._generate_single_turn([question.prompt_ids for question in batch], None, {}, 1)
                texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
                for question, answer_ids, text in zip(batch, ids, texts, strict=True):
                    earned = [self._score(reward, text, question) for reward in self.rewards]
                    unfinished = answer_ids[-1] not in self.eos_token_ids
                    sums += sums.new_tensor([*earned, len(answer_ids), unfinished, 1])
        self.model.train()
        *means, length, unfinished, count = accelerator.reduce(sums).tolist()
        measured = {
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
        super(GRPOTrainer, self).log(dict(measured))  # TRL's would add the averages of the training, and forget them
        self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return measured

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss; what is counted as supervised are the tokens of the answers."""
        answered = int(inputs["completion_mask"].sum())
        self.trained_tokens += int(inputs["prompt_mask"].sum()) + answered
        self.trained_supervised_tokens += answered
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def ids_of(self, inputs: Any) -> torch.Tensor:
        """Return the prompts of the pass just made; `inputs` were the questions of a whole step."""
        ids: torch.Tensor = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]["prompt_ids"]
        return ids

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # they are ids already

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **more: Any) -> Any:
        training = self.model.training
        self.model.eval()  # an answer is that of the model as it will be used: without dropout
        try:
            with self.autocast_smart_context_manager():
                return super()._generate_single_turn(prompt_ids, *others, **more)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise InputError(
                f"the model gives no probabilities at step {self.state.global_step + 1}, from which to sample answers; "
                "lower grpo.learning_rate"
            ) from None
        finally:
            self.model.train(training)

    def _get_per_token_logps_and_entropies(self, *others: Any, **more: Any) -> Any:
        # In training TRL calls it under autocast, for the probabilities to compare with not: they would differ.
        with self.autocast_smart_context_manager():
            return super()._get_per_token_logps_and_entropies(*others, **more)

    @contextmanager
    def _greedily(self) -> Iterator[None]:
        sampling = self.generation_config
        self.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=sampling.pad_token_id,
            eos_token_id=sampling.eos_token_id,
            disable_compile=True,
        )
        try:
            yield
        finally:
            self.generation_config = sampling

    def _scorer(self, reward: Weighed) -> Any:
        # TRL calls it with columns of the dataset, and logs it by its name.
        def scorer(*, completions: list[str], question: list[int], **_: Any) -> list[float]:
            asked = self.questions["train"]
            return [self._score(reward, text, asked[index]) for text, index in zip(completions, question, strict=True)]

        scorer.__name__ = reward.name
        return scorer

    def _score(self, reward: Weighed, text: str, question: Question) -> float:
        return reward.function(text.removeprefix(self.answer_prefix), question.reference, question.row)

    def _save_own(self, checkpoint: Path) -> None:
        super()._save_own(checkpoint)
        if self._buffered_inputs and self._step % (self.args.steps_per_generation * self.num_iterations):
            tensors = {
                f"{place}.{name}": tensor.clone()  # the passes of a step are views of one tensor
                for place, batch in enumerate(self._buffered_inputs)
                for name, tensor in batch.items()
                if isinstance(tensor, torch.Tensor)
            }
            save_file(tensors, checkpoint / ANSWERS.format(rank=distributed.own()))

    def _load_own(self, checkpoint: Path) -> None:
        super()._load_own(checkpoint)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self._step = state["global_step"] * self.args.gradient_accumulation_steps
        if (answers := checkpoint / ANSWERS.format(rank=distributed.own())).exists():
            passes: list[dict[str, torch.Tensor]] = [{} for _ in range(self.args.steps_per_generation)]
            for key, tensor in load_file(answers, device=str(self.args.device)).items():
                place, _, name = key.partition(".")
                passes[int(place)][name] = tensor
            self._buffered_inputs = passes


class _EvaluateFirst(TrainerCallback):
    """Lets the curve begin with what the model could do before the first step."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()


def _end_answers_as_taught(model: Any, tokenizer: Any) -> None:
    """Let generation stop at the token that ends an answer in the chat template, whatever the configuration says."""
    probe = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    [row] = encode(tokenizer, [probe], supervise="last")
    taught = max(place for place, supervised in enumerate(row.supervised) if supervised)
    config = unwrapped(model).generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({row.input_ids[taught], *(token for token in known if token is not None)})


def _questions(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[Question]:
    """Return each conversation's last request, and the answer that stands there."""
    template = ChatTemplate.of_tokenizer(tokenizer)
    encoded = encode(tokenizer, [row["messages"] for row in rows], supervise="last")
    questions = []
    for sequence, row in zip(encoded, rows, strict=True):
        reference = str(row["messages"][-1]["content"])
        if row["messages"][-1].get("tool_calls"):
            reference = template.split_answer(row["messages"]).answer
        questions.append(Question(sequence.input_ids[: sequence.supervised.index(True)], reference, row))
    return questions


def _in_order(questions: Sequence[Question], asked: int, *, seed: int) -> Dataset:
    """Return `asked` prompts with the indices of their questions: all in random order before any comes again.

    TRL's sampler would begin a second pass over the questions as it began the first when a run is resumed in it.
    """
    dice = random.Random(seed)
    order: list[int] = []
    while len(order) < asked:
        order += dice.sample(range(len(questions)), len(questions))
    order = order[:asked]
    return Dataset.from_dict({"prompt": [questions[index].prompt_ids for index in order], "question": order})


def _built_in(reward: Reward) -> RewardFunction:
    options = reward.model_dump(exclude={"name", "weight"}, exclude_none=True)
    function = REWARDS[reward.name]

    def earned(completion: str, reference: str, row: dict[str, Any]) -> float:
        return function(completion, reference, **options)

    return earned
