"""Values of a new recipe, each with its reason: by the size of the model, the lengths of the data, and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.common.numbers import round_up
from lathe.common.text import readable_bytes
from lathe.new_recipe.fit_memory import Fit, Memory
from lathe.new_recipe.measure_data import DataFacts, choose_held_out_fraction
from lathe.new_recipe.measure_model import ModelFacts
from lathe.new_recipe.token_lengths import LengthsInTokens

Method = Literal["sft", "dpo", "grpo"]

# Peak rate of an adapter, by the number of weights from which on it is usual.
LORA_RATES = ((3_000_000_000, 1e-4), (500_000_000, 2e-4), (50_000_000, 2e-3), (0, 5e-3))
FULL_TUNING_FACTOR = 0.1
PREFERENCE_FACTOR = 0.1  # of DPO and GRPO, which go on from where supervised training ended

# From so many training rows on: rows of a step, and passes.
STEP_ROWS = ((20_000, 32), (1_000, 16), (0, 8))
EPOCHS = ((20_000, 1), (2_000, 2), (0, 3))
LENGTH_ROOM = 1.1  # the lengths are measured on a sample
ASSUMED_LENGTH = 1024
LENGTH_STEP = 64
OUTLIER_FACTOR = 2  # beyond this multiple of the length that 99 % have, the longest row is an exception
GROUP = 8  # answers to one prompt that GRPO compares
LARGE_MODEL = 3_000_000_000
MAX_DIVERGENCE = 0.1  # of a quantized file from the merged model (nats per token)

METRICS: dict[str, list[str]] = {
    "json": ["exact_match", "json_valid", "json_fields"],
    "short": ["exact_match", "token_f1"],
    "prose": ["rouge_l", "token_f1"],
    "calls": ["tool_calls", "tool_calls_f1", "exact_match"],
    "documents": ["exact_match"],  # none of which applies to them
}


@dataclass(frozen=True)
class Choice:
    """A value of the recipe by its key, and why; a guess may be wrong once the model or the data are there."""

    key: str
    value: Any
    reason: str
    guess: bool = False


def choose_learning_rate(weights: int, tuning: Literal["lora", "full"]) -> float:
    """Return the usual peak rate for a model of that size; all weights take a tenth of an adapter's."""
    rate = _choose_by(LORA_RATES, weights)
    return float(f"{rate * FULL_TUNING_FACTOR:.1g}") if tuning == "full" else rate


def choose_step_rows(data: DataFacts) -> int:
    """Return how many rows a step is made of."""
    return int(_choose_by(STEP_ROWS, _count_training_rows(data) or 1_000))


def choose_length(data: DataFacts, model: ModelFacts, lengths: LengthsInTokens) -> Choice:
    """Return `training.max_length` for the rows, within the model's context."""
    if not data.known:
        return Choice("training.max_length", ASSUMED_LENGTH, "the dataset has not been fetched", guess=True)
    if data.kind == "documents":
        limit = min(ASSUMED_LENGTH, model.context or ASSUMED_LENGTH)
        return Choice("training.max_length", limit, "documents are cut to it, and none is dropped for its length")
    longest = lengths.count_row(data.row_characters[-1])
    most = lengths.count_row(_find_quantile(data.row_characters, 0.99))
    wanted = longest if longest <= OUTLIER_FACTOR * most else most
    length = round_up(math.ceil(LENGTH_ROOM * wanted), LENGTH_STEP)
    text = f"99 % of the rows have up to {most} tokens, the longest {longest}, {lengths.source}"
    if model.context and length > model.context:
        return Choice("training.max_length", model.context, f"the model's context; {text}")
    return Choice("training.max_length", length, text)


def choose_values(
    model: ModelFacts,
    data: DataFacts,
    memory: Memory,
    fit: Fit,
    length: Choice,
    *,
    lengths: LengthsInTokens,
    method: Method,
) -> list[Choice]:
    """Return the values of a recipe in the order in which they are written.

    Raises InputError if the data has not got what the method needs.
    """
    _check_method(data, method)
    return [
        *_choose_rows(data, length, lengths),
        length,
        *_choose_batches(model, data, memory, fit, method),
        *_choose_rates(model, data, method),
        *_choose_answers(data, lengths, method),
        *_choose_scores(model, data),
    ]


