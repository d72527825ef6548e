"""Examples of a dataset's files: each record as validated chat messages, or why it cannot be used."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.formats import RecordConverter
from lathe.data.read_files import Fault, find_text_form, read_records
from lathe.data.row_checks import RowFault
from lathe.data.split_files import find_split_files, get_suffix
from lathe.data.text_files import TextForm, describe_form
from lathe.models.unicode_form import UnicodeRule

if TYPE_CHECKING:
    from lathe.config.presets import DatasetPreset


@dataclass(frozen=True, slots=True)
class ReadExample:
    """A record's split and place in the user's file (`train.jsonl:12`), and the example or the fault it became."""

    split: str
    place: str
    value: dict[str, Any] | Fault


class ExampleFiles:
    """The files of a folder as examples; iterate over it once.

    Afterwards `files` says of each file its split, format and number of rows, `columns` how the columns are read,
    `names` which columns there are, and `unused` how many rows have columns and keys of messages that nothing reads.
    """

    def __init__(
        self,
        folder: Path,
        preset: "DatasetPreset",
        control_tokens: re.Pattern[str],
        unicode_rule: UnicodeRule | None = None,
    ) -> None:
        """Find the files. Raises InputError if there are none, or none to train on."""
        self.preset, self.control_tokens, self.unicode_rule = preset, control_tokens, unicode_rule
        self.paths = find_split_files(folder)
        if "train" not in self.paths:
            raise InputError(
                f"{next(iter(self.paths.values()))[0].name}: there is no train split beside it; name the training file "
                "train.*",
                code="missing-split",
            )
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, Any] = {}
        self.names: dict[str, None] = {}
        self.unused: dict[str, int] = {}

    def __iter__(self) -> Iterator[ReadExample]:
        """Yield every record. Raises InputError if a file cannot be read, or lacks a column."""
        converter: RecordConverter | None = None
        form = TextForm(self.preset.encoding, self.preset.delimiter)
        for split, shards in self.paths.items():
            for file in shards:
                names: dict[str, None] = {}
                count = 0
                for record in read_records(file, form):
                    count += 1
                    value: dict[str, Any] | Fault = record.value
                    if not isinstance(value, Fault):
                        names.update(dict.fromkeys(value))
                        converter = converter or RecordConverter(
                            self.preset, names, file.name, self.control_tokens, self.unicode_rule
                        )
                        try:
                            messages = converter.convert(value)
                            value = {"messages": messages, **converter.get_extra_fields(value)}
                        except RowFault as error:
                            value = error.fault
                    yield ReadExample(split, record.place, value)
                if converter and names:
                    converter.require_columns(names, file.name)
                text = find_text_form(file, form)
                self.files[file.name] = {
                    "split": split,
                    "format": (get_suffix(file) or "")[1:],
                    "rows": count,
                    **(describe_form(*text) if text else {}),
                }
                self.names.update(names)
        if converter:
            self.columns = {**converter.description, "detected": converter.detected}
            self.unused = dict(sorted(converter.unused.items()))


def add_system_prompt(messages: list[dict[str, Any]], system_prompt: str | None) -> None:
    """Put the preset's system message before a conversation that has none."""
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
