"""Judge failures: why a request brought no verdict, as exceptions by what is done next.

A problem that ends the whole run at once is a `lathe.common.errors.InputError`.
"""


class HttpStatusError(Exception):
    """The server answered with a status other than 2xx; the message is the server's, without secrets.

    `retry_after` is the delay that the server asks for, in seconds, or None.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class UnavailableError(Exception):
    """No answer at present: the request is retried, and if that fails too, the run stops.

    `billed` says that the server may have processed the request, and charge for it.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, billed: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.billed = retry_after, billed


class MalformedError(Exception):
    """The answer is not a verdict: the request is retried, and if that fails too, this row gets no verdict."""


class RowRefusedError(Exception):
    """The server refuses this row: it gets no verdict, and the run goes on with the other rows."""


class UnknownModelError(Exception):
    """The server does not know the model."""


class RetryAtOnceError(Exception):
    """The provider has changed the form of its requests after a refusal: the request is sent again at once."""


class BudgetSpentError(Exception):
    """Another request could exceed judge.max_requests or judge.max_cost."""
