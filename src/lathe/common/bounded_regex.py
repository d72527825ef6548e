"""Regular expressions of the user, bounded in time: one such as `(a+)+$` takes years on a text of forty letters.

Two guards: an expression is tried on repeated letters when the parameters are read, in a process of its own; and
wherever it is used, a match that takes too long is ended.
"""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

from lathe.common.errors import InputError

MOST_SECONDS = 10.0  # processor time of the matches of one text, or of all names of a model
TRIAL_SECONDS = 2.0  # processor time for all texts that an expression is tried on
REMEDY = r"write it without repetitions inside of repetitions, such as `\w+` in place of `(\w+)*`"

# Repeated signs, and one behind that most expressions do not match: an expression that has several ways to match the
# same text tries all of them before it fails.
_TRIAL = """
import json, re, signal, sys
pattern, seconds = json.loads(sys.stdin.read())
signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # its signal ends this process
signs = [each for each in dict.fromkeys(pattern) if each.isprintable()]
for sign in [*"a0 Z-", *signs[:60]]:
    for end in ("", "\\0"):
        re.search(pattern, sign * 40 + end)
        re.fullmatch(pattern, sign * 40 + end)
"""


class _UnendingMatchError(Exception):
    """A match that was ended."""


@cache
def is_slow(pattern: str) -> bool:
    """Tell whether a valid regular expression takes more than TRIAL_SECONDS for short texts of one repeated sign."""
    if not re.search(r"[*+}]", pattern):  # nothing is repeated
        return False
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    done = subprocess.run(command, input=json.dumps([pattern, TRIAL_SECONDS]).encode(), check=False)
    return done.returncode < 0


def compile_pattern(pattern: str, *, texts: str = "texts") -> re.Pattern[str]:
    """Compile a regular expression of the user, which is to match `texts`.

    Raises InputError if it is none (`invalid-pattern`), or takes for ever on some (`slow-pattern`).
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"pattern {pattern!r} is not a regular expression: {error}", code="invalid-pattern") from None
    if is_slow(pattern):
        raise InputError(f"pattern {pattern!r} takes for ever on some {texts}; {REMEDY}", code="slow-pattern")
    return compiled


@contextmanager
def limit_matching(key: str, pattern: str, seconds: float = MOST_SECONDS) -> Iterator[None]:
    """Raise InputError, which names the key, where the block takes more processor time than a match should.

    Python's `re` looks for signals while it matches. They come to the main thread alone: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _UnendingMatchError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _UnendingMatchError:
        raise InputError(
            f"{key}: {pattern!r} has not come to an end after {seconds:g} s on one text; {REMEDY}", code="slow-pattern"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
