"""Responses to the library requests, bounded in bytes and time: a tracker's server may answer without end."""

import time
from functools import cache, wraps
from typing import Any

MOST_BYTES = 64 << 20  # of one response, unpacked
MOST_SECONDS = 120.0  # for one response


@cache
def bound_responses() -> None:
    """From now on, in this process, have requests read every response whole, and raise where it is too long."""
    import requests
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    @wraps(send)
    def send_bounded(self: Any, *arguments: Any, **options: Any) -> Any:
        response = send(self, *arguments, **options)
        body, deadline = bytearray(), time.monotonic() + MOST_SECONDS
        for piece in response.iter_content(1 << 16):
            body += piece
            if len(body) > MOST_BYTES or time.monotonic() > deadline:
                response.close()
                limit = f"{MOST_BYTES >> 20} MiB" if len(body) > MOST_BYTES else f"{MOST_SECONDS:g} s"
                raise requests.exceptions.ConnectionError(f"the server's answer has not ended after {limit}")
        response._content = bytes(body)  # what its own `content` sets, without a bound
        return response

    HTTPAdapter.send = send_bounded  # type: ignore[method-assign]
