"""Answers of the Hub's API, bounded in bytes and time: a hub, or a mirror of it, may answer without end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from lathe.common.errors import InputError

MOST_BYTES = 64 << 20  # of one answer, unpacked; a page of a listing has some hundred kB
MOST_SECONDS = 120.0  # for one answer
SILENCE_SECONDS = 30.0  # without a byte

# What the client raises of an answer that lacks something, or is of another form.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)

_bounded: ContextVar[bool] = ContextVar("_bounded", default=False)


@contextmanager
def bound_answers() -> Iterator[None]:
    """Bound what the Hub's client reads inside the block, which downloads no file.

    Raises InputError where an answer is longer than `MOST_BYTES`, or takes more than `MOST_SECONDS`.
    """
    set_client_factory(_make_client)
    before = _bounded.set(True)
    try:
        yield
    finally:
        _bounded.reset(before)


def _make_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(SILENCE_SECONDS)
    client.event_hooks = {**client.event_hooks, "response": [_read_bounded]}
    return client


def _read_bounded(response: httpx2.Response) -> None:
    """Read the body piece by piece, as it is unpacked; the client then takes what has been read."""
    if not _bounded.get():
        return
    body, deadline = bytearray(), time.monotonic() + MOST_SECONDS
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MOST_BYTES or time.monotonic() > deadline:
            response.close()
            limit = f"{MOST_BYTES >> 20} MiB" if len(body) > MOST_BYTES else f"{MOST_SECONDS:g} s"
            raise InputError(
                f"{response.url.host}: the hub's answer has not ended after {limit}; use another hub or mirror",
                code="endless-answer",
            )
    response._content = bytes(body)  # what its own read() sets, without a bound
