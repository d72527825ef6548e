"""Errors of llama.cpp's programs: failed writes as OSError, the last line of their output as the reason."""

import os
import re
from pathlib import Path


def raise_disk_error(output: str, out: Path) -> None:
    """Raise the OSError behind a failed write to `out`, if that is what the converter or llama.cpp reports."""
    if match := re.search(r"\[Errno (\d+)\]", output):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(out))
    # C++ streams and numpy give no reason; another write to the file does.
    if "iostream error" in output or re.search(r"\d+ requested and \d+ written", output):
        with out.open("ab", buffering=0) as file:
            file.write(bytes(1 << 20))


def extract_reason(output: str) -> str:
    """Return the reason in the output of a converter or quantizer that failed."""
    # A traceback ends with its error, and the converter's own refusals are its last log line.
    lines = [line.strip() for line in output.splitlines() if line.strip(" ^~") and not re.search(r"\d%\|", line)]
    if not lines:
        return "it gives no reason"
    if lines[-1] == "AssertionError" and len(lines) > 1:  # the assertion is one line above
        return lines[-2].partition("  #")[0]
    return re.sub(r"^(?:\w+:)?(?:ERROR|Error)[:\w-]*:\s*", "", lines[-1])
