"""Verdict: the JSON schema that the judge is given, and the strict parsing of its answer."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lathe.common.http_session import MalformedError

# JSON Schema, limited to what every provider supports.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "minimum": 0, "maximum": 100},
        "reason": {"type": "string"},
    },
    "required": ["score", "reason"],
    "additionalProperties": False,
}

# The same for llama.cpp's grammars, which have no number ranges. Without a maximum length, a confused model would
# continue the reason until its tokens are used up.
GRAMMAR_SCHEMA: dict[str, Any] = {
    **SCHEMA,
    "properties": {
        "score": {"type": "integer", "enum": list(range(101))},
        "reason": {"type": "string", "maxLength": 200},
    },
}


@dataclass(frozen=True)
class JudgeAnswer:
    """The judge's answer, the name that it gives itself, and token counts (None if it does not report them)."""

    text: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    cut_off: bool = False


class Verdict(BaseModel):
    """A score from 0 to 100 and the reason for it. Fractions are allowed; nothing is converted or repaired."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    score: int | float = Field(ge=0, le=100, allow_inf_nan=False)
    reason: Annotated[str, Field(max_length=4000)]


def parse_verdict(answer: JudgeAnswer) -> Verdict:
    """Return the verdict; raises MalformedError if the answer is anything but the JSON of one verdict."""
    if answer.cut_off:
        raise MalformedError("the verdict was cut off at judge.max_tokens")
    try:
        tree = json.loads(answer.text, object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)
        return Verdict.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"][:1])) or "the whole answer"
        raise MalformedError(f"no verdict: {key}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no verdict: not JSON: {error}") from None


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python would take the last of two scores.
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
