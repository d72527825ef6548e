"""Rewards of `grpo.rewards`: what each is given of an answer, and whether the data gives it anything to reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.config.training_params import Reward
from lathe.evaluation.answer_checks import REWARDS
from lathe.evaluation.call_scores import compute_call_f1, match_calls
from lathe.models.answer_reading import HeldOutPrompt
from lathe.models.answer_split import find_answer_prefix
from lathe.models.answer_syntax import find_call_syntax, find_thought_syntax
from lathe.models.chat_template import ChatTemplate
from lathe.training.reward_functions import RewardFunction

CALL_REWARDS: dict[str, Callable[..., float]] = {"tool_calls": match_calls, "tool_calls_f1": compute_call_f1}


@dataclass(frozen=True)
class RewardPrompt:
    """A prompt as token ids, its reference answer, and the processed example that both come from."""

    prompt_ids: list[int]
    reference: str
    example: dict[str, Any]
    row: HeldOutPrompt


@dataclass(frozen=True)
class WeightedReward:
    """An entry of `grpo.rewards` with a unique name.

    Its function gets two of the same, of the answer and of the reference, and the example: what is `said` after the
    thought, the `calls`, or all that is `written`.
    """

    name: str
    weight: float
    function: Callable[[Any, Any, dict[str, Any]], float]
    sees: Literal["said", "calls", "written"] = "said"

    def compute(self, text: str, prompt: RewardPrompt, template: ChatTemplate) -> float:
        """Return the reward of an answer's text, which the evaluation of a GGUF would read in the same way."""
        written = text.removeprefix(find_answer_prefix(template))
        if self.sees == "calls":
            syntax = find_call_syntax(template)
            calls = syntax.read(written, prompt.row.tools).calls if syntax else []
            return self.function(calls, prompt.row.calls or [], prompt.example)
        if self.sees == "said":
            written = find_thought_syntax(template).strip(written, prompt=prompt.row.prompt)
        return self.function(written, prompt.reference, prompt.example)


def weight_rewards(rewards: Sequence[Reward], functions: Mapping[str, RewardFunction]) -> list[WeightedReward]:
    """Return the rewards in their order; the second of a name is called NAME_2."""
    names = [reward.function.partition(":")[2] if reward.function else reward.name for reward in rewards]
    return [
        _weight(
            reward,
            name if (count := names[: index + 1].count(name)) == 1 else f"{name}_{count}",
            functions,
        )
        for index, (reward, name) in enumerate(zip(rewards, names, strict=True))
    ]


def check_rewards(rewards: Sequence[Reward], template: ChatTemplate, examples: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError where calls are rewarded, and the template's cannot be read, or no example has tools."""
    listed = [reward.name for reward in rewards if reward.name in CALL_REWARDS]
    if not listed:
        return
    if find_call_syntax(template) is None:
        raise InputError(
            f"grpo.rewards lists {listed[0]}, and calls cannot be read from what the model's chat template writes; "
            "take it off the list, or choose a template whose calls are read (template: chatml-tools in presets.yaml)",
            code="calls-not-read",
        )
    if not any(example.get("tools") for example in examples):
        raise InputError(
            f"grpo.rewards lists {listed[0]}, and no row of data/processed/train.jsonl has tools: every answer without "
            "a call would earn it; take it off the list, or choose a dataset with tools",
            code="no-calls-to-reward",
        )


def _weight(reward: Reward, name: str, functions: Mapping[str, RewardFunction]) -> WeightedReward:
    if reward.function:
        return WeightedReward(name, reward.weight, functions[reward.function], "written")
    options = reward.model_dump(exclude={"name", "weight"}, exclude_none=True)
    is_of_calls = reward.name in CALL_REWARDS
    function = CALL_REWARDS[reward.name] if is_of_calls else REWARDS[reward.name]

    def compute(answer: Any, reference: Any, example: dict[str, Any]) -> float:
        return function(answer, reference, **options)

    return WeightedReward(name, reward.weight, compute, "calls" if is_of_calls else "said")
