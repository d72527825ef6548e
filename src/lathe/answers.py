"""Held-out conversations put to a GGUF: what it answers, how sure it is of the reference, whether it stops."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lathe.generate import Generator
from lathe.template import Conversation, answer_lead, prompt_and_answer


@dataclass(frozen=True)
class Answers:
    """One split's answers.

    `rows` are {prompt, reference, completion, finish_reason}; `facts` are the split's perplexity of the references, its
    stop rate and its number of rows; `tokens` is how many were generated.
    """

    rows: list[dict[str, str]]
    facts: dict[str, Any]
    tokens: int


def answer(generator: Generator, conversations: Sequence[Conversation], *, max_new_tokens: int) -> Answers:
    """Let the model write the last turn of each conversation, greedily, and compare with what stands there."""
    tokens = {"bos_token": generator.bos_token, "eos_token": generator.eos_token}
    asked = [prompt_and_answer(generator.template, conversation, **tokens) for conversation in conversations]
    prompts = [prompt for prompt, _, _ in asked]
    completions = generator.complete(prompts, max_new_tokens=max_new_tokens)
    nll, scored = generator.reference_nll(prompts, [written for _, written, _ in asked])
    lead = answer_lead(generator.template, **tokens)
    rows = [
        {
            "prompt": prompt,
            "reference": written.removeprefix(lead)
            if conversation[-1].get("tool_calls")
            else str(conversation[-1]["content"]),
            "completion": completion.text.removeprefix(lead),
            "finish_reason": completion.finish_reason,
        }
        for (prompt, written, _), conversation, completion in zip(asked, conversations, completions, strict=True)
    ]
    stopped = sum(completion.finish_reason == "stop" for completion in completions)
    facts = {
        "perplexity": round(math.exp(nll / scored), 4),
        "stop_rate": round(stopped / len(rows), 4),
        "rows": len(rows),
    }
    return Answers(rows, facts, sum(completion.tokens for completion in completions))
