"""`lathe recipe new`: a recipe for a model and a dataset, with values that fit both and the reason beside each."""

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.overrides import apply_overrides, format_override
from lathe.config.yaml_files import read_yaml
from lathe.experiments import recipes
from lathe.new_recipe.choose_values import Choice, Method, choose_length, choose_step_rows, choose_values
from lathe.new_recipe.fit_memory import find_memory, fit_training
from lathe.new_recipe.measure_data import measure_data
from lathe.new_recipe.measure_model import measure_model
from lathe.new_recipe.token_lengths import measure_token_lengths

BASES: dict[str, list[str]] = {
    "sft": ["base/real-model.yaml"],
    "dpo": ["base/real-model.yaml"],
    "grpo": ["base/real-model.yaml", "base/grpo.yaml"],
}
ROWS_PER_EXAMPLE = {"sft": 1, "dpo": 2, "grpo": 1}  # pairs are two rows
LINE = 120  # columns; a longer reason stands above its value


def create_recipe(name: str, model: str, dataset: str, *, gpu: str | None, method: Method, force: bool) -> None:
    """Write experiments/NAME.yaml, and print what is a guess and what to run next.

    Raises InputError if the name is taken or no name of a recipe, a preset is unknown, or model or data are not there;
    nothing is written then.
    """
    target = recipes.FOLDER / f"{name}.yaml"
    _check_names(target, model, dataset, force=force)
    memory = find_memory(gpu)
    base = _read_bases(BASES[method])
    overrides = [format_override(key, value) for key, value in {**base, "model": model, "dataset": dataset}.items()]
    config = apply_overrides([*overrides, "training.method=sft"])
    model_facts, data = measure_model(config), measure_data(config)
    lengths = measure_token_lengths(model_facts.tokenizer, data.sample)
    length = choose_length(data, model_facts, lengths)
    params = config.params.model_copy(
        update={"training": config.params.training.model_copy(update={"max_length": length.value})}
    )
    fit = fit_training(
        model_facts.config,
        model_facts.weights,
        params,
        memory,
        rows=choose_step_rows(data),
        per_row=ROWS_PER_EXAMPLE[method],
    )
    rows = f"{data.rows} usable rows, {data.describe_answers()}" if data.known else "has not been fetched"
    choices = [
        Choice("model", model, f"{model_facts.size} weights, {model_facts.source}"),
        Choice("dataset", dataset, rows),
        *choose_values(model_facts, data, memory, fit, length, lengths=lengths, method=method),
    ]
    chosen = [choice for choice in choices if not _is_same(choice, base)]
    text = format_recipe(model, dataset, BASES[method], chosen)
    _validate(name, text)
    with paths.replace_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    warnings = [f"preprocess would stop: {refusal}" for refusal in data.refusals]
    if model_facts.problem:
        warnings.append(model_facts.problem)
    if not fit.fits:
        warnings.append(f"the training does not fit into {memory}; take a smaller model, or shorter rows")
    _print_result(target, choices, warnings, fetched=model_facts.known and data.known)


def format_recipe(model: str, dataset: str, bases: Sequence[str], choices: Sequence[Choice]) -> str:
    """Return the text of a recipe with the reason beside each value."""
    extends = bases[0] if len(bases) == 1 else f"[{', '.join(bases)}]"
    lines = [
        "# yaml-language-server: $schema=../schemas/recipe.json",
        f"description: The model {model} learns from the dataset {dataset}.",
        f"extends: {extends} # all other values; generate's are auto: by the lengths that preprocess measures",
        "overrides:",
    ]
    for choice in choices:
        reason = " ".join(f"{'a guess: ' * choice.guess}{choice.reason}".split())
        line = f"  {choice.key}: {_format_value(choice.value)}"
        lines += [f"{line} # {reason}"] if len(line) + len(reason) + 3 <= LINE else [f"  # {reason}", line]
    return "\n".join(lines) + "\n"


def _check_names(target: Path, model: str, dataset: str, *, force: bool) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", target.stem) or target.parent != recipes.FOLDER:
        raise InputError(
            f"{target.stem}: the name of an experiment has small letters, digits and hyphens; give another",
            code="recipe-name",
        )
    if target.exists() and not force:
        raise InputError(
            f"experiments/{target.name}: is there already; give another name, or --force to write over it",
            code="recipe-exists",
        )
    presets = read_yaml(paths.PRESETS)
    for option, table, name in (("--model", "models", model), ("--dataset", "datasets", dataset)):
        known = list(presets[table])
        if name not in known:
            raise InputError(
                f"{option} {name}: no such name under {table} in {paths.PRESETS.name}; {did_you_mean(name, known)}",
                code="unknown-preset",
            )


def _read_bases(names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        values |= recipes.read_overrides(recipes.FOLDER / name)
    return values


def _is_same(choice: Choice, base: dict[str, Any]) -> bool:
    """Tell whether a value is the base's anyway: a recipe does not repeat it."""
    value = base.get(choice.key, ...)
    return type(value) is type(choice.value) and bool(value == choice.value)


def _format_value(value: Any) -> str:
    """Return a value as YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n...\n").strip()


def _validate(name: str, text: str) -> None:
    """Read the recipe as `lathe run` will, before it is in its place. Raises InputError if it does not load."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "base").symlink_to(recipes.FOLDER / "base")
        file = Path(folder) / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        recipes.read_recipe(file)


def _print_result(target: Path, choices: Sequence[Choice], warnings: Sequence[str], *, fetched: bool) -> None:
    name = target.stem
    lines = [f"{target.relative_to(paths.ROOT)}: written; read it, the reasons stand beside the values"]
    lines += [f"warning: {warning}" for warning in warnings]
    if guesses := [choice.key for choice in choices if choice.guess]:
        lines.append(f"guesses: {', '.join(guesses)}")
    if not fetched:
        lines.append("once model and dataset have been fetched, --force measures them and writes the recipe again")
    lines += ["next:", f"  lathe smoke {name}", f"  lathe doctor --recipe {name}", f"  lathe run {name}"]
    sys.stdout.writelines(f"{line}\n" for line in lines)
