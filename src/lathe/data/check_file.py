"""Check of a dataset's file or folder before it is used: what `fetch` and `preprocess` would read, keep and drop.

It reads by their code, and leaves out only what needs the model: its control tokens, its chat template, lengths in
tokens.
"""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.data.occurrences import Occurrences, describe_excess
from lathe.data.read_examples import ExampleFiles, add_system_prompt
from lathe.data.read_files import Fault, has_byte_order_mark
from lathe.data.split_files import SPLITS, require_data_files
from lathe.data.text_files import COMMA

if TYPE_CHECKING:
    from lathe.config.params import Preprocess
    from lathe.config.presets import SingleDataset

# Roughly: of English text, and of characters beyond ASCII.
CHARACTERS_PER_TOKEN, OTHER_CHARACTERS_PER_TOKEN = 4, 2
QUANTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}
ROWS_PER_UPDATE = 1000

NO_CONTROL_TOKENS = re.compile("(?!)")  # those of the model are not known here


def check_file(source: Path, preset: "SingleDataset", *, seed: int, settings: "Preprocess") -> dict[str, Any]:
    """Return what is found in a dataset's file or folder, as JSON values.

    Raises InputError if a file cannot be read, or the columns of no format are in it.
    """
    return check_datasets({"": (source, preset)}, seed=seed, settings=settings)


def check_datasets(
    sources: "Mapping[str, tuple[Path, SingleDataset]]", *, seed: int, settings: "Preprocess"
) -> dict[str, Any]:
    """Return what is found in the files of a mixture's datasets, or of a single one that is named "", as JSON values.

    Raises InputError if a file cannot be read, or the columns of no format are in it.
    """
    from lathe.data.example_store import ExampleWriter

    found, is_mixture = _Found(), list(sources) != [""]
    with tempfile.TemporaryDirectory() as folder:
        datasets = {}
        places: dict[str, Path] = {}
        for name, (source, preset) in sources.items():
            placed = _place_files(source, Path(folder) / "raw" / name)
            places |= {f"{name}/{file}" if name else file: path for file, path in placed.items()}
            datasets[name] = ExampleFiles(Path(folder) / "raw" / name, preset, NO_CONTROL_TOKENS, name=name)
        with ExampleWriter(Path(folder) / "examples") as writer, Progress("reading") as progress:
            for number, examples in enumerate(datasets.values()):
                found.read(examples, number, writer, progress, seed)
        excess = describe_excess(found.unusable, found.rows, settings.max_dropped_fraction)
        refusals = [excess] if excess else []
        presets = {name: preset for name, (_, preset) in sources.items()}
        splits, removed, near_overlap = _assign_splits(writer, datasets, settings, presets, refusals)
    files = {name: facts for examples in datasets.values() for name, facts in examples.files.items()}
    columns = {} if is_mixture else datasets[""].columns
    unused: Counter[str] = Counter()
    for examples in datasets.values():
        unused.update(examples.unused)
    return {
        "format": columns.get("format"),
        "detected": columns.get("detected"),
        "reads": _list_reads(columns),
        "columns": list(dict.fromkeys(name for examples in datasets.values() for name in examples.names)),
        "unused": dict(unused),
        "files": [{"file": name, **facts, **_describe_text(places[name], facts)} for name, facts in files.items()],
        **({"datasets": _describe_datasets(datasets, found, splits)} if is_mixture else {}),
        "rows": {"read": found.rows, "usable": found.rows - found.unusable, "unusable": found.unusable},
        "faults": {
            reason: {
                "rows": cases.count,
                "first": [{"at": at, "field": fault.field, "problem": fault.problem} for at, fault in cases.first],
            }
            for reason, cases in sorted(found.faults.items(), key=lambda item: (-item[1].count, item[0]))
        },
        "removed": removed,
        "splits": {split: sum(counts.values()) for split, counts in splits.items()},
        "near_overlap": near_overlap,
        "characters": {part: _compute_quantiles(lengths) for part, lengths in found.characters.items()},
        "estimated_tokens": {part: _compute_quantiles(lengths) for part, lengths in found.tokens.items()},
        "refusals": refusals,
    }


