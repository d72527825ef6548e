"""Exports of other programs: ChatGPT's conversations become messages; of annotation tools the columns are found.

A column that a preset names may be a path into a record: `data.text`, `annotations.0.result.0.value.choices.0`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.json_rows import look_up
from lathe.data.read_files import Fault

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset

CHATGPT = "chatgpt"

# Content of ChatGPT's messages that is no text of the conversation: settings of the user, and the model's thoughts.
HIDDEN_CONTENT = ("user_editable_context", "model_editable_context", "thoughts", "reasoning_recap")


class RecordReader:
    """Prepares the records of a dataset for their format: exports are converted, paths are looked up.

    `description` is what the report says of that.
    """

    def __init__(self, preset: "SingleDataset", first: Mapping[str, Any], file: str) -> None:
        """Recognise an export by its first record.

        Raises InputError, with the keys to name, for an export in which columns have no fixed names.
        """
        self.is_chatgpt = not _names_columns(preset) and {"mapping", "current_node"} <= set(first)
        if not self.is_chatgpt and not _names_columns(preset):
            _refuse_annotations(first, file)
        self.description = {"export": CHATGPT} if self.is_chatgpt else {}
        columns = (preset.messages, preset.prompt, preset.completion, preset.rejected, preset.thought, preset.tools)
        self.paths = [column for column in columns if column and "." in column and column not in first]
        self.json_texts = preset.messages or ("messages" if "messages" in first else "conversations")
        # Most records are read as they are.
        self.changes_records = bool(self.is_chatgpt or self.paths or isinstance(first.get(self.json_texts), str))

    def read(self, record: dict[str, Any]) -> dict[str, Any] | Fault:
        """Return the record as its format reads it, or its fault."""
        if self.is_chatgpt:
            return _read_chatgpt(record)
        if self.paths:
            found = {path: look_up(record, path) for path in self.paths}
            record = {**record, **{path: value for path, value in found.items() if value is not None}}
        text = record.get(self.json_texts)
        if isinstance(text, str) and text.lstrip().startswith("["):  # a list in a cell of a CSV file
            with contextlib.suppress(ValueError, RecursionError):  # then it is a fault, which the format names
                record = {**record, self.json_texts: json.loads(text)}
        return record


def _names_columns(preset: "SingleDataset") -> bool:
    named = (preset.format, preset.messages, preset.prompt, preset.completion, preset.prompt_template, preset.rejected)
    return any(named)


def _read_chatgpt(record: Mapping[str, Any]) -> dict[str, Any] | Fault:
    """Return the messages from the first to `current_node`: the branch that was shown last."""
    mapping, node = record.get("mapping"), record.get("current_node")
    if not isinstance(mapping, dict) or node not in mapping:
        return Fault("no_branch", "current_node", "is not among the messages of mapping; expected the last of them")
    branch: list[dict[str, Any]] = []
    seen = set()
    while node in mapping and node not in seen:
        seen.add(node)
        message = mapping[node].get("message")
        if message:
            branch.append(message)
        node = mapping[node].get("parent")
    messages: list[dict[str, Any]] = []
    for message in reversed(branch):
        role, content = look_up(message, "author.role"), message.get("content") or {}
        kind = content.get("content_type")
        hidden = look_up(message, "metadata.is_visually_hidden_from_conversation") is True
        if hidden or kind in HIDDEN_CONTENT or role not in ("system", "user", "assistant"):
            if role == "tool":
                return _describe_tool(message)
            continue
        parts = content.get("parts")
        if kind != "text" or not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return Fault(
                "not_text", "mapping", f"holds a message of type {kind!r}; expected conversations of text alone"
            )
        text = "".join(parts)
        if role == "assistant" and message.get("recipient", "all") != "all":
            return _describe_tool(message)
        if not text.strip() and role != "user":
            continue
        if messages and messages[-1]["role"] == role == "assistant":  # an answer that was continued
            messages[-1]["content"] += text
        else:
            messages.append({"role": role, "content": text})
    return {"messages": messages}


def _describe_tool(message: Mapping[str, Any]) -> Fault:
    name = look_up(message, "author.name") or message.get("recipient")
    return Fault("tools", "mapping", f"uses the tool {name!r} of ChatGPT; expected conversations of text alone")


def _refuse_annotations(first: Mapping[str, Any], file: str) -> None:
    """Raise InputError with the preset's keys if the record is that of Label Studio or Argilla."""
    data, fields = first.get("data"), first.get("fields")
    if isinstance(data, dict) and ("annotations" in first or "completions" in first):
        answers = [path for path in _list_paths(first.get("annotations"), "annotations") if ".value." in path]
        _refuse(file, "Label Studio", _first_text(data, "data"), answers, "annotations.0.result.0.value.choices.0")
    if isinstance(fields, dict) and ("responses" in first or "suggestions" in first):
        wanted = "responses" if first.get("responses") else "suggestions"
        answers = [path for path in _list_paths(first.get(wanted), wanted) if path.rpartition(".")[2] == "value"]
        _refuse(file, "Argilla", _first_text(fields, "fields"), answers, "responses.NAME.0.value")


def _refuse(file: str, tool: str, prompt: str, answers: list[str], otherwise: str) -> None:
    answer = answers[0] if answers else otherwise
    raise InputError(
        f"{file}: is an export of {tool}, whose columns have no fixed names; name them in the dataset's preset, as "
        f"`prompt: {prompt}` and `completion: {answer}`",
        code="name-columns",
    )


def _first_text(fields: Mapping[str, Any], prefix: str) -> str:
    names = [name for name, value in fields.items() if isinstance(value, str)]
    return f"{prefix}.{names[0] if names else 'NAME'}"


def _list_paths(value: Any, path: str) -> Iterator[str]:
    """Yield the paths of the texts in a value."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _list_paths(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _list_paths(inner, f"{path}.{number}")
