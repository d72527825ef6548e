"""Text of a dataset's check: what `lathe data` prints, and the entry of presets.yaml for the file."""

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lathe.common import paths, row_report
from lathe.data.check_file import CHARACTERS_PER_TOKEN, OTHER_CHARACTERS_PER_TOKEN
from lathe.data.text_files import DELIMITERS


def format_check(found: Mapping[str, Any], source: Path, preset: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines about a dataset; `preset` is an entry to add to presets.yaml, by its name."""
    yield from _format_files(found)
    if found["format"]:
        yield f"format      {_format_reads(found)}"
    for part in found.get("datasets", []):
        yield from _format_part(part)
    yield f"columns     {', '.join(found['columns']) or 'none'}"
    if found["unused"]:
        unused = ", ".join(f"{name} ({_count_rows(count)})" for name, count in found["unused"].items())
        yield f"not used    {unused}"
    rows = found["rows"]
    reasons = ", ".join(
        f"{fault['rows']} {row_report.name_reason(reason)}" for reason, fault in found["faults"].items()
    )
    dropped = f"{rows['unusable']} would be dropped ({reasons})" if rows["unusable"] else "none would be dropped"
    yield f"rows        {rows['read']}: {rows['usable']} can be used, {dropped}"
    for reason, fault in found["faults"].items():
        for case in fault["first"]:
            yield f"  {case['at']}: {row_report.name_reason(reason)}: {row_report.describe_case(case)}"
        yield from _format_rest(fault)
    for reason, removed in found["removed"].items():
        yield f"{row_report.name_reason(reason):<11} {_count_rows(removed['rows'])} would be removed, which is no fault"
        for case in removed["first"]:
            yield f"  {case['at']}: {case['problem']}"
        yield from _format_rest(removed)
    if found["splits"]:
        yield "splits      " + ", ".join(f"{name} {count}" for name, count in found["splits"].items())
    for near in (near for near in found["near_overlap"] if near["rows"]):
        held_out, other = near["splits"].split("_in_")
        yield f"alike       {near['rows']} of {near['checked']} {held_out} rows are nearly in {other}"
        yield from (f"  {case['at']}: {case['problem']}" for case in near["examples"])
        yield from _format_rest({"rows": near["rows"], "first": near["examples"]})
    for part in ("prompt", "answer"):
        if found["characters"][part]:
            yield f"{part:<11} {_format_lengths(found, part)}"
    yield (
        f"tokens      estimated at {CHARACTERS_PER_TOKEN} characters each, {OTHER_CHARACTERS_PER_TOKEN} beyond ASCII; "
        "preprocess counts by the tokenizer"
    )
    yield "not checked what needs the model: its control tokens in texts, its chat template, training.max_length"
    yield from (f"preprocess would stop: {refusal}" for refusal in found["refusals"])
    if preset:
        yield ""
        (path,) = (entry["path"] for entry in preset.values())
        yield f"presets.yaml, beside the other datasets{_describe_move(source, path)}:"
        text = yaml.safe_dump({"datasets": dict(preset)}, sort_keys=False, allow_unicode=True)
        yield from text.rstrip("\n").splitlines()


def make_preset(
    source: Path, known: Collection[str], *, prompt: str | None, completion: str | None
) -> dict[str, dict[str, Any]]:
    """Return an entry of presets.yaml for a file or folder, by a name that is not among the `known` ones."""
    stem = re.split(r"\.", source.name.lower())[0]
    name = base = re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "mine"
    number = 1
    while name in known:
        number += 1
        name = f"{base}-{number}"
    columns = {"prompt": prompt, "completion": completion} if prompt and completion else {}
    return {name: {"source": "local", "path": _choose_path(source), **columns}}


def _choose_path(source: Path) -> str:
    """Return the path under data/local, where a dataset of one's own belongs."""
    absolute = source.absolute()
    inside = absolute if absolute.is_relative_to(paths.DATA_LOCAL) else paths.DATA_LOCAL / absolute.name
    return inside.relative_to(paths.ROOT).as_posix()


def _describe_move(source: Path, path: str) -> str:
    return (
        ""
        if source.absolute() == paths.ROOT / path
        else f" (put it at {path} first, then `dvc add {shlex.quote(path)}`)"
    )


def _format_reads(found: Mapping[str, Any]) -> str:
    reads = ", ".join(
        f"{key}: {value!r}" if key == "prompt_template" else f"{key}: {value}" for key, value in found["reads"].items()
    )
    return f"{found['format']} ({reads}), {'by its columns' if found['detected'] else 'as named'}"


def _format_part(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a dataset of a mixture."""
    yield f"dataset     {part['dataset']}: {_format_reads(part)}"
    if part.get("train") is not None:
        share = f" ({part['share_of_train']:.1%} of all)" if part["share_of_train"] is not None else ""
        held_out = f"{part['validation']} validation, {part['test']} test"
        yield f"  {_count_rows(part['usable'])} can be used: {part['train']} for training{share}, {held_out}"


def _format_files(found: Mapping[str, Any]) -> Iterator[str]:
    for file in found["files"]:
        facts = [file["format"], *([file["encoding"]] if "encoding" in file else [])]
        if "delimiter" in file:
            facts.append(f"columns separated by {DELIMITERS.get(file['delimiter'], repr(file['delimiter']))}")
        rows = _count_rows(file["rows"])
        if file.get("not_read"):
            rows += f" of {file['rows'] + file['not_read']} (chosen among these: limits)"
        yield f"file        {file['file']}: {file['split']}, {rows}, {', '.join(facts)}"


def _count_rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _format_rest(cases: Mapping[str, Any]) -> Iterator[str]:
    if more := cases["rows"] - len(cases["first"]):
        yield f"  and {more} more"


def _format_lengths(found: Mapping[str, Any], part: str) -> str:
    characters, tokens = found["characters"][part], found["estimated_tokens"][part]
    numbers = [
        f"{what} {characters[name]} (about {tokens[name]} tokens)"
        for name, what in (("p50", "median"), ("p95", "95 % up to"), ("max", "longest"))
    ]
    return f"characters: {', '.join(numbers)}"
