"""Built-in chat templates, and files of the user's own, by name."""

import os
import re
import shlex
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean

_FOLDER = Path(__file__).parent

BUILTIN = ("chatml", "chatml-tools", "llama-3", "mistral", "gemma", "plain")

# What looks like a token of its own in a rendered template; whether the vocabulary has it is checked.
MARKER = re.compile(r"<\|[^<>|\s][^<>\n]{0,60}?\|>|<(?:start|end)_of_turn>")


def read_template(template: str) -> str:
    """Return the text of a built-in template, or of a file under models/local; raises InputError for another name."""
    if template in BUILTIN:
        return (_FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    file = Path(os.path.normpath(paths.ROOT / template))
    home = paths.MODELS_LOCAL.relative_to(paths.ROOT)
    if "/" not in template:
        raise InputError(
            f"presets.yaml: template {template!r} is not built in; {did_you_mean(template, list(BUILTIN))}; "
            f"a file of your own is given as {home}/...",
            code="unknown-template",
        )
    if paths.MODELS_LOCAL not in file.parents:
        raise InputError(
            f"presets.yaml: template {template!r} is not under {home}/, which is what DVC watches; put the file there",
            code="template-outside",
        )
    if not file.is_file():
        raise InputError(
            f"{template}: no such file; put it there and run `dvc add {shlex.quote(template)}`", code="missing-file"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{template}: byte {error.start} is not UTF-8; save the file as UTF-8", code="not-utf-8"
        ) from None
