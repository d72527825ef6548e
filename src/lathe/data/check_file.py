"""Check of a dataset's file or folder before it is used: what `fetch` and `preprocess` would read, keep and drop.

It reads by their code, and leaves out only what needs the model: its control tokens, its chat template, lengths in
tokens.
"""

import math
import re
import tempfile
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
    from lathe.data.duplicates import compute_digests
    from lathe.data.example_store import ExampleWriter

    faults: dict[str, Occurrences[tuple[str, Fault]]] = {}
    characters: dict[str, list[int]] = {"prompt": [], "answer": []}
    tokens: dict[str, list[int]] = {"prompt": [], "answer": []}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        files = _place_files(source, raw)
        examples = ExampleFiles(raw, preset, NO_CONTROL_TOKENS)
        with ExampleWriter(Path(folder) / "examples") as writer, Progress("reading") as progress:
            for number, example in enumerate(examples, start=1):
                if number % ROWS_PER_UPDATE == 0:
                    progress.add(ROWS_PER_UPDATE)
                if isinstance(example.value, Fault):
                    case = example.place, example.value
                    faults.setdefault(example.value.reason, Occurrences()).add(lambda case=case: case)  # type: ignore[misc]
                    continue
                digests = compute_digests(example.value, seed)
                add_system_prompt(example.value["messages"], examples.system_prompt)
                *prompt, answer = example.value["messages"]
                for part, messages in (("prompt", prompt), ("answer", [answer])):
                    if messages:
                        text = "".join(map(_join_text, messages))
                        characters[part].append(len(text))
                        tokens[part].append(_estimate_tokens(text))
                writer.add(example.place, example.value, digests, SPLITS.index(example.split))
        usable = len(characters["answer"])
        read = sum(facts["rows"] for facts in examples.files.values())
        excess = describe_excess(read - usable, read, settings.max_dropped_fraction)
        refusals = [excess] if excess else []
        splits, removed, near_overlap = _assign_splits(writer, examples.files, settings, preset, refusals)
    return {
        "format": examples.columns.get("format"),
        "detected": examples.columns.get("detected"),
        "reads": {name: value for name, value in examples.columns.items() if name not in ("format", "detected")},
        "columns": list(examples.names),
        "unused": examples.unused,
        "files": [
            {"file": name, **facts, **_describe_text(files[name], facts)} for name, facts in examples.files.items()
        ],
        "rows": {"read": read, "usable": usable, "unusable": read - usable},
        "faults": {
            reason: {
                "rows": cases.count,
                "first": [{"at": at, "field": fault.field, "problem": fault.problem} for at, fault in cases.first],
            }
            for reason, cases in sorted(faults.items(), key=lambda item: (-item[1].count, item[0]))
        },
        "removed": removed,
        "splits": splits,
        "near_overlap": near_overlap,
        "characters": {part: _compute_quantiles(lengths) for part, lengths in characters.items()},
        "estimated_tokens": {part: _compute_quantiles(lengths) for part, lengths in tokens.items()},
        "refusals": refusals,
    }


def _place_files(source: Path, raw: Path) -> dict[str, Path]:
    """Link the files into a folder by the names that `fetch` would give them."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; check the path", code="no-such-file")
    files = require_data_files(source, str(source))
    raw.mkdir()
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
    files: Mapping[str, Mapping[str, Any]],
    settings: "Preprocess",
    preset: "SingleDataset",
    refusals: list[str],
) -> tuple[dict[str, int], dict[str, Any], list[dict[str, Any]]]:
    """Return the rows of each split, those that are removed by reason, and near duplicates between splits.

    Adds a refusal if there are too few rows, or too many near duplicates.
    """
    from lathe.data.split_overlap import find_split_overlap
    from lathe.data.splits import assign_splits

    stored = writer.get_stored()
    try:
        assigned = assign_splits(
            stored,
            source_splits={facts["split"] for facts in files.values()},
            validation_fraction=settings.validation_fraction,
            test_fraction=settings.test_fraction,
            limits={str(name): limit for name, limit in (preset.limits or {}).items()},
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
    return {name: len(assigned.rows[name]) for name in SPLITS}, described, near_overlap


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
