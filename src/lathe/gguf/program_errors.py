"""Errors of llama.cpp's programs: a full disk told apart, the last line of their output as the reason."""

import os
import re
from pathlib import Path


def raise_disk_fault(said: str, out: Path) -> None:
    """Raise the OSError behind a failed write to `out`, if that is what the converter or llama.cpp reports."""
    if match := re.search(r"\[Errno (\d+)\]", said):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(out))
    # All that a C++ stream and numpy tell; writing some more ourselves gives the reason.
    if "iostream error" in said or re.search(r"\d+ requested and \d+ written", said):
        with out.open("ab", buffering=0) as file:
            file.write(bytes(1 << 20))


def last_line(output: str) -> str:
    """The reason in what the converter or the quantizer printed before it failed."""
    # A traceback ends with its error, and the converter's own refusals are its last log line.
    lines = [line.strip() for line in output.splitlines() if line.strip(" ^~") and not re.search(r"\d%\|", line)]
    if not lines:
        return "it gives no reason"
    if lines[-1] == "AssertionError" and len(lines) > 1:  # which of them stands one line above
        return lines[-2].partition("  #")[0]
    return re.sub(r"^(?:\w+:)?(?:ERROR|Error)[:\w-]*:\s*", "", lines[-1])
