"""General text, in paragraphs: its likelihood shows what a model has forgotten in training."""

import re
from pathlib import Path

from lathe.common.errors import InputError


def read_paragraphs(file: Path) -> list[str]:
    """Read the paragraphs of a UTF-8 text file, which blank lines separate.

    Raises InputError if there is no such file, none of its paragraphs holds text, or it is not UTF-8.
    """
    key = "evaluate.general_text"
    if not file.is_file():
        raise InputError(
            f"{key}: {file}: no such file; name a text file, such as data/general.txt", code="missing-file"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{key}: {file}: byte {error.start} is not UTF-8; save the file as UTF-8", code="not-utf-8"
        ) from None
    parts = [part.strip("\n") for part in re.split(r"\n(?:[^\S\n]*\n)+", text.replace("\r\n", "\n"))]
    paragraphs = [part for part in parts if part.strip()]
    if not paragraphs:
        raise InputError(
            f"{key}: {file}: holds no text; write paragraphs into it, separated by blank lines", code="no-text"
        )
    return paragraphs
