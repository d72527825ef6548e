"""Text for messages: near names, values and sizes in readable form."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Control characters but tab and newline, line separators, marks that turn the direction of text, halves of surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def make_printable(text: str) -> str:
    """Return a text of whatever origin with what would control a terminal as escapes, which JSON knows too."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def make_one_line(text: str) -> str:
    """Return a text on one printable line, so that it cannot pass for another line of what it stands in."""
    return make_printable(text).replace("\n", "\\n")


def write_lines(lines: Iterable[str]) -> None:
    """Write lines to standard output, each on one printable line."""
    sys.stdout.writelines(f"{make_one_line(line)}\n" for line in lines)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `did you mean 'X'?` for a near name, whatever its case, else the list of known ones."""
    return suggest_name(name, known) or f"known: {', '.join(sorted(map(escape_name, known)))}"


def suggest_name(name: str, known: list[str]) -> str:
    """Return `did you mean 'X'?` for a near name, whatever its case; nothing if there is none."""
    by_folded = {item.casefold(): item for item in known}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return f"did you mean {by_folded[near[0]]!r}?" if near else ""


def escape_name(name: Any) -> str:
    """Return a name, quoted if it cannot be printed."""
    return str(name) if str(name).isprintable() else repr(name)


def shorten_value(value: Any) -> str:
    """Return a value as Python writes it, at most 80 characters, and `null` for None."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error's text without a full stop, or the name of its class if it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def readable_bytes(count: int) -> str:
    """Return a size in decimal units, as disks are sold: `1.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def readable_seconds(seconds: float) -> str:
    """Return a duration as clocks show it: `45 s`, `12:05`, `3:02:07`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with columns of equal width, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
