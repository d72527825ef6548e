"""JSON text that is read in chunks: values are decoded one by one as they are reached, or passed over.

They are decoded by Python's own `json`, as the lines of a JSONL file are, so that what is wrong with an item is found
alike in both. ijson is as fast, but makes "?" of half a surrogate pair, keeps one of two equal keys, refuses integers
of more than 64 bits, and its errors have no line.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# What may still become valid with more text: numbers, escapes and constants such as -Infinity.
MAX_CUT = 16
# Within so many objects and lists, one in another, values are passed over item by item; deeper ones as a whole.
DEEPEST = 8
_SPACE = re.compile(r"[ \t\n\r]*")
_LINE_END = re.compile(r"[\n\r]")

# An item, or the characters of a text that begin one; (text, position) -> (value, position behind it).
Decode = Callable[[str, int], tuple[Any, int]]

skip_item: Decode = json.JSONDecoder().raw_decode


class JsonText:
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

    def peek_line(self, most: int) -> str | None:
        """Return the text up to the next line end; None if it has more than `most` characters."""
        while not (end := _LINE_END.search(self.text, self.at)) and not self.is_whole:
            if len(self.text) - self.at > most:
                return None
            self.read_more()
        return self.text[self.at : end.start() if end else len(self.text)]

    def count_lines(self) -> int:
        """Return the number of the line that is being read."""
        return self.line + self.text.count("\n", 0, self.at)

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

    def iterate_items(self) -> Iterator[int]:
        """Yield the number of each item of the list that begins here (from 0), which is to be read before the next."""
        yield from self._iterate_parts("]")

    def iterate_members(self) -> Iterator[str]:
        """Yield each key of the object that begins here; its value is to be read before the next."""
        for _ in self._iterate_parts("}"):
            if self.peek() != '"':
                raise self.make_error("Expecting property name enclosed in double quotes", self.at)
            key = self.decode(skip_item)
            if self.peek() != ":":
                raise self.make_error("Expecting ':' delimiter", self.at)
            self.at += 1
            self.peek()
            yield key

    def skip(self, depth: int = 0) -> None:
        """Go on behind the value that begins here; raises JSONDecodeError where it is none."""
        begins = self.peek()
        if begins == "{" and depth < DEEPEST:
            for _ in self.iterate_members():
                self.skip(depth + 1)
        elif begins == "[" and depth < DEEPEST:
            for _ in self.iterate_items():
                self.decode(skip_item)
        else:
            self.decode(skip_item)

    def require_end(self) -> None:
        """Raise JSONDecodeError unless nothing but white space follows."""
        if self.peek():
            raise self.make_error("Extra data", self.at)

    def make_error(self, message: str, at: int) -> json.JSONDecodeError:
        """Return an error with the line and the column in the file."""
        error = json.JSONDecodeError(message, self.text, at)
        if error.lineno == 1:
            error.colno += self.column - 1
        error.lineno += self.line - 1
        return error

    def _iterate_parts(self, closing: str) -> Iterator[int]:
        """Yield where a part of an object or a list begins, until its end."""
        self.at += 1
        if self.peek() == closing:
            self.at += 1
            return
        number = 0
        while True:
            yield number
            number += 1
            follows = self.peek()
            if follows not in (",", closing):
                raise self.make_error("Expecting ',' delimiter", self.at)
            self.at += 1
            if follows == closing:
                return
            self.peek()
