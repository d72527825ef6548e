"""Commands whose result a page waits for: run beside the studio, within a time, their refusals passed on."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError

BEARER = "LATHE_STUDIO_TOKEN"  # variable with the token of programs
LONGEST_SECONDS = 300.0
LONGEST_MESSAGE = 4000

# Two models in memory at once are enough, and two estimates.
_room = threading.BoundedSemaphore(2)


def make_environment() -> dict[str, str]:
    """Return the environment of a process beside the studio: with this checkout's code, and without the token."""
    environment = {name: text for name, text in os.environ.items() if name != BEARER}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return environment


def _run(
    words: Sequence[str], seconds: float, standard_input: str, environment: dict[str, str], *, shown: str
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m` with these words in the checkout. Raises InputError, with `shown`, if it takes longer."""
    try:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=paths.ROOT,
            env=environment,
            input=standard_input,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{shown}: took more than {seconds:g} s, and was ended; run it on a terminal", code="timeout"
        ) from None


def run_for_lines(words: Sequence[str], seconds: float) -> list[str]:
    """Run `python -m` with these words, which asks for no password, and return the lines that it prints.

    Raises InputError with what it says where it fails, or takes more than so many seconds.
    """
    done = _run(words, seconds, "", {**make_environment(), "GIT_TERMINAL_PROMPT": "0"}, shown=" ".join(words))
    if done.returncode:
        reason = re.sub(r"^ERROR: ", "", (done.stderr.strip().splitlines() or ["it printed nothing"])[0])
        raise InputError(f"{' '.join(words)}: {reason}"[:LONGEST_MESSAGE], code="command-failed")
    return done.stdout.splitlines()


def run_for_json(words: Sequence[str], request: Any = None, *, codes: tuple[int, ...] = (0, 1)) -> Any:
    """Run `python -m` with these words and return the JSON that it prints.

    Raises InputError with what it says where it ends with another code than `codes`, or takes too long.
    """
    if not _room.acquire(timeout=LONGEST_SECONDS):
        raise InputError("two others are being worked on; try again when they have ended", code="busy")
    try:
        done = _run(words, LONGEST_SECONDS, json.dumps(request), make_environment(), shown=" ".join(words[:2]))
    finally:
        _room.release()
    if done.returncode in codes:
        try:
            return json.loads(done.stdout)
        except ValueError:
            pass
    refusals = re.findall(r"^error: (.*)$", done.stderr, re.MULTILINE)
    reason = "\n".join(refusals) or (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise InputError(reason[:LONGEST_MESSAGE], code="command-failed")
