"""A verdict: what the judge is asked to write, and what is taken for one."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lathe.evaluation.judge.failures import MalformedError

# JSON Schema, in the part that every provider's own subset has.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "reason": {"type": "string"},
    },
    "required": ["score", "reason"],
    "additionalProperties": False,
}

# The same where a grammar holds a model to it, in llama.cpp's terms: it knows no range of numbers, and without a length
# a model that has lost the thread goes on with the reason until its tokens are used up.
GRAMMAR_SCHEMA: dict[str, Any] = {
    **SCHEMA,
    "properties": {
        "score": {"type": "integer", "enum": list(range(101))},
        "reason": {"type": "string", "maxLength": 200},
    },
}


@dataclass(frozen=True)
class Answer:
    """What a judge wrote, and what it says of itself; tokens are None where it does not count them."""

    text: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    cut_off: bool = False


class Verdict(BaseModel):
    """A mark from 0 to 100 with its reason. A fraction is taken as it is; nothing is converted or mended."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    score: int | float = Field(ge=0, le=100, allow_inf_nan=False)
    reason: Annotated[str, Field(max_length=4000)]


def parse(answer: Answer) -> Verdict:
    """Return the verdict that is the whole of the answer; raises MalformedError if it is anything else."""
    if answer.cut_off:
        raise MalformedError("the verdict was cut off at judge.max_tokens")
    try:
        tree = json.loads(answer.text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        return Verdict.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"][:1])) or "the whole"
        raise MalformedError(f"no verdict: {key}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no verdict: not JSON alone: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two scores, Python would take the last.
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
