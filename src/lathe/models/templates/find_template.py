"""Chat template that a preset names: a built-in one, or a file of the user's own."""

import os
import shlex
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.models.templates.builtin_templates import BUILTIN, read_template


def find_template(template: str) -> str:
    """Return the text of a built-in template, or of a file under models/local; raises InputError for another name."""
    if template in BUILTIN:
        return read_template(template)
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
