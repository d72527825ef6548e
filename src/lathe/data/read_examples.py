"""Examples of a dataset's files: each record as validated chat messages, or why it cannot be used."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.data.exports import RecordReader
from lathe.data.format_columns import FORMATS, TEXT
from lathe.data.formats import RecordConverter
from lathe.data.null_arguments import is_padded
from lathe.data.part_of_file import Part, choose_parts, count_rows_to_read
from lathe.data.read_files import Fault, find_text_form, read_records
from lathe.data.row_checks import RowFault, check_preset_text, format_names
from lathe.data.split_files import TEXT_SUFFIXES, find_split_files, get_suffix
from lathe.data.text_files import TextForm, describe_form
from lathe.models.document import DOCUMENT
from lathe.models.unicode_form import UnicodeRule

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset

ROWS_LOOKED_AT = 100  # a column that the first rows lack may be one of the format's

Row = dict[str, Any] | Fault


@dataclass(frozen=True, slots=True)
class ReadExample:
    """A record's split and place in the user's file (`train.jsonl:12`), and the example or the fault it became.

    `cluster` names what the record belongs to, by the field that rows are clustered by; None without one.
    """

    split: str
    place: str
    value: dict[str, Any] | Fault
    cluster: str | None = None


class ExampleFiles:
    """The files of a folder as examples; iterate over it once.

    `system_prompt` is the preset's as rows have it, from the first record on. Afterwards `files` says of each file its
    split, format and number of rows, `columns` how the columns are read, `names` which columns there are, and
    `unused` how many rows have columns and keys of messages that nothing reads.
    """

    def __init__(
        self,
        folder: Path,
        preset: "SingleDataset",
        control_tokens: re.Pattern[str],
        unicode_rule: UnicodeRule | None = None,
        name: str = "",
        change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        cluster_by: str | None = None,
    ) -> None:
        """Find the files; `name` is that of the dataset in a mixture, and begins each place then.

        `change` makes of each record the one that is converted. `cluster_by` is the column whose value is the
        `cluster` of an example.

        Raises InputError if there are none, or none to train on.
        """
        self.preset, self.control_tokens, self.unicode_rule = preset, control_tokens, unicode_rule
        self.change, self.cluster_by = change, cluster_by
        self.name, self.prefix = name, f"{name}/" if name else ""
        self.paths = find_split_files(folder)
        if only := getattr(preset, "split", None):
            self.paths = {only: self.paths.get(only) or self.paths.get("train", [])}
        elif "train" not in self.paths:
            raise InputError(
                f"{next(iter(self.paths.values()))[0].name}: there is no train split beside it; name the training file "
                "train.*",
                code="missing-split",
            )
        self.reader: RecordReader | None = None
        self.system_prompt = preset.system_prompt
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, Any] = {}
        self.names: dict[str, None] = {}
        self.unused: dict[str, int] = {}

    def __iter__(self) -> Iterator[ReadExample]:
        """Yield every record. Raises InputError if a file cannot be read, or lacks a column."""
        converter: RecordConverter | None = None
        self.reader = None
        form = TextForm(self.preset.encoding, self.preset.delimiter, self.preset.rows_key)
        for split, shards in self.paths.items():
            form = replace(form, is_one_document=len(shards) > 1)
            parts = choose_parts(shards, count_rows_to_read(_list_limits(self.preset), split, self.paths), form)
            for file in shards:
                part = parts.get(file)
                names: dict[str, None] = {}
                count = 0
                rows = self._read_rows(file, form, part)
                if converter is None:
                    first = list(islice(rows, ROWS_LOOKED_AT))
                    converter = self._choose_converter([row for _, row in first if not isinstance(row, Fault)], file)
                    rows = chain(first, rows)
                for place, value in rows:
                    count += 1
                    cluster: str | None = None
                    if not isinstance(value, Fault):
                        names.update(dict.fromkeys(value))
                        cluster = _name_cluster(value.get(self.cluster_by)) if self.cluster_by else None
                        converter = converter or self._choose_converter([value], file)
                        assert converter
                        try:
                            messages = converter.convert(value)
                            value = {"messages": messages, **converter.get_extra_fields(value)}
                        except RowFault as error:
                            value = error.fault
                    yield ReadExample(split, self.prefix + place, value, cluster)
                if converter and names:
                    converter.require_columns(names, file.name)
                text = find_text_form(file, form)
                self.files[self.prefix + file.name] = {
                    **({"dataset": self.name} if self.name else {}),
                    "split": split,
                    "format": (get_suffix(file) or "")[1:],
                    "rows": count,
                    **({"not_read": part.left_out} if part else {}),
                    **(describe_form(*text) if text else {}),
                }
                self.names.update(names)
        if converter:
            self._require_named_columns()
        if converter and self.reader:
            self.columns = {**self.reader.description, **converter.description, "detected": converter.detected}
            self.unused = dict(sorted(converter.unused.items()))

    def _require_named_columns(self) -> None:
        """Raise InputError if a column that the preset names, and not every row needs, is in no row at all."""
        for key in ("tools", "thought"):
            column = getattr(self.preset, key)
            if column and column not in self.names:
                raise InputError(
                    f"{self.prefix}{next(iter(self.paths.values()))[0].name}: no row has the column {column!r}, which "
                    f"the dataset's preset names in {key}; {did_you_mean(column, list(self.names))}",
                    code="missing-column",
                )

    def _read_rows(self, file: Path, form: TextForm, part: Part | None) -> Iterator[tuple[str, Row]]:
        """Yield the place and the columns of every row, or why it has none."""
        for record in read_records(file, form, part):
            value: Row = record.value
            if not isinstance(value, Fault):
                self.reader = self.reader or RecordReader(self.preset, value, file.name)
                if self.reader.changes_records:
                    value = self.reader.read(value)
            if self.change and not isinstance(value, Fault):
                value = self.change(value)
            yield record.place, value

    def _choose_converter(self, rows: list[dict[str, Any]], file: Path) -> RecordConverter | None:
        """Choose the format by the columns that any of the rows has; by those of the first if several formats fit."""
        if not rows:
            return None
        if get_suffix(file) in TEXT_SUFFIXES and self.preset.format != TEXT:
            _refuse_table(str(rows[0].get(TEXT, "")), self.preset, file.name)

        def choose(names: Iterable[str]) -> RecordConverter:
            return RecordConverter(
                self.preset,
                names,
                file.name,
                self.control_tokens,
                self.unicode_rule,
                first=rows[0],
                is_padded=is_padded(rows),
            )

        try:
            converter = choose(dict.fromkeys(name for row in rows for name in row))
        except InputError as error:
            if error.code != "ambiguous-format":
                raise
            converter = choose(rows[0])
        if self.system_prompt:
            self.system_prompt = check_preset_text(converter.check_text, self.system_prompt, "system_prompt")
        return converter


def _refuse_table(text: str, preset: "SingleDataset", file: str) -> None:
    """Raise InputError if a text begins with the header of a table, as Excel's "Unicode Text (*.txt)" does."""
    columns = text.partition("\n")[0].strip("\r").split("\t")
    named = [(preset.prompt, preset.completion)] if preset.prompt and preset.completion else []
    if any(set(wanted) <= set(columns) for wanted in (*FORMATS.values(), *named) if len(wanted) > 1):
        raise InputError(
            f"{file}: begins with the header of a table, {format_names(columns)}; rename it to "
            f"{file.partition('.')[0]}.tsv, or name its format if it is a raw text (format: text)",
            code="table-as-text",
        )


def _name_cluster(value: Any) -> str | None:
    """Return a column's value as a text; None for an empty one, whose row is a cluster of its own."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _list_limits(preset: "SingleDataset") -> dict[Any, int]:
    rows = getattr(preset, "rows", None)  # of training, in a mixture
    return {**(preset.limits or {}), **({"train": rows} if rows else {})}


def add_system_prompt(messages: list[dict[str, Any]], system_prompt: str | None) -> None:
    """Put the preset's system message before a conversation that has none."""
    if system_prompt and messages[0]["role"] not in ("system", DOCUMENT):
        messages.insert(0, {"role": "system", "content": system_prompt})
