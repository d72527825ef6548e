"""Format of a dataset by the names of its columns, and what to name in the preset where they fit none."""

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.common.errors import InputError
from lathe.data.format_columns import FORMATS, TEXT
from lathe.data.row_checks import format_names

# Columns that often hold the prompt and the answer, by names that are no format's: said, and never assumed.
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "request", "problem", "user", "human", "source")
_ANSWERS = (
    *("completion", "answer", "response", "output", "reply", "solution", "assistant", "target", "gpt", "label"),
    *("ground_truth", "expected", "summary"),
)


def detect_format(names: Sequence[str], first: Mapping[str, Any], file: str) -> str:
    """Return the format that the column names fit; raises InputError if none does, or several.

    `first` is a record with these columns, which tells where messages lie deeper.
    """
    if list(names) == [TEXT]:
        return TEXT
    fitting = [form for form, columns in FORMATS.items() if set(columns) <= set(names)]
    if fitting == ["sharegpt", "preference"]:  # LLaMA-Factory's pairs: two answers to one conversation
        return "preference"
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            f"{file}: its columns {format_names(names)} fit the formats {' and '.join(fitting)}; choose one "
            f"in the dataset's preset (format: {fitting[0]})",
            code="ambiguous-format",
        )
    known = "; ".join(" + ".join(columns) for columns in FORMATS.values())
    suggested = suggest_columns(names, first)
    raise InputError(
        f"{file}: has the columns {format_names(names)}; expected those of a format ({known}); name yours in the "
        f"dataset's preset ({suggested or 'messages, prompt + completion, prompt_template + completion'})",
        code="unknown-format",
    )


def suggest_columns(names: Sequence[str], first: Mapping[str, Any]) -> str:
    """Return keys of a preset that name columns which look like messages, or prompt and answer; "" if none do."""
    for name, value in first.items():
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            return f"perhaps messages: {name}.messages"
    by_name = {name.strip().lower(): name for name in names}
    found = [next((by_name[name] for name in usual if name in by_name), None) for usual in (_PROMPTS, _ANSWERS)]
    if not all(found) or found[0] == found[1]:
        return ""
    prompt, answer = (f'"{name}"' if name != str(name).strip() else name for name in found)
    return f"perhaps prompt: {prompt} and completion: {answer}"
