"""Texts of data and models, made fit to be read: nothing invisible, nothing endless, differences marked.

What comes from here is plain text in pieces; the template escapes it.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 4000  # characters of a text that are shown
COMPARED = 1500  # words of two texts that are compared: the time grows with their product

# Invisible marks that change what is read, or make two answers differ unseen. Joiners stay: emoji need them.
_INVISIBLE = set(
    "\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
)
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text, as `kind` says: `plain`, `differs` from the reference, `missing` of it, or `control`.

    The last is no part, but the name of a character that cannot be seen, or a remark.
    """

    text: str
    kind: str = "plain"


def pieces(text: str, reference: str | None = None) -> list[Piece]:
    """Return the text in pieces, marked where it differs from `reference`; if it is cut, the last piece says so."""
    shown, rest = text[:LONGEST], len(text) - LONGEST
    parts = [(shown, "plain")] if reference is None else list(_compared(shown, reference[:LONGEST]))
    found = [piece for part, kind in parts for piece in _visible(part, kind)]
    if rest > 0:
        found.append(Piece(f"… {rest:,} more characters", "control"))
    return found


def _compared(text: str, reference: str) -> Iterator[tuple[str, str]]:
    ours, theirs = _WORD.findall(text), _WORD.findall(reference)
    if len(ours) > COMPARED or len(theirs) > COMPARED:
        yield text, "plain"
        return
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    if matcher.ratio() < 0.5:  # marks everywhere say nothing
        yield text, "plain"
        return
    for operation, a, b, c, d in matcher.get_opcodes():
        if operation == "delete":
            yield "".join(theirs[a:b]), "missing"
        else:
            yield "".join(ours[c:d]), "plain" if operation == "equal" else "differs"


def _visible(text: str, kind: str) -> Iterator[Piece]:
    start = 0
    for place, character in enumerate(text):
        if _hidden(character):
            if place > start:
                yield Piece(text[start:place], kind)
            yield Piece(f"U+{ord(character):04X}", "control")
            start = place + 1
    if start < len(text):
        yield Piece(text[start:], kind)


def _hidden(character: str) -> bool:
    # Cs are lone surrogates, which JSON can hold and UTF-8 cannot.
    return character in _INVISIBLE or (unicodedata.category(character) in {"Cc", "Cs"} and character not in "\n\t")
