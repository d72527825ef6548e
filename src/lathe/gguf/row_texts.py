"""Texts of processed rows, as the model reads them: what `convert` and `preprocess` compare token ids on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lathe.models.chat_template import ChatTemplate


class RowTexts:
    """The rows of processed splits, rendered with the chat template; of long splits a sample, evenly spread.

    `splits` are JSONL files as `preprocess` writes them, by name. Of each about `max_bytes` are taken; None: all.
    Both answers of a preference pair are rendered. `rows` counts what was rendered so far.
    """

    def __init__(self, template: ChatTemplate, splits: Mapping[str, Path], *, max_bytes: int | None) -> None:
        self.template, self.splits, self.max_bytes = template, splits, max_bytes
        self.rows = 0
        self._places: list[tuple[str, int]] = []  # of each text

    def __iter__(self) -> Iterator[str]:
        for split, file in self.splits.items():
            every = 1 if self.max_bytes is None else -(-file.stat().st_size // self.max_bytes)
            with file.open("rb") as lines:
                for number, line in enumerate(lines):
                    if every > 1 and number % every:
                        continue
                    row = json.loads(line)
                    self.rows += 1
                    for messages in self._list_conversations(row):
                        self._places.append((split, number + 1))
                        yield self.template.render(messages, tools=row.get("tools"))

    @staticmethod
    def _list_conversations(row: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        messages = row["messages"]
        pair = [[*messages[:-1], *row["rejected"]]] if row.get("rejected") else []
        return [messages, *pair]

    def describe_place(self, number: int) -> str:
        """Return where the text of this number is from: `train, row 17`."""
        split, row = self._places[number]
        return f"{split}, row {row}"
