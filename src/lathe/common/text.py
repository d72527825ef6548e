"""Text for messages: near names, values and sizes as a person reads them."""

import difflib
from typing import Any


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `did you mean 'X'?` for a near name, whatever its case, else the list of known ones."""
    return _near(name, known) or f"known: {', '.join(sorted(map(_printed, known)))}"


def _near(name: str, known: list[str]) -> str:
    by_folded = {item.casefold(): item for item in known}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return f"did you mean {by_folded[near[0]]!r}?" if near else ""


def _printed(name: Any) -> str:
    return str(name) if str(name).isprintable() else repr(name)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def readable_bytes(count: int) -> str:
    """Return decimal units as a disk's maker counts: `1.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"
