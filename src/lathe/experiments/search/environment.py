"""What the environment says about a search: the variables of the set-up that Lathe replaces."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import overrides
from lathe.config.load import check_value

# The parameters that they fix.
VARIABLES = {
    "LORA_MODEL_NAME": "model",
    "LORA_NUM_EPOCHS": "training.num_train_epochs",
    "LORA_BATCH_SIZE": "training.per_device_train_batch_size",
    "LORA_LEARNING_RATE": "training.learning_rate",
}
NUMBER_OF_TRIALS = "LORA_N_TRIALS"


@dataclass(frozen=True)
class Environment:
    """The variables that are set, and what follows: overrides as on the command line, and the number of trials."""

    variables: dict[str, str]
    overrides: list[str]
    n_trials: int | None


def read(variables: Mapping[str, str], params: Mapping[str, Any], models: Sequence[str]) -> Environment:
    """Read the variables that are set; `models` are the presets that there are.

    Raises InputError with a line for each that its parameter cannot be.
    """
    given = {name: variables[name] for name in (*VARIABLES, NUMBER_OF_TRIALS) if name in variables}
    values = {name: _value(text) if name != "LORA_MODEL_NAME" else text for name, text in given.items()}
    problems = []
    for name, value in values.items():
        if not given[name].strip():
            problems.append(f"{name} is empty; give it a value, or unset it")
        elif name == "LORA_MODEL_NAME" and value not in models:
            near = did_you_mean(given[name], list(models))
            problems.append(f"{name} is {value!r}; must be a name under models in presets.yaml; {near}")
        elif name != NUMBER_OF_TRIALS:
            problems += check_value(VARIABLES[name], value, dict(params), name)
        elif not isinstance(value, int) or value < 1:
            problems.append(f"{name} is {given[name]!r}; must be a whole number of trials, at least 1")
    if problems:
        raise InputError("\n".join(problems))
    fixed = [overrides.format_override(key, values[name]) for name, key in VARIABLES.items() if name in given]
    return Environment(given, fixed, int(given[NUMBER_OF_TRIALS]) if NUMBER_OF_TRIALS in given else None)


def _value(text: str) -> int | float | str:
    """Return the number that is written, whole where it is written so; what is none is returned as it is."""
    if re.fullmatch(r"\d{1,15}", text, re.ASCII):
        return int(text)
    return float(text) if re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII) else text
