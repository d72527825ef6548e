"""JSON arrays: the items of a file that is one array, each decoded as it is reached, so that memory does not grow.

They are decoded by Python's own `json`, as the lines of a JSONL file are, so that what is wrong with an item is found
alike in both. ijson is as fast, but makes "?" of half a surrogate pair, keeps one of two equal keys, refuses integers
of more than 64 bits, and its errors have no line.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lathe.data.json_rows import name_messages
from lathe.data.text_files import TextForm, find_encoding, iterate_chunks, iterate_lines

# What may still become valid with more text: numbers, escapes and constants such as -Infinity.
MAX_CUT = 16
_SPACE = re.compile(r"[ \t\n\r]*")

# An item, or the characters of a text that begin one; (text, position) -> (value, position behind it).
Decode = Callable[[str, int], tuple[Any, int]]

skip_item: Decode = json.JSONDecoder().raw_decode


class _Text:
    """The text of a file from the place on that is read, and the line and column of its beginning."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self.chunks = chunks
        self.text, self.at = "", 0
        self.line, self.column = 1, 1
        self.is_whole = False

    def read_more(self) -> None:
        """Add at least as much as is there, and drop what has been read."""
        done = self.text[: self.at]
        self.line += done.count("\n")
        self.column = len(done) - done.rfind("\n") if "\n" in done else self.column + len(done)
        parts = [self.text[self.at :]]
        wanted = len(parts[0])
        size = 0
        while size <= wanted and not self.is_whole:
            chunk = next(self.chunks, None)
            self.is_whole = chunk is None
            parts.append(chunk or "")
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def decode(self, decode: Decode) -> Any:
        """Return the value that begins here, and go on behind it."""
        while True:
            try:
                value, end = decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self.text) - MAX_CUT or error.msg.startswith("Unterminated string")
                if self.is_whole or not is_cut:
                    raise self.make_error(error.msg, error.pos) from None
            else:
                if end < len(self.text) or self.is_whole:  # or a number may go on
                    self.at = end
                    return value
            self.read_more()

    def make_error(self, message: str, at: int) -> json.JSONDecodeError:
        """Return an error with the line and the column in the file."""
        error = json.JSONDecodeError(message, self.text, at)
        if error.lineno == 1:
            error.colno += self.column - 1
        error.lineno += self.line - 1
        return error


def find_layout(file: Path, form: TextForm) -> Literal["array", "lines", "value"]:
    """Return whether a .json or .jsonl file is one array of rows, has one row per line, or is another value."""
    encoding = find_encoding(file, form)
    text = _Text(iterate_chunks(file, encoding))
    begins_as_array = text.peek() == "["
    lines = (line for line in iterate_lines(file, encoding) if line.strip())
    if begins_as_array:
        text.at += 1
        is_jsonl = ".jsonl" in file.name.lower()
        try:
            first = None if text.peek() == "]" else text.decode(skip_item)
        except (ValueError, RecursionError):
            first = None
        if name_messages([first]):  # a row may be a bare conversation
            return "lines" if is_jsonl or next(islice(lines, 1, None), "").startswith("[") else "array"
        return "array" if isinstance(first, dict | list) or not is_jsonl else "lines"
    first_line, second = next(lines, ""), next(lines, "")
    try:
        return "lines" if second and isinstance(json.loads(first_line), dict) else "value"
    except (ValueError, RecursionError):
        return "value"


def iterate_items(file: Path, form: TextForm, choose_decoder: Callable[[int], Decode]) -> Iterator[Any]:
    """Yield the items of a file that is one array, each as the decoder that is chosen by its number (from 0) makes it.

    Raises JSONDecodeError, with its line and column in the file, InputError where it is not in its encoding, and what
    the decoders raise.
    """
    text = _Text(iterate_chunks(file, find_encoding(file, form)))
    text.peek()
    text.at += 1
    if text.peek() == "]":
        text.at += 1
    else:
        number = 0
        while True:
            yield text.decode(choose_decoder(number))
            number += 1
            follows = text.peek()
            if follows not in (",", "]"):
                raise text.make_error("Expecting ',' delimiter", text.at)
            text.at += 1
            if follows == "]":
                break
            text.peek()
    if text.peek():
        raise text.make_error("Extra data", text.at)


def count_items(file: Path, form: TextForm) -> int:
    """Return how many items a file has that is one array; raises as `iterate_items` does."""
    return sum(1 for _ in iterate_items(file, form, lambda _: skip_item))
