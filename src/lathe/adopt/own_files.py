"""Own files of a new repository: preset, recipe, parameters and README of the user's model and dataset."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError

EXAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """A model or dataset of the user: a path on this machine, or a repository of the Hugging Face Hub."""

    local: Path | None
    hub: str | None


@dataclass(frozen=True)
class Own:
    """The user's choices; without `model` and `dataset`, which go together, there is an example to edit."""

    name: str
    model: Source | None
    dataset: Source | None
    prompt: str | None
    completion: str | None

    @property
    def model_path(self) -> str:
        """The folder of a local model in the repository."""
        return f"models/local/{self.name}"

    @property
    def dataset_path(self) -> str:
        """The file or folder of a local dataset in the repository; a file keeps its suffixes, such as .jsonl.gz."""
        file = self.dataset.local if self.dataset else None
        suffixes = "" if file is None or file.is_dir() else "".join(re.findall(r"\.[A-Za-z]\w*", file.name)[-2:])
        return f"data/local/{self.name}{suffixes}" if file else f"data/local/{self.name}.jsonl"


def add_presets(text: str, own: Own) -> str:
    """Return presets.yaml with the user's model and dataset first; the other lines stay, so that updates merge."""
    for table, entry in (("models", _model_entry(own)), ("datasets", _dataset_entry(own))):
        head = f"{table}:\n"
        assert text.count(f"\n{head}") == 1, table
        text = text.replace(f"\n{head}", f"\n{head}{entry}\n", 1)
    return text


def write_recipe(own: Own) -> str:
    """Return the user's recipe."""
    example = own.model is None
    lines = [
        "# yaml-language-server: $schema=../schemas/recipe.json",
        *(["# An example: edit it, and its presets of the same name in presets.yaml."] if example else []),
        f"# `lathe doctor --recipe {own.name}` says if it fits this machine, `lathe run {own.name}` runs it.",
        "description: >-",
        f"  The model {own.name} learns from the dataset {own.name}.",
        "hypothesis: >-",
        "  rouge_l of the answers on validation rises above the base's.",
        "expect: >-",
        "  Not run yet.",
        "extends: base/real-model.yaml # all other values; name here what your run changes",
        "overrides:",
        f"  model: {own.name}",
        f"  dataset: {own.name}",
        "  training.learning_rate: 0.0001 # peak; for all weights (training.tuning: full) a tenth of it",
    ]
    return "\n".join(lines) + "\n"


def write_readme(own: Own, version: str) -> str:
    """Return the README of the new repository."""
    start = (
        f"`experiments/{own.name}.yaml` and the presets `{own.name}` in `presets.yaml` are an example: edit "
        "them first.\n`params.yaml` still has Lathe's own values; with them `make repro` takes 15 minutes or so."
        if own.model is None
        else f"`presets.yaml` names the model and the dataset `{own.name}`, `experiments/{own.name}.yaml` is their "
        "recipe, and\n`params.yaml` has its values."
    )
    return f"""\
# {own.name}

A model fine-tuned, quantized and measured by a DVC pipeline, made with {version}.

{start}

```
make setup                        # .venv with the pinned packages, and llama.cpp's converter
source .venv/bin/activate
lathe check                       # are params.yaml and presets.yaml valid?
lathe doctor --recipe {own.name:<12}# does the run fit this machine?
make repro                        # the pipeline with params.yaml; then commit dvc.lock and metrics/
lathe run {own.name:<24}# the recipe as an experiment: lathe experiments, lathe compare
make chat                         # talk to the best file
```

`docs/` describes Lathe page by page, from `docs/index.md` on; `docs/adopting.md` says how to take its updates.
"""


def edit_params(text: str, values: Mapping[str, Any]) -> str:
    """Return params.yaml with these values by their dotted keys, in DVC's form; other lines and all comments stay."""
    lines = text.splitlines()
    for key, value in values.items():
        start, end = _find_entry(lines, key)
        match = re.fullmatch(r"(?P<key>\s*\w+:)(?P<value>.*?)(?P<comment> #.*)?", lines[start])
        assert match, lines[start]
        items = value if isinstance(value, list) else []
        written = "" if items or value is None else f" {format_scalar(value)}"
        indent = " " * (len(lines[start]) - len(lines[start].lstrip()))
        lines[start : end + 1] = [
            f"{match['key']}{written}{match['comment'] or ''}",
            *(f"{indent}{line}" for item in items for line in _format_item(item)),
        ]
    return "\n".join(lines) + "\n"


def format_scalar(value: Any) -> str:
    """Return a value as YAML, on one line."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w. >=<-]*[\w]", value) and value not in ("true", "null"):
        return value
    return json.dumps(value, ensure_ascii=False)


def _format_item(item: Any) -> list[str]:
    """Return an item of a list as lines; those of a mapping have a key each."""
    if isinstance(item, Mapping):
        pairs = [f"{key}: {format_scalar(value)}" for key, value in item.items()]
        return [f"{'- ' if number == 0 else '  '}{pair}" for number, pair in enumerate(pairs)]
    return [f"- {format_scalar(item)}"]


def _find_entry(lines: list[str], key: str) -> tuple[int, int]:
    """Return the first and last line of a key's entry in a YAML file that has one key per line."""
    start, end = -1, len(lines)
    for depth, name in enumerate(key.split(".")):
        pattern = re.compile(rf" {{{2 * depth}}}{name}:(?!\S)")
        start = next(number for number in range(start + 1, end) if pattern.match(lines[number]))
        # The items of a list may be as far in as its key: DVC writes them so.
        further = (number for number in range(start + 1, end) if re.match(rf" {{0,{2 * depth}}}[^\s-]", lines[number]))
        end = next(further, end)
    while end - 1 > start and not lines[end - 1].strip():
        end -= 1
    return start, end - 1


def _model_entry(own: Own) -> str:
    lines = [f"  {own.name}: # the base model"]
    if own.model and own.model.local:
        lines += ["    source: local", f"    path: {own.model_path}"]
    else:
        lines += ["    source: hub", f"    id: {own.model.hub if own.model else EXAMPLE_MODEL}"]
        lines += ["    revision: main # `fetch` prints the line that pins the commit"]
    return "\n".join(lines) + "\n"


def _dataset_entry(own: Own) -> str:
    prompt, completion = own.prompt, own.completion
    if own.dataset and own.dataset.hub:
        lines = [f"  {own.name}:", "    source: hub", f"    id: {own.dataset.hub}"]
        lines += ["    revision: main # `fetch` prints the line that pins the commit"]
        lines += ["    train_split: train # validation and test are taken from it where they are not named"]
    else:
        note = "" if own.dataset else " # put the file there, then: dvc add"
        lines = [f"  {own.name}:", "    source: local", f"    path: {own.dataset_path}{note}"]
    if own.dataset is None:
        prompt, completion = prompt or "prompt", completion or "completion"
    if prompt:
        lines += [f"    prompt: {format_scalar(prompt)} # the column with the prompt"]
    if completion:
        lines += [f"    completion: {format_scalar(completion)} # the column with the answer"]
    return "\n".join(lines) + "\n"


def read_source(option: str, given: str) -> Source:
    """Return a path that is there, or a repository of the Hub; raises InputError if it is neither."""
    file = Path(given).expanduser()
    if file.exists():
        return Source(file.resolve(), None)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given):
        return Source(None, given)
    raise InputError(
        f"{option} {given}: neither a file or folder that is there nor OWNER/NAME on the Hub; check the path",
        code="missing-source",
    )