class _Found:
    """What reading the rows of all datasets found."""

    def __init__(self) -> None:
        self.rows = 0
        self.usable: Counter[str] = Counter()  # by dataset
        self.faults: dict[str, Occurrences[tuple[str, Fault]]] = {}
        self.characters: dict[str, list[int]] = {"prompt": [], "answer": []}
        self.tokens: dict[str, list[int]] = {"prompt": [], "answer": []}

    @property
    def unusable(self) -> int:
        return self.rows - self.usable.total()

    def read(self, examples: ExampleFiles, number: int, writer: Any, progress: Progress, seed: int) -> None:
        """Read the rows of the dataset with this number into the store."""
        from lathe.data.duplicates import compute_digests

        for example in examples:
            self.rows += 1
            if self.rows % ROWS_PER_UPDATE == 0:
                progress.add(ROWS_PER_UPDATE)
            if isinstance(example.value, Fault):
                case = example.place, example.value
                self.faults.setdefault(example.value.reason, Occurrences()).add(lambda case=case: case)  # type: ignore[misc]
                continue
            digests = compute_digests(example.value, seed)
            add_system_prompt(example.value["messages"], examples.system_prompt)
            *prompt, answer = example.value["messages"]
            for part, messages in (("prompt", prompt), ("answer", [answer])):
                if messages:
                    text = "".join(map(_join_text, messages))
                    self.characters[part].append(len(text))
                    self.tokens[part].append(_estimate_tokens(text))
            self.usable[examples.name] += 1
            writer.add(example.place, example.value, digests, SPLITS.index(example.split), number)


def _list_reads(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if name not in ("format", "detected")}


def _describe_datasets(
    datasets: Mapping[str, ExampleFiles], found: _Found, splits: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    """Return of each dataset of a mixture how it is read, its usable rows, and what it gives to each split."""
    train = sum(splits.get("train", {}).values())
    return [
        {
            "dataset": name,
            "format": examples.columns.get("format"),
            "detected": examples.columns.get("detected"),
            "reads": _list_reads(examples.columns),
            "read": sum(facts["rows"] for facts in examples.files.values()),
            "usable": found.usable[name],
            **{split: counts[name] for split, counts in splits.items()},
            "share_of_train": round(splits["train"][name] / train, 4) if train else None,
        }
        for name, examples in datasets.items()
    ]


def _place_files(source: Path, raw: Path) -> dict[str, Path]:
    """Link the files into a folder by the names that `fetch` would give them."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; check the path", code="no-such-file")
    files = require_data_files(source, str(source))
    raw.mkdir(parents=True)
    for name, file in files.items():
        (raw / name).symlink_to(file.resolve())
    return files


def _join_text(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return str(message["content"]) + (str(calls) if calls else "")


def _estimate_tokens(text: str) -> int:
    ascii_only = len(text) if text.isascii() else len(text.encode("ascii", "ignore"))
    return math.ceil(ascii_only / CHARACTERS_PER_TOKEN + (len(text) - ascii_only) / OTHER_CHARACTERS_PER_TOKEN)


def _assign_splits(
    writer: Any,
    datasets: Mapping[str, ExampleFiles],
    settings: "Preprocess",
    presets: "Mapping[str, SingleDataset]",
    refusals: list[str],
) -> tuple[dict[str, dict[str, int]], dict[str, Any], list[dict[str, Any]]]:
    """Return the rows of each split by dataset, those that are removed by reason, and near duplicates between splits.

    Adds a refusal if there are too few rows, or too many near duplicates.
    """
    from lathe.data.mixture import assign_all_splits, count_by_dataset
    from lathe.data.split_overlap import find_split_overlap

    stored = writer.get_stored()
    present = {name: {facts["split"] for facts in examples.files.values()} for name, examples in datasets.items()}
    try:
        assigned = assign_all_splits(
            stored,
            presets,
            source_splits=present,
            validation_fraction=settings.validation_fraction,
            test_fraction=settings.test_fraction,
        )
    except InputError as error:
        refusals.append(str(error))
        return {}, {}, []
    removed: dict[str, Occurrences[tuple[str, str]]] = {}
    for by_reason in assigned.removed.values():
        for reason, cases in by_reason.items():
            removed.setdefault(reason, Occurrences()).extend(cases)
    refusals += [f"no usable {name} row is left; add some" for name in SPLITS if not len(assigned.rows[name])]
    with stored.open_reader() as reader:
        overlap = find_split_overlap(stored, assigned.rows, reader)
        near_overlap = overlap.make_report(reader)
        if excess := overlap.describe_excess(settings.max_overlap_fraction, reader):
            refusals.append(excess)
    described = {
        reason: {"rows": cases.count, "first": [{"at": at, "problem": problem} for at, problem in cases.first]}
        for reason, cases in removed.items()
    }
    splits = {name: count_by_dataset(stored, assigned.rows[name], list(datasets)) for name in SPLITS}
    return splits, described, near_overlap


def _describe_text(file: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return encoding and delimiter of a file, if it has any."""
    suffixes = file.name.lower().removesuffix(".gz")
    if suffixes.endswith((".parquet", ".arrow")):
        return {}
    encoding = facts.get("encoding") or ("UTF-8 with a byte order mark" if has_byte_order_mark(file) else "UTF-8")
    return {
        "encoding": encoding,
        **({"delimiter": facts.get("delimiter", COMMA)} if suffixes.endswith((".csv", ".tsv")) else {}),
    }


def _compute_quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """Return the nearest-rank quantiles, so that each is a length that occurs; none of no rows."""
    ordered = sorted(lengths)
    return {
        name: ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] for name, fraction in QUANTILES.items() if ordered
    }
