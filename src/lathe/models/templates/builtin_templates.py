"""Built-in chat templates, by name."""

import re
from pathlib import Path

_FOLDER = Path(__file__).parent

BUILTIN = ("chatml", "chatml-tools", "llama-3", "mistral", "gemma", "plain")

# What looks like a token of its own in a rendered template; whether the vocabulary has it is checked.
MARKER = re.compile(r"<\|[^<>|\s][^<>\n]{0,60}?\|>|<(?:start|end)_of_turn>")


def read_template(name: str) -> str:
    """Return the text of one of `BUILTIN`."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
