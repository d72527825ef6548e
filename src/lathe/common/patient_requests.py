"""Patient requests: what a busy or absent server did not answer is sent again after pauses, some number of times."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential_jitter

from lathe.common.errors import InputError
from lathe.common.http_session import HttpStatusError, MalformedError, UnavailableError

logger = logging.getLogger(__name__)

# Pauses between attempts double from the first to the longest. A random part of up to FIRST_PAUSE_SECONDS is added, so
# that requests of several runs do not keep coinciding.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 300.0  # if a server asks for a longer delay, the run stops

BUSY_STATUSES = frozenset({408, 409, 425, 429})

Result = TypeVar("Result")


class RunStoppedError(Exception):
    """The run is stopping: no further request is made."""


class PatientRequests:
    """The requests of one run to one server; `task` begins the lines of the log, `retries` counts repeated attempts."""

    def __init__(self, task: str, *, max_retries: int) -> None:
        self.task, self.max_retries, self.retries = task, max_retries, 0
        self._stopping = asyncio.Event()
        self._not_before = 0.0  # a delay that the server asks for holds for all requests

    @property
    def is_stopping(self) -> bool:
        """Whether no further request is to be made."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Make no further request; those that wait raise RunStoppedError."""
        self._stopping.set()

    async def send(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Return what an attempt returns; one that raises UnavailableError or MalformedError is followed by another."""

        async def try_once() -> Result:
            return await attempt()

        retrying = AsyncRetrying(
            retry=retry_if_exception_type((UnavailableError, MalformedError)),
            stop=stop_after_attempt(self.max_retries + 1),
            wait=self._compute_pause,
            sleep=self._sleep,
            before_sleep=self._log_retry,
            reraise=True,
        )
        return await retrying(try_once)

    async def wait_for_server(self) -> None:
        """Wait for as long as the server has asked for. Raises RunStoppedError if the run stops meanwhile."""
        await self._sleep(self._not_before - time.monotonic())

    def _compute_pause(self, state: RetryCallState) -> float:
        pause = wait_exponential_jitter(
            multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS, jitter=FIRST_PAUSE_SECONDS
        )(state)
        retry_after = getattr(_get_error(state), "retry_after", None)
        if retry_after is None:
            return pause
        self._not_before = max(self._not_before, time.monotonic() + retry_after)
        return max(retry_after, pause)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise RunStoppedError

    def _log_retry(self, state: RetryCallState) -> None:
        self.retries += 1
        seconds = state.next_action.sleep if state.next_action else 0
        logger.info("%s: %s; retrying in %.1f s", self.task, _get_error(state), seconds)


def describe_status(error: HttpStatusError) -> str:
    """Return the status with what the server says of it."""
    return f"{error.status}: {error}"


def classify_status(error: HttpStatusError, where: str, *, key: str) -> Exception | None:
    """Return the exception for a status that says nothing of the request itself; None for all others.

    `where` is the server's address, `key` the environment variable with the key that it is sent.
    """
    status = describe_status(error)
    if error.status in BUSY_STATUSES or error.status >= 500:
        if (error.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS:
            return InputError(
                f"{where} asks for a delay of {error.retry_after:.0f} seconds ({status}); run again after that",
                code="server-busy",
            )
        return UnavailableError(f"{where} answers {status}", retry_after=error.retry_after)
    if error.status in (401, 403):
        return InputError(f"{where} refuses the key ({status}); set {key} to a valid one", code="invalid-key")
    if error.status == 402:
        return InputError(f"{where} requires a payment ({status}); check your account there", code="payment-required")
    return None


def _get_error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