def _check_method(data: DataFacts, method: Method) -> None:
    if method != "sft" and data.documents:
        raise InputError(
            f"--method {method}: {data.documents} rows are documents (format text), which have no prompts; take "
            "--method sft, or a dataset without them",
            code="documents-without-prompts",
        )
    if method == "dpo" and data.known and data.pairs < data.rows:
        raise InputError(
            f"--method dpo: {data.rows - data.pairs} of {data.rows} rows have no worse answer; name a dataset of pairs "
            "(docs/data.md), or take --method sft",
            code="no-pairs",
        )
    if method == "grpo" and data.known and data.kind == "prose":
        raise InputError(
            "--method grpo: the answers are prose, for which there is no built-in reward; take --method sft, and then "
            "write a reward of your own (docs/training.md)",
            code="no-reward",
        )


def _choose_rows(data: DataFacts, length: Choice, lengths: LengthsInTokens) -> list[Choice]:
    """Return what preprocess needs so that the rows are taken as they are."""
    choices = []
    if data.known and data.lacking and data.source_rows:
        fraction = choose_held_out_fraction(data.source_rows)
        reason = f"of {data.source_rows} rows: about {max(1, round(fraction * data.source_rows))} to measure by"
        choices += [Choice(f"preprocess.{name}_fraction", fraction, reason) for name in data.lacking]
    if data.kind == "documents":
        choices.append(Choice("sft.packing", True, "documents fill whole sequences"))
    elif data.known:
        over = sum(lengths.count_row(size) > length.value for size in data.row_characters)
        share = over / max(1, len(data.row_characters))
        if share > 0.04:
            reason = f"{share:.0%} of the rows are longer than training.max_length"
            choices.append(Choice("preprocess.too_long", "truncate_prompt", reason))
            choices.append(Choice("preprocess.max_truncated_fraction", min(1.0, round(share + 0.1, 1)), reason))
    return choices


def _count_training_rows(data: DataFacts) -> int | None:
    """Return the usable rows of training, once the recipe's other splits have taken theirs; None if not known."""
    if data.mixed_rows is not None:
        return data.splits.get("train")
    if not data.source_rows:
        return None
    return data.source_rows - len(data.lacking) * round(choose_held_out_fraction(data.source_rows) * data.source_rows)


