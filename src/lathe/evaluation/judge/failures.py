"""Why there is no verdict, by what to do about it. What ends the whole run is `lathe.common.errors.InputError`."""


class DeclinedError(Exception):
    """The server answered with a status other than 2xx; the message is what it said, without secrets.

    `retry_after` is how long it asks to be left alone, in seconds, where it says so.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class UnavailableError(Exception):
    """No answer now: asked again, and when that does not help either, nothing else is asked.

    `billed` says that the request may have been worked on, and paid for, all the same.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, billed: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.billed = retry_after, billed


class MalformedError(Exception):
    """An answer that is no verdict: asked again, and then this row stays without one."""


class RefusedError(Exception):
    """The server will not judge this very row: the row stays without a verdict, and the others go on."""


class UnknownModelError(Exception):
    """The server does not know the model."""


class AskAgainError(Exception):
    """The request was not as the server wants it, and will be: asked again at once."""


class BudgetSpentError(Exception):
    """Another request could exceed judge.max_requests or judge.max_cost."""
