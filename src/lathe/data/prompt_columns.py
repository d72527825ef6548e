"""Prompt of a record: one column, a template of several, or Alpaca's instruction and input."""

import string
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.row_checks import TextValidator, check_preset_text

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset

ALPACA_INPUT = "input"  # optional, and may be empty


class PromptColumns:
    """The columns of a prompt: one column, a template of several, or Alpaca's instruction and input."""

    def __init__(
        self, check_text: TextValidator, preset: "SingleDataset", form: str, column: str, names: list[str]
    ) -> None:
        self.check_text = check_text
        self.column = preset.prompt or column
        parts = _parse_template(preset.prompt_template) if preset.prompt_template else []
        self.parts = [(check_preset_text(check_text, text, "prompt_template"), name) for text, name in parts]
        self.input = ALPACA_INPUT if form == "alpaca" and not preset.prompt_template else None
        self.field = "prompt_template" if self.parts else self.column
        self.required: tuple[str, ...] = (self.column,)
        self.description: dict[str, Any] = {"prompt": self.column}
        if preset.prompt_template and self.parts:
            self.required = tuple(dict.fromkeys(column for _, column in self.parts if column))
            self.description = {"prompt_template": preset.prompt_template}
        elif self.input in names:
            self.description["input"] = self.input

    def read(self, record: dict[str, Any]) -> str:
        """Return the prompt's text; raises RowFault if a column is not text."""
        if self.parts:
            parts = (
                literal + (self.check_text(record[column], column) if column else "") for literal, column in self.parts
            )
            # Checked again as a whole: what is in order part by part may not be where two of them meet. An empty last
            # column leaves blank lines at the end.
            return self.check_text("".join(parts).rstrip(), self.field)
        prompt_text = self.check_text(record[self.column], self.column)
        more = record.get(self.input) if self.input else None
        if self.input and more is not None and self.check_text(more, self.input).strip():
            return f"{prompt_text}\n\n{more}"
        return prompt_text


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Return the parts of a prompt template: (literal text, name of the column that follows it or None)."""
    remedy = "write {column} for a column and {{ or }} for a brace"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"presets.yaml: prompt_template {template!r}: {error}; {remedy}", code="invalid-template"
        ) from None
    for _, column, format_spec, conversion in parsed:
        if column is not None and (not column or format_spec or conversion):
            raise InputError(
                f"presets.yaml: prompt_template {template!r}: a field must be only a name; {remedy}",
                code="invalid-template",
            )
    if not any(column for _, column, _, _ in parsed):
        raise InputError(
            f"presets.yaml: prompt_template {template!r}: names no column; {remedy}", code="invalid-template"
        )
    return [(literal, column) for literal, column, _, _ in parsed]