def _choose_batches(model: ModelFacts, data: DataFacts, memory: Memory, fit: Fit, method: Method) -> list[Choice]:
    rows, size = choose_step_rows(data), fit.batch_size
    guess = fit.total is None
    taken = "the model's shape is not known" if fit.total is None else f"takes about {readable_bytes(fit.total)}"
    reason = f"{taken}; {memory}" if fit.fits else f"does not fit: {taken}; {memory}"
    passes = max(1, rows // size)
    bits = "16 bits fit" if not fit.load_in_4bit else f"in 16 bits the base takes {readable_bytes(2 * model.weights)}"
    choices = [
        Choice("training.per_device_train_batch_size", size, reason, guess),
        Choice("training.per_device_eval_batch_size", fit.eval_batch_size, "as much as fits", guess),
        Choice("training.gradient_accumulation_steps", passes, f"{size} x {passes}: {size * passes} rows a step"),
        Choice(
            "training.gradient_checkpointing",
            fit.gradient_checkpointing,
            "less memory, slower steps" if fit.gradient_checkpointing else "there is memory for whole steps",
            guess,
        ),
        Choice("quantization.load_in_4bit", fit.load_in_4bit, f"{bits}, {memory}", guess),
    ]
    if method == "dpo":
        pairs = max(1, size // 2)
        choices += [
            Choice("dpo.per_device_train_batch_size", pairs, "a pair is two rows; not estimated", guess=True),
            Choice("dpo.gradient_accumulation_steps", max(1, rows // pairs), f"{rows} pairs a step"),
        ]
    if method == "grpo":
        answers = min(size, 4 * GROUP)
        passes = max(1, 4 * GROUP // answers)
        choices += [
            Choice("grpo.num_generations", GROUP, "answers to one prompt"),
            Choice("grpo.per_device_train_batch_size", answers, "not estimated", guess=True),
            Choice("grpo.gradient_accumulation_steps", passes, f"{answers * passes // GROUP} prompts a step"),
        ]
    return choices


def _choose_rates(model: ModelFacts, data: DataFacts, method: Method) -> list[Choice]:
    rate = choose_learning_rate(model.weights, "lora")
    rows = _count_training_rows(data)
    epochs = int(_choose_by(EPOCHS, rows or EPOCHS[0][0]))
    shown = f"{rows} training rows" if rows else "the number of rows is not known"
    guess = not model.known
    choices = [
        Choice("training.learning_rate", rate, f"usual for an adapter on {model.size} weights", guess),
        Choice("training.num_train_epochs", epochs, shown, rows is None),
    ]
    if rows:
        step_rows = choose_step_rows(data)
        steps = math.ceil(rows / step_rows) * epochs
        if method == "sft" and steps < 400:
            every = max(1, steps // 4)
            reason = f"of about {steps} steps"
            choices += [Choice(f"training.{name}_steps", every, reason) for name in ("eval", "save")]
    if method != "sft":
        later = float(f"{rate * PREFERENCE_FACTOR:.1g}")
        choices.append(Choice("training.method", method, "as asked for; a supervised phase comes first"))
        choices.append(Choice(f"{method}.learning_rate", later, "a tenth of the supervised rate", guess))
        choices.append(Choice(f"{method}.sft_epochs", 1.0, "until answers have the form"))
    if method == "dpo":
        choices.append(Choice("dpo.num_train_epochs", 1.0, "more passes seldom help"))
        choices.append(Choice("dpo.beta", 0.1, "usual; higher: closer to the model before"))
        choices.append(Choice("dpo.loss_type", "sigmoid", "the loss of the paper"))
        choices.append(Choice("dpo.label_smoothing", 0.0, "the pairs are in the right order"))
    return choices


def _choose_answers(data: DataFacts, lengths: LengthsInTokens, method: Method) -> list[Choice]:
    if method != "grpo":
        return []
    rewards = [{"name": "exact_match", "weight": 1.0}]
    if data.kind == "json":
        rewards.append({"name": "json_fields", "weight": 0.5})
    reward = Choice("grpo.rewards", rewards, data.describe_answers() if data.known else "not fetched", not data.known)
    if not data.known:
        return [reward]
    longest = lengths.count_text(data.answer_characters[-1])
    limit = max(16, round_up(math.ceil(1.25 * longest), 8))
    return [Choice("grpo.max_completion_length", limit, f"the longest answer has {longest} tokens"), reward]


def _choose_scores(model: ModelFacts, data: DataFacts) -> list[Choice]:
    metrics, guess = METRICS[data.kind], not data.known
    primary = "perplexity" if data.kind == "documents" else metrics[0]
    reason = data.describe_answers() if data.known else "prose, as the dataset has not been fetched"
    choices = [
        Choice("evaluate.metrics", metrics, reason, guess),
        Choice("evaluate.primary_metric", primary, reason, guess),
    ]
    if data.kind == "json":
        choices.append(Choice("evaluate.normalize", "json", "JSON's layout makes no difference"))
    if data.kind == "documents":
        gates = ["merged.perplexity < base.perplexity", f"quantized.kl < {MAX_DIVERGENCE}"]
    else:
        gates = [f"merged.{primary} > base.{primary}"]
        gates.append(f"quantized.{primary} >= merged.{primary} - {0.02 if data.kind == 'prose' else 0.05}")
    choices.append(Choice("evaluate.gates", gates, "training must help, and quantization not hurt"))
    if model.weights >= LARGE_MODEL:
        choices.append(Choice("quantize.types", ["Q4_K_M", "Q5_K_M"], f"{model.size} weights: Q8_0 is seldom run"))
    return choices


def _choose_by(table: Sequence[tuple[int, float]], number: int) -> float:
    """Return the value of the first row whose limit the number reaches."""
    return next(value for limit, value in table if number >= limit)


def _find_quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
