"""A checkout with the held-out rows and the general text that the stage `generate` reads; files are its test's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import Checkout, make_checkout

from lathe.common.jsonl import write_jsonl
from lathe.sources.builtin import household_commands


def make_generation_checkout(
    root: Path, settings: Mapping[str, Any], rows: Mapping[str, int], general: str
) -> Checkout:
    """Make it with the parameters `settings`, so many rows of each split, and a folder for GGUF files."""
    checkout = make_checkout(root)
    checkout.set(dict(settings))
    processed = checkout.root / "data/processed"
    processed.mkdir(parents=True)
    made = household_commands.make_rows(1)
    for split, count in rows.items():
        write_jsonl(made[split][:count], processed / f"{split}.jsonl")
    (checkout.root / "data/general.txt").write_text(general)
    (checkout.root / "models/gguf").mkdir(parents=True)
    return checkout
