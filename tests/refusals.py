"""Refusals in tests: which problem it was, where, and that a remedy is named; whole messages are kept in one place.

`with refused("unknown-key", "params.yaml") as caught:` asserts the code of the InputError, that every given part (a
file, a line, a key, a value) is in its message, and that the message names a remedy behind the problem. The whole text
is compared with tests/messages/<package>.json, `pytest --update-messages` writes what is new there.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lathe.common.errors import InputError

MESSAGES = Path(__file__).parent / "messages"
LIBRARY = Path(__file__).parents[1] / "src/lathe"

update = False  # set by `pytest --update-messages`


@contextmanager
def refused(
    code: str, *parts: str, error: type[InputError] = InputError, remedy: bool = True, kept: bool = True
) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Assert that the block raises an InputError of this code whose message holds `parts`.

    `remedy=False` is for messages without one; `kept=False` for messages that vary from run to run.
    """
    with pytest.raises(error) as caught:
        yield caught
    check_refusal(caught.value, code, *parts, remedy=remedy, kept=kept)


def check_refusal(error: InputError, code: str, *parts: str, remedy: bool = True, kept: bool = True) -> None:
    """Assert the same of an error that was caught."""
    message = str(error)
    assert error.code == code, f"{error.code}: {message}"
    for part in parts:
        assert part in message, message
    for line in message.splitlines():
        assert not remedy or re.search(r"[;:,(?] *\S", line), f"no remedy: {line}"
    if kept:
        compare_with_kept(package_of(error), code, message)


def package_of(error: BaseException) -> str:
    """Return the package of the library that raised an error."""
    package = "lathe"
    trace = error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(LIBRARY):
            package = file.relative_to(LIBRARY).with_suffix("").parts[0]
        trace = trace.tb_next
    return package


def compare_with_kept(package: str, code: str, message: str) -> None:
    """Assert that a message is one of those kept for its package and code; write it where `update` is set."""
    file = MESSAGES / f"{package}.json"
    messages: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    shown = without_paths(message)
    if shown in messages.get(code, []):
        return
    assert update, f"{package}, {code}: not in {file.name}: {shown!r}; `pytest --update-messages` adds it"
    messages.setdefault(code, []).append(shown)
    MESSAGES.mkdir(exist_ok=True)
    ordered = {key: sorted(messages[key]) for key in sorted(messages)}
    file.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def without_paths(message: str) -> str:
    """Return a message with the temporary folders and the checkout of this run taken out."""
    message = re.sub(
        r"/[^\s'\",;:()]*pytest-[^\s/'\",;:()]*/[^\s/'\",;:()]*(?:/popen-gw\d+)?/[^\s/'\",;:()]*", "<tmp>", message
    )
    return message.replace(str(LIBRARY.parents[1]), "<checkout>").replace(os.path.expanduser("~"), "<home>")
