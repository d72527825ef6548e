"""JSON arrays: the items of a file that is one array, each decoded as it is reached, so that memory does not grow."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lathe.data.json_rows import name_messages
from lathe.data.json_text import Decode, JsonText, skip_item
from lathe.data.text_files import TextForm, find_encoding, iterate_chunks, iterate_lines

MOST_CHARACTERS_OF_A_LINE = 1 << 20  # a longer first line of a file is not looked at as a whole


def open_text(file: Path, form: TextForm) -> JsonText:
    """Return the text of a file from its beginning. Raises InputError where it is not in its encoding."""
    return JsonText(iterate_chunks(file, find_encoding(file, form)))


def find_layout(file: Path, form: TextForm) -> Literal["array", "lines", "value"]:
    """Return whether a .json or .jsonl file is one array of rows, has one row per line, or is another value."""
    text = open_text(file, form)
    begins = text.peek()
    if begins == "{":
        return "lines" if _is_first_of_lines(text) else "value"
    if begins != "[":
        return "value"
    text.at += 1
    is_jsonl = ".jsonl" in file.name.lower()
    try:
        first = None if text.peek() == "]" else text.decode(skip_item)
    except (ValueError, RecursionError):
        first = None
    if name_messages([first]):  # a row may be a bare conversation
        lines = (line for line in iterate_lines(file, find_encoding(file, form)) if line.strip())
        return "lines" if is_jsonl or next(islice(lines, 1, None), "").startswith("[") else "array"
    return "array" if isinstance(first, dict | list) or not is_jsonl else "lines"


def _is_first_of_lines(text: JsonText) -> bool:
    """Tell whether the object that begins here is the whole of a line, and others follow."""
    number = text.count_lines()
    try:
        line = text.peek_line(MOST_CHARACTERS_OF_A_LINE)
        if line is None:
            text.skip()
        else:
            json.loads(line)
            text.at += len(line)
        return bool(text.peek()) and text.count_lines() > number
    except (ValueError, RecursionError):
        return False


def iterate_items(file: Path, form: TextForm, choose_decoder: Callable[[int], Decode]) -> Iterator[Any]:
    """Yield the items of a file that is one array, each as the decoder that is chosen by its number (from 0) makes it.

    Raises JSONDecodeError, with its line and column in the file, InputError where it is not in its encoding, and what
    the decoders raise.
    """
    text = open_text(file, form)
    text.peek()
    for number in text.iterate_items():
        yield text.decode(choose_decoder(number))
    text.require_end()


def count_items(file: Path, form: TextForm) -> int:
    """Return how many items a file has that is one array; raises as `iterate_items` does."""
    return sum(1 for _ in iterate_items(file, form, lambda _: skip_item))
