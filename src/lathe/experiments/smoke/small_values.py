"""Small values: a configuration cut down to a few rows, two steps and short answers, with every stage left to run."""

import math
from collections.abc import Mapping
from typing import Any

from lathe.config import gates
from lathe.config.base import SPLITS
from lathe.config.params import Params

ONE_STEP_EPOCHS = 0.001  # of a supervised phase before another method: rounded up to a step
STEPS = 2  # of the optimizer: the second one has the moments of the first
TRAIN_ROWS = 20
ANSWERED_ROWS = 4  # of each held-out split
ANSWER_TOKENS = 16
IMATRIX_ROWS = 8
FEWEST_SAMPLES = 2  # sampling.samples
GENERAL_TEXT_CHARACTERS = 400
SMALLEST_BOOTSTRAP = 100  # that params.yaml takes
MOST_ROWS = 1000

# How rarely every held-out row that is taken may be one of those that preprocess is allowed to drop.
RARELY = 1e-6


def choose_small_values(params: Params, general_text: str) -> dict[str, Any]:
    """Return the values, by their keys, with which every stage up to the quantized files is run.

    Batch sizes and lengths of rows stay: a step then takes the memory that it will. `general_text` is the file with
    the shortened text. Answers are not limited yet, as training refuses references that are longer than every answer;
    `choose_short_answers` limits them.
    """
    quantized = params.quantize.types[:1]
    values = {
        # Of a few rows any share may be unusable, cut or alike by chance.
        "preprocess.max_dropped_fraction": 1.0,
        "preprocess.max_truncated_fraction": 1.0,
        "preprocess.max_overlap_fraction": 1.0,
        "training.max_steps": STEPS,
        "training.warmup_ratio": 0.0,  # with it, the rate of the first step is 0
        "training.logging_steps": 1,
        "training.eval_steps": STEPS,
        "training.save_steps": STEPS,
        "quantize.types": quantized,
        "generate.max_new_tokens": "auto",
        "generate.engine": "llama.cpp",  # no server has the weights of two steps
        "generate.servers": [],
        "quantize.imatrix_rows": min(params.quantize.imatrix_rows, IMATRIX_ROWS),
        "sampling.files": [name for name in params.sampling.files if name.endswith("-f16") or name in quantized],
        "sampling.samples": FEWEST_SAMPLES,
        "judge.max_rows": 1,
        "benchmark.limit": 1 if params.benchmark.tasks else params.benchmark.limit,
        "evaluate.general_text": general_text,
        "evaluate.bootstrap_samples": SMALLEST_BOOTSTRAP,
        "evaluate.gates": _keep_gates(params, quantized),
        **choose_no_tracking(),
    }
    match params.training.method:
        case "dpo":
            values["dpo.sft_epochs"] = min(params.dpo.sft_epochs, ONE_STEP_EPOCHS)
        case "grpo":
            grpo = params.grpo
            answers = min(grpo.num_generations, ANSWERED_ROWS)
            values |= {
                # Answers that all fail have no gradient, and an adapter that is as it was cannot be merged.
                "grpo.sft_epochs": ONE_STEP_EPOCHS,
                "grpo.max_steps": STEPS,
                "grpo.num_generations": answers,
                "grpo.per_device_train_batch_size": answers,
                "grpo.gradient_accumulation_steps": 1,
                "grpo.max_completion_length": min(grpo.max_completion_length, ANSWER_TOKENS),
            }
    return values


def choose_short_answers(params: Params) -> dict[str, Any]:
    """Return the values, by their keys, with which the stages answer and are measured."""
    longest = params.generate.max_new_tokens
    return {
        "generate.max_new_tokens": ANSWER_TOKENS if longest == "auto" else min(longest, ANSWER_TOKENS),
        "generate.max_rows": min(params.generate.max_rows or ANSWERED_ROWS, ANSWERED_ROWS),
        "generate.few_shot": 1,
    }


def choose_no_tracking() -> dict[str, Any]:
    """Return the values with which nothing is sent to a tracker."""
    return {"tracking.mlflow.enabled": False, "tracking.wandb.enabled": False}


def choose_limits(limits: Mapping[Any, int] | None, max_dropped_fraction: float) -> dict[str, int]:
    """Return how many rows of each split to keep: more where more may be dropped, so that some are left of each."""
    if max_dropped_fraction < 1:
        answered = math.ceil(math.log(RARELY) / math.log(max_dropped_fraction)) if max_dropped_fraction else 0
        trained = math.ceil(TRAIN_ROWS / (1 - max_dropped_fraction))
    else:
        answered = trained = MOST_ROWS
    wanted = {"train": max(trained, TRAIN_ROWS), "validation": max(answered, ANSWERED_ROWS)}
    wanted["test"] = wanted["validation"]
    own = {str(name): limit for name, limit in (limits or {}).items()}
    return {name: min(wanted[name], own.get(name, MOST_ROWS), MOST_ROWS) for name in SPLITS}


def shorten_text(paragraph: str) -> str:
    """Return the beginning of a paragraph, up to the end of a word."""
    if len(paragraph) <= GENERAL_TEXT_CHARACTERS:
        return paragraph
    start = paragraph[:GENERAL_TEXT_CHARACTERS]
    return start.rpartition(" ")[0] or start


def set_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of parameters with these values by their dotted keys."""
    changed = dict(tree)
    for key, value in values.items():
        *parents, last = key.split(".")
        section = changed
        for parent in parents:
            section[parent] = dict(section[parent])
            section = section[parent]
        section[last] = value
    return changed


def _keep_gates(params: Params, types: list[str]) -> list[str] | None:
    """Return the gates that name no quantization type which is left out."""
    kept = []
    for expression in params.evaluate.gates or []:
        try:
            gates.check_names(
                gates.parse_gate(expression),
                types=[*types, *params.export.formats],
                scores=params.scores,
                tasks=bool(params.benchmark.tasks),
            )
        except ValueError:
            continue
        kept.append(expression)
    return kept or None
