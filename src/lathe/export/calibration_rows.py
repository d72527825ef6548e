"""Calibration rows: examples of the training split as token ids, never held-out ones."""

import random
from pathlib import Path

from lathe.common.jsonl import read_jsonl
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template


def draw_calibration_rows(model: Path, train: Path, count: int, *, seed: int) -> list[list[int]]:
    """Return the token ids of so many rows of the training split, or of all that there are, rendered as in training."""
    rows = read_jsonl(train)
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    tokenizer = load_tokenizer(model)
    template = read_chat_template(tokenizer)
    chats = [template.render(row["messages"], tools=row.get("tools")) for row in chosen]
    return [list(row) for row in tokenizer(chats, add_special_tokens=False)["input_ids"]]
